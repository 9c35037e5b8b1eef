"""Study designs: balance, order, repeats and catch trials, counted one by one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.evaluation.trials import NOISE, Design, Trial

PAIRS = Design("pairs", 5, ("a", "b", "c"), False, None, 2, 3, 0)
settings = st.tuples(
    st.sampled_from(["pairs", "paper"]),
    st.integers(1, 7),
    st.sampled_from([("a", "b"), ("a", "b", "c")]),
    st.booleans(),
    st.none() | st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 5),
)


def main(trials: list[Trial]) -> list[Trial]:
    """Trials that are neither repeats nor catch trials."""
    return [trial for trial in trials if trial.kind == "main"]


@given(settings, st.integers(0, 4))
def test_sides_are_balanced(settings: tuple[Any, ...], rater: int) -> None:
    """Guards against raters who favor a side: both systems of a pair are on the left equally often, up to rounding."""
    design = Design(*settings)
    lefts = Counter(trial.systems for trial in main(design.trials(rater)))
    for systems in lefts:
        if len(systems) == 2:
            most = 1 if design.num_shown is None else 2  # counting restarts once everything was shown
            assert abs(lefts[systems] - lefts[systems[::-1]]) <= most


@given(settings)
def test_raters_share_out_the_clips(settings: tuple[Any, ...]) -> None:
    """Prevents clips that nobody sees: together, raters see all clips equally often, give or take one."""
    design = Design(*settings)
    seen: Counter[tuple[int, frozenset[str]]] = Counter()
    for rater in range(5):
        trials = main(design.trials(rater))
        own = Counter((trial.prompt, frozenset(trial.systems)) for trial in trials)
        assert max(own.values()) == 1
        seen.update(own)
    groups = 3 if len(design.systems) == 3 else (1 if design.is_paired else 2)
    every = [seen[key] for key in seen] + [0] * (design.num_prompts * groups - len(seen))
    assert max(every) - min(every) <= 1


def test_two_raters_see_both_sides() -> None:
    """Prevents a clip from always being on the left: the next rater sees all pairs with sides swapped."""
    sides = [{(each.prompt, each.systems) for each in main(PAIRS.trials(rater))} for rater in range(3)]
    assert {(prompt, systems[::-1]) for prompt, systems in sides[0]} == sides[1]
    assert sides[0] == sides[2]


@given(settings, st.integers(0, 3))
def test_repeats_come_later_and_swapped(settings: tuple[Any, ...], rater: int) -> None:
    """Guards the measure of a rater's consistency: repeats show the same clips later, with sides swapped."""
    design = Design(*settings)
    trials = design.trials(rater)
    repeats = [place for place, trial in enumerate(trials) if trial.kind == "repeat"]
    for place in repeats:
        first = Trial("main", trials[place].prompt, trials[place].systems[::-1])
        assert first in trials[:place]
    assert len(repeats) == min(design.num_repeats, len(main(trials)) // 2)


@given(settings, st.integers(0, 3))
def test_catch_trials_show_noise(settings: tuple[Any, ...], rater: int) -> None:
    """Guards the attention check: noise is compared with a clip of the same prompt, and is never the first trial."""
    design = Design(*settings)
    trials = design.trials(rater)
    catches = [trial for trial in trials if trial.kind == "catch"]
    noisy = [trial for trial in catches if NOISE in trial.systems]
    assert len(noisy) == min(design.num_catches, design.num_prompts)
    assert trials[0].kind == "main"
    wanted = {(prompt, system) for prompt, system in design.catches()}
    if design.is_paired:
        lefts = sum(trial.systems[0] == NOISE for trial in noisy)
        assert abs(2 * lefts - len(noisy)) <= 1
        assert {(trial.prompt, next(each for each in trial.systems if each != NOISE)) for trial in noisy} == wanted
    else:
        real = {(trial.prompt, *trial.systems) for trial in catches if NOISE not in trial.systems}
        assert real == (wanted if design.has_real else set())


def test_order_follows_from_seed_and_rater() -> None:
    """Guards resumed studies: trials are reproducible, and differ between raters and seeds."""
    assert PAIRS.trials(1) == PAIRS.trials(1)
    assert len({tuple(each) for each in (PAIRS.trials(0), PAIRS.trials(2), replace(PAIRS, seed=1).trials(0))}) == 3


@pytest.mark.parametrize(
    "change", [{"num_prompts": 0}, {"systems": ("a",)}, {"num_shown": 0}, {"num_catches": -1}, {"num_repeats": -1}]
)
def test_impossible_designs_are_refused(change: dict[str, object]) -> None:
    """Refuses designs that cannot work, such as one without prompts."""
    with pytest.raises(ValueError, match="expected"):
        replace(PAIRS, **change)
