"""Attention that follows the structure of a sequence: cells (frames or windows) become batch dimensions.

A `Plan` says which rows (queries) see which keys. It is made of groups of equal-sized cells, each cell a gather of rows
and keys, and of chunks: runs of the gathered rows and keys that go through one `scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

SHORT = 192
"""Rows below which PyTorch's bfloat16 kernel for CPUs takes blocks of 32, and is slow backward."""


class Chunk(NamedTuple):
    """Rows of a group that see the same keys."""

    rows: range | None
    """Rows inside each cell; None: all."""
    keys: range | None
    """Keys inside each cell; None: all."""
    mask: Tensor | None = None
    """For (batch, 1, 1 or rows, keys): true where a key is seen, or what is added to scores; None: all are seen."""
    owner: slice | None = None
    """Whose keys, in the batch of the cache, where rows of several samples stand in one row of the pass; None: each
    row of the batch reads its own."""


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
    kv: Float[Tensor, "2 samples heads keys head_dim"],
    plan: Plan,
) -> Float[Tensor, "batch rows heads*head_dim"]:
    """Softmax attention of every row over the keys that the plan gives it, scaled by 1 / sqrt(head_dim)."""
    kind = q.dtype
    q = q.to(kv.dtype)  # caches may be wider than the weights
    out = _joined([_attend_group(q, kv, group) for group in plan.groups])
    out = out if plan.restore is None else out.index_select(1, plan.restore)
    return out.flatten(2).to(kind)


def _attend_group(q: Tensor, kv: Tensor, group: Group) -> Float[Tensor, "batch rows heads head_dim"]:
    if group.rows is None or group.keys is None:
        return _attend_chunks(q, kv, group.chunks)
    out = _attend_chunks(_gather(q, group.rows), _gather(kv, group.keys), group.chunks)
    return rearrange(out, "batch rows (heads cells) dim -> batch (cells rows) heads dim", cells=len(group.rows))


def _gather(x: Tensor, index: Int64[Tensor, "cells slots"]) -> Tensor:
    # index_select: the gradient of x[..., index, :] adds up element by element, some hundred times slower
    cells, slots = index.shape
    gathered = x.index_select(-2, index.flatten())
    return gathered.reshape(*x.shape[:-3], x.shape[-3] * cells, slots, x.shape[-1])


def _attend_chunks(q: Tensor, kv: Tensor, chunks: tuple[Chunk, ...]) -> Float[Tensor, "batch rows heads head_dim"]:
    rows, keys = [chunk.rows for chunk in chunks], [chunk.keys for chunk in chunks]
    parts = zip(_runs(q, rows), *(_runs(each, keys) for each in kv.unbind(0)), chunks, strict=True)
    # kernels write row by row, all heads of a row side by side
    return _joined([_attend_chunk(*part).transpose(1, 2) for part in parts])


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk) -> Float[Tensor, "batch heads rows head_dim"]:
    if chunk.owner is None:
        return _softmax_attention(q, k, v, chunk.mask)
    return _softmax_attention(q, k[chunk.owner], v[chunk.owner], chunk.mask)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)  # under autocast, scores are narrower than weights
    if _is_short(q) and torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v)):
        return _Short.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _is_short(q: Float[Tensor, "batch heads rows head_dim"]) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] < SHORT


class _Short(torch.autograd.Function):
    """Attention of few rows in bfloat16 on a CPU: PyTorch's kernel forward, whole matrix products backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        ctx.save_for_backward(q, k, v, mask, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, mask, out = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        q = q * scale
        scores = q @ k.mT
        if mask is not None:
            scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
        weights = scores.softmax(-1)
        through = (gradient @ v.mT).sub_((gradient * out).sum(-1, keepdim=True)).mul_(weights)
        return (through @ k).mul_(scale), through.mT @ q, weights.mT @ gradient, None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _runs(x: Float[Tensor, "batch heads slots head_dim"], runs: list[range | None]) -> Sequence[Tensor]:
    """Views of runs of slots; None: of all."""
    if x.requires_grad and len(runs) > 1:
        return _Runs.apply(x, runs)  # type: ignore[no-untyped-call]
    return [x if run is None else x.narrow(2, run.start, len(run)) for run in runs]


class _Runs(torch.autograd.Function):
    """Views whose gradients add up in one tensor, where those of `narrow` would each be as large as the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: list[range]) -> tuple[Tensor, ...]:
        ctx.runs, ctx.shape = runs, x.shape
        return tuple(x.narrow(2, run.start, len(run)) for run in runs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        batch, heads, slots, dim = ctx.shape
        total = gradients[0].new_zeros(batch, slots, heads, dim).transpose(1, 2)  # as kernels lay them out
        for run, gradient in zip(ctx.runs, gradients, strict=True):
            total.narrow(2, run.start, len(run)).add_(gradient)
        return total, None


class Heads(NamedTuple):
    """A fused projection, split."""

    q: Float[Tensor, "batch heads rows head_dim"]
    kv: Float[Tensor, "2 batch heads rows head_dim"]
    """Keys and values."""


def split_heads(fused: Float[Tensor, "batch rows fused"], heads: int) -> Heads:
    """Queries, and keys with values, from the fused projection [q | k | v]."""
    batch, rows, width = fused.shape
    # split: gradients of its parts are joined once, those of slices would be filled up to the whole and added
    q, kv = fused.view(batch, rows, 3, heads, width // (3 * heads)).split_with_sizes((1, 2), 2)
    return Heads(q.squeeze(2).transpose(1, 2), kv.permute(2, 0, 3, 1, 4))
