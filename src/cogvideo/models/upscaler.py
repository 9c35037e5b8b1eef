"""Super-resolution of code grids in one pass (CogView2 "direct"; spec section 4).

Two levels run in parallel. The low level, text and low codes, is the image model itself with a bidirectional
frame. The high slots share its norms, feed-forward layers and embeddings but have their own attention: each
sees the high slots around it and the low codes around its own low code, never the text.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from cogvideo.config import LayoutConfig, TransformerConfig, UpscalerConfig
from cogvideo.layout import SequenceLayout, UpscaleLayout
from cogvideo.models.attention import CellGroup, Chunk, MaskPlan, attend, split_heads
from cogvideo.models.plans import full_pass
from cogvideo.models.transformer import Base, Block, Embedding

TILE = 4
"""Side, in low codes, of an attention cell of high slots. Larger cells compute more wasted scores, smaller
ones gather each key more often (released sizes: 2.1 times on average, 4 times with cells of 2)."""


class LevelPlans(NamedTuple):
    """Mask plans of both levels."""

    num_text: int
    """Number of text rows of the low level."""
    low: MaskPlan
    """Plan of text and low codes, over themselves."""
    high: MaskPlan
    """Plan of high slots, over [high slots | low codes]."""


class UpscaleBlock(nn.Module):
    """Attention of the high slots that super-resolution adds to a block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)

    def forward(
        self,
        block: Block,
        low: Float[Tensor, "batch rows hidden"],
        high: Float[Tensor, "batch high hidden"],
        plan: LevelPlans,
    ) -> tuple[Float[Tensor, "batch rows hidden"], Float[Tensor, "batch high hidden"]]:
        """Run both levels through a block; high slots see the base's keys and values of the low codes."""
        q, kv = split_heads(block.qkv(block.norm1(low)), block.num_heads)
        own_q, own_kv = split_heads(self.qkv(block.norm1(high)), self.num_heads)
        seen = torch.cat([own_kv, kv[:, :, :, plan.num_text :]], dim=3)
        low = block.residual(low, block.out(attend(q, kv, plan.low)))
        high = block.residual(high, self.out(attend(own_q, seen, plan.high)))
        return low, high


class UpscaleChannel(nn.Module):
    """Parameters that super-resolution adds to the base: attention, and positions of the high slots."""

    def __init__(self, config: TransformerConfig, layout: LayoutConfig, upscaler: UpscalerConfig) -> None:
        super().__init__()
        self.upscaler = upscaler
        self.layout = UpscaleLayout.of(layout, upscaler)
        self.positions = Embedding(self.layout.high_grid**2, config.hidden)
        self.blocks = nn.ModuleList(UpscaleBlock(config) for _ in range(config.num_layers))


class Upscaler(nn.Module):
    """Super-resolution: low codes and their caption to high codes.

    Args:
        base: the frozen base of the image model.
        channel: parameters that super-resolution adds.
    """

    def __init__(self, base: Base, channel: UpscaleChannel) -> None:
        super().__init__()
        self.base = base
        self.channel = channel

    def forward(
        self,
        text: Int64[Tensor, "batch text"],
        mask: Bool[Tensor, "batch text"],
        codes: Int64[Tensor, "batch low"],
        layout: UpscaleLayout | None = None,
    ) -> Float[Tensor, "batch high hidden"]:
        """Run a pass; returns the high slots after the last block, before the final norm (see `Base.logits`).

        Args:
            text: left-padded tokens.
            mask: true for real text, at least one token per row.
            codes: codes of the low frame.
            layout: layout for frames whose shape differs from the channel's.
        """
        layout = layout or self.channel.layout
        spatial = full_pass(low_sequence(layout), None, mask, self.base.words.weight.dtype, 1).spatial
        plan = LevelPlans(layout.text_slots, spatial, neighborhoods(layout, self.channel.upscaler, codes.device))
        low = self._embed_low(text, mask, codes, layout)
        high = self._embed_high(codes, layout)
        for block, added in zip(self.base.blocks, self.channel.blocks, strict=True):
            low, high = added(block, low, high, plan)
        return high

    def _embed_low(
        self, text: Tensor, mask: Tensor, codes: Tensor, layout: UpscaleLayout
    ) -> Float[Tensor, "batch rows hidden"]:
        """Embed text and low codes, unshifted."""
        frame = layout.low_positions(codes.device).expand_as(codes)
        positions = torch.cat([low_sequence(layout).text_positions(mask), frame], dim=1)
        return self.base.words(torch.cat([text, codes], dim=1)) + self.base.positions(positions)

    def _embed_high(self, codes: Tensor, layout: UpscaleLayout) -> Float[Tensor, "batch high hidden"]:
        """Embed high slots: each is fed `<start_of_image>`, so they differ only in position."""
        slots = layout.high_positions(codes.device).expand(len(codes), -1)
        start = torch.full_like(slots, self.base.config.start_of_image)
        return self.base.words(start) + self.channel.positions(slots)


