"""`cogvideo study`: clips are matched to their prompts, and mistakes are reported in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cogvideo.cli import main
from cogvideo.evaluation.study import Study
from cogvideo.media.video import read_video, write_video
from rating import COLORS, make_folders

New = Callable[..., int]
STEP = 60
"""Brightness step between clips."""


@pytest.fixture
def new(tmp_path: Path) -> New:
    """`cogvideo study new` on three prompts, with extra options. Clips of system a are as bright as their numbers."""
    make_folders(tmp_path, 3, ("zebra", "walrus", "truth"))
    for number in (1, 2, 3):
        write_video(tmp_path / "zebra" / f"clip {number}.mp4", np.full((8, 32, 32, 3), STEP * number, np.uint8), 8)

    def call(*more: str) -> int:
        given = dict(zip(more[::2], more[1::2], strict=True))
        default = {"--a": "zebra", "--b": "walrus", "--prompts": "prompts.txt"}
        places = {name: str(tmp_path / value) for name, value in default.items()}
        options = [word for each in (places | given).items() for word in each]
        return main(["study", "new", str(tmp_path / "study"), *options])

    return call


def numbers(folder: Path) -> list[tuple[str, int]]:
    """Text of each prompt, and the number of its clip from system a."""
    study = Study(folder)
    levels = [read_video(study.clips["a", place], 8).frames.mean() for place in range(len(study.prompts))]
    return [(text, round(level / STEP)) for text, level in zip(study.prompts, levels, strict=True)]


def test_numbers_are_the_order_of_prompts(new: New, tmp_path: Path) -> None:
    """Catches clip 10 sorted before clip 2, and a surplus clip."""
    folder = tmp_path / "zebra"
    for number, new_number in ((1, 10), (2, 8), (3, 9)):
        (folder / f"clip {number}.mp4").rename(folder / f"clip {new_number}.mp4")
    assert new() == 0
    assert numbers(tmp_path / "study") == [("text 1", 2), ("text 2", 3), ("text 3", 1)]
    (tmp_path / "study").rename(tmp_path / "old")
    (folder / "clip 11.mp4").write_bytes((folder / "clip 10.mp4").read_bytes())
    assert new() == 2


def test_a_gap_in_the_numbers_is_refused(new: New, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents every later clip from being shown with the wrong prompt, and next to another prompt's clip."""
    (tmp_path / "zebra" / "clip 3.mp4").rename(tmp_path / "zebra" / "clip 4.mp4")
    assert new() == 2
    told = capsys.readouterr().err
    assert "zebra has no clip between 'clip 2' and 'clip 4', expected consecutive numbers" in told
    assert not (tmp_path / "study").exists()


