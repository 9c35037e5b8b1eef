"""The examples, run as a reader runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvideo.media.video import read_video

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.soak
def test_the_demo(tmp_path: Path) -> None:
    """Guards `make demo`: three clips of 33 frames and a picture of them; the third goes on from the first."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", tmp_path / "out"],
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = ["emoji.mp4", "world.mp4", "moving-on.mp4", "contact_sheet.png"]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [str(tmp_path / "out" / name) for name in names]
    emoji, world, moving = (read_video(tmp_path / "out" / name, 8).frames.astype(int) for name in names[:3])
    assert len(emoji) == len(world) == len(moving) == 33
    distance = [np.abs(moving[0] - frame).mean() for frame in (emoji[-1], world[-1], world[0])]
    assert min(distance) == distance[0]
    with Image.open(tmp_path / "out" / names[3]) as sheet:
        assert sheet.width > 9 * emoji.shape[2]
