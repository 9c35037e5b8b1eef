"""A plain guided decoder as a baseline: one code at a time, as in the released pipeline.

It runs the model twice for guidance, concatenates the caches of both channels in every layer, and uses `F.linear`,
explicit scores, and logits over the whole vocabulary. It computes the same thing as `Decoder.step`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideo.models.transformer import Transformer


class PlainContext:
    """Keys and values of one row's text and frames so far, grown by concatenation."""

    def __init__(self, model: Transformer, num_text: int, num_frame: int, dtype: torch.dtype) -> None:
        config = model.base.config
        shape = (1, config.num_heads, num_text + num_frame, config.head_dim)
        self.num_text = num_text
        self.spatial = [torch.randn(2, *shape, dtype=dtype) for _ in range(config.num_layers)]
        self.temporal = [torch.randn(2, *shape, dtype=dtype) for _ in range(config.num_layers)]


def plain_step(
    model: Transformer, contexts: list[PlainContext], token: Tensor, position: int, frame_start: int, scale: float
) -> Tensor:
    """Guided logits of the next code, from two passes in sequence."""
    conditional, unconditional = (_pass(model, context, token, position, frame_start) for context in contexts)
    return unconditional + scale * (conditional - unconditional)


def _pass(model: Transformer, context: PlainContext, token: Tensor, position: int, frame_start: int) -> Tensor:
    base = model.base
    channel = model.channel
    heads = model.base.config.num_heads
    assert channel is not None
    grid = math.isqrt(channel.first_position - channel.frame_position)
    extra = position - channel.first_position
    row = channel.positions.weight[extra] if extra >= 0 else base.positions.weight[position]
    x = base.words.weight[token] + row
    for layer, (block, own) in enumerate(zip(base.blocks, channel.blocks, strict=True)):
        normed = block.norm1(x)
        kept, both = [], []
        for cache, linear in ((context.spatial, block.qkv), (context.temporal, own.qkv)):
            q, k, v = (part.view(1, 1, heads, -1).transpose(1, 2) for part in _linear(linear, normed).chunk(3, -1))
            keys = torch.cat([cache[layer], torch.stack([k, v])], dim=3)
            kept.append(keys)
            if cache is context.spatial:
                keys = torch.cat([keys[..., : context.num_text, :], keys[..., context.num_text + frame_start :, :]], 3)
            elif model.window:
                shift = model.window // 2 if layer % 2 else 0
                text, frames = keys.split((context.num_text, keys.shape[3] - context.num_text), dim=3)
                keys = torch.cat([text, frames[..., _window_keys(frames.shape[3], grid, model.window, shift), :]], 3)
            scores = q @ keys[0].transpose(-1, -2) / math.sqrt(q.shape[-1])
            both.append((scores.softmax(-1) @ keys[1]).transpose(1, 2).flatten(2))
        gate = own.gate.sigmoid()
        mixed = gate * _linear(block.out, both[0]) + (1 - gate) * _linear(own.out, both[1])
        x = x + block.norm3(mixed)
        hidden = F.gelu(_linear(block.mlp_in, block.norm2(x)), approximate="tanh")
        x = x + block.norm4(_linear(block.mlp_out, hidden))
        context.spatial[layer], context.temporal[layer] = (keys[..., :-1, :] for keys in kept)  # to repeat the step
    return F.linear(base.norm(x), base.words.weight)[..., : base.config.num_codes]


def _window_keys(num_keys: int, grid: int, window: int, shift: int) -> Tensor:
    """Keys in the last key's window in every frame, computed in every layer as in the released code."""
    row, column = divmod((num_keys - 1) % grid**2, grid)
    inside = [
        each * grid + other for each in _span(row, grid, window, shift) for other in _span(column, grid, window, shift)
    ]
    keys = (torch.arange(0, num_keys, grid**2)[:, None] + torch.tensor(inside)).flatten()
    return keys[keys < num_keys]


def _span(at: int, grid: int, window: int, shift: int) -> range:
    first = (at + shift) // window * window - shift
    return range(max(first, 0), min(first + window, grid))


def _linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)
