"""Resizing against TensorFlow's output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cogvideo.evaluation.protocols import resize, resize_legacy

GOLDEN = np.load(Path(__file__).parents[1] / "golden/networks/resize_golden.npz")
WAYS = {
    "tf1_legacy": resize_legacy,
    "tf2_halfpixel": resize,
    "tf2_halfpixel_antialias": lambda frames, size: resize(frames, size, antialias=True),
}


def resized(direction: str, way: str) -> NDArray[np.float32]:
    frames = torch.from_numpy(GOLDEN[f"{direction}_in"]).permute(0, 3, 1, 2).float()
    return WAYS[way](frames, (28, 28)).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("way", WAYS)
def test_pixels_are_those_of_tensorflow(direction: str, way: str) -> None:
    """Guards the protocols: on noise, versions of one library differ by tens of gray levels."""
    np.testing.assert_allclose(resized(direction, way), GOLDEN[f"{direction}_{way}"], rtol=0, atol=1e-3)


def test_a_frame_of_that_size_stays() -> None:
    """Leaves data that was prepared at the network's size unchanged."""
    frames = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_legacy(frames, (6, 8)), frames)
    assert torch.equal(resize(frames, (6, 8)), frames)
