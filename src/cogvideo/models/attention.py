"""Attention that follows the structure of a sequence: cells (frames or windows) become batch dimensions.

A `Plan` says which rows (queries) see which keys. It is made of groups of equal-sized cells, each cell a gather of rows
and keys, and of chunks: runs of the gathered rows and keys that go through one `scaled_dot_product_attention`.
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

    rows: range | None
    """Rows inside each cell; None: all."""
    keys: range | None
    """Keys inside each cell; None: all."""
    mask: Tensor | None = None
    """For (batch, 1, 1 or rows, keys): true where a key is seen, or what is added to scores; None: all are seen."""
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
    kv: Float[Tensor, "2 batch heads keys head_dim"],
    plan: Plan,
) -> Float[Tensor, "batch rows heads*head_dim"]:
    """Softmax attention of every row over the keys that the plan gives it, scaled by 1 / sqrt(head_dim)."""
    kind = q.dtype
    q = q.to(kv.dtype)  # caches may be wider than the weights
    out = _joined([_attend_group(q, kv, group) for group in plan.groups])
    out = out if plan.restore is None else out.index_select(2, plan.restore)
    return out.transpose(1, 2).flatten(2).to(kind)


def _attend_group(q: Tensor, kv: Tensor, group: Group) -> Float[Tensor, "batch heads rows head_dim"]:
    if group.rows is None or group.keys is None:
        return _joined([_attend_chunk(q, kv, chunk) for chunk in group.chunks])
    q, kv = _gather(q, group.rows), _gather(kv, group.keys)
    out = _joined([_attend_chunk(q, kv, chunk) for chunk in group.chunks])
    return rearrange(out, "batch (heads cells) rows dim -> batch heads (cells rows) dim", cells=len(group.rows))


def _gather(x: Tensor, index: Int64[Tensor, "cells slots"]) -> Tensor:
    # index_select: the gradient of x[..., index, :] adds up element by element, some hundred times slower
    cells, slots = index.shape
    gathered = x.index_select(-2, index.flatten())
    return gathered.reshape(*x.shape[:-3], x.shape[-3] * cells, slots, x.shape[-1])


def _attend_chunk(q: Tensor, kv: Tensor, chunk: Chunk) -> Tensor:
    q = q if chunk.rows is None else q.narrow(2, chunk.rows.start, len(chunk.rows))
    k, v = (kv if chunk.keys is None else kv.narrow(3, chunk.keys.start, len(chunk.keys))).unbind(0)
    mask = causal_mask(chunk.mask, q.shape[2], k.shape[2], q.device) if chunk.causal else chunk.mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def causal_mask(mask: Tensor | None, rows: int, keys: int, device: torch.device) -> Tensor:
    """What the rows see if the last keys are the rows themselves: keys before those as `mask` says, then a triangle."""
    past: Bool[Tensor, "rows keys"] = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
    if mask is None:
        return past
    return mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)


class Heads(NamedTuple):
    """A fused projection, split."""

    q: Float[Tensor, "batch heads rows head_dim"]
    kv: Float[Tensor, "2 batch heads rows head_dim"]
    """Keys and values."""


def split_heads(fused: Float[Tensor, "batch rows fused"], heads: int) -> Heads:
    """Queries, and keys with values, from the fused projection [q | k | v]."""
    batch, rows, width = fused.shape
    parts = fused.view(batch, rows, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return Heads(parts.select(0, 0), parts.narrow(0, 1, 2))
