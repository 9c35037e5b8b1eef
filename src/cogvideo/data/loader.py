"""Batches of training samples, in an order that can be resumed exactly from one number.

Samples are an endless stream, epoch after epoch. Sample number `position` is a pure function of the data, the settings
and that number: the epoch is `position // rows`, the remainder an index into its order, and random choices inside the
sample are hashed from seed, epoch and row. A batch is the next positions of the stream, shared among the ranks. So the
state of a run is the position alone, for any number of workers and ranks.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt16, UInt64
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from cogvideo.config import InputError, both, require
from cogvideo.data.clips import ClipSampling, choose_window, duration_of, sampled_rates
from cogvideo.data.dataset import Dataset
from cogvideo.data.shards import digest

T = TypeVar("T")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_DRAWS = 4  # per sample, in addition to its seed: rate, offset, caption, dropout


def mix(values: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Scramble 64 bits: the output function of splitmix64 (Steele, Lea and Flood 2014), a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_numbers(*numbers: int | Int64[np.ndarray, " values"]) -> UInt64[np.ndarray, " values"]:
    """64 random-looking bits for each tuple of non-negative integers; scalars are broadcast."""
    state = np.zeros(1, np.uint64)
    for each in numbers:
        state = mix((state ^ np.atleast_1d(np.asarray(each, np.uint64))) + _GOLDEN)
    return state


def keyed_uniform(
    seed: int, epochs: Int64[np.ndarray, " samples"], rows: Int64[np.ndarray, " samples"], num_draws: int
) -> Float64[np.ndarray, "samples draws"]:
    """Random numbers in [0, 1) that depend on seed, epoch and row alone, never on batch, worker or rank."""
    steps = np.arange(1, num_draws + 1, dtype=np.uint64) * _GOLDEN
    bits = mix(hash_numbers(seed, 1, epochs, rows)[:, None] + steps)  # the next numbers of splitmix64
    return (bits >> np.uint64(11)) * 2.0**-53


def keyed_seeds(
    seed: int, epochs: Int64[np.ndarray, " samples"], rows: Int64[np.ndarray, " samples"]
) -> Int64[np.ndarray, " samples"]:
    """A 63-bit seed for each sample."""
    return (hash_numbers(seed, 2, epochs, rows) >> np.uint64(1)).astype(np.int64)


@lru_cache(maxsize=2)
def order(num_rows: int, seed: int, epoch: int) -> Int64[np.ndarray, " rows"]:
    """The rows of an epoch in its own random order: sorted by their hashes, which are all different."""
    return np.argsort(hash_numbers(seed, 0, epoch, np.arange(num_rows)))


class ShapeBuckets(NamedTuple):
    """Rows of several shapes, in batches of one shape: the last batch of a shape repeats some of its rows."""

    ends: tuple[int, ...]
    """The row after the last row of each shape."""
    batch: int

    @property
    def length(self) -> int:
        """Samples per epoch."""
        if len(self.ends) == 1:
            return self.ends[0]
        return sum(-(-(end - start) // self.batch) * self.batch for start, end in pairwise((0, *self.ends)))

    def order(self, seed: int, epoch: int) -> Int64[np.ndarray, " samples"]:
        """The rows of an epoch in its own random order."""
        return order(self.ends[0], seed, epoch) if len(self.ends) == 1 else _in_batches(self, seed, epoch)


@lru_cache(maxsize=2)
def _in_batches(buckets: ShapeBuckets, seed: int, epoch: int) -> Int64[np.ndarray, " samples"]:
    rows, batch = order(buckets.ends[-1], seed, epoch), buckets.batch
    own = [rows[(rows >= start) & (rows < end)] for start, end in pairwise((0, *buckets.ends))]
    batches = np.concatenate([np.resize(each, (-(-len(each) // batch), batch)) for each in own])
    return batches[order(len(batches), seed, epoch)].flatten()


class ClipSample(NamedTuple):
    """One training sample."""

    codes: UInt16[np.ndarray, "frames rows columns"]
    """Image codes: 5 frames for the video stages, 1 for the image model. A read-only view of the shard."""
    caption: str | None
    """One of the clip's captions; None if it was dropped: use the unconditional text."""
    duration: float
    """Seconds from the first to the last frame, as `TextTokenizer.encode_caption` expects it; 0 for images."""
    position: int
    """Index of the sample in the stream."""
    epoch: int
    row: int
    seed: int
    """63 bits from seed, epoch and row, for other random choices in the sample, such as masks."""
    high_codes: UInt16[np.ndarray, "frames high_rows high_columns"] | None = None
    """Codes of the same frames for super-resolution, if the settings ask for them."""


