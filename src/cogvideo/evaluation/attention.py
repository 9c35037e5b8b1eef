"""Attention of the temporal channel (paper, appendix A): where the slots of each frame look, layer by layer.

A finished clip is fed through a stage again, in the passes of decoding: text and given frames, then each other frame as
a whole. Every pass exposes its queries, its keys (including cached ones) and its mask plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from cogvideo.bundle.model import StageModels
from cogvideo.generation.decoder import Condition, Decoder
from cogvideo.generation.request import Request
from cogvideo.layout import SequenceLayout
from cogvideo.models.attention import attention_weights, split_heads
from cogvideo.models.transformer import Pass, TemporalBlock, Transformer

OnAttention = Callable[[int, range, Float[Tensor, "heads rows keys"]], None]
"""Called with a layer, the slots of the rows, and their attention to [text as a whole | slots]; slots are numbered
across all frames in feed order."""


class StageAttention(NamedTuple):
    """Attention in a stage for one clip. Frames are in order of time."""

    name: str
    """`sequential` or `interpolation`."""
    layout: SequenceLayout
    window: int
    """Side of the temporal windows, 0 for full attention."""
    shares: Float[Tensor, "layers heads frames targets"]
    """Share of the attention of a frame's slots that goes to the text, then to each frame; the mean over slots."""
    steps: Float[Tensor, "layers heads rows columns"]
    """Share that goes to the codes of the previous frame, by offset in rows and columns from the predicted code, which
    is in the middle; the mean over slots of generated frames."""
    gates: Float[Tensor, "layers hidden"]
    """Share of the temporal channel in each channel of the output; the spatial channel has the rest."""

    @property
    def same_place(self) -> Float[Tensor, "layers heads"]:
        """Share that goes to the code at the same position in the previous frame."""
        row, column = self.middle
        return self.steps[:, :, row, column]

    @property
    def middle(self) -> tuple[int, int]:
        """Row and column of the same position in `steps`."""
        rows, columns = self.layout.sides
        return rows - 1, columns - 1


def stage_attention(
    system: StageModels, request: Request, codes: Int64[Tensor, "1 frames slots"]
) -> list[StageAttention]:
    """Attention of the key frames, and of the first sequence of the first round of interpolation, as far as the model
    has these stages.

    The codes are those of one clip after one round of interpolation, or key frames if there is no such stage.
    """
    found, sizes, settings = [], system.config.layout, request.settings
    if "interpolation" in system.components:
        layout = SequenceLayout.interpolation(sizes)
        condition = request.condition(system, 0.5, settings.interpolation_guidance)
        found.append(measure("interpolation", system.interpolation, layout, condition, codes))
        codes = codes[:, ::2]
    layout = SequenceLayout.sequential(sizes)
    condition = request.condition(system, 1.0, settings.later.guidance)
    found.append(measure("sequential", system.sequential, layout, condition, codes))
    return found[::-1]


def measure(
    name: str,
    model: Transformer,
    layout: SequenceLayout,
    condition: Condition,
    codes: Int64[Tensor, "1 frames slots"],
) -> StageAttention:
    """Attention in a stage. The codes are in order of time, at least as many frames as a sequence has."""
    assert model.channel is not None
    config, slots, frames = model.base.config, layout.frame_slots, layout.num_frames
    height, width = layout.sides
    shares = torch.zeros(config.num_layers, config.num_heads, frames, 1 + frames)
    steps = torch.zeros(config.num_layers, config.num_heads, 2 * height - 1, 2 * width - 1)
    ranks = torch.tensor(layout.order).argsort()

    def on_attention(layer: int, rows: range, weights: Tensor) -> None:
        for rank in range(rows.start // slots, rows.stop // slots):
            place, own = layout.order[rank], weights[:, rank * slots - rows.start :][:, :slots]
            targets = rearrange(own[:, :, 1:], "heads rows (ranks slots) -> ranks heads rows slots", slots=slots)[ranks]
            shares[layer, :, place, 0] = own[:, :, 0].mean(1)
            shares[layer, :, place, 1:] = targets.sum(3).mean(2).T
            if place in layout.loss_places:
                steps[layer] += _steps(targets[place - 1], layout.sides) / len(layout.loss_places)

    replay(model, layout, condition, codes[:, layout.order], on_attention)
    gates = [1 - values.sigmoid() for name, values in model.channel.named_parameters() if name.endswith(".gate")]
    return StageAttention(name, layout, model.window or 0, shares, steps, torch.stack(gates).float().cpu())


def _steps(weights: Float[Tensor, "heads slots keys"], sides: tuple[int, int]) -> Float[Tensor, "heads rows columns"]:
    """Attention to codes of one frame, by offset in rows and columns from the predicted code; the mean over slots."""
    codes = F.pad(weights[:, :, 1:], (0, 1))  # slot j predicts code j, and was fed code j - 1
    height, width = sides
    frames = rearrange(codes, "heads slots (rows columns) -> heads slots rows columns", rows=height)
    found = weights.new_zeros(len(weights), 2 * height - 1, 2 * width - 1)
    for slot in range(height * width):
        top, left = height - 1 - slot // width, width - 1 - slot % width
        found[:, top : top + height, left : left + width] += frames[:, slot] / (height * width)
    return found


def replay(
    model: Transformer,
    layout: SequenceLayout,
    condition: Condition,
    codes: Int64[Tensor, "1 frames slots"],
    on_attention: OnAttention,
) -> None:
    """Feed the codes of a finished clip, in feed order, as decoding does.

    `on_attention` gets the attention of the temporal channel after each pass and layer; with guidance, only that of the
    prompt's rows.
    """
    decoder = Decoder(model, layout, replace(condition, unconditional=None))
    slots, num_given = layout.frame_slots, max(1, layout.num_bidirectional)
    fed = layout.feed(codes, model.base.config.start_of_image).view_as(codes).to(decoder.device)
    with _watched(decoder, range(num_given * slots), on_attention):
        decoder.prefill(codes[:, :num_given])
    for rank in range(num_given, layout.num_frames):
        with _watched(decoder, range(rank * slots, (rank + 1) * slots), on_attention):
            decoder.draft(rank, [range(slots)], fed[:, rank])


@contextmanager
def _watched(decoder: Decoder, rows: range, on_attention: OnAttention) -> Iterator[None]:
    """Call `on_attention` with the attention of a pass that feeds these slots."""

    def hook(block: TemporalBlock, inputs: tuple[Tensor, Tensor, int, Pass], _: Any) -> None:
        x, _, layer, plan = inputs
        number, kind = divmod(layer, len(plan.temporal))
        own = plan.temporal[kind]
        q, kv = split_heads(block.qkv(x), block.num_heads)
        weights = attention_weights(q[:, :, plan.num_text :], own.keys(kv, number)[0], own)[0]
        order = decoder.temporal[kind].map.key_order
        if own.write is not None and own.write.is_complete:
            order = torch.arange(weights.shape[2]) - decoder.layout.text_slots
        whole = weights.new_zeros(*weights.shape[:2], 1 + decoder.layout.num_frames * decoder.layout.frame_slots)
        on_attention(layer, rows, whole.index_add_(2, order.clamp(min=-1).to(whole.device) + 1, weights).cpu())

    assert decoder.model.channel is not None
    with ExitStack() as stack:
        for block in decoder.model.channel.blocks:
            stack.callback(block.register_forward_hook(hook).remove)
        yield
