"""Attention that follows the structure of a sequence: cells (frames or windows) become batch dimensions.

A `Plan` says which rows (queries) see which keys. It is made of groups of equal-sized cells, each cell a gather of rows
and keys, and of chunks: slices of the gathered rows and keys that go through one `scaled_dot_product_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F


class Chunk(NamedTuple):
    """Rows of a group that see the same keys."""

    rows: slice
    """Rows inside each cell."""
    keys: slice
    """Keys inside each cell."""
    mask: Tensor | None = None
    """What is broadcast over the rows, (batch, 1, 1 or rows, keys): true where a key is seen, or what is added."""
    causal: bool = False
    """Whether the last keys are the rows themselves, each of which sees itself and those before it."""


class Group(NamedTuple):
    """Cells of equal size."""

    rows: Int64[Tensor, "cells rows"] | None
    """Rows of the pass that each cell gathers; None: one cell with all rows."""
    keys: Int64[Tensor, "cells keys"] | None
    """Keys that each cell gathers; None: one cell with all keys."""
    chunks: tuple[Chunk, ...]


class Plan(NamedTuple):
    """Which rows see which keys in one channel of one kind of block."""

    groups: tuple[Group, ...]
    restore: Int64[Tensor, " rows"] | None = None
    """Where each row of the pass stands among the groups' outputs; None: they are in order."""


def attend(
    q: Float[Tensor, "batch heads rows head_dim"],
    k: Float[Tensor, "batch heads keys head_dim"],
    v: Float[Tensor, "batch heads keys head_dim"],
    plan: Plan,
) -> Float[Tensor, "batch rows heads*head_dim"]:
    """Softmax attention of every row over the keys that the plan gives it, scaled by 1 / sqrt(head_dim)."""
    heads, kind = q.shape[1], q.dtype
    q = q.to(k.dtype)  # caches may be wider than the weights
    outs = [_attend_group(q, k, v, group) for group in plan.groups]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    out = out if plan.restore is None else out[:, :, plan.restore]
    return rearrange(out, "batch heads rows dim -> batch rows (heads dim)", heads=heads).to(kind)


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: Group) -> Float[Tensor, "batch heads rows head_dim"]:
    num_cells = 1 if group.rows is None else len(group.rows)
    q, k, v = _gather(q, group.rows), _gather(k, group.keys), _gather(v, group.keys)
    outs = [
        _attend_chunk(q[:, :, chunk.rows], k[:, :, chunk.keys], v[:, :, chunk.keys], chunk) for chunk in group.chunks
    ]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return (
        out
        if num_cells == 1
        else rearrange(out, "batch (heads cells) rows dim -> batch heads (cells rows) dim", cells=num_cells)
    )


def _gather(x: Tensor, index: Tensor | None) -> Float[Tensor, "batch heads*cells slots head_dim"]:
    return x if index is None else x[:, :, index].flatten(1, 2)


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk) -> Tensor:
    mask = causal_mask(chunk.mask, q.shape[2], k.shape[2], q.device) if chunk.causal else chunk.mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_mask(mask: Tensor | None, rows: int, keys: int, device: torch.device) -> Tensor:
    """What the rows see if the last keys are the rows themselves: keys before those as `mask` says, then a triangle."""
    past: Bool[Tensor, "rows keys"] = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
    if mask is None:
        return past
    return mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)


def split_heads(fused: Float[Tensor, "batch rows 3*hidden"], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (batch, heads, rows, head_dim), from the fused projection [q | k | v]."""
    batch, rows, width = fused.shape
    q, k, v = fused.view(batch, rows, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v