def low_sequence(layout: UpscaleLayout) -> SequenceLayout:
    """Layout of the low level: text sees text, and the low codes see text and each other."""
    sizes = layout.text_slots, layout.low_grid, layout.low_position
    return SequenceLayout(*sizes, order=(0,), num_bidirectional=1, shape=layout.shape)


@torch.no_grad()
def inherit_upscaler(channel: UpscaleChannel, base: Base) -> None:
    """Initialize super-resolution from the image model: attention, and positions from the low codes.

    The added attention replaces the base's, so unlike in a temporal channel, the output projection is copied
    too. The released training also copies the attention but repeats the low positions as tiles: high slot (r,
    c) starts at that of (r % grid, c % grid), far from the low codes that it sees.
    """
    base_weights = base.state_dict()
    layout = replace(channel.layout, shape=None)  # all rows of the tables
    channel.blocks.load_state_dict({name: base_weights[f"blocks.{name}"] for name in channel.blocks.state_dict()})
    rows = base.positions(layout.low_positions(base.positions.weight.device))
    square = "(row column) hidden -> (row down column right) hidden"
    channel.positions.weight.copy_(repeat(rows, square, row=layout.low_grid, down=layout.ratio, right=layout.ratio))


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # tensors cached during generation must also work in training
def neighborhoods(
    layout: UpscaleLayout,
    upscaler: UpscalerConfig,
    device: torch.device,
    tile: int = TILE,
) -> MaskPlan:
    """Mask plan of high slots over [high slots | low codes]: each sees the slots around it and around its low code.

    The high frame is cut into tiles, which become cells of attention. A tile gathers the keys that any of its
    slots sees (keys outside the image do not exist) and masks the rest. Tiles with equal masks form a group,
    so a frame of any size has only the masks of its corners, edges and middle.

    Args:
        layout: layout of both frames.
        upscaler: sizes of the neighborhoods.
        device: device of the indices.
        tile: side of a tile in low codes; tiles at the right and lower edges may be smaller.
    """
    slots = torch.arange(layout.high_slots).view(layout.high_sides)
    side = tile * layout.ratio
    groups: dict[tuple[torch.Size, bytes], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for band in torch.split(slots, side):
        for part in torch.split(band, side, dim=1):
            high = part.flatten()
            seen = _sees(layout, upscaler, high)
            keys = seen.any(0).nonzero()[:, 0]
            mask = seen[:, keys]
            groups.setdefault((mask.shape, mask.numpy().tobytes()), []).append((high, keys, mask))
    order = torch.cat([high for group in groups.values() for high, _, _ in group])
    return MaskPlan(tuple(_group(group, device) for group in groups.values()), restore=order.argsort().to(device))


def _sees(layout: UpscaleLayout, upscaler: UpscalerConfig, high: Int64[Tensor, " rows"]) -> Bool[Tensor, "rows keys"]:
    """The visibility rule for some high slots and all keys (spec section 4)."""
    width, side = layout.high_sides[1], upscaler.low_side
    row, column = high[:, None] // width, high[:, None] % width
    fine = _near(row, column, layout.high_sides, upscaler.high_rows, upscaler.high_columns)
    coarse = _near(row // layout.ratio, column // layout.ratio, layout.low_sides, side, side)
    return torch.cat([fine, coarse], dim=1)


def _near(row: Tensor, column: Tensor, sides: tuple[int, int], rows: int, columns: int) -> Bool[Tensor, "places slots"]:
    """Slots of a frame in the `rows x columns` around a place."""
    height, width = sides
    slots = torch.arange(height * width)
    return ((slots // width - row).abs() <= rows // 2) & ((slots % width - column).abs() <= columns // 2)


def _group(tiles: list[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> CellGroup:
    highs, keys, masks = zip(*tiles, strict=True)
    chunk = Chunk(None, None, masks[0][None, None].to(device))
    return CellGroup(torch.stack(highs).to(device), torch.stack(keys).to(device), (chunk,))
