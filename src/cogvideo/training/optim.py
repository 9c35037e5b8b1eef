"""Optimization: AdamW and Muon, the learning rate schedule, and a running average of the trained weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import nn

from cogvideo.config import Limit, Limited, NotNegative, Positive, Seed, Share, require
from cogvideo.training.parallel import local

BETAS = (0.9, 0.95)
"""Decay rates of the paper and of the released training code."""
MAX_SETTING = 1e30
"""Upper limit of settings: their products must stay finite in float32, whose maximum is 3e38."""

T = TypeVar("T")
Bounded = Annotated[Positive[T], Limit(lambda value: value <= MAX_SETTING, f"{MAX_SETTING:g} at most")]


@dataclass(frozen=True)
class Optimization(Limited):
    """Optimization settings that all objectives share."""

    steps: Bounded[int] = 1000
    """Updates of the weights."""
    batch: Bounded[int] = 16
    """Samples per step, over all ranks."""
    learning_rate: Bounded[float] = 2e-4
    """Peak learning rate (paper: 2e-4)."""
    warmup: NotNegative[int] = 100
    """Steps of linear warmup of the learning rate."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products and of frozen matrices in memory. Trained weights are always float32."""
    # not options here, since they have no type; a subclass may make options of them
    final_rate = 0.0
    weight_decay = 0.0
    ema = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.learning_rate * self.weight_decay <= MAX_SETTING,
            f"learning_rate {self.learning_rate:g}, weight_decay {self.weight_decay:g}: "
            f"expected {MAX_SETTING:g} at most as their product",
        )

    @property
    def clip(self) -> float:
        """Maximum gradient norm."""
        return 1.0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)

    @property
    def dtype(self) -> torch.dtype:
        """Type of matrix products."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


@dataclass(frozen=True)
class StageOptimization(Optimization):
    """Optimization. It determines the weights of a stage, apart from the data and the start."""

    final_rate: Share = 0.1
    """Learning rate at the end, as a share of the peak; between them it decays along a cosine."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the blocks' matrices; other weights use AdamW. Muon needs about half the steps for the same loss."""
    weight_decay: NotNegative[float] = 0.01
    """Weight decay of matrices; biases, norms and gates have none."""
    clip: Bounded[float] = 1.0
    """Maximum gradient norm."""
    ema: Annotated[float, Limit(lambda share: 0 <= share < 1, "a share in [0, 1)")] = 0.0
    """Decay of a running average of the weights, such as 0.999, which is then evaluated and exported; 0 for none."""
    seed: Seed = 0
    """Seed of the random weights, of the order of samples and of all draws in them."""


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that have a gradient, each once."""
    return [each for each in module.parameters() if each.requires_grad]


def make_optimizers(module: nn.Module, settings: StageOptimization) -> list[torch.optim.Optimizer]:
    """Optimizers that together update the trained parameters; frozen ones are left out and cost nothing.

    Muon's updates are scaled to the size of AdamW's (`match_rms_adamw`), so one learning rate serves both.
    """
    if settings.optimizer == "adamw":
        return [adamw(trained(module), settings)]
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, each in module.named_parameters():
        if each.requires_grad:
            is_matrix = each.ndim == 2 and "blocks" in name.split(".")
            (matrices if is_matrix else others).append(each)
    rate, decay = settings.learning_rate, settings.weight_decay
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [*([adamw(others, settings)] if others else []), muon]


def adamw(parameters: Sequence[nn.Parameter], settings: StageOptimization) -> torch.optim.AdamW:
    """AdamW with weight decay for matrices only."""
    groups = groups_by_decay(parameters, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, fused=has_fused(parameters))


def has_fused(parameters: Sequence[nn.Parameter]) -> bool | None:
    """True for fused Adam, on CUDA; None elsewhere, which leaves the choice to PyTorch."""
    return True if all(each.device.type == "cuda" for each in parameters) else None


def groups_by_decay(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices with weight decay, vectors without."""
    matrices = [each for each in parameters if each.ndim > 1]
    vectors = [each for each in parameters if each.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Average:
    """Exponential moving average of the trained weights.

    A step keeps the share `keep` of it; early steps keep less, so that the initial weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, keep: float) -> None:
        self.keep = keep
        self._trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self.state = {name: each.detach().clone() for name, each in self._trained.items()}
        """The average, by the names of the parameters; a checkpoint fills these tensors in place."""

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Include the weights after step number `done`, which counts from 1."""
        keep = min(self.keep, (1 + done) / (10 + done))
        values = [local(each) for each in self.state.values()]
        weights = [local(each.detach()) for each in self._trained.values()]
        torch._foreach_lerp_(values, weights, 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the average as the module's weights inside the `with` block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, own in self._trained.items():
            value, held = self.state[name], own.detach().clone()
            own.copy_(value)
            value.copy_(held)
