"""What the rows of each pass see, from the layout: the masks of the paper as slices of cells (docs/sequence.md).

`full_pass` is for training and prefill: text and whole frames, complete in itself. `CachedPlans` are for decoding,
where rows read the cache: `step` one slot of each of a few frames, the same in every sample, and `runs` consecutive
slots of a frame, other ones in every sample, by contiguous slices; `masked` the same by comparing two integers a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from cogvideo.layout import SequenceLayout, cells
from cogvideo.models.attention import Chunk, Group, Plan
from cogvideo.models.cache import CacheMap, Write
from cogvideo.models.transformer import Pass

CAUSAL_ROWS = 200
"""Rows of a frame that are causal in one matrix of scores: of more, half of the scores would be made in vain. From 192
on, PyTorch's kernel for CPUs takes 64 at a time instead of 32, and is a fifth faster."""


class TextMasks(NamedTuple):
    """What is added to the scores of text keys, (batch, 1, 1, text): nothing, or -inf at pads; None: nothing at all."""

    spatial: Tensor | None
    given: Tensor | None
    """In the temporal channel, by rows of given frames."""
    drawn: Tensor | None
    """In the temporal channel, by rows of frames that are being generated."""


def text_masks(mask: Bool[Tensor, "batch text"], bonus: float, dtype: torch.dtype) -> TextMasks:
    """Pads are never seen; `bonus` is added to text scores, in the temporal channel only by drawn slots (spec 3)."""
    given = _added(mask, 0.0, dtype)
    drawn = _added(mask, bonus, dtype)
    return TextMasks(drawn, given, drawn)


def _added(
    mask: Bool[Tensor, "batch text"], bonus: float, dtype: torch.dtype
) -> Float[Tensor, "batch 1 1 text"] | None:
    if not bonus and mask.device.type == "cpu" and bool(mask.all()):  # another device would be waited for
        return None
    added = torch.full(mask.shape, bonus, dtype=dtype, device=mask.device)
    return added.masked_fill(~mask, -torch.inf)[:, None, None]


def extend(text: Tensor, keys: int) -> Tensor:
    """The mask of [text | keys], every one of those keys seen, from that of the text."""
    return F.pad(text, (0, keys)) if keys else text


def full_pass(
    layout: SequenceLayout, window: int, text: TextMasks, num_frames: int, video: bool, device: torch.device
) -> Pass:
    """Text and the first `num_frames` frames (in feed order), reading their own keys.

    Args:
        layout: the sequence.
        window: side of the temporal windows, 0 for full attention.
        text: how text keys are seen.
        num_frames: leading ranks that are fed.
        video: whether there is a temporal channel.
        device: where the indices go.
    """
    # a dry run on the meta device counts all that it allocates, each time
    structure = _structure.__wrapped__ if device.type == "meta" else _structure
    spatial, *temporal = structure(layout, window, num_frames, video and num_frames > 0, device)
    return Pass(
        layout.text_slots,
        _with_text(spatial, text.spatial),
        tuple(_with_text(plan, text.given) for plan in temporal),
    )


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is made while generating must also serve in training
def _structure(
    layout: SequenceLayout, window: int, num_frames: int, video: bool, device: torch.device
) -> tuple[Plan, ...]:
    """Plans that see every text slot: of the spatial channel, then one a kind of temporal block.

    On CUDA each is one attention with a mask: starting many small ones takes longer than scoring pairs in vain.
    """
    plans = [_spatial(layout, num_frames)]
    if video:
        plans += [_temporal(layout, window, shifted, num_frames) for shifted in ((False, True) if window else (False,))]
    if device.type == "cuda":
        frame_rows = num_frames * layout.frame_slots
        keys = layout.text_slots + frame_rows
        plans = [_dense(plan, rows, keys) for plan, rows in zip(plans, (keys, frame_rows, frame_rows), strict=False)]
    return tuple(_on(plan, device) for plan in plans)


