"""Distances of clips from real clips with alpha, on any background: pure functions.

To compare a real clip with a clip, the real one is put on the color of the clip's border: a wrong background then makes
no difference, and a yellow face on yellow is as hard to see on both sides. The distance is the mean squared difference
of the pixels, plus `WEIGHT` times the dissimilarity of the differences of neighboring frames: one minus their cosine,
so that a clip that moves too much is no nearer to calm ones. Clips are compared as 17 frames of 32 x 32 pixels, 4 per
second, in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from cogvideo.media.colors import Pixels

WEIGHT = 0.01
"""Distance of movements that have nothing in common: about the pixel distance between an emoji and the one most like it
(median 0.012)."""
SIZE = 32
"""Side of the frames that are compared, in pixels."""
BORDER = 1 / 16
"""Width of the border as a share of the frame's side."""
EPS = 1e-9
"""Smallest product of movements, to avoid dividing by zero."""
BATCH = 64
"""Clips that are compared at a time, which bounds the memory."""


class ClipFeatures(NamedTuple):
    """Features to compare clips by, flattened, by color; both are linear in the pixels."""

    pixels: Float[Tensor, "clips colors features"]
    moves: Float[Tensor, "clips colors features"]
    """Differences of neighboring frames."""

    @classmethod
    def of(cls, clips: Float[Tensor, "clips frames height width colors"]) -> ClipFeatures:
        """Features of clips."""
        flat = "clips frames height width colors -> clips colors (frames height width)"
        return cls(rearrange(clips, flat), rearrange(clips.diff(dim=1), flat))


Gallery = tuple[ClipFeatures, ClipFeatures]
"""Real clips on black, and their transparency, one value for all colors. A clip on a color is `on_black + transparency
* color`, and so are its features."""


def gallery(
    on_black: UInt8[np.ndarray, "clips frames size size 3"], on_white: UInt8[np.ndarray, "clips frames size size 3"]
) -> Gallery:
    """Real clips from how they look on black and on white, which together give the alpha."""
    through = torch.from_numpy(on_white[..., :1]).float() - torch.from_numpy(on_black[..., :1]).float()
    return ClipFeatures.of(torch.from_numpy(on_black).float() / 255), ClipFeatures.of(through / 255)


def distances(clips: UInt8[np.ndarray, "clips frames size size 3"], real: Gallery) -> Float[Tensor, "clips real"]:
    """Distance of each clip from each real one put on the clip's own background."""
    found = []
    for start in range(0, len(clips), BATCH):
        some = clips[start : start + BATCH]
        grounds = torch.tensor(np.stack([border_color(clip) for clip in some])).float() / 255
        drawn, (on_black, transparency) = ClipFeatures.of(torch.from_numpy(some).float() / 255), real
        own, both, others = _products(drawn.pixels, on_black.pixels, transparency.pixels, grounds)
        squares = (own - 2 * both + others) / (3 * transparency.pixels.shape[-1])
        own, both, others = _products(drawn.moves, on_black.moves, transparency.moves, grounds)
        cosine = both / (own * others).sqrt().clamp(min=EPS)
        found.append(squares + WEIGHT * (1 - cosine))
    return torch.cat(found)


def _products(
    clips: Float[Tensor, "clips 3 features"],
    on_black: Float[Tensor, "real 3 features"],
    transparency: Float[Tensor, "real 1 features"],
    grounds: Float[Tensor, "clips 3"],
) -> tuple[Float[Tensor, "clips 1"], Float[Tensor, "clips real"], Float[Tensor, "clips real"]]:
    """Sums q · q, q · r and r · r over all features of clips q and real clips r on their backgrounds.

    With r = b + c a (b on black, transparency a, color c), these multiply out to products of matrices.
    """
    a, both, real = transparency[:, 0], torch.zeros(len(clips), len(on_black)), torch.zeros(len(clips), len(on_black))
    for color in range(3):
        q, b, c = clips[:, color], on_black[:, color], grounds[:, color, None]
        both += q @ b.T + c * (q @ a.T)
        real += b.square().sum(-1) + 2 * c * (a * b).sum(-1) + c**2 * a.square().sum(-1)
    return clips.square().sum((1, 2))[:, None], both, real


def ranks(distances: Float[Tensor, "clips real"], right: Sequence[int]) -> Int64[Tensor, " clips"]:
    """Rank of each clip's own real clip, given by its number: 1 if no other one is nearer."""
    return 1 + (distances < distances.gather(1, torch.tensor(right)[:, None])).sum(1)


def border_color(clip: Pixels) -> UInt8[np.ndarray, "3"]:
    """Median of the border's pixels in all frames, for each of red, green and blue."""
    width = max(1, round(clip.shape[1] * BORDER))
    inside = np.zeros(clip.shape[1:3], bool)
    inside[width:-width, width:-width] = True
    return np.median(clip[:, ~inside].reshape(-1, 3), 0).astype(np.uint8)


def nearest_name(color: UInt8[np.ndarray, "3"], names: dict[str, tuple[int, int, int]]) -> str:
    """The name of the nearest color in `names`."""
    return min(names, key=lambda name: float(np.square(color.astype(float) - names[name]).sum()))
