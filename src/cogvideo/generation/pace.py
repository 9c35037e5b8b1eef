"""Number of slots that a sample drafts in a pass: as many as its earlier drafts make worth their time.

A pace follows from the drafts of its sample alone. So the rows of a sample go through the model in the same portions,
and are rounded in the same way, whatever else is in the batch.
"""

from __future__ import annotations

from functools import lru_cache

PRICE = 0.15
"""Cost of one more row over that of a pass without any (measured on CPUs: 0.05 to 0.25, more in larger batches)."""
MEMORY = 0.9
"""Weight of earlier passes, one pass later."""


class Pace:
    """The pace of one sample.

    Args:
        most: slots of a pass.
        free: rows cost nothing, so that every pass takes the most.
    """

    def __init__(self, most: int, free: bool = False) -> None:
        self.most, self.free = most, free
        self.right, self.tried = 1.0, 2.0
        self.repeated, self.kept = 1.0, 2.0

    @property
    def width(self) -> int:
        """Slots of the next pass."""
        return self.most if self.free else worth(round(100 * self.right / self.tried), self.most)

    @property
    def repeats(self) -> float:
        """The share of codes that are those of the frame before, never none or all."""
        return min(max(self.repeated / self.kept, 0.01), 0.99)

    def saw(self, right: int, width: int, repeated: int = 0) -> None:
        """Drafts that came true before the first that did not, of a pass of `width` slots, and how many of the codes
        that are kept are those of the frame before."""
        kept = min(right + 1, width)
        self.right = MEMORY * self.right + right
        self.tried = MEMORY * self.tried + kept
        self.repeated = MEMORY * self.repeated + repeated
        self.kept = MEMORY * self.kept + kept


@lru_cache(maxsize=4096)
def worth(percent: int, most: int) -> int:
    """Number of slots that gives the most codes for its cost, where `percent` of all drafts come true.

    A slot is kept if all drafts before it were right: `width` slots give `1 + p + p^2 + ...` codes.
    """

    def codes_for_cost(width: int) -> float:
        return sum((percent / 100) ** row for row in range(width)) / (1 + PRICE * width)

    return max(range(1, most + 1), key=codes_for_cost)
