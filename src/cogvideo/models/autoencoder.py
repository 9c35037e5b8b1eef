"""The VQ image autoencoder (ICE): frames to codes and back, at every rate that has a decoder.

A code at rate `r` represents `r x r` pixels: `rows = height / r`, `columns = width / r`. The layers are those
of taming-transformers (arXiv 2012.09841); downsamplers after the encoder produce coarser rates.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from cogvideo.config import AutoencoderConfig, both, require
from cogvideo.media.colors import Pixels
from cogvideo.models.quantizer import Codebook


class Autoencoder(nn.Module):
    """The image tokenizer: one encoder, one codebook, one decoder per rate.

    Convolutions and norms have PyTorch's initialization; see `Codebook` for the codebook's.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.downsamplers = nn.ModuleList(Downsample(config.embedding_dim) for _ in range(config.num_downsamplers))
        self.project = nn.Conv2d(config.embedding_dim, config.embedding_dim, kernel_size=1)
        self.codebook = Codebook(config.num_codes, config.embedding_dim)
        self.decoders = nn.ModuleList(Decoder(config, multipliers) for multipliers in config.decoder_multipliers)

    def encode(
        self, frames: Float[Tensor, "batch 3 height width"], rate: int | None = None, chunk: int | None = None
    ) -> Int64[Tensor, "batch rows columns"]:
        """Encode frames.

        Args:
            frames: RGB in [0, 1]; converted to the model's dtype.
            rate: side of a code in pixels; by default, the configuration's `rate`.
            chunk: frames per pass; by default, all. It bounds the memory and does not affect the result.

        Raises:
            ValueError: the rate has no decoder, frames have a wrong shape or dtype, or a side is not
                divisible by the rate.
        """
        rate = self._known_rate(rate)
        _require_frames(frames, rate)
        order = "batch embedding rows columns -> batch rows columns embedding"
        vectors = (rearrange(self.features(part, rate), order) for part in _passes(frames, chunk))
        return torch.cat([self.codebook.nearest(each) for each in vectors])

    def decode(
        self, codes: Int64[Tensor, "batch rows columns"], rate: int | None = None, chunk: int | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """Decode codes to RGB frames, 0 black and 1 white, NOT clamped (values slightly outside occur).

        Args:
            codes: ids in `[0, num_codes)`.
            rate: side of a code in pixels; by default, the configuration's `rate`.
            chunk: frames per pass; by default, all. It bounds the memory and does not affect the result.

        Raises:
            ValueError: the rate has no decoder, or codes have a wrong shape or dtype or an id out of range.
        """
        rate = self._known_rate(rate)
        require(codes.ndim == 3, f"codes have shape {tuple(codes.shape)}, expected (batch, rows, columns)")
        vectors = rearrange(self.codebook.lookup(codes), "batch rows columns embedding -> batch embedding rows columns")
        return torch.cat([self.render(part, rate) for part in _passes(vectors, chunk)])

    @torch.inference_mode()
    def encode_pixels(self, pixels: Pixels, chunk: int | None = 1) -> Int64[Tensor, "frames slots"]:
        """Encode pictures to codes on the CPU; raises what `encode` raises."""
        like = self.codebook.embedding
        frames = rearrange(torch.from_numpy(pixels), "frames height width rgb -> frames rgb height width")
        return self.encode(frames.to(like.device).to(like.dtype) / 255, chunk=chunk).flatten(1).cpu()

    @torch.inference_mode()
    def decode_pixels(
        self, codes: Int64[Tensor, "frames slots"], chunk: int | None = 1, sides: tuple[int, int] | None = None
    ) -> Pixels:
        """Decode codes to pictures of `sides` rows and columns, by default squares; raises what `decode` raises."""
        device = self.codebook.embedding.device
        rows, columns = sides or both(math.isqrt(codes.shape[1]))
        with torch.autocast(device.type, enabled=False):
            return to_pixels(self.decode(codes.to(device).view(-1, rows, columns), chunk=chunk))

    def reconstruct(self, pixels: Pixels, chunk: int | None = 1) -> Pixels:
        """Encode and decode pictures."""
        sides = pixels.shape[1] // self.config.rate, pixels.shape[2] // self.config.rate
        return self.decode_pixels(self.encode_pixels(pixels, chunk), chunk, sides)

    def features(
        self, frames: Float[Tensor, "batch 3 height width"], rate: int
    ) -> Float[Tensor, "batch embedding rows columns"]:
        """Vectors before quantization. Differentiable; raises what `encode` raises."""
        _require_frames(frames, self._known_rate(rate))
        x = frames.to(self.project.weight.dtype)
        x = self.encoder((x - _channels(self.config.mean, x)) / _channels(self.config.std, x))
        halvings_left = (rate // self.config.encoder_rate).bit_length() - 1
        for downsample in self.downsamplers[:halvings_left]:
            x = F.avg_pool2d(x, 2) + downsample(x)
        return self.project(x)

    def render(
        self, vectors: Float[Tensor, "batch embedding rows columns"], rate: int
    ) -> Float[Tensor, "batch 3 height width"]:
        """Decode codebook rows to frames, as `decode` does. Differentiable.

        Raises:
            ValueError: the rate has no decoder.
        """
        decoder = self.decoders[self.config.rates.index(self._known_rate(rate))]
        x = decoder(vectors)
        return x * _channels(self.config.std, x) + _channels(self.config.mean, x)

    def _known_rate(self, rate: int | None) -> int:
        rate = self.config.rate if rate is None else rate
        require(rate in self.config.rates, f"rate is {rate}, expected one of {self.config.rates}")
        return rate


def to_frames(pixels: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
    """Convert pixels to the input of `Autoencoder.encode`, in [0, 1]; on CUDA, in channels-last format."""
    memory_format = torch.channels_last if pixels.is_cuda else torch.contiguous_format
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format) / 255


def to_pixels(frames: Float[Tensor, "batch 3 height width"]) -> UInt8[np.ndarray, "batch height width 3"]:
    """Convert the output of `Autoencoder.decode` to pixels: clamped to [0, 1] and rounded to 256 levels."""
    pixels = (frames.float().clamp(0, 1) * 255).round().byte()
    return rearrange(pixels, "batch rgb height width -> batch height width rgb").cpu().numpy()


class Encoder(nn.Module):
    """Normalized frames -> cells of `embedding_dim` values; each level but the last halves the side."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels, *(config.channels * factor for factor in config.encoder_multipliers)]
        halvings_left = reversed(range(len(config.encoder_multipliers)))
        self.conv_in = nn.Conv2d(3, config.channels, kernel_size=3, padding=1)
        levels = zip(halvings_left, pairwise(widths), strict=True)
        self.levels = nn.Sequential(*(EncoderLevel(config, *width, shrinks=left > 0) for left, width in levels))
        self.middle = _middle(widths[-1], config.groups)
        self.norm_out = _norm(widths[-1], config.groups)
        self.conv_out = nn.Conv2d(widths[-1], config.embedding_dim, kernel_size=3, padding=1)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embedding rows columns"]:
        x = self.middle(self.levels(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class EncoderLevel(nn.Module):
    """Residual blocks of one size, then an optional downsampling."""

    def __init__(self, config: AutoencoderConfig, before: int, after: int, shrinks: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*_residual_blocks(before, after, config.encoder_blocks, config.groups))
        self.downsample = Downsample(after) if shrinks else nn.Identity()

    def forward(self, x: Float[Tensor, "batch before height width"]) -> Float[Tensor, "batch after rows columns"]:
        return self.downsample(self.blocks(x))


class Decoder(nn.Module):
    """Codebook rows -> normalized frames, from the coarsest level; each but the last doubles the side."""

    def __init__(self, config: AutoencoderConfig, multipliers: tuple[int, ...]) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in (multipliers[-1], *reversed(multipliers))]
        doublings_left = reversed(range(len(multipliers)))
        self.conv_in = nn.Conv2d(config.embedding_dim, widths[0], kernel_size=3, padding=1)
        self.middle = _middle(widths[0], config.groups)
        levels = zip(doublings_left, pairwise(widths), strict=True)
        self.levels = nn.Sequential(*(DecoderLevel(config, *width, doublings_left=left) for left, width in levels))
        self.norm_out = _norm(widths[-1], config.groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, kernel_size=3, padding=1)

    def forward(self, x: Float[Tensor, "batch embedding rows columns"]) -> Float[Tensor, "batch 3 height width"]:
        x = self.levels(self.middle(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class DecoderLevel(nn.Module):
    """Residual blocks of one size, each with optional attention, then an optional upsampling."""

    def __init__(self, config: AutoencoderConfig, before: int, after: int, doublings_left: int) -> None:
        super().__init__()
        attends = config.nominal_resolution == config.attention_resolution * 2**doublings_left
        self.blocks = nn.ModuleList(_residual_blocks(before, after, config.decoder_blocks, config.groups))
        attentions = (SelfAttention(after, config.groups) if attends else nn.Identity() for _ in self.blocks)
        self.attentions = nn.ModuleList(attentions)
        self.upsample = Upsample(after) if doublings_left > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "batch before rows columns"]) -> Float[Tensor, "batch after height width"]:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.upsample(x)


class ResidualBlock(nn.Module):
    """`x + conv(swish(norm(conv(swish(norm(x))))))`; a 1 x 1 convolution adapts the width of `x`."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(before, groups)
        self.conv1 = nn.Conv2d(before, after, kernel_size=3, padding=1)
        self.norm2 = _norm(after, groups)
        self.conv2 = nn.Conv2d(after, after, kernel_size=3, padding=1)
        self.shortcut = nn.Conv2d(before, after, kernel_size=1) if before != after else nn.Identity()

    def forward(self, x: Float[Tensor, "batch before height width"]) -> Float[Tensor, "batch after height width"]:
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.shortcut(x) + residual


class SelfAttention(nn.Module):
    """Single-head attention among all cells of a frame, with a residual connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.output = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        normed = self.norm(x)
        q, k, v = (
            rearrange(project(normed), "batch channels height width -> batch 1 (height width) channels")
            for project in (self.q, self.k, self.v)
        )
        if q.is_cuda:  # fused kernels need the values of a cell to be adjacent
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = rearrange(mixed, "batch 1 (height width) channels -> batch channels height width", height=x.shape[2])
        return x + self.output(mixed)


class Downsample(nn.Conv2d):
    """Convolution that halves the side: 3 x 3, stride 2, padded by one cell at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2)

    def forward(self, input: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels rows cols"]:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Nearest-neighbor upsampling by 2, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, input: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels height width"]:
        return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))