def _spatial(layout: SequenceLayout, num_frames: int) -> Plan:
    """Text sees text; a frame sees text and itself, as a whole where it is bidirectional, else causally."""
    words = torch.arange(layout.text_slots)
    slots = layout.text_slots + torch.arange(num_frames * layout.frame_slots).view(num_frames, layout.frame_slots)
    both = min(layout.num_bidirectional, num_frames)
    groups = [Group(words[None], words[None], (Chunk(None, None),))]
    causal = tuple(_causal(layout.text_slots, range(layout.frame_slots)))
    for frames, chunks in ((slots[:both], (Chunk(None, None),)), (slots[both:], causal)):
        if len(frames):
            keys = torch.cat([words.expand(len(frames), -1), frames], dim=1)
            groups.append(Group(frames, keys, chunks))
    return Plan(tuple(groups))


def _causal(text_slots: int, frame: range) -> Iterator[Chunk]:
    """Each row of a frame sees text, all rows before it and itself; keys are [text | rows]."""
    for start in frame[::CAUSAL_ROWS]:
        rows = range(start, min(start + CAUSAL_ROWS, frame.stop))
        keys = range(text_slots + rows.stop)
        yield Chunk(rows, keys, torch.ones(len(rows), len(keys), dtype=torch.bool).tril(text_slots + start))


def _temporal(layout: SequenceLayout, window: int, shifted: bool, num_frames: int) -> Plan:
    """Each cell of a frame sees text and the same cell of every frame fed before it; rows are counted without text."""
    if not window:  # one cell, whose rows need not be gathered
        return Plan((Group(None, None, _frame_chunks(layout, layout.frame_slots, num_frames)),))
    words, frames = torch.arange(layout.text_slots), torch.arange(num_frames) * layout.frame_slots
    groups: list[Group] = []
    places: list[Tensor] = []
    for part in cells(layout.grid, window, shifted):
        rows = (frames[:, None] + part[:, None]).flatten(1)
        keys = torch.cat([words.expand(len(rows), -1), layout.text_slots + rows], dim=1)
        groups.append(Group(rows, keys, _frame_chunks(layout, part.shape[1], num_frames)))
        places.append(rows.flatten())
    return Plan(tuple(groups), restore=torch.cat(places).argsort())


def _frame_chunks(layout: SequenceLayout, area: int, num_frames: int) -> tuple[Chunk, ...]:
    """Bidirectional frames see each other in full; each later one sees all before it in full and itself causally."""
    both = min(layout.num_bidirectional, num_frames)
    chunks = []
    if both:
        chunks.append(Chunk(range(both * area), range(layout.text_slots + both * area)))
    for rank in range(both, num_frames):
        chunks += _causal(layout.text_slots, range(rank * area, (rank + 1) * area))
    return tuple(chunks)


def _dense(plan: Plan, num_rows: int, num_keys: int) -> Plan:
    """The same plan as one group of one cell and one chunk."""
    seen = torch.zeros(num_rows, num_keys, dtype=torch.bool)
    for group in plan.groups:
        rows = torch.arange(num_rows)[None] if group.rows is None else group.rows
        keys = torch.arange(num_keys)[None] if group.keys is None else group.keys
        for chunk in group.chunks:
            inside, others = _part(rows, chunk.rows), _part(keys, chunk.keys)
            seen[inside[:, :, None], others[:, None]] = True if chunk.mask is None else chunk.mask
    return Plan((Group(None, None, (Chunk(None, None, seen),)),))


def _part(slots: Int64[Tensor, "cells slots"], run: range | None) -> Int64[Tensor, "cells part"]:
    return slots if run is None else slots[:, run.start : run.stop]


