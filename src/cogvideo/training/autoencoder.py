"""How the image tokenizer learns: its settings, its losses, one step, and all that a checkpoint must hold.

The recipe is that of taming-transformers (arXiv 2012.09841) with a codebook of running averages (arXiv 1711.00937): the
autoencoder minimises differences of pixels, a perceptual distance, the commitment to its codes and, later, what an
adversary sees. Where LPIPS's weights are not given, pyramids and edges stand for it.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from cogvideo.config import AutoencoderConfig, require
from cogvideo.media.metrics import code_usage, count_codes, perplexity, psnr, ssim
from cogvideo.models.adversary import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from cogvideo.models.autoencoder import Autoencoder, Decoder, to_frames
from cogvideo.models.perceptual import Lpips, edge_distance, pyramid_distance
from cogvideo.training.codebook import MovingCodebook, straight_through
from cogvideo.training.optim import has_fused

M = TypeVar("M", bound=nn.Module)

SMALLEST_MATRIX = 16
"""Rows and columns of a kernel that Muon takes; smaller ones, of pixels, stay with Adam."""


@dataclass(frozen=True)
class TokenizerSettings:
    """What decides the weights of a tokenizer, apart from its configuration and its frames."""

    steps: int = 20_000
    """Steps of the autoencoder."""
    batch: int = 32
    """Frames a step."""
    optimizer: Literal["adam", "muon"] = "adam"
    """Optimizer of convolution kernels, which Muon takes as matrices; all else has Adam. Muon needs about a third of
    the steps for the same loss, at some five times the learning rate."""
    learning_rate: float = 5e-4
    """Largest learning rate."""
    warmup: int = 200
    """Steps in which the learning rate rises to it; then it falls to zero along half a cosine."""
    largest_gradient: float = 1.0
    """Norm that the autoencoder's gradient is cut to."""
    commitment: float = 0.25
    """Weight of the distance of the encoder's vectors from their codebook rows (beta of VQ-VAE)."""
    codebook_decay: float = 0.95
    """Share that the running averages of the codebook keep in a step. With 0.99 rows lag behind an encoder that begins
    to use codes, and most die before they are restarted."""
    restart_below: float = 0.1
    """A code that is used less than this share of an even use is dead, and starts again at one of the vectors."""
    plain_steps: int | None = None
    """Steps without codes, before the codebook starts at the k-means of the encoder's vectors; a quarter of the
    steps, but at most 1,000, unless given."""
    start_vectors: int = 16
    """Vectors a code for that k-means."""
    pyramid_levels: int = 3
    """Sizes at which pixels are compared, each half the one before."""
    edge_weight: float = 0.5
    """Weight of differences between the edges; 0 leaves them out."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS where its weights are given."""
    adversary_weight: float = 0.1
    """Share of the adversary's gradient in the last layer over that of the other differences; 0 leaves it out."""
    adversary_start: int | None = None
    """Step at which the adversary begins; half of the steps unless given."""
    adversary_width: int = 32
    """Channels of its first layer."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the layers in a step (autocast); losses, weights and codes are float32."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "learning_rate",
            "largest_gradient",
            "start_vectors",
            "pyramid_levels",
            "adversary_width",
        ):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("warmup", "commitment", "edge_weight", "perceptual_weight", "adversary_weight"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("plain_steps", "adversary_start"):
            step = getattr(self, name)
            require(step is None or step >= 0, f"{name} is {step}, expected 0 or more")
        for name in ("codebook_decay", "restart_below"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name} is {value}, expected a number between 0 and 1")
        require(
            self.codes_from < self.steps,
            f"plain_steps is {self.plain_steps}, expected less than the {self.steps} steps: codes must be learnt",
        )

    @property
    def codes_from(self) -> int:
        """First step with codes."""
        return min(1000, self.steps // 4) if self.plain_steps is None else self.plain_steps

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = (step + 1) / (self.warmup + 1)
        falling = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * min(1.0, rising) * falling

    def has_adversary(self, step: int) -> bool:
        """Whether there is one at a step."""
        start = self.steps // 2 if self.adversary_start is None else self.adversary_start
        return self.adversary_weight > 0 and step >= start


class Trainer:
    """An autoencoder in training: step `n` depends on the state after step `n - 1`, the settings and `n` alone.

    Args:
        config: sizes of the autoencoder. Where it has several rates, they take turns.
        settings: the recipe.
        seed: of everything drawn at random.
        lpips: with weights, or None.
        device: where everything is.
        initial: weights and codebook to go on from, in place of random ones and k-means.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        settings: TokenizerSettings,
        seed: int,
        lpips: Lpips | None,
        device: torch.device,
        initial: Autoencoder | None = None,
    ) -> None:
        self.settings, self.seed, self.device = settings, seed, device
        self.lpips = lpips.to(device) if lpips is not None else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_key(seed, "weights"))
            self.autoencoder = _placed(Autoencoder(config), device)
            self.discriminator = _placed(PatchDiscriminator(settings.adversary_width), device)
        self.codebook = MovingCodebook(self.autoencoder.codebook, settings.codebook_decay, settings.restart_below)
        self.starts_codebook = initial is None
        """Whether its rows come from k-means, else from `initial`."""
        if initial is not None:
            self.autoencoder.load_state_dict(initial.state_dict())
        self.optimizer = _Optimizer(self.autoencoder, settings)
        judges = list(self.discriminator.parameters())
        self.adversary_optimizer = torch.optim.Adam(judges, betas=(0.5, 0.9), fused=has_fused(judges))

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {name: getattr(self, name).state_dict() for name in self._PARTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        for name in self._PARTS:
            getattr(self, name).load_state_dict(state[name])

    _PARTS = ("autoencoder", "discriminator", "codebook", "optimizer", "adversary_optimizer")

    def step(self, number: int, pixels: UInt8[np.ndarray, "_ size size 3"]) -> dict[str, Float[Tensor, ""]]:
        """Learn from the step's batch.

        Args:
            number: of the step, counted from 0.
            pixels: all frames to learn from.

        Returns:
            What was measured: the weighted losses, the gradient's norm, restarted codes and the squared error.
        """
        if self.starts_codebook and number == self.settings.codes_from:
            self._start_codebook(number, pixels)
        frames = self._batch(number, pixels)
        rates = self.autoencoder.config.rates
        rate, quantised = rates[number % len(rates)], number >= self.settings.codes_from
        made, vectors, codes, commitment = self._pass(frames, rate, quantised)
        losses = self._image_losses(made, frames)
        measured = {"squared_error": F.mse_loss(made.detach().clamp(0, 1), frames)}
        if self.settings.has_adversary(number):
            losses["adversary"] = self._adversary_loss(made, torch.stack([*losses.values()]).sum(), rate)
        if quantised:
            losses["commitment"] = self.settings.commitment * commitment
        measured["gradient"] = self._descend(number, torch.stack([*losses.values()]).sum())
        if self.settings.has_adversary(number):
            measured["discriminator"] = self._teach_adversary(number, made.detach(), frames)
        if quantised:
            if not self.starts_codebook and number == self.settings.codes_from:
                self.codebook.take_up(len(vectors))
            measured["restarted"] = self.codebook.update(vectors, codes, generator(self.seed, "codes", number))
        return {name: loss.detach().float() for name, loss in (losses | measured).items()}

    def _batch(self, number: int, pixels: UInt8[np.ndarray, "_ size size 3"]) -> Float[Tensor, "batch 3 size size"]:
        places = batch_places(number, self.settings.batch, len(pixels), self.seed)
        return to_device(pixels[places.numpy()], self.device)

    def _half(self) -> AbstractContextManager[Any]:
        enabled = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _pass(self, frames: Float[Tensor, "batch 3 size size"], rate: int, quantised: bool) -> _Pass:
        """Frames through the encoder, the codebook and a decoder; the codes are left out if not `quantised`."""
        with self._half():
            features = self.autoencoder.features(frames, rate).float()
            vectors = rearrange(features.detach(), "batch embedding rows columns -> (batch rows columns) embedding")
            codes = self.autoencoder.codebook.nearest(vectors)
            chosen = F.embedding(codes, self.autoencoder.codebook.embedding)
            chosen = chosen.view(len(features), *features.shape[2:], -1).permute(0, 3, 1, 2)
            inner = straight_through(features, chosen) if quantised else features
            made = self.autoencoder.render(inner, rate).float()
        return _Pass(made, vectors, codes, F.mse_loss(features, chosen))

    def _image_losses(
        self, made: Float[Tensor, "batch 3 size size"], frames: Float[Tensor, "batch 3 size size"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The weighted differences of reconstructions from frames."""
        settings = self.settings
        losses = {"pixels": pyramid_distance(made, frames, settings.pyramid_levels)}
        if settings.edge_weight > 0:
            losses["edges"] = settings.edge_weight * edge_distance(made, frames)
        if self.lpips is not None and settings.perceptual_weight > 0:
            with self._half():
                losses["perceptual"] = settings.perceptual_weight * self.lpips(made, frames).mean()
        return losses

    def _adversary_loss(
        self, made: Float[Tensor, "batch 3 size size"], image_loss: Float[Tensor, ""], rate: int
    ) -> Float[Tensor, ""]:
        self.discriminator.requires_grad_(False)
        with self._half():
            loss = generator_loss(self.discriminator(made).float())
        last = cast(Decoder, self.autoencoder.decoders[self.autoencoder.config.rates.index(rate)]).conv_out.weight
        return self.settings.adversary_weight * adaptive_weight(image_loss, loss, last) * loss

    def _descend(self, number: int, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Move the autoencoder's weights; returns the gradient's norm before it is cut."""
        self.autoencoder.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.autoencoder.parameters(), self.settings.largest_gradient)
        self.optimizer.step(self.settings.rate_at(number))
        return norm

    def _teach_adversary(
        self, number: int, made: Float[Tensor, "batch 3 size size"], frames: Float[Tensor, "batch 3 size size"]
    ) -> Float[Tensor, ""]:
        self.discriminator.requires_grad_(True)
        self.adversary_optimizer.param_groups[0]["lr"] = self.settings.rate_at(number)
        self.adversary_optimizer.zero_grad()
        with self._half():
            loss = discriminator_loss(self.discriminator(frames).float(), self.discriminator(made).float())
        loss.backward()  # type: ignore[no-untyped-call]
        self.adversary_optimizer.step()
        return loss

    @torch.no_grad()
    def _start_codebook(self, number: int, pixels: UInt8[np.ndarray, "_ size size 3"]) -> None:
        """K-means of the vectors of the coming batches."""
        config, needed = self.autoencoder.config, self.settings.start_vectors * len(self.codebook.counts)
        vectors: list[Tensor] = []
        while sum(map(len, vectors)) < needed:
            frames = self._batch(number + len(vectors), pixels)
            vectors.append(self._pass(frames, config.rate, quantised=False).vectors)
        by = generator(self.seed, "k-means", device=self.device)
        self.codebook.start(torch.cat(vectors), per_step=len(vectors[0]), generator=by)


class _Optimizer:
    """Adam, or Muon for convolution kernels as matrices of outputs by inputs and Adam for the rest.

    Args:
        module: its trained parameters are moved.
        settings: of the run.
    """

    def __init__(self, module: nn.Module, settings: TokenizerSettings) -> None:
        learnt = [each for each in module.parameters() if each.requires_grad]
        is_kernel = [settings.optimizer == "muon" and _is_kernel(each) for each in learnt]
        self._kernels = [each for each, kernel in zip(learnt, is_kernel, strict=True) if kernel]
        self._matrices = [nn.Parameter(_matrix(each.detach(), like=each)) for each in self._kernels]  # same memory
        rest = [each for each, kernel in zip(learnt, is_kernel, strict=True) if not kernel]
        self._parts: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, betas=(0.9, 0.99), fused=has_fused(rest))]
        if self._matrices:
            self._parts.append(torch.optim.Muon(self._matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))

    def step(self, rate: float) -> None:
        """Move the parameters along their gradients."""
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.grad = None if kernel.grad is None else _matrix(kernel.grad, like=kernel)
        for part in self._parts:
            part.param_groups[0]["lr"] = rate
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """States of the optimizers; with Adam alone its own, as checkpoints always had it."""
        adam, *muon = (part.state_dict() for part in self._parts)
        return adam | {"muon": muon}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        adam, *muon = self._parts
        adam.load_state_dict({name: each for name, each in state.items() if name != "muon"})
        for part, each in zip(muon, state.get("muon", []), strict=True):  # older checkpoints are of Adam alone
            part.load_state_dict(each)


