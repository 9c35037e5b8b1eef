"""Movement of clips, against real clips of the same prompts: pure functions of pixels at one size and rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from cogvideo.media.colors import Pixels

STATIC_ENERGY = 2e-5
"""Energy below which a clip counts as static: about a change of one level in 255 of every pixel from frame to frame.
The calmest clip of the World has twenty times as much."""


class Motion(NamedTuple):
    """Measures of one clip."""

    energy: float
    """Mean squared difference of neighboring frames, pixels in [0, 1]."""
    flicker: float
    """Flicker in the calmer half of the clip's pixels, in levels of 255; see `flicker`."""


class Movement(NamedTuple):
    """Measures of many clips, against real ones of the same prompts."""

    energy_ratio: float
    """Their mean energy divided by that of the real clips; 1 is equal motion, less is calmer."""
    static: float
    """Share of the clips whose energy is below `STATIC_ENERGY`."""
    flicker: float
    """Mean flicker, in levels of 255."""


def measure(clip: Pixels) -> Motion:
    """Energy and flicker of a clip of three frames or more."""
    pixels = clip.astype(np.float32) / 255
    return Motion(float(np.square(np.diff(pixels, axis=0)).mean()), flicker(pixels))


def flicker(pixels: Float32[np.ndarray, "frames height width 3"]) -> float:
    """Flicker of pixels that should be still, in levels of 255.

    The second difference in time, `x[t - 1] - 2 x[t] + x[t + 1]`, is zero for pixels that are still or change evenly.
    Its mean square is taken for each pixel over time and colors, then the mean over the calmer half of the clip's
    pixels, then the root: moving things are in the other half.
    """
    unrest = np.square(np.diff(pixels, 2, axis=0)).mean((0, 3)).flatten()
    calmer = np.sort(unrest)[: (len(unrest) + 1) // 2]
    return 255 * float(calmer.mean()) ** 0.5


def movement(clips: Sequence[Motion], real: Sequence[Motion]) -> Movement:
    """Clips compared with real ones of the same prompts, in any order."""
    (energies, flickers), (real_energies, _) = np.transpose(clips), np.transpose(real)
    ratio = energies.mean() / real_energies.mean()
    return Movement(float(ratio), float((energies < STATIC_ENERGY).mean()), float(flickers.mean()))
