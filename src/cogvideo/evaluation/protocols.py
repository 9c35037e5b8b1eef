"""Published protocols of FVD: one entry each, with everything that affects their figures.

Sources: google-research/frechet_video_distance (`tfhub`), songweige/TATS (`tats`), universome/stylegan-v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from cogvideo.config import Limit, Limited, Positive
from cogvideo.evaluation.distribution import (
    InceptionScore,
    frechet_distance,
    frechet_distance_float32,
    inception_score,
    polynomial_mmd,
)
from cogvideo.evaluation.networks.i3d import SIDE
from cogvideo.media.colors import Pixels

MIN_RELIABLE_CLIPS = 2048
"""Number of clips below which FVD reflects the number more than the content of clips."""


Several = Annotated[int, Limit(lambda number: number > 1, "2 or more")]


@dataclass(frozen=True)
class Protocol(Limited):
    """Settings of one implementation."""

    resize: Literal["legacy", "half-pixel"]
    """Resizing of frames to the 224 x 224 pixels of I3D: as in TensorFlow 1, or as in PyTorch. Both are bilinear,
    without antialiasing, and ignore the aspect ratio."""
    eps: float
    """Constant of I3D's normalization."""
    ddof: int
    """Covariances are divided by the number of clips minus this."""
    dtype: Literal["float32", "float64"]
    """Precision of the Frechet distance."""
    real: Literal["random", "anywhere"]
    """Windows of real clips: one at random in each video, or drawn from all windows, where long videos count more."""
    order: Literal["shuffled", "sorted"]
    """Order of the videos; the first ones are used."""
    size: Positive[int] | None
    """Side in pixels to which clips are reduced first, cropped to the center; None keeps their size."""
    antialias: bool
    """True if this reduction is antialiased."""
    splits: int
    """Number of parts for the Inception Score."""
    score_eps: float
    """Constant inside its logarithm."""
    score_seed: int | None
    """Seed that shuffles clips for it; None keeps their order."""
    clips: Several = MIN_RELIABLE_CLIPS
    """Number of clips on each side."""
    score_clips: Several = MIN_RELIABLE_CLIPS
    """Number of clips for the Inception Score."""
    frames: Positive[int] = 16
    """Frames per clip."""
    step: Positive[int] = 1
    """Frames of the file from one frame of a clip to the next."""

    @property
    def span(self) -> int:
        """Frames of the file from the first to the last of a clip, inclusive."""
        return (self.frames - 1) * self.step + 1

    def reduced(self, frames: Pixels, size: int | None) -> UInt8[np.ndarray, "frames rows columns 3"]:
        """Frames in a square: the shorter side becomes `size`, and the longer one is cropped to its center."""
        height, width = frames.shape[1:3]
        if size is None or (height, width) == (size, size):
            return frames
        scale = size / min(height, width)
        rows, columns = round(height * scale), round(width * scale)
        top, left = (rows - size) // 2, (columns - size) // 2
        whole = resize(_to_float(frames), (rows, columns), self.antialias)
        square = whole[..., top : top + size, left : left + size].clamp(0, 255)
        levels = square.round() if self.antialias else square  # TATS truncates
        return rearrange(levels.byte(), "frames colors rows columns -> frames rows columns colors").contiguous().numpy()

    def to_i3d(self, frames: Pixels, device: str = "cpu") -> Float[Tensor, "3 frames rows columns"]:
        """Frames as I3D expects them, on a device, in [-1, 1]."""
        way = resize_legacy if self.resize == "legacy" else resize
        pixels = way(_to_float(frames, device), (SIDE, SIDE)) / 127.5 - 1
        return rearrange(pixels, "frames colors rows columns -> colors frames rows columns")

    def fvd(self, real: Float[Tensor, "clips features"], generated: Float[Tensor, "clips features"]) -> float:
        """Frechet video distance of I3D's logits."""
        if self.dtype == "float32":
            return frechet_distance_float32(real, generated)
        return frechet_distance(real, generated, self.ddof)

    def kvd(self, real: Float[Tensor, "clips features"], generated: Float[Tensor, "clips features"]) -> float:
        """Kernel video distance of the same logits, which is the same in all published implementations."""
        return polynomial_mmd(real, generated)

    def inception_score(self, logits: Float[Tensor, "clips classes"]) -> InceptionScore:
        """Inception Score of C3D's logits."""
        return inception_score(torch.softmax(logits.double(), 1), self.splits, self.score_eps, self.score_seed)


PROTOCOLS = {
    "tfhub": Protocol(
        resize="legacy",
        eps=1e-3,
        ddof=1,
        dtype="float64",
        real="random",
        order="shuffled",
        size=None,
        antialias=True,
        splits=1,
        score_eps=1e-20,
        score_seed=None,
    ),
    "tats": Protocol(
        resize="half-pixel",
        eps=1e-5,
        ddof=1,
        dtype="float32",
        real="anywhere",
        order="shuffled",
        size=128,
        antialias=False,
        splits=1,
        score_eps=1e-20,
        score_seed=None,
        score_clips=10_000,
    ),
    "stylegan-v": Protocol(
        resize="half-pixel",
        eps=1e-3,
        ddof=0,
        dtype="float64",
        real="random",
        order="sorted",
        size=None,
        antialias=True,
        splits=10,
        score_eps=0.0,
        score_seed=42,
    ),
}
"""Protocols by name. Where an implementation has no Inception Score, TGAN-v2's is used."""


def _to_float(frames: Pixels, device: str = "cpu") -> Float[Tensor, "frames 3 height width"]:
    pixels = torch.from_numpy(frames).to(device)
    return rearrange(pixels, "frames rows columns colors -> frames colors rows columns").float()


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
