"""Preference statistics against published figures and slow, obvious oracles."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest

from cogvideo.evaluation import preferences
from cogvideo.evaluation.preferences import (
    Interval,
    PairwiseComparison,
    agreement,
    bootstrap,
    outcomes,
    sample_size,
    share,
    strengths,
)

SYSTEMS = ("a", "b", "c")
KRIPPENDORFF = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
"""Four observers of twelve units, "Computing Krippendorff's alpha-reliability" (2011), section C; ordinal: 0.815."""


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(successes: int, total: int, low: float, high: float) -> None:
    """Checks intervals of shares against Newcombe (1998), table I, method 3."""
    assert share(successes, total) == pytest.approx((successes / total, low, high), abs=1e-4)


def test_intervals_of_none_and_all_end_there() -> None:
    """Keeps bounds such as 2.78e-15% out of tables."""
    assert share(0, 6).low == 0
    assert share(6, 6).high == 1


def test_share_of_nothing_may_be_anything() -> None:
    """Prevents a division by zero in reports without answers."""
    assert math.isnan(share(0, 0).value)
    assert share(0, 0)[1:] == (0.0, 1.0)


@pytest.mark.parametrize(("part", "margin"), [(0.5, 0.05), (0.5, 0.2), (0.9, 0.05), (0.0, 0.1), (1.0, 0.1)])
def test_sample_size_is_the_smallest(part: float, margin: float) -> None:
    """Checks the planning of studies against a search upwards from one answer."""

    def half_width(total: int) -> float:
        z = 1.959964
        return z / (1 + z**2 / total) * math.sqrt(part * (1 - part) / total + z**2 / (4 * total**2))

    assert sample_size(part, margin) == next(total for total in range(1, 2000) if half_width(total) <= margin)


def simulated(truth: dict[str, float], prompts: int, raters: int, ties: float = 0.0) -> list[PairwiseComparison]:
    """Comparisons by simulated Bradley-Terry raters."""
    random = Random(0)
    found = []
    for rater in range(raters):
        for prompt in range(prompts):
            for first, second in (("a", "b"), ("a", "c"), ("b", "c")):
                is_first = random.random() < 1 / (1 + math.exp(truth[second] - truth[first]))
                outcome = 0 if random.random() < ties else 2 * is_first - 1
                found.append(PairwiseComparison(rater, prompt, first, second, outcome))
    return found


def slow_strengths(comparisons: list[PairwiseComparison]) -> list[float]:
    """Hunter's MM algorithm (2004), one comparison at a time. A tie is half a win, and each pair gets one extra tie."""
    pairs = {(each.first, each.second) for each in comparisons}
    games = comparisons + [PairwiseComparison(0, 0, first, second, 0) for first, second in pairs]
    weight = dict.fromkeys(SYSTEMS, 1.0)
    for _ in range(500):
        new = {}
        for system in SYSTEMS:
            won, spread = 0.0, 0.0
            for _, _, first, second, outcome in games:
                if system in (first, second):
                    won += (1 + (outcome if system == first else -outcome)) / 2
                    spread += 1 / (weight[first] + weight[second])
            new[system] = won / spread
        weight = new
    logs = [math.log(weight[system]) for system in SYSTEMS]
    return [each - sum(logs) / len(logs) for each in logs]


def test_bradley_terry_equals_a_slow_oracle() -> None:
    """Checks strengths, with ties, against a plain fixed-point iteration."""
    games = simulated({"a": 0.8, "b": 0.0, "c": -0.8}, 6, 2, ties=0.2)
    found = strengths(outcomes(games, SYSTEMS).sum(-1))
    assert found == pytest.approx(slow_strengths(games), abs=1e-4)


def test_a_simulated_taste_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks counts, strengths and bootstrap together: intervals contain the truth, and shrink with more prompts."""
    monkeypatch.setattr(preferences, "NUM_DRAWS", 200)
    truth = {"a": 0.8, "b": 0.0, "c": -0.8}
    widths = []
    for prompts in (10, 90):
        games = simulated(truth, prompts, 3)
        won = outcomes(games, SYSTEMS)
        found = bootstrap(
            lambda weights, won=won: strengths(won @ weights),
            [each.rater for each in games],
            [each.prompt for each in games],
        )
        assert all(each.low <= truth[system] <= each.high for system, each in zip(SYSTEMS, found, strict=True))
        widths.append(found[0].high - found[0].low)
    assert widths[1] < widths[0] / 1.5


def test_a_system_that_always_wins_is_finite() -> None:
    """Prevents infinite strengths: with one virtual tie per pair, ten wins in ten give log(10.5 / 0.5)."""
    games = [PairwiseComparison(0, prompt, "a", "b", 1) for prompt in range(10)]
    found = strengths(outcomes(games, ("a", "b")).sum(-1))
    assert found[0] - found[1] == pytest.approx(math.log(10.5 / 0.5), abs=1e-6)


def test_systems_that_never_met_have_no_strengths() -> None:
    """Prevents rankings that no answer supports."""
    games = [PairwiseComparison(0, 0, "a", "b", 1)]
    with pytest.raises(ValueError, match="never compared"):
        strengths(outcomes(games, SYSTEMS).sum(-1))


def test_bootstrap_draws_whole_raters_and_prompts() -> None:
    """Keeps intervals honest: a hundred answers by one rater to one prompt are one opinion, not a hundred."""

    def mean(weights: np.ndarray) -> np.ndarray:
        if not weights.any():
            raise ValueError("nothing was drawn")
        return np.average(values, weights=weights, axis=0, keepdims=True)

    values = np.array([0.0] * 50 + [1.0] * 50)
    assert [math.isnan(each) for each in bootstrap(mean, [0] * 100, [0] * 100)[0]] == [False, True, True]
    assert bootstrap(mean, [0] * 50 + [1] * 50, [0] * 100)[0] == Interval(0.5, 0.0, 1.0)
    assert bootstrap(mean, [0] * 100, [0] * 50 + [1] * 50)[0] == Interval(0.5, 0.0, 1.0)
    values = np.full(100, 2.0)  # unanimous answers bound nothing
    assert [math.isnan(each) for each in bootstrap(mean, [0] * 50 + [1] * 50, [0] * 100)[0]] == [False, True, True]


def test_alpha_as_published() -> None:
    """Checks the agreement of raters, with missing answers, against the published value."""
    rows = [line.split() for line in KRIPPENDORFF.strip().splitlines()]
    ratings = [
        (rater, unit, int(cell)) for rater, row in enumerate(rows) for unit, cell in enumerate(row) if cell != "."
    ]
    assert agreement(ratings) == pytest.approx(0.815, abs=1e-3)


@pytest.mark.parametrize("ratings", [[], [(0, 0, 1), (0, 1, 2)], [(0, 0, 1), (1, 0, 1)], [(0, 0, 1), (1, 1, 2)]])
def test_alpha_of_too_little_is_not_a_number(ratings: list[tuple[int, object, int]]) -> None:
    """Gives NaN without answers, with a single rater, without a common clip, and if all answers are equal."""
    assert math.isnan(agreement(ratings))
