"""Nearest real clips: against a plain implementation of the distance, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cogvideo.data.frames import BACKGROUNDS
from cogvideo.evaluation.retrieval import WEIGHT, border_color, distances, gallery, nearest_name, ranks

NUM_CLIPS, SHAPE = 40, (17, 32, 32)


class Animations:
    """Random animations: moving colored blobs with soft edges."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        rows, columns = np.mgrid[:32, :32]
        self.alpha = np.zeros((NUM_CLIPS, *SHAPE, 1))
        for clip, frame in np.ndindex(NUM_CLIPS, SHAPE[0]):
            if frame == 0:
                centre, speed, radius = random.uniform(12, 20, 2), random.uniform(-0.2, 0.2, 2), random.uniform(4, 8)
            away = np.hypot(rows - centre[0] - speed[0] * frame, columns - centre[1] - speed[1] * frame)
            self.alpha[clip, frame, ..., 0] = np.clip(radius - away, 0, 1)
        self.colours = random.uniform(0, 255, (NUM_CLIPS, 1, 1, 1, 3))

    def on(self, colour: tuple[int, int, int]) -> np.ndarray:
        """All animations on a background color."""
        return (self.alpha * self.colours + (1 - self.alpha) * np.array(colour)).round().astype(np.uint8)


@pytest.fixture(scope="module")
def animations() -> Animations:
    return Animations()


def slow_distance(clip: np.ndarray, other: np.ndarray) -> float:
    """The definition: pixel differences, plus WEIGHT times the dissimilarity of frame-to-frame changes."""
    x, y = clip.astype(np.float64) / 255, other.astype(np.float64) / 255
    moves, others = (np.concatenate([each[t + 1] - each[t] for t in range(len(each) - 1)]).ravel() for each in (x, y))
    cosine = moves @ others / (np.linalg.norm(moves) * np.linalg.norm(others))
    return np.mean((x - y) ** 2) + WEIGHT * (1 - cosine)


def test_distance_is_that_of_clips_on_one_background(animations: Animations) -> None:
    """Checks the algebra that avoids putting real clips on a color: the result is the same, up to rounding."""
    colour = BACKGROUNDS["orange"]
    clips, black, white = (animations.on(each) for each in (colour, (0, 0, 0), (255, 255, 255)))
    fast = distances(clips[:5], gallery(black, white))
    through = (white[..., :1].astype(float) - black[..., :1]) / 255
    placed = black + through * np.array(colour)  # no second rounding
    for clip in range(5):
        slow = [slow_distance(clips[clip], other) for other in placed]
        np.testing.assert_allclose(fast[clip].numpy(), slow, atol=1e-5)


def test_real_clips_find_themselves_on_any_background(animations: Animations) -> None:
    """Checks the ceiling: real clips have rank 1 on any background; with shuffled answers, ranks are at chance."""
    real = gallery(animations.on((0, 0, 0)), animations.on((255, 255, 255)))
    for name in ("red", "white", "light blue"):
        found = distances(animations.on(BACKGROUNDS[name]), real)
        assert ranks(found, range(NUM_CLIPS)).tolist() == [1] * NUM_CLIPS
    shuffled = torch.randperm(NUM_CLIPS, generator=torch.Generator().manual_seed(0)).tolist()
    assert (ranks(found, shuffled) == 1).float().mean() < 0.1
    assert ranks(found, shuffled).float().mean() > NUM_CLIPS / 4


def test_a_calm_clip_of_a_lively_animation_is_of_that_one() -> None:
    """Guards lively animations: a version that moves too little must still match its own, not another calm one."""
    noise, shape = np.random.default_rng(0), (*SHAPE, 3)
    inside = np.zeros((*SHAPE, 1))
    inside[:, 8:24, 8:24] = 1
    blue, green = (inside * np.array(colour) for colour in ((0, 60, 200), (0, 120, 120)))
    lively, calm = blue + inside * noise.normal(0, 40, shape), green + inside * noise.normal(0, 2, shape)
    drawn = (blue + inside * noise.normal(0, 2, shape)).clip(0, 255).astype(np.uint8)[None]
    looks = [np.stack([lively, calm]) + (1 - inside) * ground for ground in (0, 255)]
    real = gallery(*(each.clip(0, 255).astype(np.uint8) for each in looks))
    assert ranks(distances(drawn, real), [0]).tolist() == [1]
    still = np.repeat(drawn[:, :1], SHAPE[0], 1)  # no movement at all
    assert ranks(distances(still, real), [0]).tolist() == [1]


def test_rank_counts_those_that_are_nearer() -> None:
    """Catches off-by-one errors: if two real clips are nearer, the right one is third; ties do not count."""
    far = torch.tensor([[0.5, 0.1, 0.2, 0.5], [0.0, 0.3, 0.3, 0.9]])
    assert ranks(far, [0, 0]).tolist() == [3, 1]
    assert ranks(far, [3, 2]).tolist() == [3, 2]


def test_border_has_the_background_that_is_named(animations: Animations) -> None:
    """Checks background detection: every named color is recognized, even if something touches the border."""
    for name, colour in BACKGROUNDS.items():
        clip = animations.on(colour)[0]
        clip[:, :, :8] = 200
        assert nearest_name(border_color(clip), BACKGROUNDS) == name