def _is_kernel(parameter: nn.Parameter) -> bool:
    """Whether it is worth being taken as a matrix."""
    return parameter.ndim == 4 and min(len(parameter), parameter[0].numel()) >= SMALLEST_MATRIX


def _matrix(kernel: Tensor, like: Tensor) -> Tensor:
    """A kernel, or its gradient, as outputs by inputs: a view of what has the memory format of `like`."""
    return kernel.flatten(1) if like.is_contiguous() else kernel.permute(0, 2, 3, 1).flatten(1)


class _Pass(NamedTuple):
    """What a step sees."""

    made: Float[Tensor, "batch 3 size size"]
    """Reconstructions."""
    vectors: Float[Tensor, "many embedding"]
    """Of the encoder, without a gradient."""
    codes: Int64[Tensor, " many"]
    """Nearest rows."""
    commitment: Float[Tensor, ""]
    """Mean squared distance of the vectors from their rows."""


class Quality(NamedTuple):
    """How well frames survive being codes."""

    psnr: float
    """Mean of the frames, dB."""
    ssim: float
    """Mean of the frames."""
    code_usage: float
    """Share of the codes that occur."""
    perplexity: float
    """Codes that would be as even."""


@torch.inference_mode()
def evaluate(
    autoencoder: Autoencoder, pixels: UInt8[np.ndarray, "_ size size 3"], batch: int, device: torch.device
) -> Quality:
    """Quality of the frames' reconstructions, which are clamped to what can be shown."""
    counts = torch.zeros(autoencoder.config.num_codes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(pixels), batch):
        frames = to_device(pixels[start : start + batch], device)
        codes = autoencoder.encode(frames)
        made = autoencoder.decode(codes).clamp(0, 1)
        counts += count_codes(codes, len(counts))
        sums += torch.stack([psnr(made, frames).sum(), ssim(made, frames).sum()])
    means = (sums / len(pixels)).tolist()
    return Quality(means[0], means[1], code_usage(counts), perplexity(counts))


