"""`cogvideo evaluate alignment`: real clips score perfectly, killed evaluations resume, everything is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from cogvideo.commands.evaluate_alignment import alignment
from cogvideo.config import InputError
from cogvideo.data.frames import BACKGROUNDS, FrameSettings, background_of
from cogvideo.data.sources import SourceOptions, list_source
from cogvideo.evaluation import alignment as module
from cogvideo.evaluation.alignment import shown
from cogvideo.evaluation.making import ClipOptions, generate, read_clip
from cogvideo.evaluation.preferences import wilson
from cogvideo.evaluation.reader import ATTRIBUTES, SIZE, Reader, ReaderConfig, resized
from cogvideo.evaluation.subjects import Clip, EmojiSubject, Prompt, unseen_background
from cogvideo.pipeline import CogVideoPipeline
from gallery import make_model

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # whole clips; tests/generation checks the parts

NUM_EMOJI = 6


@pytest.fixture(scope="module")
def model(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a complete model with frames of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("alignment") / "model"
    make_model(folder, train_text_model())
    return str(folder)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained reader."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("alignment") / "reader.safetensors"
    Reader(ReaderConfig((4, 8, 8, 16), (0, 1, 1, 1), 16)).save(file)
    return file


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of animations with alpha: discs that circle, each with its own phase, size and color."""
    folder = tmp_path_factory.mktemp("alignment") / "emoji"
    folder.mkdir()
    rows, columns = np.mgrid[:64, :64]
    lines = ["file,caption"]
    for number in range(NUM_EMOJI):
        frames = []
        for time in range(12):
            angle = 2 * np.pi * (time / 12 + number / NUM_EMOJI)
            away = np.hypot(rows - 32 - 12 * np.sin(angle), columns - 32 - 12 * np.cos(angle))
            picture = np.zeros((64, 64, 4), np.uint8)
            picture[away < 10 + number] = (40 * number, 255 - 40 * number, 90, 255)
            frames.append(Image.fromarray(picture))
        frames[0].save(folder / f"{number}.webp", save_all=True, append_images=frames[1:], duration=125, lossless=True)
        lines.append(f"{number}.webp,disc number {number}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def run(model: str, out: Path, reader: Path, **options: Any) -> dict[str, Any]:
    """Run the evaluation and return the contents of alignment.json."""
    settings = {"world": 4, "batch": 2, "device": "cpu", "making": ClipOptions(guidance=1.0, truncate=True)}
    alignment(model=model, out=out, reader=reader, **(settings | options))
    return json.loads((out / "alignment.json").read_text())


def test_a_killed_evaluation_goes_on(
    model: str, reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards hours of work: after a kill, finished clips are kept, and the results match an uninterrupted run."""
    whole = run(model, tmp_path / "whole", reader, batch=3)
    assert "Without --emoji" in capsys.readouterr().out
    real, made = module.generate, []

    def once(pipeline: CogVideoPipeline, prompts: list[Prompt], making: ClipOptions) -> list[Clip]:
        if made:
            raise KeyboardInterrupt
        made.extend(prompts)
        return real(pipeline, prompts, making)

    monkeypatch.setattr(module, "generate", once)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "killed", reader)
    assert len(list((tmp_path / "killed/generated").iterdir())) == 2

    def rest(pipeline: CogVideoPipeline, prompts: list[Prompt], making: ClipOptions) -> list[Clip]:
        assert not set(prompts) & set(made)
        return real(pipeline, prompts, making)

    monkeypatch.setattr(module, "generate", rest)
    assert run(model, tmp_path / "killed", reader)["results"] == whole["results"]
    assert (tmp_path / "killed/alignment.png").read_bytes() == (tmp_path / "whole/alignment.png").read_bytes()


def test_real_clips_are_the_ceiling(
    model: str, reader: Path, emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks every measure at once: a model that returns the real clips scores 1 everywhere, motion included."""
    subject = EmojiSubject(emoji, None, 0, 0)

    def perfect(pipeline: CogVideoPipeline, prompts: list[Prompt], making: ClipOptions) -> list[Clip]:
        return [resized(subject.real(subject.prompts.index(prompt), 16), SIZE) for prompt in prompts]

    monkeypatch.setattr(module, "generate", perfect)
    told = run(model, tmp_path / "out", reader, world=0, emoji=emoji)
    rows = told["results"]["emoji"]
    assert rows["generated"] == rows["real"]
    assert rows["real"]["shares"]["all clips"] == {"rank 1": 1, "rank 5": 1, "background": 1}
    assert rows["real"]["movement"]["energy_ratio"] == 1
    assert rows["reconstruction"]["shares"] != rows["real"]["shares"]  # the tokenizer is untrained
    assert len(rows["generated"]["clips"]) == told["protocol"]["subjects"]["emoji"]["gallery"] == NUM_EMOJI


def test_memory_of_one_batch_is_enough(
    model: str, reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeps large evaluations possible on small machines: a batch of clips must fit into memory, not all of them."""
    checked: list[int] = []
    monkeypatch.setattr(CogVideoPipeline, "check_memory", lambda self, settings, batch: checked.append(batch))
    monkeypatch.setattr(module, "generate", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", reader, world=6, batch=4)
    assert checked == [4, 2]


def test_protocol_says_what_was_measured(model: str, reader: Path, emoji: Path, tmp_path: Path) -> None:
    """Guards reproducibility: hashes, seeds, settings and counts are recorded. A prompt limit keeps all animations."""
    told = run(model, tmp_path / "out", reader, emoji=emoji, emoji_limit=2)
    protocol, results = told["protocol"], told["results"]
    assert set(protocol["bundle_sha256"]) >= {"base", "sequential", "interpolation", "image_tokenizer", "text"}
    assert len(protocol["subjects"]["world"]["reader_sha256"]) == 64
    assert protocol["subjects"]["world"]["held_out"] == protocol["subjects"]["world"]["validation"] == 2
    assert protocol["subjects"]["emoji"]["prompts"] == 2
    assert protocol["subjects"]["emoji"]["gallery"] == NUM_EMOJI
    assert protocol["making"]["guidance"] == 1.0
    assert len(protocol["seeds"]["world"]) == 4
    assert protocol["seeds"]["emoji"] == [0, NUM_EMOJI - 1]  # evenly spread, each matched with its own animation
    assert results["emoji"]["real"]["shares"]["all clips"]["rank 1"] == 1
    assert set(results["world"]["real"]["shares"]) == {"all clips", "held-out pairs", "other clips"}
    assert set(results["world"]["real"]["clips"][0]) == set(ATTRIBUTES)
    ends = results["world"]["generated"]["intervals"]["held-out pairs"]["object"]
    assert ends == list(wilson(results["world"]["generated"]["shares"]["held-out pairs"]["object"], 2))


def test_super_resolution_is_drawn_as_asked(model: str) -> None:
    """Catches super-resolution options that are accepted but ignored: each one must change the clips."""
    pipeline, prompts = CogVideoPipeline.from_pretrained(model), [Prompt("cat", "a cat", 0)]
    plain = ClipOptions(superres=True)
    changes = ({}, {"superres": False}, {"superres_temperature": 0.0}, {"superres_clusters": 1})
    clips = [generate(pipeline, prompts, replace(plain, **change))[0] for change in changes]
    assert not any(np.array_equal(one, other) for one, other in combinations(clips, 2))


def test_intervals_are_wilsons() -> None:
    """Guards confidence intervals: with few clips, or none right, they are wide but stay within [0, 1]."""
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for right in range(21):  # by definition, each end is 1.96 of its own standard errors from the share
        share = right / 20
        for end in wilson(share, 20):
            assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 20, abs=1e-12)


def test_another_model_is_refused(model: str, reader: Path, tmp_path: Path) -> None:
    """Prevents results that mix clips generated with different settings."""
    run(model, tmp_path / "out", reader, world=2)
    with pytest.raises(ValueError, match="another run"):
        run(model, tmp_path / "out", reader, world=2, making=ClipOptions(guidance=2.0, truncate=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world": 0}, "nothing to judge"),
        ({"world": -1}, "world is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"emoji_limit": 0}, "emoji_limit is 0"),
        ({"emoji": Path("nowhere")}, "there is no nowhere"),
        ({"reader": Path("nowhere")}, "there is no reader nowhere"),
        ({"making": ClipOptions(truncate=False)}, "16"),  # text slots, too few for captions of the World
    ],
)
def test_mistakes_are_refused_before_anything_is_made(
    model: str, reader: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Refuses invalid options up front, not after hours of generation."""
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path / "out", **({"reader": reader} | options))
    assert not (tmp_path / "out/generated").exists()


def test_clips_without_alpha_are_refused_before_anything_is_made(model: str, reader: Path, tmp_path: Path) -> None:
    """Refuses opaque animations up front, not after hours of generation."""
    folder = tmp_path / "opaque"
    folder.mkdir()
    frames = [Image.fromarray(np.full((64, 64, 3), 20 * number, np.uint8)) for number in range(12)]
    frames[0].save(folder / "0.webp", save_all=True, append_images=frames[1:], duration=125, lossless=True)
    (folder / "captions.csv").write_text("file,caption\n0.webp,a disc\n")
    with pytest.raises(ValueError, match="has no alpha, expected animations on a transparent ground"):
        run(model, tmp_path / "out", reader, emoji=folder, world=2)
    assert not (tmp_path / "out").exists()


def test_a_damaged_clip_is_told(tmp_path: Path) -> None:
    """Names a damaged clip, such as a full disk leaves, in a one-line error."""
    for content in (b"", b"PK", b"no zip"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"a.npz is damaged \(.*\): remove it"):
            read_clip(tmp_path / "a.npz")


def test_background_was_never_behind_the_clip(emoji: Path) -> None:
    """Ensures that the background is really unseen: eleven copies use eleven colors, and the prompt the twelfth."""
    settings = FrameSettings(background="random", seed=3)
    copies = list_source(str(emoji), SourceOptions(copies=11)).items
    for item in list_source(str(emoji), SourceOptions()).items:
        seen = {background_of(each, settings) for each in copies if each.media == item.media}
        assert {unseen_background(item, 3)} == set(BACKGROUNDS) - seen


def test_sheet_shows_failures() -> None:
    """Prevents a contact sheet of successes only: failed clips are added to the evenly spaced ones."""
    right = [True] * 100
    right[7] = right[8] = False
    assert shown(right) == [0, 20, 40, 59, 79, 99, 7, 8]
    assert shown([False]) == [0]
