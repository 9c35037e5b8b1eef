"""The recipe of the model in the box: its captions, and the public animations laid out as clips."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvideo.video import read_video

RECIPE = Path(__file__).parent.parent / "recipes" / "pocket"


def captions() -> list[dict[str, str]]:
    with (RECIPE / "captions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_animation_has_a_caption_of_its_own() -> None:
    """Guards the table: 706 files, each once, with a caption that names no background."""
    rows = captions()
    assert len(rows) == len({row["file"] for row in rows}) == 706
    assert all(row["caption"].strip() == row["caption"] != "" for row in rows)
    assert not [row for row in rows if row["caption"].endswith("background")]


def test_the_chosen_animations_look_different() -> None:
    """Guards the choice that a small model learns: 211 of them, none twice in another colour of skin."""
    rows = [row for row in captions() if row["pocket"]]
    assert {row["pocket"] for row in rows} == {"yes"}
    assert len(rows) == len({row["caption"] for row in rows}) == 211
    assert not [row for row in rows if "skin" in row["caption"] or "skin" in row["file"]]


@pytest.mark.parametrize(("options", "number"), [((), 211), (("--all",), 706)])
def test_animations_become_clips(tmp_path: Path, options: tuple[str, ...], number: int) -> None:
    """Guards the way from the public files to training data: size, time and transparency stay what they were, and the
    table has the chosen ones alone unless all are asked for."""
    source, name = tmp_path / "gifs", Path(captions()[0]["file"])
    source.mkdir()
    frames = []
    for place in range(3):
        pixels = np.zeros((512, 512, 4), np.uint8)
        pixels[128:384, 128 * place : 128 * place + 128] = (250, 0, 0, 255)
        frames.append(Image.fromarray(pixels))
    path = source / name.with_suffix(".gif").name
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500, loop=0, disposal=2)
    command = [sys.executable, RECIPE / "layout.py", source, tmp_path / "out", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"{number - 1} animations are missing" in done.stderr
    with (tmp_path / "out" / "captions.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [row for row in captions() if options or row["pocket"]]
    video = read_video(tmp_path / "out" / name, 2, background=(0, 0, 250))
    assert video.has_alpha
    assert video.frames.shape == (3, 128, 128, 3)
    for place, frame in enumerate(video.frames):
        assert np.abs(frame[64, 32 * place + 16].astype(int) - (250, 0, 0)).max() < 9
        assert np.abs(frame[64, (32 * place + 80) % 128].astype(int) - (0, 0, 250)).max() < 9
