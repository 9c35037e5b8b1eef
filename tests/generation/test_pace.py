"""Number of slots a sample drafts."""

from __future__ import annotations

import pytest

from cogvideo.generation.pace import DraftPace, worth


def learned(right: int, most: int = 16, passes: int = 40) -> int:
    """Width after many passes whose first `right` drafts are correct."""
    pace = DraftPace(most)
    for _ in range(passes):
        pace.saw(min(right, pace.width), pace.width)
    return pace.width


def test_width_follows_the_drafts_that_come_true() -> None:
    """Checks both extremes: drafts that are never right cost nothing, and drafts that always are fill a pass."""
    widths = [learned(right) for right in (0, 1, 2, 4, 16)]
    assert widths == sorted(widths)
    assert widths[0] == 1
    assert 1 < widths[1] < 8
    assert widths[-1] == 16


def test_width_recovers() -> None:
    """Guards against a pace stuck at one slot per pass, where only the next code can be guessed right."""
    pace = DraftPace(8)
    for right in [0] * 40 + [1] * 40:
        pace.saw(min(right, pace.width), pace.width)
    assert pace.width > 1


@pytest.mark.parametrize("most", [1, 8])
def test_where_rows_are_free(most: int) -> None:
    """Guards the fixed shape of passes on devices that replay them."""
    pace = DraftPace(most, free=True)
    pace.saw(0, most)
    assert pace.width == most


def test_worth() -> None:
    """Checks the rule against the explicit sum: with two of three right, four slots give 2.4 codes for 1.6 passes."""
    assert worth(0, 8) == 1
    assert worth(100, 8) == 8
    assert worth(66, 8) == 4


@pytest.mark.parametrize(("repeated", "share"), [(0, 0.01), (1, 0.99)])
def test_repeats(repeated: int, share: float) -> None:
    """Checks the share of codes that repeat the previous frame: it is learned, and never 0 or 1."""
    pace = DraftPace(8)
    assert pace.repeats == 0.5
    for _ in range(80):
        pace.saw(0, 1, repeated)
    assert pace.repeats == share
