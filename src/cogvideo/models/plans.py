"""What the rows of each pass see, from the layout: the masks of the paper as slices of cells (docs/sequence.md).

`full_pass` is for training and prefill: text and whole frames, complete in itself. `CachedPlans` are for decoding,
where rows read the cache: `step` one slot of each of a few frames, the same in every sample, by contiguous slices
without masks; `draft` any slots, other ones in every sample, by comparing two integers a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    if not bonus and bool(mask.all()):
        return None
    added = torch.full(mask.shape, bonus, dtype=dtype, device=mask.device)
    return added.masked_fill(~mask, -torch.inf)[:, None, None]


def extend(text: Tensor | None, keys: int) -> Tensor | None:
    """The mask of [text | keys], every one of those keys seen, from that of the text."""
    return None if text is None else F.pad(text, (0, keys))


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
    spatial = _spatial(layout, text.spatial, num_frames, device)
    if not video or not num_frames:
        return Pass(layout.text_slots, spatial, ())
    kinds = (False, True) if window else (False,)
    return Pass(
        layout.text_slots,
        spatial,
        tuple(_temporal(layout, window, shifted, text, num_frames, device) for shifted in kinds),
    )


def _spatial(layout: SequenceLayout, text: Tensor | None, num_frames: int, device: torch.device) -> Plan:
    """Text sees text; a frame sees text and itself, as a whole where it is bidirectional, else causally."""
    words = torch.arange(layout.text_slots)
    slots = layout.text_slots + torch.arange(num_frames * layout.frame_slots).view(num_frames, layout.frame_slots)
    both = min(layout.num_bidirectional, num_frames)
    groups = [Group(words[None].to(device), words[None].to(device), (Chunk(None, None, text),))]
    whole = (Chunk(None, None, extend(text, layout.frame_slots)),)
    causal = tuple(_causal(text, layout.text_slots, range(layout.frame_slots), device))
    for frames, chunks in ((slots[:both], whole), (slots[both:], causal)):
        if len(frames):
            keys = torch.cat([words.expand(len(frames), -1), frames], dim=1)
            groups.append(Group(frames.to(device), keys.to(device), chunks))
    return Plan(tuple(groups))


def _causal(text: Tensor | None, text_slots: int, frame: range, device: torch.device) -> Iterator[Chunk]:
    """Each row of a frame sees text, all rows before it and itself; keys are [text | rows]."""
    for start in frame[::CAUSAL_ROWS]:
        rows = range(start, min(start + CAUSAL_ROWS, frame.stop))
        keys = range(text_slots + rows.stop)
        seen = torch.ones(len(rows), len(keys), dtype=torch.bool, device=device).tril(text_slots + start)
        mask = extend(text, rows.stop)
        yield Chunk(rows, keys, seen if mask is None else mask.masked_fill(~seen, -torch.inf))


def _temporal(
    layout: SequenceLayout, window: int, shifted: bool, text: TextMasks, num_frames: int, device: torch.device
) -> Plan:
    """Each cell of a frame sees text and the same cell of every frame fed before it; rows are counted without text."""
    if not window:  # one cell, whose rows need not be gathered
        return Plan((Group(None, None, _frame_chunks(layout, text, layout.frame_slots, num_frames, device)),))
    words, frames = torch.arange(layout.text_slots), torch.arange(num_frames) * layout.frame_slots
    groups: list[Group] = []
    places: list[Tensor] = []
    for part in cells(layout.grid, window, shifted):
        rows = (frames[:, None] + part[:, None]).flatten(1)
        keys = torch.cat([words.expand(len(rows), -1), layout.text_slots + rows], dim=1)
        chunks = _frame_chunks(layout, text, part.shape[1], num_frames, device)
        groups.append(Group(rows.to(device), keys.to(device), chunks))
        places.append(rows.flatten())
    return Plan(tuple(groups), restore=torch.cat(places).argsort().to(device))


def _frame_chunks(
    layout: SequenceLayout, text: TextMasks, area: int, num_frames: int, device: torch.device
) -> tuple[Chunk, ...]:
    """Bidirectional frames see each other in full; each later one sees all before it in full and itself causally."""
    both = min(layout.num_bidirectional, num_frames)
    chunks = []
    if both:
        end = layout.text_slots + both * area
        chunks.append(Chunk(range(both * area), range(end), extend(text.given, both * area)))
    for rank in range(both, num_frames):
        chunks += _causal(text.given, layout.text_slots, range(rank * area, (rank + 1) * area), device)
    return tuple(chunks)


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

    def draft(self, rank: int, slots: Int64[Tensor, "batch rows"]) -> tuple[Pass, tuple[Write, ...]]:
        """Any slots of one frame, other ones in every sample. The keys of the whole frame are read, whatever the slots:
        how many there are, which kernels round by, must not depend on the other samples."""
        spatial, *temporal = self.views
        own = spatial.draft(0, slots)
        others = [view.draft(rank, slots) for view in temporal]
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
        self.prefix = extend(text, where.num_keys - self.text_slots)
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
        index = range(places[0], places[0] + 1) if len(rows) == 1 else torch.tensor(places, device=self.key_cell.device)
        return Plan((Group(None, None, tuple(chunks)),)), Write(None, index)

    def draft(self, rank: int, slots: Tensor) -> tuple[Plan, Write]:
        """A key is seen in the row's own cell, if it is text or was fed no later than the row."""
        keys = self.places[rank][-1] + 1 if self.num_cells == 1 else len(self.key_order)
        order = rank * len(self.cell) + slots
        seen = self.key_order[:keys] <= order[..., None]
        if self.num_cells > 1:
            seen &= self.key_cell[:keys] == self.device_cell[slots][..., None]
        mask = self.keys_mask[..., :keys].masked_fill(~seen[:, None], -torch.inf)
        return Plan((Group(None, None, (Chunk(None, range(keys), mask),)),)), Write(
            None, self.device_places[rank][slots]
        )


def _spread(text: Tensor | None, where: CacheMap) -> Float[Tensor, "#batch 1 1 keys"]:
    """The text mask at every cell's copy of the text, nothing added to all other keys."""
    if text is None:
        return torch.zeros(1, 1, 1, where.num_keys)
    spread = text.new_zeros(*text.shape[:-1], where.num_keys)
    spread[..., where.text_places.to(text.device)] = text[..., None, :]
    return spread
