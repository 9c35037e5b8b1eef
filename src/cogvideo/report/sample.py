"""What some rows of a dataset say about all: their words, attributes and codes, counted."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from cogvideo.data.dataset import Dataset
from cogvideo.media.metrics import code_usage, perplexity

NUM_ROWS = 20_000
"""Rows that are looked at, so that five million take no longer than these."""

_FUNCTION_WORDS = (
    "a an and are as at be been but by for from had has have he her his in into is it its of off on onto or out over "
    "she so than that the their them then there these they this to under until up was were which while who with"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that say little about what is seen."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+(?:['’-][^\W_]+)*")


@dataclass
class Sample:
    """Counts over the rows of a sample."""

    num_rows: int
    """Rows that were counted."""
    num_clips: int
    """Rows that there are."""
    codes: Int64[np.ndarray, " codes"]
    """How often each code occurs."""
    seed: int
    """Of which rows they are."""
    words: Counter[str] = field(default_factory=Counter)
    """How many captions have each word, in small letters, without `FUNCTION_WORDS`."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Captions of each number of words."""
    captions: Counter[int] = field(default_factory=Counter)
    """Captions by a hash of their text."""
    per_clip: Counter[int] = field(default_factory=Counter)
    """Clips of each number of captions."""
    attributes: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Clips of each value of each attribute."""

    @property
    def is_whole(self) -> bool:
        """Whether no row was left out."""
        return self.num_rows == self.num_clips

    @property
    def num_captions(self) -> int:
        """Captions of the sample's rows."""
        return self.captions.total()

    @property
    def usage(self) -> float:
        """Share of codes that occur."""
        return code_usage(torch.from_numpy(self.codes))

    @property
    def perplexity(self) -> float:
        """Of the frequencies of codes; 0 where there are none."""
        return perplexity(torch.from_numpy(self.codes)) if self.codes.any() else 0.0


def draw_rows(dataset: Dataset, number: int, seed: int) -> list[int]:
    """Different rows at random, in ascending order; all where there are no more."""
    total = len(dataset)
    return sorted(random.Random(seed).sample(range(total), min(number, total)))


def take_sample(dataset: Dataset, seed: int, num_rows: int) -> Sample:
    """Count what is in random rows.

    Raises:
        ValueError: a shard is damaged.
    """
    rows = draw_rows(dataset, num_rows, seed)
    sample = Sample(len(rows), len(dataset), np.zeros(dataset.card.num_codes, np.int64), seed)
    for number in rows:
        row = dataset.row(number)
        sample.codes += np.bincount(row.codes.reshape(-1), minlength=len(sample.codes))
        sample.per_clip[len(row.captions)] += 1
        _count_captions(sample, row.captions)
        for name, value in row.attributes.items():
            sample.attributes[name][str(value)] += 1
    return sample


def _count_captions(sample: Sample, captions: Iterable[str]) -> None:
    for caption in captions:
        words = words_of(caption)
        sample.captions[hash(caption)] += 1  # the text itself would stay in memory
        sample.lengths[len(words)] += 1
        sample.words.update(set(words) - FUNCTION_WORDS)


def words_of(caption: str) -> list[str]:
    """Words in small letters; Chinese and Japanese, which have no spaces, by their characters."""
    return _WORD.findall(caption.lower())


class Range(NamedTuple):
    """How many of what was counted lie between two values."""

    low: int
    """The lowest of them."""
    high: int | None
    """The highest of them; None for no limit."""
    total: int
    """How many."""

    @property
    def label(self) -> str:
        """What stands below its column."""
        return f"{self.low}+" if self.high is None else str(self.low)


def spread(counts: Counter[int], limit: int) -> list[Range]:
    """Counts in at most `limit` ranges of equal width. The last one is open, for half a percent that may be far out."""
    low, end = min(counts), quantile(counts, 0.995)
    width = -(-(end - low + 1) // limit)
    starts = range(low, end + 1, width)
    sums = [sum(counts[value] for value in range(start, start + width)) for start in starts]
    ranges = [Range(start, start + width - 1, total) for start, total in zip(starts, sums, strict=True)]
    beyond = counts.total() - sum(sums)
    return [*ranges[:-1], Range(ranges[-1].low, None, ranges[-1].total + beyond)] if beyond else ranges


def quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that so large a share does not exceed."""
    below = 0
    for value, number in sorted(counts.items()):
        below += number
        if below >= share * counts.total():
            return value
    return max(counts)


def mean(counts: Counter[int]) -> float:
    """The mean of what was counted."""
    return sum(value * number for value, number in counts.items()) / counts.total()
