"""Comparison of variants: paired intervals, points of comparison, and which runs are compared."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cogvideo.report.ablation import CLIPS, PACE, SAMPLES, TIME, Paces, SeedFigure, compare, levels, paired
from cogvideo.report.runs import Curve
from cogvideo.training.ablation import Ablation, Experiment
from cogvideo.training.optim import StageOptimization


def curve(*points: tuple[int, float]) -> Curve:
    steps, values = zip(*points, strict=True)
    return Curve(np.array(steps, np.int64), np.array(values, np.float64))


def coverage(half: float, freedom: int, parts: int = 20_000) -> float:
    """Probability that Student's t lies within `half` of zero, by the midpoint rule."""
    width = 2 * half / parts
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    middles = (-half + (number + 0.5) * width for number in range(parts))
    return sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) * width for x in middles)


@pytest.mark.parametrize("count", range(2, 11))
def test_paired_intervals_hold_95_percent(count: int) -> None:
    """Checks the intervals over seeds against an integral of the density."""
    values = [0.3 + 0.1 * (number * number % 7) for number in range(count)]
    found = paired(values)
    assert found is not None
    mean = sum(values) / count
    error = math.sqrt(sum((each - mean) ** 2 for each in values) / (count - 1) / count)
    assert found.value == pytest.approx(mean)
    assert (found.low + found.high) / 2 == pytest.approx(mean)
    assert coverage((found.high - mean) / error, count - 1) == pytest.approx(0.95, abs=1e-4)


def test_one_seed_has_no_interval() -> None:
    """Prevents intervals from fewer than two seeds."""
    assert paired([]) is None
    assert paired([1.0]) is None


def walked(line: Curve, pace: float, moment: float) -> float:
    """The value of a curve at a moment, interpolated point by point."""
    points = [(step * pace, value) for step, value in zip(*line, strict=True)]
    if moment <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if moment <= right:
            return low + (high - low) * (moment - left) / (right - left)
    raise AssertionError


@pytest.mark.parametrize("paces", [(1.0, 1.0), (2.0, 3.0), (3.0, 0.5), (1.0, 20.0)])
def test_curves_are_compared_where_both_have_arrived(paces: tuple[float, float]) -> None:
    """Checks comparisons at equal samples and equal time: at the last moment that both curves reach."""
    one = curve((10, 5.0), (20, 3.0), (30, 2.5))
    other = curve((15, 6.0), (30, 4.0), (45, 1.0))
    moment = min(30 * paces[0], 45 * paces[1])
    expected = walked(one, paces[0], moment), walked(other, paces[1], moment)
    assert levels(one, other, paces) == pytest.approx(expected)


def test_runs_are_compared_with_the_full_system_of_their_seed(tmp_path: Path) -> None:
    """Checks the pairs: only the full system of the same seed counts, and only figures that it has."""
    experiment = Experiment(tmp_path, Ablation(seeds=2), StageOptimization(seed=5), "cpu")
    slow, name = curve((1, 4.0), (2, 3.0)), "sequential, 1 fps"
    lines = {
        "full-5": {name: curve((1, 3.0), (2, 2.0))},
        "full-6": {name: curve((1, 3.0), (2, 2.5))},
        "trained-5": {name: slow},
        "trained-6": {name: slow},
        "one-stage-6": {"sequential, 8 fps": slow},
    }
    reports = {run: {run.rpartition("-")[0]: {"FVD": 10.0}} for run in lines}
    reports["full-5"] = {"full system": {"FVD": 7.0}}
    paces: Paces = {
        "full": {"sequential": 1.0, "interpolation": 1.0},
        "trained": {"sequential": 2.0, "interpolation": 2.0},
        "one-stage": {"sequential": 2.0},
    }
    found = compare(experiment, reports, lines, paces)
    trained = found[SAMPLES][name]["base trained"]
    assert trained.values == {5: 3.0, 6: 3.0}
    assert trained.differences == {5: 1.0, 6: 0.5}
    assert found[TIME][name]["base trained"].differences == {5: 2.0, 6: 1.5}
    assert found[PACE]["sequential"]["base trained"].differences == {5: 1.0}
    assert found[PACE]["interpolation"].keys() == {"full system", "base trained"}
    assert found[CLIPS]["FVD"]["trained"].differences == {5: 3.0}
    assert found[SAMPLES][name]["full system"].differences == {}
    assert found[SAMPLES]["sequential, 8 fps"]["one stage"].values == {6: 3.0}
    assert found[SAMPLES]["sequential, 8 fps"]["one stage"].differences == {}
    assert str(trained) == "3; +0.75 (-2.43 to +3.93)"
    assert str(found[PACE]["sequential"]["base trained"]) == "2; +1"
    without = compare(experiment, reports, lines, {})
    assert not without[TIME]
    assert not without[PACE]
    assert without[SAMPLES] == found[SAMPLES]


def test_equal_differences_of_two_seeds_are_not_significant() -> None:
    """Catches an asterisk for an interval of zero width, which shares of few clips can have."""
    assert str(SeedFigure({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.25}).times(100)) == "62.5; +25 (+25 to +25)"
    assert str(SeedFigure({0: 1.0, 1: 1.0}, {0: 0.9, 1: 1.0})).endswith(" *")
