"""Studies on disk: their files, and answers that are neither lost nor counted twice."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cogvideo.evaluation.study import Study
from cogvideo.media.video import examine, read_video, write_video
from rating import COLORS, make_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with three prompts."""
    return make_study(tmp_path_factory.mktemp("study"), 3, "--catches", "1", "--repeats", "1")


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize("fps", [8.0, 12.5, 25.0])
def test_rate_takes_every_frame_once(suffix: str, fps: float, tmp_path: Path) -> None:
    """Prevents clips that stutter: at its own rate, a file gives each of its frames once."""
    levels = np.arange(0, 240, 12, dtype=np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (20, 16, 16, 3)).copy()
    path = tmp_path / f"clip{suffix}"
    write_video(path, frames, fps)
    rate = examine(path).fps
    assert rate == pytest.approx(fps, rel=5e-3)
    found = read_video(path, rate, start=0.5 / rate).frames.mean((1, 2, 3))
    assert found == pytest.approx(levels, abs=3)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_pauses_do_not_change_the_rate(suffix: str, tmp_path: Path) -> None:
    """Handles clips that pause: encoders store identical frames as one long one."""
    levels = np.array([0, 20, 40, 40, 40, 40, 40, 40, 60, 80, 100], np.uint8)
    path = tmp_path / f"clip{suffix}"
    write_video(path, np.broadcast_to(levels[:, None, None, None], (11, 16, 16, 3)).copy(), 10)
    rate = examine(path).fps
    assert read_video(path, rate, start=0.5 / rate).frames.mean((1, 2, 3)) == pytest.approx(levels, abs=3)


def test_files_say_nothing_about_systems(folder: Path) -> None:
    """Keeps studies blind: neither names nor contents of files give a system away. Noise looks like neither system."""
    paths = sorted((folder / "clips").iterdir())
    assert len(paths) == 3 * 2 + 1
    for path in paths:
        assert len(path.stem) == 16
        assert not any(name.encode() in path.read_bytes() for name in (*COLORS, "clip", "text"))
    means = [tuple(read_video(path, 8).frames.mean((0, 1, 2)).round(-1)) for path in paths]
    assert len(set(means)) == 3


def test_only_the_next_trial_takes_an_answer(folder: Path) -> None:
    """Prevents duplicate and out-of-order answers: the first one counts, and no trial is skipped."""
    study = Study(folder)
    study.add_raters(2)
    study.add_raters(1)
    assert [(rater.num_answered, rater.num_trials) for rater in study.raters()] == [(0, 5), (0, 5)]
    assert not study.answer(0, 1, {"preference": 1}, 1.0)
    assert study.answer(0, 0, {"preference": 1}, 1.0)
    assert not study.answer(0, 0, {"preference": -1}, 1.0)
    assert not study.answer(7, 0, {"preference": 1}, 1.0)
    assert [(each.place, each.values) for each in Study(folder).answers()] == [(0, {"preference": 1})]
    shown = study.shown(0)
    assert shown is not None
    assert shown.place == 1


@pytest.mark.parametrize(
    ("values", "seconds"),
    [({}, 1.0), ({"preference": 5}, 1.0), ({"looks": 1}, 1.0), ({"preference": 1}, float("nan"))],
)
def test_wrong_answers_are_refused(folder: Path, values: dict[str, int], seconds: float) -> None:
    """Keeps values that no question allows out of the tables."""
    with pytest.raises(ValueError, match="expected"):
        Study(folder).answer(0, 1, values, seconds)


def test_writers_at_once_store_each_answer_once(tmp_path: Path) -> None:
    """Supports two servers on one study: of simultaneous answers to a trial, only one is stored."""
    folder = make_study(tmp_path, 3, "--catches", "0", "--repeats", "0")
    Study(folder).add_raters(1)
    with ThreadPoolExecutor(4) as pool:
        for place in range(3):
            stored = pool.map(lambda _, place=place: Study(folder).answer(0, place, {"preference": 0}, 1.0), range(4))
            assert sorted(stored) == [False, False, False, True]
    assert Study(folder).shown(0) is None
    assert len(Study(folder).answers()) == 3


def test_a_lost_database_is_one_line(tmp_path: Path) -> None:
    """Reports a lost database without a traceback, and does not create an empty one in its place."""
    folder = make_study(tmp_path, 1)
    study = Study(folder)
    (folder / "study.sqlite").unlink()
    with pytest.raises(ValueError, match="cannot use"):
        study.add_raters(1)
    assert not (folder / "study.sqlite").exists()


def test_damaged_studies_are_refused(tmp_path: Path) -> None:
    """Refuses damaged studies at startup, not when the first rater arrives."""
    folder = make_study(tmp_path, 1)
    with pytest.raises(ValueError, match="holds no study"):
        Study(tmp_path)
    clip = next((folder / "clips").iterdir())
    clip.rename(tmp_path / clip.name)
    with pytest.raises(ValueError, match=r"lacks clips \(1\), the first is"):
        Study(folder)
    with sqlite3.connect(folder / "study.sqlite") as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(ValueError, match="version 9"):
        Study(folder)
    (folder / "study.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(ValueError, match="damaged"):
        Study(folder)
