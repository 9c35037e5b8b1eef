"""The paper's protocols on small datasets in the official layouts: lists, clips, tables, interruptions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.cli import main
from cogvideo.commands import evaluate_distribution
from cogvideo.evaluation.features import ExcerptPixels, Judge
from cogvideo.evaluation.footage import Reading, draw
from cogvideo.evaluation.making import fill
from cogvideo.evaluation.paper import CHINESE, of_classes, read_kinetics, read_ucf101
from cogvideo.evaluation.protocols import PROTOCOLS
from cogvideo.media.video import read_video, write_video
from gallery import make_model
from killing import kill_at

CLASSES = ("Archery", "BabyCrawling", "TaiChi")
GROUPS = ("g01", "g02", "g08", "g09")


def means(device: str) -> Callable[[ExcerptPixels], Tensor]:
    """A cheap network: mean colors of the first and last frames."""
    return lambda clips: torch.stack(
        [torch.from_numpy(each[[0, -1]]).float().mean((1, 2)).flatten() for (each,) in clips]
    )


@pytest.fixture(scope="module")
def model(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small, complete model."""
    folder = tmp_path_factory.mktemp("paper") / "model"
    make_model(folder, train_text_model())
    return str(folder)


@pytest.fixture(autouse=True)
def _networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGVIDEO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate_distribution, "i3d", lambda *_: Judge(("means", "0123456789"), means))
    monkeypatch.setattr(evaluate_distribution, "c3d", lambda *_: Judge(("classes",), means))


def video(path: Path, seed: int, frames: int = 40, fps: float = 16) -> None:
    """Write a video of colored noise, as WebP whatever the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 3, 4, 3), dtype=np.uint8)
    written = path.with_suffix(".webp")
    write_video(written, pixels.repeat(8, 1).repeat(8, 2), fps)
    written.rename(path)


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UCF-101 with three classes, in the official layout."""
    root = tmp_path_factory.mktemp("ucf")
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for number, name in enumerate(CLASSES, 1):
        for place, group in enumerate(GROUPS):
            file = f"{name}/v_{name}_{group}_c01.avi"
            video(root / "UCF-101" / file, 10 * number + place)
            if group < "g08":
                parts["test"].append(file)
            else:
                parts["train"].append(f"{file} {number}")
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{number} {name}\r\n" for number, name in enumerate(CLASSES, 1)))
    for part, lines in parts.items():
        (lists / f"{part}list01.txt").write_text("\n".join(lines) + "\n")
    return root


def call(command: str, model: str, videos: Path, out: Path, *arguments: object) -> int:
    """Exit status of the command with one worker and cheap sampling."""
    options = ["--out", out, "--network", videos, "--device", "cpu", "--workers", 1]
    options += ["--guidance", 1, "--first-guidance", 1, *arguments]
    return main(["evaluate", command, model, str(videos), *map(str, options)])


def run(command: str, model: str, videos: Path, out: Path, *arguments: object) -> dict[str, Any]:
    """The JSON that the command writes."""
    assert call(command, model, videos, out, "--truncate", *arguments) == 0
    found: dict[str, Any] = json.loads((out / f"{command}.json").read_text(encoding="utf-8"))
    return found


