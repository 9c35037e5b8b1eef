"""The smoke recipe, as a user runs it: the whole chain from clips to a video, with every stage learning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cogvideo.bundle.model import CogVideo
from cogvideo.media.video import read_video

ROOT = Path(__file__).parents[1]
FALLS = {"image": 1 / 2, "sequential": 1 / 4, "interpolation": 1 / 10, "superres": 1 / 3}
"""Minimum share by which the loss falls; comments in the recipe say the same."""


@pytest.mark.soak
def test_the_whole_chain(tmp_path: Path) -> None:
    """Guards the user's path: each command finds what the previous one wrote, and each trained stage learns."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "recipes" / "smoke" / "run.sh", tmp_path],
        env=os.environ | {"PATH": binaries, "OMP_NUM_THREADS": "1"},  # other tests run at the same time
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for stage, share in FALLS.items():
        lines = (tmp_path / "model" / f".{stage}-run" / "metrics.jsonl").read_text().splitlines()
        losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        assert losses[-1] < losses[0] * (1 - share), stage
    model = CogVideo.from_pretrained(tmp_path / "model")
    assert {"base", "sequential", "interpolation", "superres", "text", "image_tokenizer"} <= set(model.components)
    frames = read_video(tmp_path / "ball.mp4", 8).frames
    assert frames.shape == (33, 96, 96, 3)
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 0  # something moves
    assert "superres" in (tmp_path / "report.html").read_text()
