"""Drafts of codes that one pass verifies: which codes are likely, and how many slots are worth their cost.

Most codes repeat those of a neighboring frame at the same slot. How many do depends on the context: whether the frames
before and after agree at this slot, and whether the slots above and to the left repeat the frame before. Others can be
guessed: a slot's noise is known in advance, and is added to the scores of an earlier slot. So each sample counts in
every context which was the first of these three to come true.

Drafts depend only on the codes of their own sample. So the rows of a sample go through the model in the same portions,
and are rounded in the same way, in any batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

ROW_COST = 0.15
"""Cost of a row relative to a pass without rows (measured on CPUs: 0.05 to 0.25, more in larger batches)."""
DECAY = 0.97
"""Factor by which the weight of earlier codes decays with each new one."""


class Drafter:
    """Drafts of one sample, from frame to frame.

    Args:
        slots: number of slots in a frame.
        columns: number of slots in a row of a frame.
        start: token that is fed at the first slot of a frame.
        max_slots: maximum number of slots per pass.
        is_free: always feed `max_slots` slots, since more rows cost nothing.
    """

    def __init__(self, slots: int, columns: int, start: int, max_slots: int, is_free: bool = False) -> None:
        self.slots = slots
        self.columns = columns
        self.start = start
        self.max_slots = max_slots
        self.is_free = is_free
        self.counts: defaultdict[tuple[bool, ...], list[float]] = defaultdict(lambda: [1.0, 0.5, 0.5, 0.5])
        """Number of codes, by context, that were those of the frame before, of the frame after, the guess, or none."""
        self.redrawn = [1.0, 1.5]
        """Number of right and of wrong drafts among those that are what an earlier pass drew after a wrong draft."""

    def begin(self, before: Sequence[int] | None = None, after: Sequence[int] | None = None) -> None:
        """Begin a frame between two others, if they are known."""
        self.fed = [self.start] * (self.slots + 1)
        """Token of each slot: the code of the slot before it, final or drafted."""
        self.done = 0
        """Number of slots whose codes are final."""
        self.drawn = 0
        """Number of slots that went through the model."""
        self.guesses = [self.start] * self.slots if before is None else [*before]
        """Codes drawn from the scores of an earlier slot with the slot's own noise, where there are any."""
        self.before = self.guesses if before is None else before  # in a first frame, guesses stand in for it
        self.after = self.before if after is None else after

    def propose(self) -> range:
        """Draft codes, each likely enough to be worth one more slot; return the slots of the next pass."""
        start = self.done
        stop, codes, chance = min(start + 1, self.slots), 1.0, 1.0
        while stop < min(start + self.max_slots, self.slots):
            chance *= self._draft(stop - 1)
            if chance * (1 + ROW_COST * (stop - start)) < ROW_COST * codes and not self.is_free:
                break
            codes += chance
            stop += 1
        return range(start, stop)

    def ahead(self, run: range) -> range:
        """Slots that need guesses: those that the next pass may reach and that have not gone through the model."""
        return range(max(run.stop, self.drawn), min(run.stop + self.max_slots, self.slots))

    def saw(self, drawn: Sequence[int], guesses: Sequence[int] = ()) -> None:
        """Record the codes that a pass drew for its slots: those up to the first wrong draft are final, the others
        become drafts. `guesses` are for the slots of `ahead`."""
        start, is_final = self.done, True
        for slot, code in enumerate(drawn, start):
            is_right, self.fed[slot + 1] = self.fed[slot + 1] == code, code
            if is_final:
                self.done += 1
                _count(self.counts[self._context(slot)], (*self._choices(slot), code).index(code))
                if slot < self.drawn:
                    _count(self.redrawn, 0 if is_right else 1)
                is_final = is_right
        self.drawn = max(self.drawn, start + len(drawn))
        self.guesses[self.drawn : self.drawn + len(guesses)] = guesses

    def _draft(self, slot: int) -> float:
        """Draft the code of a slot, unless an earlier pass drew it; return its worth: the chance that it is right, or
        the mean of this chance and that of a redrawn draft if it is larger, since the pass will redraw it if wrong."""
        redrawn = self.redrawn[0] / sum(self.redrawn)
        if slot < self.drawn:
            return redrawn
        counts = self.counts[self._context(slot)]
        best = max(range(3), key=counts.__getitem__)
        self.fed[slot + 1] = self._choices(slot)[best]
        right = counts[best] / sum(counts)
        return max(right, (right + redrawn) / 2)

    def _choices(self, slot: int) -> tuple[int, int, int]:
        return self.before[slot], self.after[slot], self.guesses[slot]

    def _context(self, slot: int) -> tuple[bool, bool, bool]:
        above, left = slot - self.columns, slot - 1
        return (
            self.before[slot] == self.after[slot],
            above >= 0 and self.fed[above + 1] == self.before[above],
            left >= 0 and self.fed[left + 1] == self.before[left],
        )


def _count(counts: list[float], outcome: int) -> None:
    counts[:] = [DECAY * each for each in counts]
    counts[outcome] += 1
