"""Objective of the image tokenizer: its settings, its losses, and the codebook that follows the encoder.

The recipe follows taming-transformers (arXiv 2012.09841) with a codebook of running averages (arXiv 1711.00937): the
autoencoder minimizes pixel differences, a perceptual distance, the commitment loss and, later, an adversarial loss.
If LPIPS's weights are not given, pyramids and edges replace it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from cogvideo.config import AutoencoderConfig, Limit, NotNegative, Positive, require
from cogvideo.models.adversary import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from cogvideo.models.autoencoder import Autoencoder, Decoder, to_frames
from cogvideo.models.perceptual import Lpips, edge_distance, pyramid_distance
from cogvideo.training.objectives.codebook import MovingCodebook, straight_through
from cogvideo.training.objectives.task import BatchLosses, Objective, generator, key
from cogvideo.training.optim import Bounded, Optimization, has_fused, trained
from cogvideo.training.parallel import ALONE, Ranks, gathered, is_first

M = TypeVar("M", bound=nn.Module)

MIN_MATRIX_SIDE = 16
"""Minimum rows and columns of a kernel that Muon takes; smaller ones, of pixels, stay with Adam."""
PARTS = ("pixels", "edges", "perceptual", "adversary", "commitment", "psnr", "discriminator", "restarted")
"""Figures of a step: weighted losses, PSNR of the reconstructions, the adversary's own loss, restarted codes."""

OpenShare = Annotated[float, Limit(lambda value: 0 < value < 1, "a number between 0 and 1")]