class ClipStream(MapDataset[ClipSample]):
    """Samples of one or more dataset folders, by their position in the endless stream. `len` is the length of an epoch.

    Workers receive file names and map the files themselves.

    Args:
        folders: outputs of `cogvideo data prepare`, one after another; a folder given twice counts twice.
        split: split to use of each folder.
        sampling: settings of the samples.
        tokenizer_sha256: hash of the image tokenizer of the codes; any unless given, but the same for all.
        grid: side of the largest frame of the model, in codes; any unless given.
        batch: batch size; the frames of a batch have one shape. Without it, all datasets must have the same shape.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        split: str = "train",
        sampling: ClipSampling = ClipSampling(),  # noqa: B008  # frozen
        tokenizer_sha256: str | None = None,
        grid: int | None = None,
        batch: int | None = None,
    ) -> None:
        require(len(folders) > 0, "got no dataset folder, expected at least one")
        datasets = [Dataset(Path(folder), tokenizer_sha256) for folder in folders]
        shapes = list(dict.fromkeys(each.card.grid for each in datasets))
        self.datasets = sorted(datasets, key=lambda each: shapes.index(each.card.grid))
        self.split = split
        self.sampling = sampling
        _check_cards(self.datasets, sampling, grid, is_mixed=batch is not None)
        self._starts = [0, *accumulate(len(dataset) for dataset in self.datasets)]
        self._rows = self._usable_rows()
        counts = (sum(len(each) for each in self.datasets if each.card.grid == shape) for shape in shapes)
        ends = tuple(np.searchsorted(self._rows, [*accumulate(counts)]).tolist())
        self._buckets = ShapeBuckets(ends, batch or 1)
        shards = [[entry.sha256 for entry in dataset.card.shards] for dataset in self.datasets]
        self.identity = f"samples in the second order, {digest([shards, split, asdict(sampling)])}"
        """Hash of everything that determines the sample order. The first order, by a Feistel network, is gone.
        """

    def __len__(self) -> int:
        return self._buckets.length

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the image tokenizer that made all codes."""
        return self.datasets[0].card.tokenizer_sha256

    @property
    def num_clips(self) -> list[int]:
        """Number of clips that samples come from, by dataset."""
        return [int(each) for each in np.diff(np.searchsorted(self._rows, self._starts))]

    @property
    def rates(self) -> tuple[float, ...]:
        """Frame rates of the samples, lowest first; none in mode image."""
        lengths = np.unique(np.concatenate([each.num_frames() for each in self.datasets])[self._rows])
        return tuple(sorted({rate for each in lengths for rate in sampled_rates(int(each), self.sampling)}))

    def __iter__(self) -> Iterator[ClipSample]:
        """The samples of the first epoch."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, position: int) -> ClipSample:
        require(position >= 0, f"the position is {position}, expected 0 or more")
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[ClipSample]:
        """The samples of a batch, with their random numbers drawn at once."""
        numbers = np.asarray(positions, np.int64)
        epochs, places = np.divmod(numbers, len(self))
        seed = self.sampling.seed
        in_order = zip(epochs.tolist(), places.tolist(), strict=True)
        rows = np.array([self._buckets.order(seed, epoch)[place] for epoch, place in in_order], np.int64)
        draws = keyed_uniform(seed, epochs, rows, _DRAWS).tolist()
        where = (numbers, epochs, rows, keyed_seeds(seed, epochs, rows), self._rows[rows])
        return [self._sample(*each) for each in zip(*(each.tolist() for each in where), draws, strict=True)]

    def _sample(
        self, position: int, epoch: int, row: int, seed: int, stored_row: int, draws: list[float]
    ) -> ClipSample:
        number = bisect_right(self._starts, stored_row) - 1
        shard, place = self.datasets[number].find(stored_row - self._starts[number])
        rate_draw, offset_draw, caption_draw, dropout_draw = draws
        codes, high_codes = shard.codes(place), None
        window = choose_window(len(codes), self.sampling, rate_draw, offset_draw)
        assert window is not None, "the index holds rows that are long enough"
        is_dropped = dropout_draw < self.sampling.caption_dropout
        caption = None if is_dropped else shard.caption(place, int(caption_draw * shard.num_captions(place)))
        frames = slice(window.start, window.stop, window.step)
        codes = codes[frames]
        shard.check(place, codes)
        if self.sampling.high_codes and (stored := shard.high_codes(place)) is not None:
            high_codes = stored[frames]
            shard.check(place, high_codes)
        duration = duration_of(window, self.sampling, rate_draw)
        return ClipSample(codes, caption, duration, position, epoch, row, seed, high_codes)

    def _usable_rows(self) -> Int64[np.ndarray, " rows"]:
        """Rows of the split that are long enough, numbered across all datasets."""
        starts = zip(self._starts, self.datasets, strict=False)
        rows = np.concatenate([start + each.rows(self.split) for start, each in starts])
        lengths = np.concatenate([each.num_frames() for each in self.datasets])[rows]
        where = f"{', '.join(str(each.folder) for each in self.datasets)}, split {self.split!r}"
        require(len(lengths) > 0, f"{where}: there is no clip, expected at least one")
        needed, mode = self.sampling.min_frames, self.sampling.mode
        usable = rows[lengths >= needed]
        expected = f"expected {needed} frames at {self.sampling.rates.base:g} per second"
        got = f"got clips of {lengths.min()} to {lengths.max()}"
        require(len(usable) > 0, f"{where}: no clip is long enough for the mode {mode}: {expected}, {got}")
        return usable


def _check_cards(datasets: Sequence[Dataset], sampling: ClipSampling, grid: int | None, is_mixed: bool) -> None:
    """Refuse datasets that cannot form one stream for one model."""
    first = datasets[0]
    for dataset in datasets:
        card, where = dataset.card, dataset.folder
        card.check_tokenizer(first.card.tokenizer_sha256, where)
        got = "{} has frames of {} x {} codes".format(where, *both(card.grid))
        require(is_mixed or card.grid == first.card.grid, f"{got}, expected the {first.card.grid} of {first.folder}")
        fits = grid is None or max(both(card.grid)) <= grid
        require(fits, f"{got}, expected at most {grid} x {grid}: the positions of the model")
        base = sampling.rates.base
        require(card.fps == base, f"{where} has {card.fps:g} frames per second, expected the base rate {base:g}")
        if sampling.high_codes:
            require(card.high_grid != 0, f"{where} has no codes of super-resolution: prepare the data with them")
            ratios = [both(each.card.high_grid)[0] // both(each.card.grid)[0] for each in (dataset, first)]
            same = f"{where} has {ratios[0]} high codes for a side of a code, expected {ratios[1]}"
            require(ratios[0] == ratios[1], same)


def _without_traces(batches: Iterable[T]) -> Iterator[T]:
    """Reduce the errors of workers, whose text is a traceback, to the message at its end."""
    try:
        yield from batches
    except InputError as error:
        raise InputError(re.split(r"\n[\w.]*Error: ", str(error))[-1].strip()) from error


def shares(position: int, batch_size: int, rank: int, world_size: int, end: int | None = None) -> Iterator[range]:
    """Positions of each batch of one rank, from `position` up to `end`; ranks take turns within a batch."""
    firsts = count(position, batch_size) if end is None else range(position, end, batch_size)
    for first in firsts:
        last = first + batch_size if end is None else min(first + batch_size, end)
        if share := range(first + rank, last, world_size):
            yield share


@dataclass
class Loader(Generic[T]):
    """Batches of a stream for one rank, and the position to continue from.

    Training uses the endless stream, in which batches may straddle epochs. Evaluation uses `end=len(stream)`: exactly
    one epoch, whose last batch may be smaller; some ranks may have one batch fewer than others.
    """

    stream: ClipStream
    batch_size: int
    """Batch size over all ranks."""
    collate: Callable[[list[ClipSample]], T]
    """Turns a rank's samples into a batch; runs in the workers, which may have to unpickle it."""
    rank: int = 0
    world_size: int = 1
    position: int = 0
    """Number of samples already taken, over all ranks."""
    end: int | None = None
    """Position after the last one; None for an endless stream."""
    num_workers: int = 0
    """Processes that load ahead; 0 loads in this process."""
    pin_memory: bool = False
    """Put tensors in pinned memory, from which a GPU copies asynchronously."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, f"num_workers is {self.num_workers}, expected 0 or more")
        require(self.position >= 0, f"the position is {self.position}, expected 0 or more")
        require(self.batch_size > 0, f"batch_size is {self.batch_size}, expected a positive number")
        ranks = self.world_size
        require(0 <= self.rank < ranks, f"rank is {self.rank} of {ranks} ranks, expected a number in [0, {ranks})")
        message = f"batch_size {self.batch_size} is not divisible by the {ranks} ranks that share a batch"
        require(self.batch_size % ranks == 0, message)

    def __iter__(self) -> Iterator[T]:
        """Batches from `position` on; when a batch is yielded, `position` is past it, whatever was loaded ahead."""
        batches = DataLoader(
            self.stream,
            batch_sampler=cast(Any, shares(self.position, self.batch_size, self.rank, self.world_size, self.end)),
            num_workers=self.num_workers,
            collate_fn=self.collate,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # not the global one: the loader draws a seed that nothing uses
        )
        for batch in _without_traces(batches):
            self.position += self.batch_size
            if self.end is not None:
                self.position = min(self.position, self.end)
            yield batch