def _residual_blocks(before: int, after: int, num_blocks: int, groups: int) -> list[ResidualBlock]:
    return [ResidualBlock(before if index == 0 else after, after, groups) for index in range(num_blocks)]


def _middle(channels: int, groups: int) -> nn.Sequential:
    block = partial(ResidualBlock, channels, channels, groups)
    return nn.Sequential(OrderedDict(before=block(), attention=SelfAttention(channels, groups), after=block()))


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _channels(values: tuple[float, float, float], like: Tensor) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True).view(3, 1, 1)


def _passes(tensor: Float[Tensor, "batch ..."], chunk: int | None) -> tuple[Float[Tensor, "part ..."], ...]:
    require(chunk is None or chunk > 0, f"chunk is {chunk}, expected a positive number of frames")
    return torch.split(tensor, chunk or max(1, len(tensor)))


def _require_frames(frames: Tensor, rate: int) -> None:
    shape, kind = tuple(frames.shape), frames.dtype
    are_images = len(shape) == 4 and shape[1] == 3
    require(are_images, f"frames have shape {shape}, expected (batch, 3, height, width)")
    require(kind.is_floating_point, f"frames have dtype {kind}, expected floating point values in [0, 1]")
    are_divisible = all(side > 0 and side % rate == 0 for side in shape[2:])
    expected = f"expected sides divisible by the rate {rate}"
    require(are_divisible, f"frames are {shape[2]} x {shape[3]} pixels, {expected}")