def _on(plan: Plan, device: torch.device) -> Plan:
    """The plan with its tensors on a device."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    groups = (
        Group(
            moved(group.rows), moved(group.keys), tuple(each._replace(mask=moved(each.mask)) for each in group.chunks)
        )
        for group in plan.groups
    )
    return Plan(tuple(groups), moved(plan.restore))


def _with_text(plan: Plan, text: Tensor | None) -> Plan:
    """The plan where text keys are seen as the mask of the text says."""
    if text is None:
        return plan
    groups = (
        group._replace(chunks=tuple(chunk._replace(mask=_masked(group, chunk, text)) for chunk in group.chunks))
        for group in plan.groups
    )
    return plan._replace(groups=tuple(groups))


def _masked(group: Group, chunk: Chunk, text: Tensor) -> Float[Tensor, "batch 1 #rows keys"]:
    if chunk.mask is not None:
        return extend(text, chunk.mask.shape[-1] - text.shape[-1]).masked_fill(~chunk.mask, -torch.inf)
    keys = group.keys[0] if chunk.keys is None and group.keys is not None else chunk.keys
    assert keys is not None
    return extend(text, len(keys) - text.shape[-1])


class Rows(NamedTuple):
    """One slot of one frame, the same in every sample."""

    rank: int
    slot: int
    lane: int


class CachedPlans:
    """Passes that read the caches of one decoding run, and where those passes write.

    Args:
        layout: the sequence.
        spatial: map of the spatial cache.
        temporal: maps of the temporal cache, one a kind of block; none for the image model.
        text: how text keys are seen.
        device: of the caches.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        spatial: CacheMap,
        temporal: tuple[CacheMap, ...],
        text: TextMasks,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.views = (
            _CacheView(spatial, text.spatial, device),
            *(_CacheView(each, text.drawn, device) for each in temporal),
        )

    def prefill_writes(self, num_frames: int) -> tuple[Write, ...]:
        """What a full pass keeps: text in both channels, given frames in the temporal one."""
        spatial, *temporal = self.views
        return spatial.prefill(0), *(view.prefill(num_frames) for view in temporal)

    def step(self, rows: Sequence[Rows]) -> tuple[Pass, tuple[Write, ...]]:
        """One slot of each of a few frames, the same in every sample: every row reads one run of the cache."""
        spatial, *temporal = self.views
        own = spatial.step([(0, row.lane * self.layout.frame_slots + row.slot) for row in rows])
        others = [view.step([(row.rank, row.slot) for row in rows]) for view in temporal]
        return Pass(0, own[0], tuple(plan for plan, _ in others)), (own[1], *(write for _, write in others))

    def runs(self, rank: int, runs: Sequence[range]) -> tuple[Pass, tuple[Write, ...]]:
        """Consecutive slots of one frame, a run a sample, which may be empty: the rows of all samples stand one after
        another, in one row of the pass, unless the runs are all the same. Each sample reads its own cells alone."""
        spatial, *temporal = self.views
        own = spatial.runs(0, runs)
        others = [view.runs(rank, runs) for view in temporal]
        return Pass(0, own[0], tuple(plan for plan, _ in others)), (own[1], *(write for _, write in others))

    def masked(self, rank: int, slots: Int64[Tensor, "batch rows"]) -> tuple[Pass, tuple[Write, ...]]:
        """Any slots of one frame, other ones in every sample, from tensors alone: the shapes are those of every pass of
        the frame, so that it can be captured. The keys of all cells are read."""
        spatial, *temporal = self.views
        own = spatial.masked(0, slots)
        others = [view.masked(rank, slots) for view in temporal]
        return Pass(0, own[0], tuple(plan for plan, _ in others)), (own[1], *(write for _, write in others))


