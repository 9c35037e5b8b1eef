"""Statistics of preferences: shares, strengths of systems, agreement of raters, sample sizes. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from cogvideo.config import require

Z = 1.959964
"""Standard deviations to each side of a normal distribution's mean that cover 95%."""
NUM_DRAWS = 1000
"""Number of bootstrap samples."""


class Interval(NamedTuple):
    """A value with its 95% confidence interval."""

    value: float
    low: float
    high: float


class PairwiseComparison(NamedTuple):
    """Two systems, compared by a rater on a prompt."""

    rater: int
    prompt: int
    first: str
    second: str
    outcome: int
    """1 if the first is preferred, -1 if the second is, 0 if neither is."""


def share(successes: int, total: int) -> Interval:
    """A share with its Wilson interval; for 0 of 0, that is [0, 1]."""
    if total == 0:
        return Interval(math.nan, 0.0, 1.0)
    return Interval(successes / total, *wilson(successes / total, total))


def wilson(part: float, total: int) -> tuple[float, float]:
    """The 95% interval of a share of independent answers, by Wilson's score (1927)."""
    middle, half = _wilson(part, total)
    return max(0.0, round(middle - half, 12)), min(1.0, round(middle + half, 12))  # exactly 0 or 1, despite rounding


def _wilson(part: float, total: float) -> tuple[float, float]:
    """Center and half-width of the interval of a share."""
    scale = 1 + Z**2 / total
    half = Z / scale * math.sqrt(part * (1 - part) / total + Z**2 / (4 * total**2))
    return (part + Z**2 / (2 * total)) / scale, half


def sample_size(part: float, margin: float) -> int:
    """Smallest number of answers for which the Wilson interval of a share has a half-width of at most `margin`."""
    require(0 < margin < 0.5, f"margin is {margin}, expected a share in (0, 0.5), such as 0.05")
    low, high = 0, math.ceil((Z / (2 * margin)) ** 2) + 1  # a share of one half needs the most answers
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _wilson(part, middle)[1] <= margin else (middle, high)
    return high


def outcomes(
    comparisons: Sequence[PairwiseComparison], systems: Sequence[str]
) -> Float64[np.ndarray, "systems systems comparisons"]:
    """For each comparison, 1 if the row's system won against the column's, half if neither did.

    Multiplied by the weights of comparisons, it counts wins.
    """
    won = np.zeros((len(systems), len(systems), len(comparisons)))
    for place, each in enumerate(comparisons):
        first, second = systems.index(each.first), systems.index(each.second)
        won[first, second, place] = (1 + each.outcome) / 2
        won[second, first, place] = (1 - each.outcome) / 2
    return won


def strengths(
    wins: Float64[np.ndarray, "systems systems"], start: Float64[np.ndarray, " systems"] | None = None
) -> Float64[np.ndarray, " systems"]:
    """Bradley-Terry strengths with mean 0: `strengths[i] - strengths[j]` is the log-odds that i is preferred to j.

    Two systems that were compared get one more comparison, a tie: one that always won would be infinitely strong.
    `wins` counts how often the row's system won against the column's; `start` may be the strengths of similar wins.
    """
    import choix  # importing it takes two seconds

    compared = (wins + wins.T) > 0
    reached = np.linalg.matrix_power(compared + np.eye(len(wins)), len(wins)) > 0
    require(bool(reached.all()), "some systems were never compared with the others, expected answers about all of them")
    return choix.ilsr_pairwise_dense(wins + compared / 2, initial_params=start, max_iter=1000)


def bootstrap(
    estimate: Callable[[Float64[np.ndarray, " answers"]], Float64[np.ndarray, " values"]],
    raters: Sequence[int],
    prompts: Sequence[int],
) -> list[Interval]:
    """Values with intervals over raters and prompts, both of which are resampled with replacement.

    With one rater, the interval is over prompts alone: other raters may disagree. It is NaN if all draws give the same
    value, as with unanimous answers or a single rater and prompt: they do not show how far other answers could be.
    `estimate` takes the weights of answers; a draw for which it raises ValueError is left out.
    """
    values = estimate(np.ones(len(raters)))
    random = np.random.default_rng(0)
    draws = []
    for _ in range(NUM_DRAWS):
        weights = _drawn(raters, random) * _drawn(prompts, random)
        try:
            draws.append(estimate(weights))
        except ValueError:
            continue
    low, high = np.quantile(draws, (0.025, 0.975), axis=0) if draws else np.full((2, len(values)), math.nan)
    is_known = ~np.isclose(low, high)
    limits = np.where(is_known, (low, high), math.nan)
    return [Interval(*map(float, each)) for each in zip(values, *limits, strict=True)]


def _drawn(groups: Sequence[int], random: np.random.Generator) -> Float64[np.ndarray, " answers"]:
    """Number of times that the group of each answer is drawn."""
    names, places = np.unique(groups, return_inverse=True)
    drawn = random.integers(len(names), size=len(names))
    return np.bincount(drawn, minlength=len(names))[places].astype(float)


def agreement(ratings: Sequence[tuple[int, object, int]]) -> float:
    """Krippendorff's alpha of ordinal ratings (rater, item, value): 1 is full agreement, 0 is chance agreement.

    NaN if no two raters judged the same item, or all answers are equal.
    """
    import krippendorff

    raters = {rater: row for row, rater in enumerate(sorted({each[0] for each in ratings}))}
    units = {unit: column for column, unit in enumerate(dict.fromkeys(each[1] for each in ratings))}
    table = np.full((len(raters), len(units)), np.nan)
    for rater, unit, value in ratings:
        table[raters[rater], units[unit]] = value
    has_two = (np.isfinite(table).sum(0) > 1).any()
    if not has_two or len({each[2] for each in ratings}) < 2:
        return math.nan
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal"))