@dataclass(frozen=True)
class TokenizerSettings(Optimization):
    """Optimization. It determines the weights, apart from the configuration and the frames."""

    steps: Bounded[int] = 20_000
    """Steps of the autoencoder."""
    batch: Bounded[int] = 32
    """Frames per step, over all ranks."""
    learning_rate: Bounded[float] = 5e-4
    """Peak learning rate."""
    warmup: NotNegative[int] = 200
    """Steps of linear warmup of the learning rate; then it decays to zero along a cosine."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the layers in a step (autocast); losses, weights and codes are float32."""
    optimizer: Literal["adam", "muon"] = "adam"
    """Optimizer of convolution kernels, which Muon takes as matrices; all other weights use Adam. Muon needs about a
    third of the steps for the same loss, at about five times the learning rate."""
    largest_gradient: Bounded[float] = 1.0
    """Maximum gradient norm of the autoencoder."""
    commitment: NotNegative[float] = 0.25
    """Weight of the distance from the encoder's vectors to their codebook rows (beta of VQ-VAE)."""
    codebook_decay: OpenShare = 0.95
    """Decay of the running averages of the codebook. With 0.99, rows lag behind an encoder that begins to use codes,
    and most die before they are restarted."""
    restart_below: OpenShare = 0.1
    """Share of uniform usage below which a code is dead and restarts at one of the encoder's vectors."""
    plain_steps: NotNegative[int] | None = None
    """Steps without codes, before the codebook is initialized by k-means of the encoder's vectors; by default a quarter
    of the steps, at most 1,000."""
    start_vectors: Positive[int] = 16
    """Vectors for each code in that k-means."""
    pyramid_levels: Positive[int] = 3
    """Number of sizes at which pixels are compared, each half the previous one."""
    edge_weight: NotNegative[float] = 0.5
    """Weight of differences between edges; 0 disables them."""
    perceptual_weight: NotNegative[float] = 1.0
    """Weight of LPIPS, if its network is given."""
    adversary_weight: NotNegative[float] = 0.1
    """Ratio of the adversary's gradient to that of the other losses in the last layer; 0 disables the adversary."""
    adversary_start: NotNegative[int] | None = None
    """Step at which the adversary starts; half of the steps unless given."""
    adversary_width: Positive[int] = 32
    """Channels of the adversary's first layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.codes_from < self.steps,
            f"plain_steps is {self.plain_steps}, expected less than the {self.steps} steps: codes must be learned",
        )

    @property
    def clip(self) -> float:
        """Maximum gradient norm."""
        return self.largest_gradient

    @property
    def codes_from(self) -> int:
        """First step with codes."""
        return min(1000, self.steps // 4) if self.plain_steps is None else self.plain_steps

    def has_adversary(self, step: int) -> bool:
        """True if the adversary learns at a step."""
        start = self.steps // 2 if self.adversary_start is None else self.adversary_start
        return self.adversary_weight > 0 and step >= start


class FrameStream:
    """Batches of frames as a function of the step: every frame once per epoch, in another order each time.

    Ranks get adjacent parts of a batch.
    """

    def __init__(
        self, pixels: UInt8[np.ndarray, "_ height width 3"], batch: int, seed: int, ranks: Ranks = ALONE
    ) -> None:
        divides = batch % ranks.data_size == 0
        require(divides, f"batch is {batch}, expected a multiple of the {ranks.data_size} ranks that share it")
        self.pixels, self.batch, self.seed = pixels, batch, seed
        share = batch // ranks.data_size
        self._part = slice(ranks.data_rank * share, (ranks.data_rank + 1) * share)

    def __getitem__(self, step: int) -> UInt8[Tensor, "batch height width 3"]:
        """This rank's share of a step's batch."""
        places = batch_places(step, self.batch, len(self.pixels), self.seed)[self._part]
        return torch.from_numpy(self.pixels[places.numpy()])

    def after(self, step: int) -> Iterator[UInt8[Tensor, "batch height width 3"]]:
        """The batches after the first `step` steps."""
        return (self[each] for each in count(step))


class TokenizerObjective(Objective):
    """An autoencoder with its adversary and the running averages of its codebook.

    A step depends only on the state, the settings and the step number. If the autoencoder has several rates, they take
    turns. The adversary's loss is part of the step's backward pass, but its gradient reaches only the adversary. The
    codebook is initialized from frames of the stream, or from an initial autoencoder, like the weights.
    """

    model: Autoencoder
    parts = PARTS
    unit, num_positions = "images", 1
    has_unused_parameters = True  # rates take turns, and the adversary begins late

    def __init__(
        self,
        config: AutoencoderConfig,
        settings: TokenizerSettings,
        seed: int,
        stream: FrameStream,
        lpips: Lpips | None = None,
        device: torch.device = ALONE.device,
        initial: Autoencoder | None = None,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "weights"))
            autoencoder = _placed(Autoencoder(config), device)
            discriminator = _placed(PatchDiscriminator(settings.adversary_width), device)
        if initial is not None:
            autoencoder.load_state_dict(initial.state_dict())
        super().__init__(autoencoder, None)
        self.settings, self.seed, self.stream = settings, seed, stream
        self.discriminator = discriminator
        self.codebook = MovingCodebook(autoencoder.codebook, settings.codebook_decay, settings.restart_below)
        self.lpips = None if lpips is None else lpips.to(device)
        self.has_initial = initial is not None
        self._step = 0

    def clipped(self) -> list[nn.Parameter]:
        """Parameters of the autoencoder."""
        return trained(self.model)

    def optimizers(self, settings: Any) -> list[torch.optim.Optimizer]:
        """Adam; Muon for convolution kernels if chosen; Adam for the adversary."""
        kernels = [each for each in trained(self.model) if self.settings.optimizer == "muon" and _is_kernel(each)]
        known = set(map(id, kernels))
        rest = [each for each in trained(self.model) if id(each) not in known]
        judges = trained(self.discriminator)
        muon = [self._muon(kernels)] if kernels else []
        return [
            torch.optim.Adam(rest, betas=(0.9, 0.99), fused=has_fused(rest)),
            *muon,
            torch.optim.Adam(judges, betas=(0.5, 0.9), fused=has_fused(judges)),
        ]

    def _muon(self, kernels: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Muon for kernels, viewed as matrices of outputs by inputs that share the kernels' memory."""
        self.matrices = nn.ParameterList(_matrix(each.detach(), like=each) for each in kernels)
        muon = torch.optim.Muon(self.matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

        def take_gradients(*_: Any) -> None:
            for kernel, matrix in zip(kernels, self.matrices, strict=True):
                if kernel.grad is not None:
                    matrix.grad = _matrix(kernel.grad, like=kernel)

        muon.register_step_pre_hook(take_gradients)
        return muon

    def load_old(self, state: dict[str, Any], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Load a checkpoint.pt."""
        self.model.load_state_dict(state["autoencoder"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.codebook.counts.copy_(state["codebook"]["counts"])
        self.codebook.sums.copy_(state["codebook"]["sums"])
        adam = {name: each for name, each in state["optimizer"].items() if name != "muon"}
        muon = state["optimizer"].get("muon", [])  # older checkpoints only have Adam
        for optimizer, each in zip(optimizers, [adam, *muon, state["adversary_optimizer"]], strict=True):
            optimizer.load_state_dict(each)

    def begin(self, step: int) -> None:
        """Record the step number, and initialize the codebook at the first step with codes."""
        self._step = step
        if step == self.settings.codes_from and not self.has_initial:
            if is_first():
                said = f"Step {step + 1:,}: initializing the codebook by k-means; this takes a while."
                print(said, file=sys.stderr)
            self._start_codebook()

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Initialize the codebook by k-means of the vectors of the coming batches."""
        device = self.model.codebook.embedding.device
        needed = self.settings.start_vectors * len(self.codebook.counts)
        vectors: list[Tensor] = []
        while sum(map(len, vectors)) < needed:
            pixels = self.stream[self._step + len(vectors)].to(device, non_blocking=True)
            found = self._pass(to_frames(pixels), self.model.config.rate, is_quantized=False)
            vectors.append(gathered(found.vectors))
        by = generator(self.seed, "k-means", device=device)
        self.codebook.start(torch.cat(vectors), per_step=len(vectors[0]), generator=by)

    def forward(self, batch: UInt8[Tensor, "batch height width 3"]) -> BatchLosses:
        """The losses of a batch as a whole; in training, this also updates the codebook."""
        with torch.autocast(batch.device.type, enabled=False):
            return self._losses(to_frames(batch))

    def _losses(self, frames: Float[Tensor, "batch 3 height width"]) -> BatchLosses:
        settings, step = self.settings, self._step
        rates = self.model.config.rates
        rate = rates[step % len(rates)]
        is_quantized = step >= settings.codes_from
        has_adversary = self.training and settings.has_adversary(step)
        reconstructed, vectors, codes, commitment = self._pass(frames, rate, is_quantized)
        losses = self._image_losses(reconstructed, frames)
        if has_adversary:
            losses["adversary"] = self._adversary_loss(reconstructed, torch.stack([*losses.values()]).sum(), rate)
        if is_quantized:
            losses["commitment"] = settings.commitment * commitment
        loss = torch.stack([*losses.values()]).sum()
        squared_error = F.mse_loss(reconstructed.detach().clamp(0, 1), frames)
        figures = {"psnr": -10 * squared_error.clamp(min=1e-10).log10()}
        if has_adversary:
            figures["discriminator"] = self._discriminator_loss(reconstructed.detach(), frames)
            loss = loss + (figures["discriminator"] - figures["discriminator"].detach())  # adds a gradient but no value
        if is_quantized and self.training:
            figures["restarted"] = self._move_codebook(vectors, codes)
        parts = losses | figures
        nothing = loss.new_full((), torch.nan)
        return BatchLosses(loss[None], torch.stack([parts.get(name, nothing).detach().float() for name in PARTS])[None])

    def _half(self) -> AbstractContextManager[Any]:
        enabled = self.settings.precision == "bfloat16"
        return torch.autocast(self.model.codebook.embedding.device.type, torch.bfloat16, enabled=enabled)

    def _pass(self, frames: Float[Tensor, "batch 3 height width"], rate: int, is_quantized: bool) -> _Pass:
        """Frames through the encoder, the codebook and a decoder; quantization is skipped unless `is_quantized`."""
        with self._half():
            features = self.model.features(frames, rate).float()
            vectors = rearrange(features.detach(), "batch embedding rows columns -> (batch rows columns) embedding")
            codes = self.model.codebook.nearest(vectors)
            chosen = F.embedding(codes, self.model.codebook.embedding)
            chosen = chosen.view(len(features), *features.shape[2:], -1).permute(0, 3, 1, 2)
            inner = straight_through(features, chosen) if is_quantized else features
            reconstructed = self.model.render(inner, rate).float()
        return _Pass(reconstructed, vectors, codes, F.mse_loss(features, chosen))

    def _image_losses(
        self, reconstructed: Float[Tensor, "batch 3 height width"], frames: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Weighted distances between reconstructions and frames."""
        settings = self.settings
        losses = {"pixels": pyramid_distance(reconstructed, frames, settings.pyramid_levels)}
        if settings.edge_weight > 0:
            losses["edges"] = settings.edge_weight * edge_distance(reconstructed, frames)
        if self.lpips is not None and settings.perceptual_weight > 0:
            with self._half():
                losses["perceptual"] = settings.perceptual_weight * self.lpips(reconstructed, frames).mean()
        return losses

    def _adversary_loss(
        self, reconstructed: Float[Tensor, "batch 3 height width"], image_loss: Float[Tensor, ""], rate: int
    ) -> Float[Tensor, ""]:
        """Adversarial loss, with a gradient only for the autoencoder."""
        fixed = {name: each.detach() for name, each in self.discriminator.named_parameters()}
        with self._half():
            loss = generator_loss(torch.func.functional_call(self.discriminator, fixed, (reconstructed,)).float())
        last = cast(Decoder, self.model.decoders[self.model.config.rates.index(rate)]).conv_out.weight
        return self.settings.adversary_weight * adaptive_weight(image_loss, loss, last) * loss

    def _discriminator_loss(
        self, reconstructed: Float[Tensor, "batch 3 height width"], frames: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, ""]:
        with self._half():
            return discriminator_loss(self.discriminator(frames).float(), self.discriminator(reconstructed).float())

    @torch.no_grad()
    def _move_codebook(self, vectors: Float[Tensor, "many dim"], codes: Int64[Tensor, " many"]) -> Int64[Tensor, ""]:
        """Update the codebook with the vectors of all ranks; returns the number of restarted codes."""
        vectors, codes = gathered(vectors), gathered(codes)
        if self.has_initial and self._step == self.settings.codes_from:
            self.codebook.take_up(len(vectors))
        return self.codebook.update(vectors, codes, generator(self.seed, "codes", self._step))


class _Pass(NamedTuple):
    """Results of a forward pass."""

    reconstructed: Float[Tensor, "batch 3 height width"]
    vectors: Float[Tensor, "many embedding"]
    codes: Int64[Tensor, " many"]
    """Nearest rows."""
    commitment: Float[Tensor, ""]
    """Mean squared distance of the vectors from their rows."""


def _is_kernel(parameter: nn.Parameter) -> bool:
    """True if Muon should treat it as a matrix."""
    return parameter.ndim == 4 and min(len(parameter), parameter[0].numel()) >= MIN_MATRIX_SIDE


def _matrix(kernel: Tensor, like: Tensor) -> Tensor:
    """A kernel, or its gradient, as outputs by inputs; a view if it has the memory format of `like`."""
    return kernel.flatten(1) if like.is_contiguous() else kernel.permute(0, 2, 3, 1).flatten(1)


def _placed(module: M, device: torch.device) -> M:
    """The module on its device; on a GPU in channels-last format, which is faster there, but not for norms on a CPU."""
    module = module.to(device)
    return cast(M, cast(Any, module).to(memory_format=torch.channels_last)) if device.type == "cuda" else module


def batch_places(step: int, batch: int, num_frames: int, seed: int) -> Int64[Tensor, " batch"]:
    """Indices of the frames of a step: every frame once per epoch, in another order each time."""
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
