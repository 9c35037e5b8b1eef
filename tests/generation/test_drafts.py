"""Drafts of one sample, driven by made-up models."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest

from cogvideo.generation.drafts import ROW_COST, Drafter

COLUMNS, SLOTS, START = 6, 36, 99

Model = Callable[[int, Sequence[int]], int]
"""Code of a slot after the tokens that were fed up to it."""


def drawn(drafter: Drafter, model: Model, before: list[int] | None = None, after: list[int] | None = None) -> int:
    """Decode a frame, and return the number of passes."""
    drafter.begin(before, after)
    passes = 0
    while run := drafter.propose():
        assert len(run) <= drafter.max_slots
        passes += 1
        drafter.saw([model(slot, drafter.fed[: slot + 1]) for slot in run])
    assert drafter.done == SLOTS
    return passes


def codes_of(model: Model) -> list[int]:
    """The frame that a model draws slot by slot."""
    fed = [START]
    for slot in range(SLOTS):
        fed.append(model(slot, fed))
    return fed[1:]


def frame(seed: int, codes: int = 50) -> list[int]:
    return random.Random(seed).choices(range(codes), k=SLOTS)


@pytest.mark.parametrize("is_free", [False, True])
@pytest.mark.parametrize("most", [1, 2, 8])
@pytest.mark.parametrize("num_codes", [2, 5, 50])
def test_codes_are_those_of_one_slot_at_a_time(num_codes: int, most: int, is_free: bool) -> None:
    """Checks a model whose codes depend on all earlier ones: whatever is drafted, the frame is the true one."""
    drafter = Drafter(SLOTS, COLUMNS, START, most, is_free)
    for seed in range(20):

        def model(slot: int, fed: Sequence[int], seed: int = seed) -> int:
            return random.Random(f"{seed} {slot} {list(fed)}").randrange(num_codes)

        neighbors = (None, frame(seed, num_codes), frame(seed + 1, num_codes))
        before, after = neighbors[min(seed, 1)], neighbors[2 * (seed % 2)]
        drawn(drafter, model, before, after if before else None)
        assert drafter.fed[1:] == codes_of(model)


def test_widths_follow_what_comes_true() -> None:
    """Checks both extremes: still frames fill every pass, and where no draft is ever right, none is fed."""
    drafter, still = Drafter(SLOTS, COLUMNS, START, 8), frame(0)
    passes = [drawn(drafter, lambda slot, _: still[slot], still) for _ in range(6)]
    assert passes[-1] == math.ceil(SLOTS / 8)
    noise = random.Random(1)
    fresh = [drawn(drafter, lambda *_: noise.randrange(10_000), still) for _ in range(30)]
    assert fresh[-1] == SLOTS
    passes = [drawn(drafter, lambda slot, _: still[slot], still) for _ in range(40)]
    assert passes[-1] == math.ceil(SLOTS / 8), "drafts never recover"


def test_a_changed_slot_repeats_the_frame_after() -> None:
    """Guards the choice between two neighbors: where they differ, this model takes the frame after."""
    drafter = Drafter(SLOTS, COLUMNS, START, 8)
    for seed in range(6):
        before = frame(seed)
        after = [code if slot % 3 else code + 50 for slot, code in enumerate(before)]
        passes = drawn(drafter, lambda slot, _, after=after: after[slot], before, after)
    assert passes == math.ceil(SLOTS / 8)


def test_drafts_reach_as_far_as_the_still_background() -> None:
    """Guards the context: in each frame, some columns move, which the row above shows. So most passes end with
    a code of a moving column, neither earlier nor later."""
    drafter, noise = Drafter(SLOTS, COLUMNS, START, 8), random.Random(2)
    still = frame(3)
    hits = passes = 0
    for number in range(80):
        moving = noise.sample(range(COLUMNS), 3)
        drafter.begin(still)
        while run := drafter.propose():
            if number >= 40 and run.start >= COLUMNS:
                passes += 1
                hits += len(run) == 8 or run.stop == SLOTS or (run.stop - 1) % COLUMNS in moving
            drafter.saw([noise.randrange(10_000) if slot % COLUMNS in moving else still[slot] for slot in run])
    assert hits > 0.7 * passes


@pytest.mark.parametrize("seed", range(10))
def test_the_width_is_the_best(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the rule against all widths: the most codes for the cost of a pass."""
    chances = [random.Random(seed).uniform(0.5, 1) for _ in range(SLOTS)]
    monkeypatch.setattr(Drafter, "_draft", lambda drafter, slot: chances[slot])
    drafter = Drafter(SLOTS, COLUMNS, START, 8)
    drafter.begin()
    kept = [1, *accumulate(chances[:7], lambda chance, each: chance * each)]
    worth = {width: sum(kept[:width]) / (1 + ROW_COST * width) for width in range(1, 9)}
    assert len(drafter.propose()) == max(worth, key=worth.__getitem__)


def test_where_rows_are_free() -> None:
    """Guards the fixed shape of passes on devices that replay them."""
    drafter, noise = Drafter(SLOTS, COLUMNS, START, 8, is_free=True), random.Random(0)
    drafter.begin()
    while run := drafter.propose():
        assert len(run) == min(8, SLOTS - run.start)
        drafter.saw([noise.randrange(10_000) for _ in run])


def test_the_slot_to_the_left_is_context() -> None:
    """Guards a context by itself: in a frame of one row, everything moves from a random column on, where no draft is
    worth its cost."""
    drafter, noise = Drafter(SLOTS, SLOTS, START, 8), random.Random(4)
    still = frame(5)
    widths = []
    for number in range(80):
        moves_from = noise.randrange(SLOTS)
        drafter.begin(still)
        while run := drafter.propose():
            if number >= 40 and run.start > moves_from:
                widths.append(len(run))
            drafter.saw([still[slot] if slot < moves_from else noise.randrange(10_000) for slot in run])
    assert sum(widths) < 1.1 * len(widths)


@pytest.mark.parametrize("is_right", [False, True])
def test_redrawn_codes_are_fed_if_they_come_true(is_right: bool) -> None:
    """Checks a model whose first pass is always wrong: what it drew is worth feeding only where it is right, and worth
    a wrong draft where it is the only way to learn it."""
    drafter, noise = Drafter(SLOTS, COLUMNS, START, 8), random.Random(6)
    passes = []
    for _ in range(40):
        truth = noise.choices(range(1000, 10_000), k=SLOTS)
        drafter.begin(frame(7))
        passes.append(0)
        while run := drafter.propose():
            passes[-1] += 1
            drafter.saw([truth[slot] if is_right or slot == run.start else noise.randrange(100, 1000) for slot in run])
    assert passes[-1] == SLOTS if not is_right else passes[-1] < 0.7 * SLOTS


def test_guesses_that_come_true_are_fed() -> None:
    """Guards the third choice, in frames that repeat no neighbor."""
    drafter, noise = Drafter(SLOTS, COLUMNS, START, 8), random.Random(8)
    passes = []
    for _ in range(10):
        truth = noise.choices(range(1000, 10_000), k=SLOTS)
        drafter.begin(frame(9), frame(10))
        passes.append(0)
        while run := drafter.propose():
            passes[-1] += 1
            drafter.saw([truth[slot] for slot in run], [truth[slot] for slot in drafter.ahead(run)])
    assert passes[-1] == 1 + math.ceil((SLOTS - 1) / 8), "all but the first pass, which has no guesses yet"
