"""Mask plans of training and prefill: the masks of the paper as slices of cells.

Such a pass has text and whole frames, and reads only its own keys. Passes that read a cache are in
`cache.py`; docs/sequence.md has diagrams.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from cogvideo.layout import SequenceLayout, cells, kinds
from cogvideo.models.attention import CellGroup, Chunk, MaskPlan
from cogvideo.models.transformer import Pass

CAUSAL_ROWS = 200
"""Maximum number of causal rows in one matrix of scores, half of which are wasted. From 192 rows on,
PyTorch's CPU kernel takes 64 rows at a time instead of 32, and is a fifth faster."""


def text_mask(
    mask: Bool[Tensor, "batch text"], bonus: float, dtype: torch.dtype
) -> Float[Tensor, "batch 1 1 text"] | None:
    """Numbers added to the scores of text keys: -inf for padding, `bonus` elsewhere; None if all are zero."""
    if not bonus and mask.device.type == "cpu" and bool(mask.all()):  # other devices would synchronize
        return None
    added = torch.full(mask.shape, bonus, dtype=dtype, device=mask.device)
    return added.masked_fill(~mask, -torch.inf)[:, None, None]


def extend(text: Tensor, keys: int) -> Tensor:
    """Extend the text mask to [text | keys]; all added keys are seen."""
    return F.pad(text, (0, keys)) if keys else text


def full_pass(
    layout: SequenceLayout,
    window: int | None,
    mask: Bool[Tensor, "batch text"],
    dtype: torch.dtype,
    num_frames: int,
    bonus: float = 0.0,
) -> Pass:
    """Masks of a pass of text and the first `num_frames` frames in the order of feeding.

    Args:
        layout: layout of the sequence.
        window: side of the temporal windows; 0 for full attention, None for no temporal channel.
        mask: true for real text, on the device of the pass.
        dtype: type of the keys.
        num_frames: number of leading ranks that are fed.
        bonus: added to text scores in the spatial channel; in the temporal one, only generated slots have
            it (spec 3).
    """
    spatial, *temporal = _structure(layout, window, num_frames, mask.device)
    text = text_mask(mask, 0.0, dtype)
    return Pass(
        layout.text_slots,
        _with_text(spatial, text_mask(mask, bonus, dtype) if bonus else text),
        tuple(_with_text(plan, text) for plan in temporal),
    )


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # tensors cached during generation must also work in training
def _structure(
    layout: SequenceLayout, window: int | None, num_frames: int, device: torch.device
) -> tuple[MaskPlan, ...]:
    """Plans in which every text slot is seen: the spatial channel's, then one per kind of temporal block.

    On CUDA each is one masked attention: launching many small ones takes longer than computing wasted scores.
    """
    plans = [_spatial(layout, num_frames)]
    if window is not None:
        plans += [_temporal(layout, window, shifted, num_frames) for shifted in kinds(window)]
    if device.type == "cuda":
        frame_rows = num_frames * layout.frame_slots
        keys = layout.text_slots + frame_rows
        spatial, *temporal = plans
        plans = [_dense(spatial, keys, keys), *(_dense(plan, frame_rows, keys) for plan in temporal)]
    return tuple(_on(plan, device) for plan in plans)


def _spatial(layout: SequenceLayout, num_frames: int) -> MaskPlan:
    """Text sees text; a frame sees text and itself, in full if bidirectional, otherwise causally."""
    words = torch.arange(layout.text_slots)
    slots = layout.text_slots + torch.arange(num_frames * layout.frame_slots).view(num_frames, layout.frame_slots)
    both = min(layout.num_bidirectional, num_frames)
    groups = [CellGroup(words[None], words[None], (Chunk(None, None),))]
    causal = tuple(_causal(layout.text_slots, range(layout.frame_slots)))
    for frames, chunks in ((slots[:both], (Chunk(None, None),)), (slots[both:], causal)):
        if len(frames):
            keys = torch.cat([words.expand(len(frames), -1), frames], dim=1)
            groups.append(CellGroup(frames, keys, chunks))
    return MaskPlan(tuple(groups))


