"""Objective of the World reader: attributes of clips rendered on the fly, at first of single frames.

Unlike models, which learn from the split `train`, the reader learns from all splits: it must read held-out pairs as
well as others. It never sees clips numbered below `FIRST_TRAINING`. Shapes are learned last, but in a tenth
of the time from single frames, so the first steps use stills of a single figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from cogvideo import world
from cogvideo.config import NotNegative, Positive, Seed
from cogvideo.evaluation.reader import (
    ATTRIBUTES,
    FIRST_TRAINING,
    LABELS,
    SIZE,
    Reader,
    ReaderConfig,
    labels,
    render,
    to_input,
)
from cogvideo.training.objectives.task import BatchLosses, Objective, generator
from cogvideo.training.optim import Bounded, Optimization, groups_by_decay, has_fused, trained

STILLS = 100_000_000
"""Number of the first clip that stills are taken from."""
STILL_FROM, STILL_TO = 1.0, 2.0
"""Interval, in seconds, during which figures are in the picture, at least mostly."""
SHIFT, BRIGHTNESS, TINT, NOISE = 3, 0.08, 0.03, 0.04
"""Augmentation limits: shift in pixels, relative brightness overall and per color, standard deviation of noise."""
BETAS = (0.9, 0.98)
"""Decay rates of AdamW's averages."""


@dataclass(frozen=True)
class ReaderSettings(Optimization):
    """Optimization. It determines the weights."""

    steps: Bounded[int] = 5000
    """Number of steps, each on new clips."""
    batch: Bounded[int] = 16
    """Clips per step."""
    learning_rate: Bounded[float] = 2e-3
    """Peak learning rate of AdamW."""
    warmup: NotNegative[int] = 200
    """Steps of linear warmup of the learning rate; then it decays to zero along a cosine."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the layers in a step (autocast)."""
    still_steps: NotNegative[int] = 1500
    """Number of initial steps that train on single frames instead of clips."""
    stills: Positive[int] = 64
    """Frames per step on single frames."""
    weight_decay: NotNegative[float] = 0.05
    """Weight decay of AdamW."""
    largest_gradient: Bounded[float] = 1.0
    """Maximum gradient norm."""
    seed: Seed = 0
    """Seed of weights and augmentation."""

    @property
    def clip(self) -> float:
        """Maximum gradient norm."""
        return self.largest_gradient


class ReaderBatch(NamedTuple):
    """Clips, or stills as clips of one frame."""

    pixels: Float[Tensor, "batch 3 frames 64 64"]
    """Red, green and blue in [0, 1]."""
    truth: Int64[Tensor, "batch attributes"]
    """Index of the true label of each attribute."""


