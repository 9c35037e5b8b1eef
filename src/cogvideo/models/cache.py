"""Static key and value caches of both channels, preallocated for one layout.

A cache lies in cells, so that what a row sees is one contiguous run: every cell holds the text, then its slots of one
frame after another. In the temporal channel the cells are those of the block's windows. In the spatial channel they are
lanes, each with one frame: a frame that is finished is overwritten by the next of its lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cogvideo.layout import Cells, SequenceLayout, cells


class Write(NamedTuple):
    """Which rows of a pass are kept, and where in the cache."""

    rows: Int64[Tensor, " kept"] | None
    """Rows of the pass; None: all."""
    places: range | Int64[Tensor, " kept"] | Int64[Tensor, "batch kept"]
    samples: Int64[Tensor, " kept"] | None = None
    """Sample of each row, where rows of several stand in one row of the pass; None: the batch of both is the same."""


class KeyStore(Protocol):
    """Where a block's keys and values go, and which it then reads."""

    def store(self, layer: int, kv: Tensor) -> Tensor:
        """Take a pass's keys and values, (2, batch, heads, rows, head_dim), and give those that its rows read."""


class NoCache:
    """Training: a pass reads its own keys and values."""

    def store(self, layer: int, kv: Tensor) -> Tensor:
        """See `KeyStore`."""
        return kv


@dataclass(frozen=True)
class CacheMap:
    """Where each key of a cache lies: `cell_slots` are the frame slots of each cell, in the cache's order."""

    text_slots: int
    cell_slots: tuple[Int64[Tensor, " _"], ...]
    frames: int
    """Frames that a cell holds one after another."""

    @classmethod
    def temporal(cls, layout: SequenceLayout, window: int, shifted: bool) -> CacheMap:
        """Cells of the block's windows, all frames in each."""
        parts: Cells = cells(layout.grid, window, shifted)
        return cls(layout.text_slots, tuple(cell for part in parts for cell in part), layout.num_frames)

    @classmethod
    def spatial(cls, layout: SequenceLayout, lanes: int) -> CacheMap:
        """Lanes of one frame each, side by side like the cells of one wide frame: slot `lane * frame_slots + slot`."""
        return cls(layout.text_slots, tuple(torch.arange(lanes * layout.frame_slots).view(lanes, -1)), 1)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First key of each cell."""
        sizes = [self.text_slots + self.frames * len(slots) for slots in self.cell_slots]
        return tuple(sum(sizes[:cell]) for cell in range(len(sizes)))

    @cached_property
    def num_keys(self) -> int:
        """Keys of the whole cache."""
        return len(self.cell_slots) * self.text_slots + self.frames * sum(len(slots) for slots in self.cell_slots)

    @cached_property
    def text_places(self) -> Int64[Tensor, "cells text"]:
        """Keys that hold the text: every cell has its own copy."""
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
        """When each key is fed, counted in slots over all frames; text comes before everything, at -1."""
        order = torch.full((self.num_keys,), -1, dtype=torch.int64)
        order[self.frame_places] = torch.arange(self.frame_places.numel()).view_as(self.frame_places)
        return order

    @cached_property
    def key_cell(self) -> Int64[Tensor, " keys"]:
        """Cell that each key lies in."""
        return (torch.arange(self.num_keys)[:, None] >= torch.tensor(self.starts)).sum(1) - 1


class Cache:
    """Keys and values of one channel in every layer; `writes` says where the rows of the next pass go.

    A pass that is complete in itself (prefill) reads its own keys, like training; any other reads the cache.
    """

    def __init__(self, maps: tuple[CacheMap, ...], layers: int, batch: int, heads: int, head_dim: int, like: Tensor):
        self.maps = maps
        shapes = [(2, batch, heads, self.map(layer).num_keys, head_dim) for layer in range(layers)]
        self.layers: list[Float[Tensor, "2 batch heads keys head_dim"]] = [like.new_zeros(shape) for shape in shapes]
        self.writes: tuple[Write, ...] = ()
        self.complete = False

    def map(self, layer: int) -> CacheMap:
        """The map of a layer: blocks take turns."""
        return self.maps[layer % len(self.maps)]

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return sum(each.numel() * each.element_size() for each in self.layers)

    def store(self, layer: int, kv: Tensor) -> Tensor:
        """See `KeyStore`."""
        write = self.writes[layer % len(self.writes)]
        _write(self.layers[layer], kv if write.rows is None else kv[:, :, :, write.rows], write)
        return kv if self.complete else self.layers[layer]


def _write(buffer: Tensor, rows: Float[Tensor, "2 batch heads kept head_dim"], write: Write) -> None:
    places = write.places
    if isinstance(places, range):
        buffer.narrow(3, places.start, len(places)).copy_(rows)
    elif write.samples is not None:
        apart = buffer.view(2, rows.shape[1], -1, *buffer.shape[2:]).permute(2, 4, 0, 1, 3, 5)  # (sample, place, ...)
        apart[write.samples, places] = rows.permute(3, 0, 1, 2, 4).to(buffer.dtype)
    elif places.ndim == 1:
        buffer.index_copy_(3, places, rows.to(buffer.dtype))
    else:
        buffer.scatter_(3, places[:, None, :, None].expand(rows.shape), rows.to(buffer.dtype))