class _CacheView:
    """One cache's map on a device, with the text mask spread over its keys."""

    def __init__(self, where: CacheMap, text: Tensor | None, device: torch.device) -> None:
        self.text_slots, self.starts, self.num_cells = where.text_slots, where.starts, len(where.starts)
        self.places: list[list[int]] = where.frame_places.tolist()
        self.cell: list[int] = where.cell_of_slot.tolist()
        self.device_places, self.device_cell = where.frame_places.to(device), where.cell_of_slot.to(device)
        self.text_places = where.text_places.to(device)
        self.key_order, self.key_cell = where.key_order.to(device), where.key_cell.to(device)
        self.prefix = None if text is None else extend(text, where.num_keys - self.text_slots)
        self.keys_mask = _spread(text, where).to(device)

    def prefill(self, num_frames: int) -> Write:
        text = torch.arange(self.text_slots, device=self.device_places.device).repeat(self.num_cells)
        frames = self.text_slots + torch.arange(num_frames * len(self.cell), device=text.device)
        places = torch.cat([self.text_places.flatten(), self.device_places[:num_frames].flatten()])
        return Write(torch.cat([text, frames]), places)

    def step(self, rows: list[tuple[int, int]]) -> tuple[Plan, Write]:
        """Plan and write of rows, each given as (rank, slot)."""
        places, chunks = [self.places[rank][slot] for rank, slot in rows], []
        for row, (place, (_, slot)) in enumerate(zip(places, rows, strict=True)):
            start = self.starts[self.cell[slot]]
            mask = None if self.prefix is None else self.prefix[..., : place + 1 - start]
            chunks.append(Chunk(None if len(rows) == 1 else range(row, row + 1), range(start, place + 1), mask))
        index: range | Tensor = range(places[0], places[0] + 1)
        if len(rows) > 1:
            index = torch.stack([self.device_places[rank, slot] for rank, slot in rows])
        return _plan(chunks), Write(None, index)

    def runs(self, rank: int, runs: Sequence[range]) -> tuple[Plan, Write]:
        """A chunk for each stretch of a run that lies in one cell: its keys are those up to its last row."""
        if len(set(runs)) == 1:
            chunks = list(self._stretches(rank, runs[0], 0, None))
            return _plan(chunks), Write(None, self.device_places[rank, runs[0].start : runs[0].stop])
        chunks, first = [], 0
        for sample, run in enumerate(runs):
            chunks += self._stretches(rank, run, first, slice(sample, None, len(runs)))
            first += len(run)
        places = torch.cat([self.device_places[rank, run.start : run.stop] for run in runs])
        return _plan(chunks), Write(None, places, owners(runs, places.device))

    def _stretches(self, rank: int, run: range, first: int, owner: slice | None) -> Iterator[Chunk]:
        for cell, group in groupby(run, self.cell.__getitem__):
            slots = list(group)
            start, stop = self.starts[cell], self.places[rank][slots[-1]] + 1
            mask = None if self.prefix is None else self.prefix[owner or slice(None), ..., : stop - start]
            if len(slots) > 1:
                later = torch.full((len(slots), stop - start), -torch.inf, dtype=self.keys_mask.dtype)
                later = later.triu_(stop - start - len(slots) + 1).to(self.device_places.device)
                mask = later if mask is None else mask + later
            yield Chunk(range(first, first + len(slots)), range(start, stop), mask, owner)
            first += len(slots)

    def masked(self, rank: int, slots: Tensor) -> tuple[Plan, Write]:
        """A key is seen in the row's own cell, if it is text or was fed no later than the row."""
        keys = self.places[rank][-1] + 1 if self.num_cells == 1 else len(self.key_order)
        order = rank * len(self.cell) + slots
        seen = self.key_order[:keys] <= order[..., None]
        if self.num_cells > 1:
            seen &= self.key_cell[:keys] == self.device_cell[slots][..., None]
        mask = self.keys_mask[..., :keys].masked_fill(~seen[:, None], -torch.inf)
        return _plan([Chunk(None, range(keys), mask)]), Write(None, self.device_places[rank][slots])


def owners(runs: Sequence[range], device: torch.device) -> Int64[Tensor, " rows"]:
    """The sample of each row, for one run a sample."""
    return torch.tensor([sample for sample, run in enumerate(runs) for _ in run], device=device)


def _plan(chunks: list[Chunk]) -> Plan:
    return Plan((Group(None, None, tuple(chunks)),))


def _spread(text: Tensor | None, where: CacheMap) -> Float[Tensor, "#batch 1 1 keys"]:
    """The text mask at every cell's copy of the text, nothing added to all other keys."""
    if text is None:
        return torch.zeros(1, 1, 1, where.num_keys)
    spread = text.new_zeros(*text.shape[:-1], where.num_keys)
    spread[..., where.text_places.to(text.device)] = text[..., None, :]
    return spread
