"""The report on prepared data: one page that is complete, safe and correct, whatever the data holds or lacks."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image

from cogvideo.bundle import model as bundle
from cogvideo.bundle.format import Manifest
from cogvideo.config import AutoencoderConfig, CogVideoConfig
from cogvideo.data.dataset import Dataset, make_card, read_card, write_card
from cogvideo.data.frames import FrameSettings, read_item
from cogvideo.data.shards import Row, ShardInfo, digest, write_shard
from cogvideo.data.sources import Listing, SourceOptions, list_source
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.report import clips as report_clips
from cogvideo.report import data as report_module
from cogvideo.report import page as page_module
from cogvideo.report.clips import find_origin, read_as_encoded
from cogvideo.report.data import frequencies, ranges, report, summary, take_sample, training_rates, words_of
from cogvideo.report.page import RunName, environment, middle, percent, shorten, write_page

SMALL = AutoencoderConfig(
    channels=8, groups=4, encoder_multipliers=(1, 1, 1), decoder_multipliers=((1, 1, 1),), embedding_dim=8, rate=4
)
SIZE, GRID, FPS = 16, 4, 8.0
FRAMES = FrameSettings(fps=FPS, size=SIZE)
LENGTHS = {"a": 34, "b": 18, "c": 6, "d": 12}
NASTY = "<script>alert('x')</script> \"quoted\" & \x1b[31mred\x00 \u202egnp.exe </title></style>"
VOID = ("img", "meta")


class Page(HTMLParser):
    """A page as a browser sees it: elements with their attributes, texts, tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[tuple[str, str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed inside another element"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] = (self.open[-1], self.headings[-1][1] + data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def rows(self) -> dict[str, list[str]]:
        """Rows of all tables by their first cell; the first row of a name wins."""
        return {row[0]: row[1:] for table in reversed(self.tables) for row in reversed(table)}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a small, randomly initialized image tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    config = replace(CogVideoConfig(), autoencoder=SMALL)
    torch.manual_seed(0)
    bundle.update(folder, config, image_tokenizer=Autoencoder(SMALL))
    return folder


@pytest.fixture(scope="session")
def autoencoder(tokenizer: Path) -> Autoencoder:
    return bundle.CogVideo.from_pretrained(tokenizer).autoencoder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four small GIFs of a moving square; one caption is malicious, and one clip has two captions."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number, (name, length) in enumerate(LENGTHS.items()):
        pictures = [np.full((20, 24 + 8 * (number % 2), 3), 60 * number, np.uint8) for _ in range(length // 2)]
        for place, picture in enumerate(pictures):
            picture[5:12, place % 16 : place % 16 + 6] = (255, 7 * place, 40)
        first, *others = map(Image.fromarray, pictures)
        first.save(folder / f"{name}.gif", save_all=True, append_images=others, duration=250)
        caption = NASTY if name == "a" else f"The {name} square moves\nanother of {name}" if name == "b" else "It moves"
        (folder / f"{name}.txt").write_bytes(caption.replace("\x00", "").encode())
    return folder


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, source: Path, tokenizer: Path, autoencoder: Autoencoder) -> Make:
    """Builds datasets with the real shard functions, from the source unless `rows` are given."""

    def build(
        rows: list[Row] | None = None,
        rejected: dict[str, list[tuple[str, str]]] | None = None,
        origin: str = "",
        tokenizer_sha256: str = "",
        place: str = str(tokenizer),
        frames: FrameSettings = FRAMES,
        fps: float = FPS,
        high_grid: int = 0,
    ) -> Path:
        folder = tmp_path / "data"
        folder.mkdir()
        made = {"frames": asdict(frames), "superres": high_grid > 0, "source": asdict(SourceOptions())}
        sha256 = tokenizer_sha256 or Manifest.read(tokenizer).components["image_tokenizer"].sha256
        info = ShardInfo(
            grid=GRID,
            num_codes=SMALL.num_codes,
            fps=fps,
            high_grid=high_grid,
            tokenizer_sha256=sha256,
            settings_sha256=digest(made),
            work_sha256="",
        )
        rows = list(encoded(source, autoencoder)) if rows is None else rows
        parts = [rows[:2], rows[2:]]
        for number, part in enumerate(parts):
            write_shard(folder / f"shard-{number:05d}.arrow", part, info)
        files = [f"shard-{number:05d}.arrow" for number in range(len(parts))]
        card = make_card(folder, files, source=origin or str(source), tokenizer=place, settings=made)
        counts = {reason: len(clips) for reason, clips in (rejected or {}).items()}
        write_card(folder, replace(card, rejected=counts))
        return folder

    return build


def encoded(source: Path, autoencoder: Autoencoder) -> Iterator[Row]:
    for item in list_source(str(source), SourceOptions()).items:
        frames = read_item(item, FRAMES).frames
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
        codes = autoencoder.encode(pixels).numpy().astype(np.uint16)
        attributes = {"letter": item.id[0], "kind<b>": NASTY if item.id == "a.gif" else "plain"}
        yield Row(item.id, item.captions, attributes, FPS, codes, item.split or "train")


def write_csv(folder: Path, rejected: dict[str, list[tuple[str, str]]]) -> None:
    import csv

    with (folder / "rejected.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("id", "reason", "detail"))
        table.writerows((id, reason, detail) for reason, clips in rejected.items() for id, detail in clips)


def written(folder: Path, **options: Any) -> Page:
    report(folder, **options)
    return Page(folder / "report.html")


def test_page_is_whole_and_needs_nothing_else(make: Make) -> None:
    """Catches broken HTML, external pictures or styles, scripts, and pages that a screen reader cannot use."""
    page = written(make())
    assert page.source.startswith("<!DOCTYPE html>")
    without_pictures = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", page.source)
    assert re.search(r"https?://|//[a-z]|@import|url\(", without_pictures) is None
    assert not page.all("script")
    assert not page.all("link")
    assert all((each["src"] or "").startswith("data:image/webp;base64,") for each in page.all("img"))
    assert all((attributes.get("href") or "#").startswith("#") for _, attributes in page.elements)
    assert all(each["alt"] for each in page.all("img"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {each["href"] for each in page.all("a")} <= {f"#{id}" for id in ids}
    assert [level for level, _ in page.headings].count("h1") == 1
    assert "lang" in page.all("html")[0]
    assert all(name.strip() for _, name in page.headings)
    policy = next(each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy


def test_counts_are_those_of_the_dataset(make: Make) -> None:
    """Catches tables that disagree with the rows: splits, lengths, rates, captions, attributes, codes."""
    folder = make()
    dataset, page = Dataset(folder), written(folder)
    rows, shown = [dataset.row(number) for number in range(len(dataset))], page.rows()
    for split, clips in Counter(row.split for row in rows).items():
        assert shown[split][1] == str(clips)
    assert [shown[name] for name in ("shortest", "longest")] == [["6", "0.75 s"], ["34", "4.25 s"]]
    (lengths,) = [{row[0]: row[2] for row in table} for table in page.tables if table[0][0] == "frames"]
    assert lengths["34"] == "1"
    assert {name: row[1] for name, row in shown.items() if name.endswith("per second")} == {
        "1 per second": "1",  # 33 frames or more
        "2 per second": "2",  # 17 or more
        "4 per second": "3",  # 9 or more
        "8 per second": "4",  # 5 or more
    }
    assert [shown[f"{rate} per second"][3] for rate in (1, 2, 4, 8)] == ["1", "1", "1", "1"]
    captions = [caption for row in rows for caption in row.captions]
    assert shown["captions"] == [str(len(captions))]
    assert shown["distinct captions"][0].startswith(f"{len(set(captions))} (")
    assert shown["2 captions"][1] == "1"
    assert shown["plain"][1] == "3"
    codes = np.concatenate([row.codes.reshape(-1) for row in rows])
    used = np.unique(codes)
    assert shown["codes in use"][0].startswith(f"{len(used)} (")
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    assert float(shown["perplexity"][0]) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=0.051)
    assert shown["places counted"] == [f"{len(codes):,}"]
    assert shown["never"][1] == f"{SMALL.num_codes - len(used):,}"
    assert shown["24 × 20"][1] == "2"
    assert shown["32 × 20"][1] == "2"


def test_words_are_counted_once_a_caption_without_function_words(make: Make) -> None:
    """Counts a word once per caption, and leaves out function words such as `the`."""
    page = written(make())
    words = page.rows()
    assert words["moves"] == ["3"]
    assert words["square"] == ["1"]
    assert "the" not in words


def test_psnr_is_that_of_the_pictures(make: Make, autoencoder: Autoencoder) -> None:
    """Catches a PSNR of frames other than those shown, or of values outside [0, 1], which no viewer sees."""
    folder = make()
    page, values = written(folder), []
    items = {item.id: item for item in list_source(read_card(folder).source, SourceOptions()).items}
    dataset = Dataset(folder)
    for row in map(dataset.row, range(len(dataset))):
        places = np.linspace(0, len(row.codes) - 1, min(8, len(row.codes))).round().astype(int)
        original = read_item(items[row.id], FRAMES).frames[places] / 255
        decoded = autoencoder.decode(torch.from_numpy(row.codes[places].astype(np.int64))).clamp(0, 1)
        errors = (decoded.permute(0, 2, 3, 1).numpy() - original) ** 2
        values.append(np.mean([10 * np.log10(1 / error.mean()) for error in errors]))
        assert f"{values[-1]:.1f} dB" in page.text
    assert f"{np.mean(values):.1f} dB" in page.text
    assert len(page.all("img")) == 4


def test_users_texts_stay_texts(make: Make) -> None:
    """Prevents HTML injection through captions, attributes, names or reasons."""
    bad = "<img src=x onerror=alert(1)>"
    rejected = {"too <b>short": [(bad, f"detail {bad}")]}
    folder = make(rejected=rejected, origin=f"/nowhere/{bad}", place=f"/nothing/{bad}")
    write_csv(folder, rejected)
    page = written(folder)
    assert not page.all("script")
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert len(page.all("b")) == 1  # the page's own
    plain = NASTY.replace("\x00", "").replace("\x1b", "␛")
    assert plain in page.text
    assert any(bad in cell for table in page.tables for row in table for cell in row)
    assert "kind<b>" in [name for _, name in page.headings]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page.source)


EVERY_PART = """{% extends "page.html" %}
{% from "parts.html" import panel, picture, section %}
{% set titles = {text: text} %}
{% block main %}
{% call section(text, titles, [text], [text]) %}
{{ panel(text, [text, text, ""], [[text, text, 0.5], [name, text, 0.0]], text, plot, [[name, text]], kind=text) }}
{{ picture(pixels, text, text, [text], [[text, text]], [text], text) }}
{% endcall %}
{% endblock %}"""


def test_any_text_survives_escaping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against characters that end an attribute or element, or that cannot be encoded, anywhere on the page."""
    template = environment().from_string(EVERY_PART)
    monkeypatch.setattr(page_module, "environment", lambda: Mock(get_template=lambda _: template))

    @given(st.text(st.characters(codec=None), max_size=15))
    @settings(max_examples=50, deadline=None)
    def check(text: str) -> None:
        text = f"{text}\"'></title><script>"
        facts = {"text": text, "name": RunName(text, 0), "plot": Markup("<svg></svg>")}
        facts["pixels"] = np.zeros((1, 1, 3), np.uint8)
        write_page(tmp_path / "page.html", text, text, text, "every part", facts)
        page = Page(tmp_path / "page.html")
        assert not page.all("script")
        assert page.text.count("<script>") == 24

    check()


def test_long_texts_are_cut_where_they_say_least(make: Make) -> None:
    """Keeps huge captions, ids and attributes from bloating the page."""
    assert len(shorten("x" * 10**6)) == 300
    assert middle("a" * 50 + "end", 20).endswith("end")
    assert len(middle("a" * 50, 20)) == 20
    rows = [
        Row(f"{'y' * 10**5}{n}", ("z" * 10**5,), {"k" * 10**5: "v" * 10**5}, FPS, codes(3), "train") for n in (1, 2)
    ]
    assert len(written(make(rows=rows)).source) < 100_000


def codes(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL.num_codes, (num_frames, GRID, GRID)).astype(np.uint16)


def test_missing_source_is_said(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Reports moved videos on the page, without a traceback, and still shows reconstructions."""
    page = written(make(origin="/nowhere/clips"))
    assert "Not everything can be shown" in page.text
    assert "there is no /nowhere/clips" in page.text
    assert "/nowhere/clips" in capsys.readouterr().out
    assert "dB" not in page.text
    assert all("reconstruction" in (each["alt"] or "") for each in page.all("img"))
    assert len(page.all("img")) == 4


@pytest.mark.parametrize("case", ["gone", "other", "no tokenizer", "damaged"])
def test_missing_tokenizer_is_said(make: Make, tmp_path: Path, tokenizer: Path, case: str) -> None:
    """Prevents decoding with the wrong tokenizer, and reports one that is missing or damaged without a traceback."""
    place, sha256 = tmp_path / "other", ""
    if case == "no tokenizer":
        bundle.CogVideo(replace(CogVideoConfig(), autoencoder=SMALL)).save_pretrained(place)
    elif case == "damaged":
        bundle.CogVideo.from_pretrained(tokenizer).save_pretrained(place)
        file = place / "image_tokenizer.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif case == "other":
        place, sha256 = tokenizer, "0" * 64
    page = written(make(place=str(place), tokenizer_sha256=sha256))
    assert "Reconstructions:" in page.text
    assert {"gone": "there is no folder", "other": "another image tokenizer", "damaged": "content was changed"}.get(
        case, "has no image_tokenizer"
    ) in page.text
    assert "dB" not in page.text
    assert all((each["alt"] or "").endswith("the original") for each in page.all("img"))
    assert len(page.all("img")) == 4


def test_tokenizer_can_be_named(make: Make, tokenizer: Path) -> None:
    """Lets users name the bundle if it was moved."""
    folder = make(place="/nowhere/bundle")
    page = written(folder, tokenizer=str(tokenizer))
    assert "Not everything can be shown" not in page.text
    assert "dB" in page.text


def test_nothing_but_the_dataset(make: Make) -> None:
    """Shows captions and code statistics even if both source and tokenizer are gone."""
    page = written(make(origin="/nowhere/clips", place="/nowhere/bundle"))
    assert not page.all("img")
    assert "It moves" in page.text
    assert page.rows()["places counted"]


def test_changed_clips_are_not_compared(make: Make, source: Path) -> None:
    """Prevents comparing a replaced clip with the codes of the old one, and reports clips that vanished or broke."""
    folder = make()
    (source / "a.gif").write_bytes((source / "c.gif").read_bytes())
    (source / "b.gif").unlink()
    (source / "d.gif").write_bytes(b"GIF89a, but nothing more")
    page = written(folder)
    assert "the source has changed: it gives 6 frames, the dataset has 34" in page.text
    assert "the source no longer has this clip" in page.text
    assert "it can no longer be read" in page.text
    assert page.text.count("dB") == 2  # the one clip that is left, and the mean
    assert len(page.all("img")) == 4


def test_empty_dataset(make: Make) -> None:
    """Prevents a division by zero or a missing bound if no clip is left."""
    rejected = {"file is missing": [("a.mp4", "there is no a.mp4")], "too short": [("b.mp4", "1 frame")]}
    folder = make(rows=[], rejected=rejected)
    write_csv(folder, rejected)
    page = written(folder)
    assert page.rows()["file is missing"][1] == "1"
    assert "there is no a.mp4" in page.text
    assert "100.0% of all clips" in page.text
    assert not page.all("img")


def test_dataset_without_shards(make: Make) -> None:
    """Handles the card of a source in which no clip was found."""
    folder = make()
    card = read_card(folder)
    for path in folder.glob("shard-*"):
        path.unlink()
    write_card(folder, replace(card, shards=(), splits={}, lengths={}, num_frames=0))
    assert "The dataset has no clips." in written(folder).text


def test_rejected_counts_and_examples(make: Make) -> None:
    """Checks counts by reason against the card, limits examples, and reports a table that is missing or disagrees."""
    rejected = {
        "too short": [(f"clip {n}.mp4", "1 frame") for n in range(9)],
        "no caption": [('x, "y".mp4', "line\n2")],
    }
    folder = make(rejected=rejected)
    page = written(folder)
    assert "there is no rejected.csv" in page.text
    write_csv(folder, rejected)
    page = written(folder)
    assert page.rows()["too short"][1:] == ["9", "90.0%"]
    examples = [row for table in page.tables for row in table if row[0] == "too short" and len(row) == 3]
    assert [row[1] for row in examples] == [f"clip {n}.mp4" for n in range(5)]
    assert ["no caption", 'x, "y".mp4', "line\n2"] in [row for table in page.tables for row in table]
    assert "do not agree" not in page.text
    write_csv(folder, {"too short": rejected["too short"]})
    assert "do not agree" in written(folder).text
    (folder / "rejected.csv").write_text("something,else\n1,2\n")
    with pytest.raises(ValueError, match="expected a table with the columns id, reason, detail"):
        report(folder)


def test_same_bytes_in_every_process(make: Make) -> None:
    """Catches hash order, times and temporary names on the page."""
    folder = make()
    report(folder)
    first = (folder / "report.html").read_bytes()
    report(folder)
    assert (folder / "report.html").read_bytes() == first
    command = [sys.executable, "-c", "from cogvideo.cli import main; main()", "data", "report", str(folder)]
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(folder / "other.html")], check=True, env=environment, timeout=300)
    assert (folder / "other.html").read_bytes() == first


def test_seed_chooses_clips(make: Make) -> None:
    """Checks that the seed chooses the clips, and that no more are shown than requested."""
    folder = make()
    shown = set()
    for seed in range(6):
        page = written(folder, clips=1, seed=seed)
        assert len(page.all("img")) == 1
        shown.add(page.all("img")[0]["alt"])
    assert len(shown) > 1
    assert not written(folder, clips=0).all("img")


def test_large_datasets_are_sampled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps large datasets from being read row by row, and labels counts over a sample as such."""
    folder = make()
    monkeypatch.setattr(report_module, "NUM_ROWS", 2)
    page = written(folder, seed=3)
    assert "Counted over 2 of 4 clips, drawn at random (seed 3)." in page.text
    assert page.rows()["train"][1] == str(read_card(folder).splits["train"])  # figures from the card stay exact
    sample = take_sample(Dataset(folder), 3, 2)
    assert sample.num_rows == 2
    assert page.rows()["places counted"] == [f"{sample.codes.sum():,}"]


def test_large_worlds_are_not_listed(make: Make, monkeypatch: pytest.MonkeyPatch, tokenizer: Path) -> None:
    """Prevents listing all clips of a large World to show just a few."""
    rows = [Row(f"world/{index:06}", ("x",), {}, FPS, codes(33), "train") for index in (3, 4_999_999)]
    card = read_card(make(rows=rows, origin="world:5000000"))
    asked = []

    def listed(source: str, options: SourceOptions) -> Listing:
        asked.append(source)
        assert source != "world:5000000"
        return list_source(source, options)

    monkeypatch.setattr(report_clips, "list_source", listed)
    origin = find_origin(card, "", ["world/000003", "world/4999999"])
    assert set(origin.items) == {"world/000003", "world/4999999"}
    assert asked == ["world:3:4", "world:4999999:5000000"]


def test_superres_originals_are_means_of_large_frames(make: Make, source: Path) -> None:
    """Prevents a PSNR against frames that the encoder never saw: it saw super-resolution frames averaged down."""
    card = read_card(make(high_grid=3 * GRID))
    item = next(item for item in list_source(str(source), SourceOptions()).items if item.id == "b.gif")
    large = read_item(item, replace(FRAMES, size=3 * SIZE)).frames.astype(np.float64)
    expected = sum(large[:, row::3, column::3] for row in range(3) for column in range(3)) / 9
    assert np.abs(read_as_encoded(item, FRAMES, card) - expected).max() <= 0.5 + 1e-6


def test_settings_of_another_version(make: Make) -> None:
    """Handles cards with unknown or missing settings without a traceback."""
    folder = make()
    card = read_card(folder)
    for changed in ({}, {"frames": 3}, {"frames": {"speed": 2}}, card.settings | {"source": None}):
        path = folder / "shard-00000.arrow"
        rows = [row for number in range(2) for row in [Dataset(folder).shard(0).row(number)]]
        info = replace(Dataset(folder).shard(0).info, settings_sha256=digest(changed))
        other = folder.parent / "other"
        other.mkdir(exist_ok=True)
        write_shard(other / path.name, rows, info)
        described = make_card(other, [path.name], source=card.source, tokenizer=card.tokenizer, settings=changed)
        write_card(other, described)
        page = written(other)
        assert "not those of this version" in page.text
        assert len(page.all("img")) == 2


@pytest.mark.parametrize(("out", "message"), [("", "is a folder"), ("none/page.html", "there is no folder")])
def test_places_that_cannot_be_written(make: Make, tmp_path: Path, out: str, message: str) -> None:
    """Refuses an invalid output path without a traceback."""
    with pytest.raises(ValueError, match=message):
        report(make(), out=tmp_path / out)


def test_bad_input_is_one_line(tmp_path: Path, make: Make) -> None:
    """Reports a folder without data, a damaged shard or a negative number without a traceback."""
    with pytest.raises(ValueError, match="not a complete dataset"):
        report(tmp_path)
    folder = make()
    with pytest.raises(ValueError, match="clips is -1, expected 0 or more"):
        report(folder, clips=-1)
    (folder / "shard-00001.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match="incomplete"):
        report(folder)


def test_old_page_stays_until_the_new_one_is_whole(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the old page if a report is interrupted."""
    folder = make()
    before = written(folder).source
    monkeypatch.setattr(report_module, "facts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(folder, seed=5)
    assert (folder / "report.html").read_text(encoding="utf-8") == before
    assert not list(folder.glob(".*"))


@given(st.dictionaries(st.integers(0, 3000), st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_ranges_hold_everything_once(counts: dict[int, int], limit: int) -> None:
    """Catches lengths in no column or in two, and more columns than allowed."""
    found = ranges(Counter(counts), limit)
    assert len(found) <= limit
    assert sum(each.height for each in found) == sum(counts.values())
    for each in found:
        low, high = [*each.meaning.split(" to ")] * 2 if "to" not in each.meaning else each.meaning.split(" to ")
        is_open = "more" in each.meaning
        low, high = (int(low.split()[0]), math.inf) if is_open else (int(low), int(high))
        assert each.height == sum(n for value, n in counts.items() if low <= value <= high)
    values = sorted(value for value, n in counts.items() for _ in range(n))
    mean = round(sum(values) / len(values), 1)
    assert summary(Counter(counts)) == [
        ("shortest", values[0]),
        ("median", values[(len(values) + 1) // 2 - 1]),
        ("mean", pytest.approx(mean, abs=0.101)),
        ("longest", values[-1]),
    ]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50).filter(any))
@settings(max_examples=50, deadline=None)
def test_every_code_has_one_frequency(counts: list[int]) -> None:
    """Catches columns of the logarithmic scale that overlap or leave gaps."""
    columns = list(frequencies(np.array(counts, np.int64)))
    assert sum(each.height for each in columns) == len(counts)
    assert columns[0].height == counts.count(0)
    assert columns[-1].height > 0


def test_words_of_any_language() -> None:
    """Splits text without spaces into characters, and does not split words at an apostrophe."""
    assert words_of("A dog's Ear, 3.5 re-opens_It") == ["a", "dog's", "ear", "3", "5", "re-opens", "it"]
    assert words_of("一只猫 runs") == ["一", "只", "猫", "runs"]
    assert words_of("Été à Ñandú") == ["été", "à", "ñandú"]


def test_rates_of_any_base() -> None:
    """Handles base rates that are not multiples of the usual rates."""
    assert training_rates(8.0).rates == (1.0, 2.0, 4.0, 8.0)
    assert training_rates(24.0).rates == (1.0, 2.0, 4.0, 8.0)
    assert training_rates(10.0).rates == (1.25, 2.5, 5.0, 10.0)


def test_small_shares_are_not_zero() -> None:
    """Keeps one rejected clip in a million from being shown as none."""
    assert percent(1, 10**6) == "0.0001%"
    assert percent(0, 10) == "0.0%"
    assert percent(1, 0) == "0.0%"
