"""Resizing as in the published protocols. Libraries place samples differently, which changes FVD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize(
    frames: Float[Tensor, "batch channels height width"], size: tuple[int, int], antialias: bool = False
) -> Float[Tensor, "batch channels rows columns"]:
    """Bilinear, with pixels as areas, as in PyTorch and TensorFlow 2 (`half_pixel_centers`)."""
    return F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=antialias)


def resize_legacy(
    frames: Float[Tensor, "batch channels height width"], size: tuple[int, int]
) -> Float[Tensor, "batch channels rows columns"]:
    """Bilinear as in TensorFlow 1, which the official FVD uses: pixel i of n is taken at `i / n` of the frame."""
    for dim, length in zip((2, 3), size, strict=True):
        before = frames.shape[dim]
        places = torch.arange(length, dtype=torch.float32, device=frames.device) * (before / length)
        first = places.long()
        second = (first + 1).clamp_max(before - 1)
        weights = (places - first).to(frames.dtype)
        if dim == 2:
            weights = weights[:, None]
        frames = torch.lerp(frames.index_select(dim, first), frames.index_select(dim, second), weights)
    return frames