def test_the_next_command_can_be_pasted(
    new: New, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks names of studies with spaces."""
    monkeypatch.chdir(tmp_path)
    places = ["--a", "zebra", "--b", "walrus", "--prompts", "prompts.txt"]
    assert main(["study", "new", "my study", *places]) == 0
    assert "next: cogvideo study serve 'my study'\n" in capsys.readouterr().out


def test_names_of_a_table_count(new: New, tmp_path: Path) -> None:
    """Checks clips with arbitrary names: the table maps them to texts, here in reverse order."""
    rows = [{"file": f"clip {number}.mp4", "caption": [f"it is {number}"]} for number in (3, 2)]
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    assert new("--prompts", str(table)) == 0
    assert numbers(tmp_path / "study") == [("it is 3", 3), ("it is 2", 2)]


def test_names_that_generate_gives_count(new: New, tmp_path: Path) -> None:
    """Checks that clips from `cogvideo generate`, named after prompts, are matched by name and not by sort order."""
    texts = ["a red ball, rolling", "A cat", "a cat"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    for number, stem in enumerate(("a-red-ball-rolling", "A-cat", "a-cat-2")):
        (tmp_path / "zebra" / f"clip {number + 1}.mp4").rename(tmp_path / "zebra" / f"{stem}.mp4")
    assert new() == 0
    assert numbers(tmp_path / "study") == list(zip(texts, (1, 2, 3), strict=True))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_other_formats_become_mp4(suffix: str, tmp_path: Path) -> None:
    """Checks clips in other formats, cropped to one size, and studies with a single prompt."""
    make_folders(tmp_path, 1, ("heron", "walrus"), suffix)
    given = ["--a", str(tmp_path / "heron"), "--b", str(tmp_path / "walrus"), "--size", "16"]
    assert main(["study", "new", str(tmp_path / "study"), *given, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    study = Study(tmp_path / "study")
    for system, name in (("a", "heron"), ("b", "walrus")):
        frames = read_video(study.clips[system, 0], 8).frames
        assert frames.shape[1:] == (16, 16, 3)
        assert frames.mean((0, 1, 2)) == pytest.approx(COLORS[name], abs=6)
    assert [trial.kind for trial in study.design.trials(0)] == ["main", "catch"]


def test_real_clips_are_for_catch_trials_alone(new: New, tmp_path: Path) -> None:
    """Checks that real clips appear only in catch trials, and that only those that are shown are copied."""
    assert new("--real", str(tmp_path / "truth"), "--catches", "2") == 0
    shown = Study(tmp_path / "study").design.trials(0)
    assert sum("real" in trial.systems for trial in shown) == sum(trial.kind == "catch" for trial in shown) == 2
    assert len(list((tmp_path / "study" / "clips").iterdir())) == 3 * 2 + 2 * 2


MISTAKES = [
    (["--a", "missing"], "missing is not a folder"),
    (["--prompts", "missing.txt"], "No such file"),
    (["--prompts", "zebra"], "zebra is a folder, expected a file with prompts"),
    (["--prompts", "few.txt"], "has 3 clips for 2 prompts"),
    (["--prompts", "table.csv"], "lacks 1 of 1 clips, the first is 'other'"),
    (["--prompts", "twice.csv"], "twice in file"),
    (["--prompts", "gap.csv"], "expected the name of a clip"),
    (["--a", "empty"], "empty has no clips"),
    (["--a", "broken"], "broken/clip"),
    (["--a", "double"], "several clips clip 1, expected"),
    (["--a", "words"], "lacks 3 of 3 clips, the first is 'text-1'"),
    (["--trials", "0"], "trials is 0"),
    (["--catches", "-1"], "catches is -1"),
    (["--size", "0"], "size is 0"),
    (["--questions", "all"], "pairs"),
]


@pytest.mark.parametrize(("options", "told"), MISTAKES)
def test_mistakes_are_one_line(
    new: New,
    options: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Protects users from tracebacks and half-created studies."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken", "double", "words"):
        Path(name).mkdir()
    Path("few.txt").write_text("one\ntwo")
    Path("table.csv").write_text("file,prompt\nother.mp4,a text")
    Path("twice.csv").write_text("file,prompt\nclip 1.mp4,a text\nclip 1.mp4,a text")
    Path("gap.csv").write_text("file,prompt\n,a text")
    for number in (1, 2, 3):
        Path(f"broken/clip {number}.mp4").write_bytes(b"no video")
        Path(f"double/clip {number}.mp4").touch()
        Path(f"words/{'x' * number}.mp4").touch()
    Path("double/clip 1.gif").touch()
    assert new(*options) == 2
    line = capsys.readouterr().err.strip()
    assert line.count("\n") == 0
    assert told in line
    assert not Path("study").exists()
    assert not list(tmp_path.glob(".study*"))


def test_mistakes_of_server_and_report(new: New, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents servers without raters and reports about nothing."""
    study = str(tmp_path / "study")
    assert new() == 0
    cases = [
        (["new", study, "--a", ".", "--b", ".", "--prompts", str(tmp_path / "prompts.txt")], "no clips"),
        (["serve", str(tmp_path)], "holds no study"),
        (["serve", study, "--raters", "0"], "raters is 0"),
        (["serve", study, "--port", "70000"], "port is 70000"),
        (["report", str(tmp_path)], "holds no study"),
        (["report", study], "no answers yet"),
        (["report", study, "--margin", "0.6"], "margin is 0.6"),
        (["report", study, "--slips", "-1"], "slips is -1"),
        (["report", study, "--out", str(tmp_path / "missing")], "missing"),
    ]
    capsys.readouterr()
    for arguments, told in cases:
        assert main(["study", *arguments]) == 2, arguments
        line = capsys.readouterr().err.strip()
        assert (told in line, line.count("\n")) == (True, 0), line
