"""How much clips move: what stands still, moves alike, moves less, or flickers."""

from __future__ import annotations

import numpy as np
import pytest

from cogvideo import world
from cogvideo.evaluation.motion import STATIC, measure, movement


def clips() -> list[np.ndarray]:
    return [world.render(world.scene(number), 64) for number in range(6)]


def test_equal_clips_move_alike() -> None:
    """Guards the ratio that results are quoted with: 1 for the real clips themselves, of which none is static."""
    real = [measure(clip) for clip in clips()]
    ratio, static, _ = movement(real, real)
    assert ratio == 1
    assert static == 0


def test_energy_is_the_mean_square_of_changes() -> None:
    """Guards the unit: one pixel of one colour that jumps from black to white, written out by hand."""
    clip = np.zeros((3, 4, 4, 3), np.uint8)
    clip[1:, 2, 3, 0] = 255
    assert measure(clip).energy == pytest.approx(1 / (2 * 4 * 4 * 3))


def test_still_clip_is_static() -> None:
    """Guards against a model that repeats its first frame and goes unnoticed."""
    real = [measure(clip) for clip in clips()]
    still = [measure(np.repeat(clip[:1], len(clip), 0)) for clip in clips()]
    assert movement(still, real) == (0, 1, 0)
    assert movement([*still[:3], *real[3:]], real).static == 0.5


def test_least_visible_motion_is_not_static() -> None:
    """Guards the threshold: every real clip lies well above it, the noise of one level below."""
    assert min(measure(clip).energy for clip in clips()) > 10 * STATIC
    one_level = np.full((9, 8, 8, 3), 100, np.uint8)
    one_level[1::2] += 1
    assert measure(one_level).energy < STATIC


def test_flicker_is_unrest_of_what_should_be_still() -> None:
    """Guards against taking motion for flicker: a square that moves has none, a background that alternates does."""
    moving = np.full((17, 32, 32, 3), 90, np.uint8)
    for number, frame in enumerate(moving):
        frame[4:10, number : number + 6] = 250
    assert measure(moving).flicker == 0
    alternating = moving.copy()
    alternating[::2] += 3
    assert measure(alternating).flicker == pytest.approx(6, rel=1e-3)  # 3 - 2 * 0 + 3 levels
