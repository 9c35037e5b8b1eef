"""Drafts of codes that one pass verifies: which codes are likely, and how many slots are worth their cost.

Most codes repeat those of a neighboring frame at the same slot. How many do depends on the context: whether the frames
before and after agree at this slot, and whether the slots above and to the left repeat the frame before. Others can be
guessed where noise decides: a slot's own noise is fixed, so it is added to the scores of an earlier slot. So each
sample counts in every context which of these guesses came true.

Drafts depend only on the codes of their own sample. So the rows of a sample go through the model in the same portions,
and are rounded in the same way, in any batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

PRICE = 0.15
"""Cost of a row relative to a pass without rows (measured on CPUs: 0.05 to 0.25, more in larger batches)."""
MEMORY = 0.97
"""Factor by which the weight of earlier codes in a context decays with each new one."""
REDRAWN = "drawn by an earlier pass"
"""Context of slots that went through the model after a wrong draft. Their drafts are what it drew, so they are right
more often than others."""


class Drafter:
    """Drafts of one sample, from frame to frame.

    Args:
        columns: number of slots in a row of a frame.
        start: token that is fed at the first slot of a frame.
        most: maximum number of slots per pass.
        is_free: feed that many slots in every pass, since more rows cost nothing.
    """

    def __init__(self, columns: int, start: int, most: int, is_free: bool = False) -> None:
        self.columns = columns
        self.start = start
        self.most = most
        self.is_free = is_free
        self.counts: defaultdict[Hashable, list[float]] = defaultdict(lambda: [1.0, 0.5, 0.5, 0.5])

    def begin(self, slots: int, before: Sequence[int] | None = None, after: Sequence[int] | None = None) -> None:
        """Begin a frame with this number of slots, between two other frames if they are known."""
        self.fed = [self.start] * (slots + 1)
        """Token of each slot: the code of the slot before it, final or drafted."""
        self.done = 0
        """Number of slots whose codes are final."""
        self.drawn = 0
        """Number of slots that went through the model."""
        self.guesses = [self.start] * slots if before is None else [*before]
        """Codes drawn from the scores of an earlier slot with the slot's own noise, where there are any."""
        self.before = self.guesses if before is None else before
        self.after = self.before if after is None else after

    def propose(self) -> range:
        """Draft codes, each likely enough to be worth one more slot; return the slots of the next pass."""
        start, last = self.done, len(self.fed) - 1
        stop, codes, chance = min(start + 1, last), 1.0, 1.0
        while stop < min(start + self.most, last):
            chance *= self._draft(stop - 1)
            if chance * (1 + PRICE * (stop - start)) < PRICE * codes and not self.is_free:
                break
            codes += chance
            stop += 1
        return range(start, stop)

    def ahead(self, run: range) -> range:
        """Slots that need guesses: those of the next pass that have not gone through the model."""
        return range(max(run.stop, self.drawn), min(run.stop + self.most, len(self.fed) - 1))

    def saw(self, drawn: Sequence[int], guesses: Sequence[int] = ()) -> None:
        """Record the codes that a pass drew for its slots: those up to the first wrong draft are final, and the others
        are new drafts. Guesses are those for the slots ahead of the pass."""
        start, is_final = self.done, True
        for slot, code in enumerate(drawn, start):
            is_right, self.fed[slot + 1] = self.fed[slot + 1] == code, code
            if is_final:
                self.done += 1
                self._count(self._context(slot), (*self._choices(slot), code).index(code))
                if slot < self.drawn:
                    self._count(REDRAWN, 0 if is_right else 3)
                is_final = is_right
        self.drawn = max(self.drawn, start + len(drawn))
        self.guesses[self.drawn : self.drawn + len(guesses)] = guesses

    def _draft(self, slot: int) -> float:
        """Draft the code of a slot, unless an earlier pass drew it; return how much it promises to allow one more slot:
        the probability that it is right, now or, counted half, when a pass has redrawn it."""
        redrawn = _share(self.counts[REDRAWN], 0)
        if slot < self.drawn:
            return redrawn
        counts = self.counts[self._context(slot)]
        best = max(range(3), key=counts.__getitem__)
        self.fed[slot + 1] = self._choices(slot)[best]
        right = _share(counts, best)
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

    def _count(self, context: Hashable, outcome: int) -> None:
        counts = self.counts[context]
        counts[:] = [MEMORY * each for each in counts]
        counts[outcome] += 1


def _share(counts: list[float], outcome: int) -> float:
    return counts[outcome] / sum(counts)