def _causal(text_slots: int, frame: range) -> Iterator[Chunk]:
    """Each row of a frame sees text, itself and all rows before it; keys are [text | rows]."""
    for start in frame[::CAUSAL_ROWS]:
        rows = range(start, min(start + CAUSAL_ROWS, frame.stop))
        keys = range(text_slots + rows.stop)
        yield Chunk(rows, keys, torch.ones(len(rows), len(keys), dtype=torch.bool).tril(text_slots + start))


def _temporal(layout: SequenceLayout, window: int, shifted: bool, num_frames: int) -> MaskPlan:
    """Each cell of a frame sees text, itself, and the same cell of all earlier frames; rows exclude text."""
    if not window:  # one cell, whose rows need no gathering
        return MaskPlan((CellGroup(None, None, _frame_chunks(layout, layout.frame_slots, num_frames)),))
    words = torch.arange(layout.text_slots)
    frames = torch.arange(num_frames) * layout.frame_slots
    groups: list[CellGroup] = []
    places: list[Tensor] = []
    for part in cells(layout.sides, window, shifted):
        rows = (frames[:, None] + part[:, None]).flatten(1)
        keys = torch.cat([words.expand(len(rows), -1), layout.text_slots + rows], dim=1)
        groups.append(CellGroup(rows, keys, _frame_chunks(layout, part.shape[1], num_frames)))
        places.append(rows.flatten())
    return MaskPlan(tuple(groups), restore=torch.cat(places).argsort())


def _frame_chunks(layout: SequenceLayout, area: int, num_frames: int) -> tuple[Chunk, ...]:
    """Bidirectional frames see each other in full; later ones see all earlier frames, and themselves causally."""
    both = min(layout.num_bidirectional, num_frames)
    chunks = []
    if both:
        chunks.append(Chunk(range(both * area), range(layout.text_slots + both * area)))
    for rank in range(both, num_frames):
        chunks += _causal(layout.text_slots, range(rank * area, (rank + 1) * area))
    return tuple(chunks)


def _dense(plan: MaskPlan, num_rows: int, num_keys: int) -> MaskPlan:
    """Merge a plan into one group with one cell and one chunk."""
    seen = torch.zeros(num_rows, num_keys, dtype=torch.bool)
    for group in plan.groups:
        rows = torch.arange(num_rows)[None] if group.rows is None else group.rows
        keys = torch.arange(num_keys)[None] if group.keys is None else group.keys
        for chunk in group.chunks:
            inside, others = _part(rows, chunk.rows), _part(keys, chunk.keys)
            seen[inside[:, :, None], others[:, None]] = True if chunk.mask is None else chunk.mask
    return MaskPlan((CellGroup(None, None, (Chunk(None, None, seen),)),))


def _part(slots: Int64[Tensor, "cells slots"], run: range | None) -> Int64[Tensor, "cells part"]:
    return slots if run is None else slots[:, run.start : run.stop]


def _on(plan: MaskPlan, device: torch.device) -> MaskPlan:
    """Move the tensors of a plan to a device."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    groups = []
    for group in plan.groups:
        chunks = tuple(chunk._replace(mask=moved(chunk.mask)) for chunk in group.chunks)
        groups.append(CellGroup(moved(group.rows), moved(group.keys), chunks))
    return MaskPlan(tuple(groups), moved(plan.restore))


def _with_text(plan: MaskPlan, text: Tensor | None) -> MaskPlan:
    """Apply the mask of the text to a plan."""
    if text is None:
        return plan
    groups = []
    for group in plan.groups:
        chunks = tuple(chunk._replace(mask=_masked(group, chunk, text)) for chunk in group.chunks)
        groups.append(group._replace(chunks=chunks))
    return plan._replace(groups=tuple(groups))


def _masked(group: CellGroup, chunk: Chunk, text: Tensor) -> Float[Tensor, "batch 1 #rows keys"]:
    if chunk.mask is not None:
        return extend(text, chunk.mask.shape[-1] - text.shape[-1]).masked_fill(~chunk.mask, -torch.inf)
    keys = group.keys[0] if chunk.keys is None and group.keys is not None else chunk.keys
    assert keys is not None
    return extend(text, len(keys) - text.shape[-1])
