"""Which of many real clips a clip is nearest to, whatever it stands on: pure functions.

Real clips have alpha. To compare one with a clip, it is put on the colour that the clip's border has: so a wrong
background is no difference, and a yellow face on yellow is as hard to see on both sides. The distance is the mean
squared difference of the pixels plus `WEIGHT` times that of the differences of neighbouring frames, with 17 frames of
32 x 32 pixels, 4 a second, in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

WEIGHT = 4.0
"""Weight of what moves: about what makes it count as much as what is there."""
SIZE = 32
"""Side of the frames that are compared, in pixels."""
BORDER = 1 / 16
"""Width of the border over the side of the frame."""
AT_ONCE = 64
"""Clips that are compared at a time, which bounds the memory."""


class Gallery(NamedTuple):
    """Real clips with alpha: a clip on a colour is `on_black + transparency * colour`, and so are its features."""

    on_black: Float[Tensor, "clips 3 features"]
    """Features of the clips on black, by colour."""
    transparency: Float[Tensor, "clips features"]
    """Features of what shows through of the background."""


def gallery(
    on_black: UInt8[np.ndarray, "clips frames size size 3"], on_white: UInt8[np.ndarray, "clips frames size size 3"]
) -> Gallery:
    """Real clips from how they look on black and on white, which together tell the alpha."""
    through = torch.from_numpy(on_white[..., :1]).float() - torch.from_numpy(on_black[..., :1]).float()
    return Gallery(features(torch.from_numpy(on_black).float() / 255), features(through / 255)[:, 0])


def features(pixels: Float[Tensor, "clips frames height width colours"]) -> Float[Tensor, "clips colours features"]:
    """Numbers whose squared differences add up to a colour's share of the distance; they are linear in the pixels."""
    moves = pixels.diff(dim=1)
    parts = [pixels / _count(pixels) ** 0.5, moves * (WEIGHT / _count(moves)) ** 0.5]
    flat = [
        rearrange(part, "clips frames height width colours -> clips colours (frames height width)") for part in parts
    ]
    return torch.cat(flat, -1)


def _count(pixels: Tensor) -> int:
    """Numbers that a mean over a clip of three colours is taken of."""
    return 3 * pixels[0, ..., 0].numel()


def distances(clips: UInt8[np.ndarray, "clips frames size size 3"], real: Gallery) -> Float[Tensor, "clips real"]:
    """Of each clip from each real one put on the clip's own background.

    With features q of the clip, b on black and a of the transparency, |q - b - c a|² is multiplied out for each colour
    c, which leaves products of matrices.
    """
    return torch.cat([_distances(clips[start : start + AT_ONCE], real) for start in range(0, len(clips), AT_ONCE)])


def _distances(clips: UInt8[np.ndarray, "clips frames size size 3"], real: Gallery) -> Float[Tensor, "clips real"]:
    grounds = torch.tensor(np.stack([border_colour(clip) for clip in clips])).float() / 255
    queries, a = features(torch.from_numpy(clips).float() / 255), real.transparency
    total = torch.zeros(len(clips), len(a))
    for colour in range(3):
        q, b, c = queries[:, colour], real.on_black[:, colour], grounds[:, colour, None]
        total += _square(q)[:, None] - 2 * q @ b.T + _square(b)
        total += 2 * c * (_dot(b, a) - q @ a.T) + c**2 * _square(a)
    return total


def _dot(x: Float[Tensor, "rows features"], y: Float[Tensor, "rows features"]) -> Float[Tensor, " rows"]:
    return (x * y).sum(-1)


def _square(x: Float[Tensor, "rows features"]) -> Float[Tensor, " rows"]:
    return _dot(x, x)


def ranks(distances: Float[Tensor, "clips real"], right: Sequence[int]) -> Int64[Tensor, " clips"]:
    """Rank of the right real clip of each clip: 1 if no other one is nearer.

    Args:
        distances: of each clip from each real one.
        right: number of the real clip that each clip should show.
    """
    own = distances.gather(1, torch.tensor(right)[:, None])
    return 1 + (distances < own).sum(1)


def border_colour(clip: UInt8[np.ndarray, "frames height width 3"]) -> UInt8[np.ndarray, "3"]:
    """Median of the border's pixels in all frames, for each of red, green and blue."""
    width = max(1, round(clip.shape[1] * BORDER))
    inside = np.zeros(clip.shape[1:3], bool)
    inside[width:-width, width:-width] = True
    return np.median(clip[:, ~inside].reshape(-1, 3), 0).astype(np.uint8)


def nearest_name(colour: UInt8[np.ndarray, "3"], names: dict[str, tuple[int, int, int]]) -> str:
    """The name of the nearest of some colours."""
    return min(names, key=lambda name: float(np.square(colour.astype(float) - names[name]).sum()))
