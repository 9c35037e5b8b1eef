"""Faster equivalents of operations that are slow in PyTorch on some devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SHORT_ROWS = 192
"""Number of rows below which PyTorch's bfloat16 CPU kernel uses blocks of 32 and has a slow backward pass."""


def softmax_attention(
    q: Float[Tensor, "batch heads rows head_dim"],
    k: Float[Tensor, "batch heads keys head_dim"],
    v: Float[Tensor, "batch heads keys head_dim"],
    mask: Tensor | None,
) -> Float[Tensor, "batch heads rows head_dim"]:
    """`scaled_dot_product_attention` with a fast backward pass for few rows in bfloat16 on a CPU.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: true where a key is seen, or numbers added to the scores; None if all keys are seen.
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)  # under autocast, scores have fewer bits than weights
    if _is_short(q) and torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v)):
        return _Short.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _is_short(q: Float[Tensor, "batch heads rows head_dim"]) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] < SHORT_ROWS


class _Short(torch.autograd.Function):
    """PyTorch's attention kernel in the forward pass, whole matrix products in the backward pass."""

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


def narrow(
    x: Float[Tensor, "batch heads slots head_dim"], runs: list[range | None]
) -> Sequence[Float[Tensor, "batch heads _ head_dim"]]:
    """Views of runs of slots; None stands for all slots."""
    if x.requires_grad and len(runs) > 1:
        return _Runs.apply(x, runs)  # type: ignore[no-untyped-call]
    return [x if run is None else x.narrow(2, run.start, len(run)) for run in runs]


class _Runs(torch.autograd.Function):
    """Views whose gradients are summed in one tensor; gradients of `narrow` would each be as large as `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: list[range]) -> tuple[Tensor, ...]:
        ctx.runs, ctx.shape = runs, x.shape
        return tuple(x.narrow(2, run.start, len(run)) for run in runs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        batch, heads, slots, dim = ctx.shape
        total = gradients[0].new_zeros(batch, slots, heads, dim).transpose(1, 2)  # the kernels' memory layout
        for run, gradient in zip(ctx.runs, gradients, strict=True):
            total.narrow(2, run.start, len(run)).add_(gradient)
        return total, None
