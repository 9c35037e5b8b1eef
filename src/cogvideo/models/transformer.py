"""Transformer of all stages: a frozen text-to-image base, and the temporal channel that a video stage adds.

`Base` and `TemporalChannel` own parameters; `Transformer` joins them. One base in memory serves the image
model and all stages. The same forward pass trains, prefills and decodes, with different rows and mask plans.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from cogvideo.config import LayoutConfig, StageConfig, TransformerConfig
from cogvideo.layout import SequenceLayout
from cogvideo.models.attention import MaskPlan, attend, split_heads

NORM_EPS = 1e-5
INIT_STD = 0.02


class Pass(NamedTuple):
    """Mask plans of one forward pass. Text rows come first, then frame rows."""

    num_text: int
    spatial: MaskPlan
    """Plan of the spatial channel, for all rows."""
    temporal: tuple[MaskPlan, ...]
    """Plans of the temporal channel, for frame rows: one per kind of block, or none in the image model."""


class TemporalBlock(nn.Module):
    """Attention over frames and gate that a video stage adds to a block (paper section 3.2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)
        self.gate = nn.Parameter(torch.empty(config.hidden))

    def forward(
        self, x: Float[Tensor, "batch rows hidden"], spatial: Tensor, layer: int, plan: Pass
    ) -> Float[Tensor, "batch rows hidden"]:
        """Mix the spatial channel's output with attention over frames; text rows keep the spatial output."""
        number, kind = divmod(layer, len(plan.temporal))
        own = plan.temporal[kind]
        q, kv = split_heads(self.qkv(x), self.num_heads)
        kv = own.keys(kv, number)
        if not plan.num_text:
            return self.mix(q, kv, spatial, own)
        text, frames = spatial.tensor_split((plan.num_text,), dim=1)
        if not frames.shape[1]:
            return text
        return torch.cat([text, self.mix(q[:, :, plan.num_text :], kv, frames, own)], dim=1)

    def mix(self, q: Tensor, kv: Tensor, spatial: Tensor, plan: MaskPlan) -> Float[Tensor, "batch rows hidden"]:
        """Frame rows: `a * spatial + (1 - a) * temporal` with the gate `a`."""
        temporal = self.out(attend(q, kv, plan))
        return torch.lerp(temporal, spatial, self.gate.sigmoid().to(temporal.dtype))  # for autocast


class Block(nn.Module):
    """Block of the base: sandwich-LayerNorm attention and feed-forward layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.num_heads = config.num_heads
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(hidden, NORM_EPS) for _ in range(4))
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.mlp_in = nn.Linear(hidden, config.mlp_hidden)
        self.mlp_out = nn.Linear(config.mlp_hidden, hidden)

    def forward(
        self, x: Float[Tensor, "batch rows hidden"], layer: int, temporal: TemporalBlock | None, plan: Pass
    ) -> Float[Tensor, "batch rows hidden"]:
        """`x + LN3(Attention(LN1(x)))`, then `x + LN4(MLP(LN2(x)))`."""
        normed = self.norm1(x)
        q, kv = split_heads(self.qkv(normed), self.num_heads)
        attention = self.out(attend(q, plan.spatial.keys(kv, layer), plan.spatial))
        if temporal is not None:
            attention = temporal(normed, attention, layer, plan)
        return self.residual(x, attention)

    def residual(
        self, x: Float[Tensor, "batch rows hidden"], attention: Float[Tensor, "batch rows hidden"]
    ) -> Float[Tensor, "batch rows hidden"]:
        """Add the attention and the feed-forward layer, each through its second norm."""
        x = x + self.norm3(attention)
        return x + self.norm4(self.mlp(self.norm2(x)))

    def mlp(self, x: Float[Tensor, "batch rows hidden"]) -> Float[Tensor, "batch rows hidden"]:
        """Feed-forward layer with GELU in its tanh form."""
        return self.mlp_out(F.gelu(self.mlp_in(x), approximate="tanh"))


class Embedding(nn.Embedding):
    """`nn.Embedding`, but cheap to construct on the meta device."""

    def reset_parameters(self) -> None:
        """Draw the weights, unless there are none: drawing on the meta device imports PyTorch's compiler (0.8 s)."""
        if not self.weight.is_meta:
            super().reset_parameters()


