"""Motion of clips: those that stand still, move as much as real ones, move less, or flicker."""

from __future__ import annotations

import numpy as np
import pytest

from cogvideo import world
from cogvideo.evaluation.motion import STATIC_ENERGY, measure, movement


def clips() -> list[np.ndarray]:
    return [world.render(world.scene(number), 64) for number in range(6)]


def test_equal_clips_move_alike() -> None:
    """Checks the reported ratio: real clips compared with themselves have 1, and none is static."""
    real = [measure(clip) for clip in clips()]
    ratio, static, _ = movement(real, real)
    assert ratio == 1
    assert static == 0


def test_energy_is_the_mean_square_of_changes() -> None:
    """Checks the unit of energy: one channel of one pixel jumps from 0 to 255."""
    clip = np.zeros((3, 4, 4, 3), np.uint8)
    clip[1:, 2, 3, 0] = 255
    assert measure(clip).energy == pytest.approx(1 / (2 * 4 * 4 * 3))


def test_still_clip_is_static() -> None:
    """Catches models that just repeat their first frame."""
    real = [measure(clip) for clip in clips()]
    still = [measure(np.repeat(clip[:1], len(clip), 0)) for clip in clips()]
    assert movement(still, real) == (0, 1, 0)
    assert movement([*still[:3], *real[3:]], real).static == 0.5


def test_least_visible_motion_is_not_static() -> None:
    """Checks the threshold: every real clip is well above it, flicker of one level is below."""
    assert min(measure(clip).energy for clip in clips()) > 10 * STATIC_ENERGY
    one_level = np.full((9, 8, 8, 3), 100, np.uint8)
    one_level[1::2] += 1
    assert measure(one_level).energy < STATIC_ENERGY


def test_flicker_is_unrest_of_what_should_be_still() -> None:
    """Keeps motion from counting as flicker: a moving square has none, an alternating background does."""
    moving = np.full((17, 32, 32, 3), 90, np.uint8)
    for number, frame in enumerate(moving):
        frame[4:10, number : number + 6] = 250
    assert measure(moving).flicker == 0
    alternating = moving.copy()
    alternating[::2] += 3
    assert measure(alternating).flicker == pytest.approx(6, rel=1e-3)  # 3 - 2 * 0 + 3 levels
