"""Attention by the structure of a sequence: cells (frames or windows) become batch dimensions.

A `MaskPlan` says which rows (queries) see which keys. It consists of groups of equal-sized cells, which
gather rows and keys. Each group has chunks: runs of the gathered rows and keys that share one
`scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from cogvideo.kernels import narrow, softmax_attention


class Chunk(NamedTuple):
    """Rows of a group that see the same keys."""

    rows: range | None
    """Rows in each cell; None is all."""
    keys: range | None
    """Keys in each cell; None is all."""
    mask: Tensor | None = None
    """Mask of shape (batch, 1, 1 or rows, keys): true where a key is seen, or numbers added to scores; None
    if all keys are seen."""
    owner: slice | None = None
    """Samples of the cache whose keys are read, if one row of the pass holds rows of several samples; None if
    each row of the batch reads its own."""


class CellGroup(NamedTuple):
    """Cells of equal size."""

    rows: Int64[Tensor, "cells rows"] | None
    """Rows of the pass that each cell gathers; None is one cell with all rows."""
    keys: Int64[Tensor, "cells keys"] | None
    """Keys that each cell gathers; None is one cell with all keys."""
    chunks: tuple[Chunk, ...]


class CacheWrite(NamedTuple):
    """Rows of a pass to keep, and their places in a cache."""

    cache: Sequence[Float[Tensor, "2 samples heads slots head_dim"]]
    """Keys and values of each layer with this kind of block."""
    places: range | Int64[Tensor, " kept"] | Int64[Tensor, "batch kept"]
    """Place of each row in the cache."""
    rows: Int64[Tensor, " kept"] | None = None
    """Rows of the pass; None is all."""
    samples: Int64[Tensor, " kept"] | None = None
    """Sample of each row, if one row of the pass holds rows of several samples; None if the batches match."""
    is_complete: bool = False
    """True if the pass reads its own keys, as in training (prefill); other passes read the cache."""

    def store(self, kv: Float[Tensor, "2 batch heads rows head_dim"], layer: int) -> Tensor:
        """Write keys and values of a pass, and return those that its rows read."""
        cached, places = self.cache[layer], self.places
        kept = kv if self.rows is None else kv[:, :, :, self.rows]
        if isinstance(places, range):
            cached.narrow(3, places.start, len(places)).copy_(kept)
        elif self.samples is not None:
            apart = cached.view(2, kept.shape[1], -1, *cached.shape[2:])
            by_sample = apart.permute(2, 4, 0, 1, 3, 5)  # (sample, place, ...)
            by_sample[self.samples, places] = kept.permute(3, 0, 1, 2, 4).to(cached.dtype)
        elif places.ndim == 1:
            cached.index_copy_(3, places, kept.to(cached.dtype))
        else:
            cached.scatter_(3, places[:, None, :, None].expand(kept.shape), kept.to(cached.dtype))
        return kv if self.is_complete else cached


class MaskPlan(NamedTuple):
    """Visibility of keys in one channel of one kind of block, and the rows to keep for later passes."""

    groups: tuple[CellGroup, ...]
    restore: Int64[Tensor, " rows"] | None = None
    """Index of each row of the pass in the groups' outputs; None if they are in order."""
    write: CacheWrite | None = None
    """Keys and values to write to the cache before rows read it; None in training."""

    def keys(self, kv: Float[Tensor, "2 batch heads rows head_dim"], layer: int) -> Tensor:
        """Keys and values that the rows of a pass read, after any write; `layer` counts layers of this kind."""
        return kv if self.write is None else self.write.store(kv, layer)


def attend(
    q: Float[Tensor, "batch heads rows head_dim"],
    kv: Float[Tensor, "2 samples heads keys head_dim"],
    plan: MaskPlan,
) -> Float[Tensor, "batch rows heads*head_dim"]:
    """Softmax attention of each row over the keys that it sees, scaled by 1 / sqrt(head_dim)."""
    kind = q.dtype
    q = q.to(kv.dtype)  # caches may have more bits than the weights
    out = _joined([_attend_group(q, kv, group) for group in plan.groups])
    out = out if plan.restore is None else out.index_select(1, plan.restore)
    return out.flatten(2).to(kind)


def _attend_group(q: Tensor, kv: Tensor, group: CellGroup) -> Float[Tensor, "batch rows heads head_dim"]:
    if group.rows is None or group.keys is None:
        return _attend_chunks(q, kv, group.chunks)
    out = _attend_chunks(_gather(q, group.rows), _gather(kv, group.keys), group.chunks)
    return rearrange(out, "batch rows (heads cells) dim -> batch (cells rows) heads dim", cells=len(group.rows))


def _gather(x: Tensor, index: Int64[Tensor, "cells slots"]) -> Tensor:
    # index_select: the gradient of x[..., index, :] is added element by element, about a hundred times slower
    cells, slots = index.shape
    gathered = x.index_select(-2, index.flatten())
    return gathered.reshape(*x.shape[:-3], x.shape[-3] * cells, slots, x.shape[-1])


def _attend_chunks(q: Tensor, kv: Tensor, chunks: tuple[Chunk, ...]) -> Float[Tensor, "batch rows heads head_dim"]:
    rows, keys = [chunk.rows for chunk in chunks], [chunk.keys for chunk in chunks]
    parts = []
    for own, k, v, chunk in zip(narrow(q, rows), *(narrow(each, keys) for each in kv), chunks, strict=True):
        seen = (k, v) if chunk.owner is None else (k[chunk.owner], v[chunk.owner])
        # kernels write row by row, with all heads of a row adjacent
        parts.append(softmax_attention(own, *seen, chunk.mask).transpose(1, 2))
    return _joined(parts)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def attention_weights(
    q: Float[Tensor, "batch heads rows head_dim"],
    k: Float[Tensor, "samples heads keys head_dim"],
    plan: MaskPlan,
) -> Float[Tensor, "batch heads rows keys"]:
    """Attention probabilities in `attend`, zero for unseen keys: its outputs with unit vectors as values."""
    num_keys, width = k.shape[2:]
    units = F.pad(torch.eye(num_keys).to(k), (0, -num_keys % width))
    parts = [attend(q, torch.stack([k, unit.expand_as(k)]), plan) for unit in torch.split(units, width, dim=1)]
    weights = [rearrange(part, "batch rows (heads keys) -> batch heads rows keys", keys=width) for part in parts]
    return torch.cat(weights, dim=3)[..., :num_keys]


def split_heads(
    fused: Float[Tensor, "batch rows fused"], heads: int
) -> tuple[Float[Tensor, "batch heads rows head_dim"], Float[Tensor, "2 batch heads rows head_dim"]]:
    """Queries, and stacked keys and values, from the fused projection [q | k | v]."""
    batch, rows, width = fused.shape
    # split: gradients of its parts are joined once; those of slices would be padded to full size and added
    q, kv = fused.view(batch, rows, 3, heads, width // (3 * heads)).split_with_sizes((1, 2), 2)
    return q.squeeze(2).transpose(1, 2), kv.permute(2, 0, 3, 1, 4)
