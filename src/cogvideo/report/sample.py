"""Counts over random rows of a dataset: words, captions, attributes and codes."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from cogvideo.data.dataset import Dataset
from cogvideo.report.page import Column

_FUNCTION_WORDS = (
    "a an and are as at be been but by for from had has have he her his in into is it its of off on onto "
    "or out over she so than that the their them then there these they this to under until up was were "
    "which while who with"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that say little about what is seen."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+(?:['’-][^\W_]+)*")


@dataclass
class SampleCounts:
    """Counts over the rows of a sample."""

    num_rows: int
    num_clips: int
    """Number of rows in the whole dataset."""
    seed: int
    codes: Int64[np.ndarray, " codes"]
    """Occurrences of each code."""
    words: Counter[str] = field(default_factory=Counter)
    """Captions with each word, in lower case, without `FUNCTION_WORDS`."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Captions by number of words."""
    captions: Counter[int] = field(default_factory=Counter)
    """Captions by a hash of their text, to save memory."""
    per_clip: Counter[int] = field(default_factory=Counter)
    """Clips by number of captions."""
    attributes: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Clips by value of each attribute."""


def draw_rows(dataset: Dataset, number: int, seed: int) -> list[int]:
    """Distinct random rows, in ascending order; all if there are no more."""
    total = len(dataset)
    return sorted(random.Random(seed).sample(range(total), min(number, total)))


def take_sample(dataset: Dataset, seed: int, num_rows: int) -> SampleCounts:
    """Count the contents of random rows."""
    rows = draw_rows(dataset, num_rows, seed)
    sample = SampleCounts(len(rows), len(dataset), seed, np.zeros(dataset.card.num_codes, np.int64))
    for row in map(dataset.row, rows):
        sample.codes += np.bincount(row.codes.reshape(-1), minlength=len(sample.codes))
        sample.per_clip[len(row.captions)] += 1
        for name, value in row.attributes.items():
            sample.attributes[name][str(value)] += 1
        for caption in row.captions:
            words = words_of(caption)
            sample.captions[hash(caption)] += 1
            sample.lengths[len(words)] += 1
            sample.words.update(set(words) - FUNCTION_WORDS)
    return sample


def words_of(caption: str) -> list[str]:
    """Words in lower case; Chinese and Japanese, which have no spaces, by their characters."""
    return _WORD.findall(caption.lower())


def top(counts: Mapping[str, int], limit: int | None = None) -> list[tuple[str, int]]:
    """The most frequent values, most frequent first, ties by name."""
    return sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:limit]


def ranges(counts: Counter[int], limit: int) -> list[Column]:
    """Counts in at most `limit` ranges of equal width; the last one is open if half a percent lies far beyond.

    At least one value must have been counted.
    """
    values = _expand(counts)
    low, end = int(values[0]), _quantile(values, 0.995)
    width = -(-(end - low + 1) // limit)
    starts = range(low, end + 1, width)
    heights = np.bincount(((values - low) // width).clip(max=len(starts) - 1), minlength=len(starts)).tolist()
    meanings = [str(start) if width == 1 else f"{start} to {start + width - 1}" for start in starts]
    labels = [str(start) for start in starts]
    if values[-1] >= starts[-1] + width:
        labels[-1], meanings[-1] = f"{starts[-1]}+", f"{starts[-1]} or more"
    return list(map(Column, labels, meanings, heights))


def summary(counts: Counter[int]) -> list[tuple[str, float]]:
    """The shortest, median, mean and longest of the counted lengths, of which there must be at least one."""
    values = _expand(counts)
    mean = round(float(values.mean()), 1)
    figures = (int(values[0]), _quantile(values, 0.5), mean, int(values[-1]))
    return list(zip(("shortest", "median", "mean", "longest"), figures, strict=True))


def _expand(counts: Counter[int]) -> Int64[np.ndarray, " values"]:
    """All values that were counted, ascending."""
    return np.repeat(sorted(counts), [counts[value] for value in sorted(counts)])


def _quantile(values: Int64[np.ndarray, " values"], share: float) -> int:
    """The smallest value that at least a `share` of all values do not exceed."""
    return int(np.quantile(values, share, method="inverted_cdf"))
