"""Which of many real clips a clip is nearest to, whatever it stands on: pure functions.

Real clips have alpha. To compare one with a clip, it is put on the color that the clip's border has: so a wrong
background is no difference, and a yellow face on yellow is as hard to see on both sides. The distance is the mean
squared difference of the pixels, plus `WEIGHT` times how unlike the differences of neighboring frames are: one less
their cosine, so that a clip that moves too much is no nearer to calm ones. Clips are compared as 17 frames of 32 x 32
pixels, 4 a second, in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

WEIGHT = 0.01
"""Distance of movements that have nothing in common: about what pixels of an emoji differ from those of the one that is
most like it (median 0.012)."""
SIZE = 32
"""Side of the frames that are compared, in pixels."""
BORDER = 1 / 16
"""Width of the border over the side of the frame."""
TINY = 1e-9
"""Products of movements that are none."""
AT_ONCE = 64
"""Clips that are compared at a time, which bounds the memory."""


class Features(NamedTuple):
    """Features by which clips are compared, flat, by color; both are linear in the pixels."""

    pixels: Float[Tensor, "clips colors features"]
    """All of them."""
    moves: Float[Tensor, "clips colors features"]
    """Differences of neighboring frames."""


class Gallery(NamedTuple):
    """Real clips with alpha: a clip on a color is `on_black + transparency * color`, and so are its features."""

    on_black: Features
    """Of the clips on black."""
    transparency: Features
    """Features of how much background shows through; one for all colors."""


def gallery(
    on_black: UInt8[np.ndarray, "clips frames size size 3"], on_white: UInt8[np.ndarray, "clips frames size size 3"]
) -> Gallery:
    """Real clips from how they look on black and on white, which together tell the alpha."""
    through = torch.from_numpy(on_white[..., :1]).float() - torch.from_numpy(on_black[..., :1]).float()
    return Gallery(features(torch.from_numpy(on_black).float() / 255), features(through / 255))


def features(pixels: Float[Tensor, "clips frames height width colors"]) -> Features:
    """What is compared of clips."""
    flat = "clips frames height width colors -> clips colors (frames height width)"
    return Features(rearrange(pixels, flat), rearrange(pixels.diff(dim=1), flat))


def distances(clips: UInt8[np.ndarray, "clips frames size size 3"], real: Gallery) -> Float[Tensor, "clips real"]:
    """Of each clip from each real one put on the clip's own background."""
    return torch.cat([_distances(clips[start : start + AT_ONCE], real) for start in range(0, len(clips), AT_ONCE)])


def _distances(clips: UInt8[np.ndarray, "clips frames size size 3"], real: Gallery) -> Float[Tensor, "clips real"]:
    grounds = torch.tensor(np.stack([border_color(clip) for clip in clips])).float() / 255
    pixels, moves = (
        _products(*each, grounds) for each in zip(features(torch.from_numpy(clips).float() / 255), *real, strict=True)
    )
    squares = pixels.of_clips - 2 * pixels.of_both + pixels.of_real
    cosine = moves.of_both / (moves.of_clips * moves.of_real).sqrt().clamp(min=TINY)
    return squares / (3 * real.transparency.pixels.shape[-1]) + WEIGHT * (1 - cosine)


class _Products(NamedTuple):
    """Sums over all features of clips q and real clips r."""

    of_clips: Float[Tensor, "clips 1"]
    """q · q."""
    of_both: Float[Tensor, "clips real"]
    """q · r."""
    of_real: Float[Tensor, "clips real"]
    """r · r, which depends on the clip's background."""


def _products(
    clips: Float[Tensor, "clips 3 features"],
    on_black: Float[Tensor, "real 3 features"],
    transparency: Float[Tensor, "real 1 features"],
    grounds: Float[Tensor, "clips 3"],
) -> _Products:
    """With r = b + c a for b on black, a of the transparency and color c, multiplied out: products of matrices."""
    a, both, real = transparency[:, 0], torch.zeros(len(clips), len(on_black)), torch.zeros(len(clips), len(on_black))
    for color in range(3):
        q, b, c = clips[:, color], on_black[:, color], grounds[:, color, None]
        both += q @ b.T + c * (q @ a.T)
        real += _dot(b, b) + 2 * c * _dot(a, b) + c**2 * _dot(a, a)
    return _Products(clips.square().sum((1, 2))[:, None], both, real)


def _dot(x: Float[Tensor, "rows features"], y: Float[Tensor, "rows features"]) -> Float[Tensor, " rows"]:
    return (x * y).sum(-1)


def ranks(distances: Float[Tensor, "clips real"], right: Sequence[int]) -> Int64[Tensor, " clips"]:
    """Rank of the right real clip of each clip: 1 if no other one is nearer.

    Args:
        distances: of each clip from each real one.
        right: number of the real clip that each clip should show.
    """
    own = distances.gather(1, torch.tensor(right)[:, None])
    return 1 + (distances < own).sum(1)


def border_color(clip: UInt8[np.ndarray, "frames height width 3"]) -> UInt8[np.ndarray, "3"]:
    """Median of the border's pixels in all frames, for each of red, green and blue."""
    width = max(1, round(clip.shape[1] * BORDER))
    inside = np.zeros(clip.shape[1:3], bool)
    inside[width:-width, width:-width] = True
    return np.median(clip[:, ~inside].reshape(-1, 3), 0).astype(np.uint8)


def nearest_name(color: UInt8[np.ndarray, "3"], names: dict[str, tuple[int, int, int]]) -> str:
    """The name of the nearest of some colors."""
    return min(names, key=lambda name: float(np.square(color.astype(float) - names[name]).sum()))