def to_device(
    pixels: UInt8[np.ndarray, "batch size size 3"], device: torch.device
) -> Float[Tensor, "batch 3 size size"]:
    """Pixels as the model takes them, on a device."""
    return to_frames(torch.from_numpy(np.array(pixels)).to(device, non_blocking=True))


def batch_places(step: int, batch: int, num_frames: int, seed: int) -> Int64[Tensor, " batch"]:
    """Which frames a step learns from: every frame once an epoch, in another order each time."""
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs = places // num_frames
    return torch.cat(
        [
            _order(num_frames, seed, epoch)[places[epochs == epoch] % num_frames]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
    )


@lru_cache(maxsize=2)
def _order(num_frames: int, seed: int, epoch: int) -> Int64[Tensor, " frames"]:
    return torch.randperm(num_frames, generator=generator(seed, "order", epoch))


def generator(seed: int, *purpose: str | int, device: torch.device | None = None) -> torch.Generator:
    """Random numbers for one purpose, the same whenever they are drawn."""
    return torch.Generator(device or "cpu").manual_seed(_key(seed, *purpose))


def _key(*parts: str | int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def _placed(module: M, device: torch.device) -> M:
    """On a GPU with the channels of a pixel side by side, which its convolutions are faster with; a CPU's norms not."""
    module = module.to(device)
    return cast(M, cast(Any, module).to(memory_format=torch.channels_last)) if device.type == "cuda" else module