class ReaderObjective(Objective):
    """A reader that learns to read every attribute."""

    model: Reader
    parts = ATTRIBUTES
    unit, num_positions = "clips", 1

    def __init__(self, config: ReaderConfig, settings: ReaderSettings, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = Reader(config).to(device)
        super().__init__(model, None)

    def optimizers(self, settings: Any) -> list[torch.optim.Optimizer]:
        """AdamW with weight decay for matrices only."""
        groups = groups_by_decay(trained(self), settings.weight_decay)
        return [torch.optim.AdamW(groups, settings.learning_rate, betas=BETAS, fused=has_fused(trained(self)))]

    def load_old(self, state: dict[str, Any], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Load a checkpoint.pt."""
        self.model.load_state_dict(state["model"])
        optimizers[0].load_state_dict(state["optimizer"])

    def forward(self, batch: ReaderBatch) -> BatchLosses:
        """Cross entropy over all attributes that can be seen."""
        is_still = batch.pixels.shape[2] == 1
        scores = self.model.looks(batch.pixels) if is_still else self.model(batch.pixels)
        truth = dict(zip(LABELS, batch.truth.unbind(1), strict=True))
        losses = [F.cross_entropy(each.float(), truth[name], reduction="none") for name, each in scores.items()]
        unseen = torch.full_like(losses[0], torch.nan)
        right = [(scores[name].argmax(-1) == truth[name]).float() if name in scores else unseen for name in ATTRIBUTES]
        return BatchLosses(torch.stack(losses).sum(0), torch.stack(right, 1).detach())


def batches(settings: ReaderSettings, step: int) -> Iterator[ReaderBatch]:
    """Batches after the first `step` steps."""
    for number in count(step):
        is_still = number < settings.still_steps
        drawn = stills(number, settings.stills) if is_still else clips(number, settings.batch)
        seen = augment(drawn.pixels, generator(settings.seed, "augment", number))
        yield ReaderBatch(seen, torch.stack([*labels(drawn.scenes).values()], 1))


class RenderedScenes(NamedTuple):
    """Clips of a step."""

    scenes: list[world.Scene]
    pixels: UInt8[np.ndarray, "batch frames 64 64 3"]


def clips(step: int, batch: int) -> RenderedScenes:
    """Clips that no earlier step used, without those kept for tests."""
    scenes = [world.scene(FIRST_TRAINING + number) for number in range(step * batch, (step + 1) * batch)]
    return RenderedScenes(scenes, np.stack([render(scene) for scene in scenes]))


def stills(step: int, number: int) -> RenderedScenes:
    """Single frames of other clips with one figure, since one frame does not show which of two acts."""
    begin = STILLS + step * number * 4  # two clips of three have one figure
    alone = (scene for scene in world.scenes("all", begin) if not scene.other_object)
    scenes = list(islice(alone, number))
    moments = np.linspace(STILL_FROM, STILL_TO, number).tolist()
    frames = [world.render(scene, SIZE, 1 / moment, 2)[1:] for scene, moment in zip(scenes, moments, strict=True)]
    return RenderedScenes(scenes, np.stack(frames))


def augment(
    clips: UInt8[np.ndarray, "batch frames size size 3"], generator: torch.Generator
) -> Float[Tensor, "batch 3 frames size size"]:
    """Clips as a tokenizer might reconstruct them, with all labels still true: no mirroring, no large color change.

    Each clip as a whole is shifted by up to 3 pixels, every second one blurred, its brightness and colors changed a
    little; noise comes in squares of 2 x 2 pixels, new in every frame. The result is on the generator's device.
    """
    device = generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(clips), *shape, 1, 1, 1, generator=generator, device=device)

    pixels = to_input(_shifted(clips, generator), device)
    pixels[::2] = torch.lerp(pixels[::2], _blurred(_blurred(pixels[::2])), uniform(0, 1, 1)[::2])
    pixels = pixels * ((1 + uniform(-BRIGHTNESS, BRIGHTNESS, 1)) * (1 + uniform(-TINT, TINT, 3)))
    cells = *pixels.shape[:3], pixels.shape[3] // 2, pixels.shape[4] // 2
    noise = torch.randn(cells, generator=generator, device=device) * uniform(0, NOISE, 1)
    return (pixels + noise.repeat_interleave(2, 3).repeat_interleave(2, 4)).clamp_(0, 1)


def _shifted(
    clips: UInt8[np.ndarray, "batch frames size size 3"], generator: torch.Generator
) -> UInt8[np.ndarray, "batch frames size size 3"]:
    """Shift clips, repeating the outermost pixels at the edges."""
    offsets = torch.randint(-SHIFT, SHIFT + 1, (len(clips), 2, 1), generator=generator, device=generator.device)
    places = (offsets.cpu().numpy() + np.arange(clips.shape[2])).clip(0, clips.shape[2] - 1)
    return np.stack([clip[:, rows][:, :, columns] for clip, (rows, columns) in zip(clips, places, strict=True)])


def _blurred(pixels: Float[Tensor, "*planes rows columns"]) -> Float[Tensor, "*planes rows columns"]:
    """Blur with weights 1, 2, 1 across and down; the outermost pixels stay."""
    made = pixels.clone()
    made[..., 1:-1] += pixels[..., :-2].add(pixels[..., 2:]).sub_(pixels[..., 1:-1], alpha=2).mul_(0.25)
    pixels = made.clone()
    made[..., 1:-1, :] += pixels[..., :-2, :].add(pixels[..., 2:, :]).sub_(pixels[..., 1:-1, :], alpha=2).mul_(0.25)
    return made
