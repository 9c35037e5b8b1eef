"""A plain training step as a baseline: dense float masks, explicit scores, logits over the whole vocabulary.

Both channels attend over the whole sequence, as in the paper's equations: every score is computed, multiplied by a mask
of ones and zeros, shifted by -10000 where the mask is zero, and kept for the backward pass. It computes the same loss
as `VideoTask`, from the same weights. Here too, a frozen base has no gradients and no optimizer state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideo.layout import SequenceLayout
from cogvideo.models.transformer import Transformer
from cogvideo.training.objectives.video import VideoBatch

RELAXED = 16
"""Scores are divided by this before their maximum is subtracted, then multiplied by it, so that float16 would do."""


class DenseMasks(NamedTuple):
    """Masks over text and frames in the order they are fed, (batch, 1, rows, rows): 1 where a key is seen, else 0."""

    spatial: Tensor
    temporal: tuple[Tensor, ...]
    """One per kind of block; the kinds alternate."""


def dense_masks(layout: SequenceLayout, window: int, text: Tensor, dtype: torch.dtype) -> DenseMasks:
    """Build a batch's masks from its text mask, one pair of frames at a time."""
    everywhere = torch.ones(layout.frame_slots, layout.frame_slots)
    kinds = [_same_window(layout.grid, window, shifted) for shifted in (False, True)] if window else [everywhere]
    spatial = _mask(layout, text, everywhere, across=False)
    temporal = [_mask(layout, text, same, across=True) for same in kinds]
    return DenseMasks(spatial.to(dtype), tuple(each.to(dtype) for each in temporal))


def _mask(layout: SequenceLayout, text: Tensor, same: Tensor, across: bool) -> Tensor:
    """All rows see text. Frames see themselves and, if `across`, earlier frames."""
    mask = torch.zeros(layout.length, layout.length)
    frames = mask[layout.text_slots :, layout.text_slots :].view(layout.num_frames, layout.frame_slots, -1)
    for rank, rows in enumerate(frames):
        for other, block in enumerate(rows.split(layout.frame_slots, dim=1)):
            given = max(rank, other) < layout.num_bidirectional
            if other == rank or (across and (other < rank or given)):
                block.copy_(same if other != rank or given else same.tril())
    mask = mask.repeat(len(text), 1, 1, 1)
    mask[..., : layout.text_slots] = text[:, None, None]
    return mask


def _same_window(grid: int, window: int, shifted: bool) -> Tensor:
    cut = (torch.arange(grid) + (window // 2 if shifted else 0)) // window
    labels = (cut[:, None] * grid + cut).flatten()
    return (labels[:, None] == labels).float()


def plain_attention(fused: Tensor, mask: Tensor, num_heads: int) -> Tensor:
    """Attention of every row, from the fused projection [q | k | v]."""
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in fused.chunk(3, -1))
    scores = (q / (RELAXED * math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    scores = scores * mask - 10_000.0 * (1 - mask)
    scores = RELAXED * (scores - scores.detach().amax(-1, keepdim=True))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def plain_loss(model: Transformer, layout: SequenceLayout, masks: DenseMasks, batch: VideoBatch) -> Tensor:
    """Mean loss of a video stage over a batch."""
    codes = batch.codes[:, list(layout.order)].flatten(2)
    tokens = torch.cat([batch.text.tokens, layout.feed(codes, model.base.config.start_of_image)], dim=1)
    frames = layout.frame_positions(range(layout.num_frames)).expand(len(tokens), -1)
    positions = torch.cat([layout.text_positions(batch.text.mask), frames], dim=1)
    hidden = _blocks(model, model.base.words(tokens) + model.position(positions), masks, layout.text_slots)
    logits = F.linear(model.base.norm(hidden), model.base.words.weight)
    slots = layout.loss_slots()
    learnt = logits[:, layout.text_slots + slots, : model.base.config.num_codes]
    return F.cross_entropy(learnt.flatten(0, 1).float(), codes.flatten(1)[:, slots].flatten())


def _blocks(model: Transformer, x: Tensor, masks: DenseMasks, text: int) -> Tensor:
    heads = model.base.config.num_heads
    kinds = len(masks.temporal)
    assert model.channel is not None
    for layer, (block, own) in enumerate(zip(model.base.blocks, model.channel.blocks, strict=True)):
        normed = block.norm1(x)
        spatial = block.out(plain_attention(block.qkv(normed), masks.spatial, heads))
        temporal = own.out(plain_attention(own.qkv(normed), masks.temporal[layer % kinds], heads))
        gate = own.gate.sigmoid()
        mixed = gate * spatial + (1 - gate) * temporal
        x = x + block.norm3(torch.cat([spatial[:, :text], mixed[:, text:]], dim=1))
        x = x + block.norm4(block.mlp_out(F.gelu(block.mlp_in(block.norm2(x)), approximate="tanh")))
    return x
