"""Number of slots that a sample drafts per pass: as many as pay off, judging by its earlier drafts.

A pace depends only on the drafts of its own sample. So the rows of a sample go through the model in the same
portions, and are rounded in the same way, in any batch.
"""

from __future__ import annotations

from functools import lru_cache

PRICE = 0.15
"""Cost of a row relative to a pass without rows (measured on CPUs: 0.05 to 0.25, more in larger batches)."""
MEMORY = 0.9
"""Factor by which the weight of earlier passes decays in each pass."""


class DraftPace:
    """The pace of one sample, with at most `most` slots per pass, and always `most` if rows are `free`."""

    def __init__(self, most: int, free: bool = False) -> None:
        self.most = most
        self.free = free
        self.right = 1.0
        self.tried = 2.0
        self.repeated = 1.0
        self.kept = 2.0

    @property
    def width(self) -> int:
        """Number of slots of the next pass."""
        return self.most if self.free else worth(round(100 * self.right / self.tried), self.most)

    @property
    def repeats(self) -> float:
        """Share of codes that repeat the previous frame, strictly between 0 and 1."""
        return min(max(self.repeated / self.kept, 0.01), 0.99)

    def saw(self, right: int, width: int, repeated: int = 0) -> None:
        """Record a pass of `width` slots: the number of drafts before the first wrong one, and the
        number of kept codes that repeat the previous frame."""
        kept = min(right + 1, width)
        self.right = MEMORY * self.right + right
        self.tried = MEMORY * self.tried + kept
        self.repeated = MEMORY * self.repeated + repeated
        self.kept = MEMORY * self.kept + kept


@lru_cache(maxsize=4096)
def worth(percent: int, most: int) -> int:
    """Number of slots with the most codes for their cost, if `percent` of all drafts are right.

    A slot is kept if all drafts before it were right, so `width` slots give `1 + p + p^2 + ...` codes.
    """

    def codes_for_cost(width: int) -> float:
        return sum((percent / 100) ** row for row in range(width)) / (1 + PRICE * width)

    return max(range(1, most + 1), key=codes_for_cost)