class WordEmbedding(Embedding):
    """Word embedding, whose rows are also the weights of the output heads (tied)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.vocab_size, config.hidden)
        self.num_codes = config.num_codes

    def code_logits(self, x: Float[Tensor, "batch rows hidden"]) -> Float[Tensor, "batch rows codes"]:
        """Logits of image codes."""
        return F.linear(x, self.weight[: self.num_codes])

    def text_logits(self, x: Float[Tensor, "batch rows hidden"]) -> Float[Tensor, "batch rows words"]:
        """Logits of all other tokens."""
        return F.linear(x, self.weight[self.num_codes :])


class Base(nn.Module):
    """Parameters of the text-to-image model: embeddings, blocks and the final norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.words = WordEmbedding(config)
        self.positions = Embedding(config.num_positions, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden, NORM_EPS)

    def logits(self, x: Float[Tensor, "batch rows hidden"]) -> Float[Tensor, "batch rows codes"]:
        """Logits of image codes."""
        return self.words.code_logits(self.norm(x))

    def text_logits(self, x: Float[Tensor, "batch rows hidden"]) -> Float[Tensor, "batch rows words"]:
        """Logits of all other tokens, from token `num_codes` on; for training."""
        return self.words.text_logits(self.norm(x))


class TemporalChannel(nn.Module):
    """Parameters that a video stage adds: temporal attention and gates, and positions of later frames."""

    def __init__(self, config: TransformerConfig, layout: LayoutConfig, stage: StageConfig) -> None:
        super().__init__()
        self.stage = stage
        self.frame_position = layout.frame_position
        self.first_position = SequenceLayout.sequential(layout).first_extra_position
        self.positions = Embedding(layout.num_frames * layout.grid**2, config.hidden)
        self.blocks = nn.ModuleList(TemporalBlock(config) for _ in range(config.num_layers))


class Transformer(nn.Module):
    """Image model or video stage.

    Args:
        base: the base, which all stages share and video stages freeze.
        channel: parameters that a video stage adds; None for the image model.
    """

    def __init__(self, base: Base, channel: TemporalChannel | None = None) -> None:
        super().__init__()
        self.base = base
        self.channel = channel

    @property
    def window(self) -> int | None:
        """Side of the temporal windows; 0 is full attention, None no temporal channel (image model)."""
        return None if self.channel is None else self.channel.stage.window

    def forward(
        self, tokens: Int64[Tensor, "batch rows"], positions: Int64[Tensor, "#batch rows"], plan: Pass
    ) -> Float[Tensor, "batch rows hidden"]:
        """Run a pass; returns its rows after the last block, before the final norm (see `Base.logits`)."""
        x = self.base.words(tokens) + self.position(positions)
        temporal = [None] * len(self.base.blocks) if self.channel is None else self.channel.blocks
        for layer, (block, channel) in enumerate(zip(self.base.blocks, temporal, strict=True)):
            x = block(x, layer, channel, plan)
        return x

    def position(self, positions: Int64[Tensor, "#batch rows"]) -> Float[Tensor, "#batch rows hidden"]:
        """Position embeddings: the base's for text and the first frame, the channel's for later frames."""
        if self.channel is None:
            return self.base.positions(positions)
        extra = positions - self.channel.first_position
        own = self.channel.positions(extra.clamp(min=0))
        return torch.where(extra[..., None] >= 0, own, self.base.positions(positions.where(extra < 0, 0)))


@torch.no_grad()
def initialize(module: nn.Module, num_layers: int, generator: torch.Generator | None = None) -> None:
    """Initialize a base or a channel (spec section 1).

    | parameter | initial value |
    |---|---|
    | linear and embedding weights | N(0, 0.02) |
    | output projections of the base (`out`, `mlp_out`) | N(0, 0.02 / sqrt(2 x layers)) |
    | biases | 0 |
    | LayerNorm | weight 1, bias 0 |
    | gates | 0, so both channels have weight 1/2 |
    """
    for name, parameter in module.named_parameters():
        owner, kind = name.split(".")[-2:] if "." in name else ("", name)
        if kind == "gate" or kind == "bias":
            parameter.zero_()
        elif owner.startswith("norm"):
            parameter.fill_(1)
        else:
            narrow = isinstance(module, Base) and owner in ("out", "mlp_out")
            parameter.normal_(0, INIT_STD / math.sqrt(2 * num_layers) if narrow else INIT_STD, generator=generator)


@torch.no_grad()
def inherit(channel: TemporalChannel, base: Base, generator: torch.Generator | None = None) -> None:
    """Initialize a video stage from the image model (paper section 3.2; spec section 1, Inheritance).

    Temporal q, k and v are copied from the base, and the positions of later frames from the first frame. The
    output projection is random, and gates are 0.
    """
    initialize(channel, len(channel.blocks), generator)
    base_weights, own_weights = base.state_dict(), channel.state_dict()
    for name in own_weights:
        if ".qkv." in name:
            own_weights[name].copy_(base_weights[name])
    frame = channel.first_position - channel.frame_position
    rows = base.positions.weight[channel.frame_position : channel.first_position]
    channel.positions.weight.copy_(rows.repeat(len(channel.positions.weight) // frame, 1))