def test_ucf101_ends_in_one_table(model: str, ucf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks the protocol: class prompts, clip counts of both metrics, and published figures next to ours."""
    options = ("--lists", ucf / "ucfTrainTestlist", "--split", "all", "--language", "chinese", "--clips", 3)
    options += ("--samples", 4, "--c3d-weights", "x", "--c3d-mean", "y")
    found = run("ucf101", model, ucf / "UCF-101", tmp_path, *options)
    printed = " ".join(capsys.readouterr().out.split())
    assert "another network than that of FVD" in printed
    assert "N is 3, below 2,048" in printed
    assert found["texts"] == sorted(["射箭", "婴儿爬行", "打太极拳"])
    values = {(each["name"], each["of"]): (each["clips"], each["value"]) for each in found["figures"]}
    assert values["FVD", "real / generated"][0] == 3
    assert values["Inception Score", "generated"][0] == values["Inception Score", "real"][0] == 4
    rows = {row["method"]: (row["fvd"], row["inception_score"]) for row in found["table"]}
    assert rows["TATS-base"] == (332, 79.28)
    assert rows["this model"] == (values["FVD", "real / generated"][1], values["Inception Score", "generated"][1])
    assert rows["this model **"] == (values["FVD", "reconstructed / generated"][1], None)
    assert rows["real clips"][1] == values["Inception Score", "real"][1]
    assert len(list((tmp_path / "real.jsonl").read_text().splitlines())) == 12
    clips = sorted((tmp_path / "generated").iterdir())
    assert len(clips) == 4
    assert read_video(clips[0], 8).frames.shape == (16, 16, 16, 3)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_killed_evaluation_continues_to_the_same_bits(
    model: str, ucf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards runs that take days: after a kill, finished clips stay, and the rest is bit-identical to an uninterrupted
    run. Clips with other texts, rates or seeds are never mixed in."""
    options = ["--lists", ucf / "ucfTrainTestlist", "--clips", 3, "--batch", 2]

    def go(out: Path) -> dict[str, Any]:
        return run("ucf101", model, ucf / "UCF-101", out, *options)

    def made(out: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (out / "generated").glob("*.webp")}

    whole = go(tmp_path / "whole")
    assert kill_at(20, lambda: go(tmp_path / "killed"))
    before = made(tmp_path / "killed")
    assert len(before) == 1  # in the middle of a batch
    assert go(tmp_path / "killed")["figures"] == whole["figures"]
    assert made(tmp_path / "killed") == made(tmp_path / "whole")
    assert len(made(tmp_path / "whole")) == 3
    changes = {"texts": ["--language", "chinese"], "fps": ["--fps", 4], "seed": ["--seed", 1]}
    for name, other in changes.items():
        assert call("ucf101", model, ucf / "UCF-101", tmp_path / "whole", "--truncate", *options, *other) == 2
        error = capsys.readouterr().err
        assert "another run began in" in error
        assert f"{name} was" in error
        assert error.count(" and is ") == 1  # nothing else differs
    assert call("ucf101", model, ucf / "UCF-101", tmp_path / "long", *options) == 2
    assert not list((tmp_path / "long").glob("generated/*"))  # prompts that are too long are refused up front


def test_batches_are_those_of_the_whole_list(tmp_path: Path) -> None:
    """Keeps clips bit-identical on devices where they depend on the batch; existing files are not overwritten."""
    files = [tmp_path / str(number) for number in range(5)]
    files[1].write_text("kept")
    files[2].write_text("kept")
    files[3].write_text("kept")
    asked: list[list[int]] = []
    added: list[int] = []

    def make(numbers: list[int]) -> list[str]:
        asked.append(numbers)
        return [f"made {number}" for number in numbers]

    fill(files, make, Path.write_text, 2, added.append)
    assert asked == [[0, 1], [4]]
    assert added == [1, 1]
    assert [file.read_text() for file in files] == ["made 0", "kept", "kept", "kept", "made 4"]


def kinetics(root: Path) -> tuple[Path, Path]:
    """Kinetics-600 videos in both layouts, the first one too short, and a table that lists one more."""
    rows = ["label,youtube_id,time_start,time_end,split"]
    videos = root / "videos"
    for number in range(5):
        rows.append(f"air drumming,id-{number},{number},{number + 10},test")
        folder = videos if number % 2 else videos / "air drumming"
        video(folder / f"id-{number}_{number:06}_{number + 10:06}.mp4", number, 40 if number else 20)
    rows.append("air drumming,gone,0,10,test")
    table = root / "test.csv"
    table.write_text("\n".join(rows) + "\n")
    return videos, table


def test_kinetics600_keeps_the_given_frames(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks prediction: the five given frames are bit-identical to the real ones, later ones are not. Short videos are
    left out."""
    videos, table = kinetics(tmp_path)
    out = tmp_path / "out"
    options = ("--table", table, "--clips", 2, "--seed", 1)
    found = run("kinetics600", model, videos, out, *options)
    assert "1 of 6 listed videos are missing and left out" in capsys.readouterr().out
    assert found["missing"] == 1
    assert found["protocol"]["size"] == 64
    assert [each["clips"] for each in found["figures"] if each["name"] == "FVD"] == [2, 2, 2]
    reading = Reading(replace(PROTOCOLS["tats"], size=64), 8.0)
    real = draw(str(out / "real.jsonl"), reading, "random", 99, 0).excerpts
    assert len(real) == 2
    assert {each.first for each in real} == {0}  # each row is one window
    for excerpt in real:
        file = Path(str(excerpt.footage.media.media))  # type: ignore[union-attr]
        assert file.name != "id-0_000000_000010.mp4"
        made = read_video(out / "generated" / f"{file.stem}.webp", 8).frames
        source = reading.read(excerpt, None)
        assert made.shape == source.shape == (16, 64, 64, 3)
        assert np.array_equal(made[:5], source[:5])
        assert not np.array_equal(made[5], source[5])
    starts = [json.loads(line)["start"] for line in (out / "real.jsonl").read_text().splitlines()]
    assert any(starts)
    clip = next((out / "generated").iterdir())
    before = clip.read_bytes()
    clip.unlink()
    assert run("kinetics600", model, videos, out, *options)["figures"] == found["figures"]
    assert clip.read_bytes() == before


def test_every_class_has_its_share() -> None:
    """Guards the Inception Score: each class occurs equally often, give or take one, and each clip has its own seed."""
    texts = [str(each) for each in range(101)]
    for count in (101, 2048, 10_000):
        prompts = of_classes(texts, count, 7)
        shares = Counter(each.text for each in prompts)
        assert len(shares) == 101
        assert max(shares.values()) - min(shares.values()) <= 1
        assert [each.seed for each in prompts] == list(range(7, 7 + count))
        assert len({each.name for each in prompts}) == count


def test_classes_have_texts_in_both_languages(tmp_path: Path) -> None:
    """Checks class prompts: 101 different texts in English, and as many in Chinese."""
    names = [line.split("\t")[0] for line in CHINESE.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "classInd.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(names, 1)))
    (tmp_path / "testlist02.txt").write_text("".join(f"{name}/v.avi\n" for name in names))
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "v.avi").touch()
    english, chinese = (
        [each.text for each in read_ucf101(tmp_path, tmp_path, "test", 2, language)]
        for language in ("english", "chinese")
    )
    assert len(set(english)) == len(set(chinese)) == 101
    assert english[:4] == ["apply eye makeup", "apply lipstick", "archery", "baby crawling"]
    assert chinese[:2] == ["画眼妆", "涂口红"]
    assert all(not text.isascii() for text in chinese)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classInd.txt", "1 Archery\n2 Sleeping\n", "has Sleeping, expected classes of UCF-101"),
        ("trainlist01.txt", "v_Archery_g08_c01.avi 1\n", "expected CLASS/FILE.avi with a class of .*classInd.txt"),
        ("trainlist01.txt", "../../x.avi 1\n", "expected CLASS/FILE.avi"),
        ("trainlist01.txt", "Archery/v_Archery_g08_c01.avi\nArchery/gone.avi 1\n", "lacks 1 of 2 .*Archery.gone.avi$"),
        ("trainlist01.txt", "TaiChi/v_TaiChi_g08_c01.avi\n", "lacks 1 of 1 listed videos"),  # its folder is missing
    ],
)
def test_foreign_lists_are_refused(ucf: Path, tmp_path: Path, file: str, content: str, message: str) -> None:
    """Reports lists of another dataset, and folders that lack some of the videos."""
    (tmp_path / "classInd.txt").write_text("1 Archery\n2 TaiChi\n")
    (tmp_path / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi\n")
    (tmp_path / file).write_text(content)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/Archery").symlink_to(ucf / "UCF-101/Archery")
    with pytest.raises(ValueError, match=message):
        read_ucf101(tmp_path, tmp_path / "videos", "train", 1, "chinese")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lacks label, youtube_id, time_start, time_end, expected"),
        ("label,youtube_id,time_start\na,b,0\n", "lacks time_end, expected"),
        ("label,youtube_id,time_start,time_end\na,b,soon,10\n", "line 2: got time_start 'soon' and time_end '10'"),
        ("label,youtube_id,time_start,time_end\na,b,inf,10\n", "line 2: got time_start 'inf'"),
        ("label,youtube_id,time_start,time_end\na,b\n", "line 2: got time_start None"),
        (
            "label,youtube_id,time_start,time_end\na,b,0,10\n",
            "has none of the 1 listed videos, the first is ",
        ),
    ],
)
def test_foreign_tables_are_refused(tmp_path: Path, content: str, message: str) -> None:
    """Reports what is wrong with a table that is not the official one."""
    (tmp_path / "test.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_kinetics(tmp_path / "test.csv", tmp_path)


def test_too_few_clips_are_refused_before_any_is_generated(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents hours of wasted generation."""
    video(tmp_path / "id-0_000000_000010.mp4", 0)
    (tmp_path / "test.csv").write_text("label,youtube_id,time_start,time_end\na,id-0,0,10\n")
    assert call("kinetics600", model, tmp_path, tmp_path / "out", "--table", tmp_path / "test.csv") == 2
    assert "has 1 clip of 16 frames or more among 1" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("generated/*"))
