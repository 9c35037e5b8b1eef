"""Static caches of keys and values, preallocated for one layout, and mask plans of the passes that read them.

A cache is laid out in cells, so a row sees one contiguous run: every cell holds the text, then its slots of
one frame after another. In the temporal channel the cells are those of the block's windows. In the spatial
channel they are lanes with one frame each; a finished frame is overwritten by the next one of its lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cogvideo.layout import Cells, SequenceLayout, cells
from cogvideo.models.attention import CacheWrite, CellGroup, Chunk, MaskPlan
from cogvideo.models.plans import extend


@dataclass(frozen=True)
class CacheMap:
    """Place of each key in a cache."""

    text_slots: int
    cell_slots: tuple[Int64[Tensor, " _"], ...]
    """Frame slots of each cell, in the order of the cache."""
    frames: int
    """Number of frames in a cell, one after another."""

    @classmethod
    def temporal(cls, layout: SequenceLayout, window: int, shifted: bool) -> CacheMap:
        """Map of the temporal channel: the cells of the block's windows, with all frames in each."""
        parts: Cells = cells(layout.sides, window, shifted)
        return cls(layout.text_slots, tuple(cell for part in parts for cell in part), layout.num_frames)

    @classmethod
    def spatial(cls, layout: SequenceLayout, lanes: int) -> CacheMap:
        """Map of the spatial channel: one frame per lane, at slots `lane * frame_slots + slot`."""
        return cls(layout.text_slots, tuple(torch.arange(lanes * layout.frame_slots).view(lanes, -1)), 1)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First key of each cell."""
        sizes = [self.text_slots + self.frames * len(slots) for slots in self.cell_slots]
        return tuple(accumulate(sizes[:-1], initial=0))

    @cached_property
    def num_keys(self) -> int:
        """Number of keys in the whole cache."""
        return len(self.cell_slots) * self.text_slots + self.frames * sum(len(slots) for slots in self.cell_slots)

    @cached_property
    def text_places(self) -> Int64[Tensor, "cells text"]:
        """Keys of the text; every cell has its own copy."""
        return torch.tensor(self.starts)[:, None] + torch.arange(self.text_slots)

    @cached_property
    def frame_places(self) -> Int64[Tensor, "frames slots"]:
        """Key of each slot of each frame."""
        places = torch.empty(self.frames, sum(len(slots) for slots in self.cell_slots), dtype=torch.int64)
        for start, slots in zip(self.starts, self.cell_slots, strict=True):
            inside = torch.arange(self.frames * len(slots)).view(self.frames, -1)
            places[:, slots] = start + self.text_slots + inside
        return places

    @cached_property
    def cell_of_slot(self) -> Int64[Tensor, " slots"]:
        """Cell of each slot."""
        owner = torch.empty(self.frame_places.shape[1], dtype=torch.int64)
        for cell, slots in enumerate(self.cell_slots):
            owner[slots] = cell
        return owner

    @cached_property
    def key_order(self) -> Int64[Tensor, " keys"]:
        """Slot at which each key is fed, counted over all frames; -1 for text."""
        order = torch.full((self.num_keys,), -1, dtype=torch.int64)
        order[self.frame_places] = torch.arange(self.frame_places.numel()).view_as(self.frame_places)
        return order

    @cached_property
    def key_cell(self) -> Int64[Tensor, " keys"]:
        """Cell of each key."""
        return (torch.arange(self.num_keys)[:, None] >= torch.tensor(self.starts)).sum(1) - 1


class Cache:
    """Keys and values of the layers with one kind of block, and mask plans of the passes that use them.

    Slots are counted over all frames in feeding order; a spatial cache keeps only those of the last
    frames. `step` feeds one slot of each of a few frames, the same in every sample. `runs` feeds consecutive
    slots of a frame, different ones in every sample. Both read contiguous slices; `masked` compares two
    integers per key instead.

    Args:
        where: place of each key.
        num_layers: number of layers with this kind of block.
        text: numbers added to the scores of text keys, see `text_mask`.
        shape: samples, heads and head width.
        like: a tensor with the dtype and device of the cache.
    """

    def __init__(
        self, where: CacheMap, num_layers: int, text: Tensor | None, shape: tuple[int, int, int], like: Tensor
    ) -> None:
        batch, heads, head_dim = shape
        self.map = where
        self.layers: list[Float[Tensor, "2 batch heads keys head_dim"]] = [
            like.new_zeros(2, batch, heads, where.num_keys, head_dim) for _ in range(num_layers)
        ]
        cell = where.cell_of_slot.repeat(where.frames)
        self.places: list[int] = where.frame_places.flatten().tolist()
        self.first_keys: list[int] = torch.tensor(where.starts)[cell].tolist()
        self.device_places = where.frame_places.flatten().to(like.device)
        self.device_cell = cell.to(like.device)
        self.text_places = where.text_places.to(like.device)
        self.key_order = where.key_order.to(like.device)
        self.key_cell = where.key_cell.to(like.device)
        self.prefix = None if text is None else extend(text, where.num_keys - where.text_slots)
        self.keys_mask = _spread(text, where).to(like.device)

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values, in bytes."""
        return sum(each.numel() * each.element_size() for each in self.layers)

    def keep(self, plan: MaskPlan, num_slots: int) -> MaskPlan:
        """Make the plan of a prefill pass keep its text and first `num_slots` frame slots."""
        text_slots = self.map.text_slots
        device = self.device_places.device
        text = torch.arange(text_slots, device=device).repeat(len(self.map.starts))
        frames = text_slots + torch.arange(num_slots, device=device)
        places = torch.cat([self.text_places.flatten(), self.device_places[:num_slots]])
        return plan._replace(write=CacheWrite(self.layers, places, torch.cat([text, frames]), is_complete=True))

    def step(self, slots: Sequence[int]) -> MaskPlan:
        """Plan for one slot of each of a few frames, the same in all samples; a row reads one run of keys."""
        held = [slot % len(self.places) for slot in slots]
        chunks = []
        for row, slot in enumerate(held):
            keys = range(self.first_keys[slot], self.places[slot] + 1)
            mask = None if self.prefix is None else self.prefix[..., : len(keys)]
            chunks.append(Chunk(None if len(held) == 1 else range(row, row + 1), keys, mask))
        first = self.places[held[0]]
        places: range | Tensor = range(first, first + 1)
        if len(held) > 1:
            places = torch.stack([self.device_places[slot] for slot in held])
        return _plan(chunks, CacheWrite(self.layers, places))

    def runs(self, runs: Sequence[range]) -> MaskPlan:
        """Plan for consecutive slots of one frame, with one run per sample, which may be empty. Unless all
        runs are equal, the rows of all samples follow each other in one row of the pass. Each sample reads
        only its own cells. A chunk is a stretch of a run in one cell, and reads the keys up to its last
        row."""
        if len(set(runs)) == 1:
            return _plan(list(self._stretches(runs[0], 0, None)), CacheWrite(self.layers, self._places(runs[0])))
        chunks: list[Chunk] = []
        first = 0
        for sample, run in enumerate(runs):
            chunks += self._stretches(run, first, slice(sample, None, len(runs)))
            first += len(run)
        places = torch.cat([self._places(run) for run in runs])
        samples = [sample for sample, run in enumerate(runs) for _ in run]
        return _plan(chunks, CacheWrite(self.layers, places, samples=torch.tensor(samples, device=places.device)))

    def _places(self, run: range) -> Int64[Tensor, " slots"]:
        first = run.start % len(self.places)
        return self.device_places[first : first + len(run)]

    def _stretches(self, run: range, first: int, owner: slice | None) -> Iterator[Chunk]:
        held = [slot % len(self.places) for slot in run]
        for start, group in groupby(held, self.first_keys.__getitem__):
            slots = list(group)
            stop = self.places[slots[-1]] + 1
            mask = None if self.prefix is None else self.prefix[owner or slice(None), ..., : stop - start]
            if len(slots) > 1:
                later = torch.full((len(slots), stop - start), -torch.inf, dtype=self.keys_mask.dtype)
                later = later.triu_(stop - start - len(slots) + 1).to(self.device_places.device)
                mask = later if mask is None else mask + later
            yield Chunk(range(first, first + len(slots)), range(start, stop), mask, owner)
            first += len(slots)

    def masked(self, frame: range, slots: Int64[Tensor, "batch rows"]) -> MaskPlan:
        """Plan for any slots of one frame, different ones in every sample, computed from tensors. All passes
        of the frame have the same shapes, so CUDA graphs can capture them. A row sees a key of its own cell if the
        key is text or was fed no later than the row. Slots are counted from the first of the frame.
        """
        first = frame.start % len(self.places)
        held = first + slots
        is_one_cell = len(self.map.starts) == 1
        keys = self.places[first + len(frame) - 1] + 1 if is_one_cell else len(self.key_order)
        seen = self.key_order[:keys] <= held[..., None]
        if not is_one_cell:
            seen &= self.key_cell[:keys] == self.device_cell[held][..., None]
        mask = self.keys_mask[..., :keys].masked_fill(~seen[:, None], -torch.inf)
        return _plan([Chunk(None, range(keys), mask)], CacheWrite(self.layers, self.device_places[held]))


def _plan(chunks: list[Chunk], write: CacheWrite) -> MaskPlan:
    return MaskPlan((CellGroup(None, None, tuple(chunks)),), write=write)


def _spread(text: Tensor | None, where: CacheMap) -> Float[Tensor, "#batch 1 1 keys"]:
    """The text mask at every cell's copy of the text, and zero at all other keys."""
    if text is None:
        return torch.zeros(1, 1, 1, where.num_keys)
    spread = text.new_zeros(*text.shape[:-1], where.num_keys)
    spread[..., where.text_places.to(text.device)] = text[..., None, :]
    return spread
