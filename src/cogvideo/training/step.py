"""One training step of any stage: gradients from micro-batches, a clipped update, metrics that stay on the device.

A batch is split among ranks, and a rank's share into micro-batches. Losses are means over samples, so neither split
changes the gradient, except for rounding.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cogvideo.config import InputError, Limited, NotNegative
from cogvideo.training.objectives.task import BatchLosses, Objective
from cogvideo.training.optim import Average, Optimization, trained
from cogvideo.training.parallel import (
    ALONE,
    ParallelSettings,
    Ranks,
    accumulating,
    any_rank,
    clip_gradients,
    distribute,
    local,
    mean_over_ranks,
)

MAX_WORKERS = 4
"""Maximum number of loader processes per rank, unless more are requested."""


@dataclass(frozen=True)
class Execution(Limited):
    """Computation of a step. It changes speed and memory, and results only by rounding."""

    micro_batch: NotNegative[int] = 0
    """Samples of one forward and backward pass; fewer need less memory. 0 is a rank's whole share of the batch."""
    checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: far less memory, a third more work."""
    compile: bool = False
    """Compile each block with torch.compile; for GPUs."""
    num_workers: NotNegative[int] | None = None
    """Loader processes per rank; by default 4 on a GPU, or fewer if a rank has fewer cores, and 0 on CPUs."""

    def workers(self, device: torch.device) -> int:
        """Number of loader processes per rank on a device."""
        if self.num_workers is not None:
            return self.num_workers
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
        return min(MAX_WORKERS, (os.cpu_count() or 1) // ranks_here) if device.type == "cuda" else 0


class StepMetrics(NamedTuple):
    """Means over some steps and all ranks: the loss, and each part over the samples that have it."""

    loss: float
    parts: dict[str, float]
    gradient_norm: float
    """Mean over the steps, before clipping."""


class Trainer:
    """Runs training steps of any objective, which is on the rank's device."""

    def __init__(
        self,
        objective: Objective,
        settings: Optimization,
        execution: Execution = Execution(),  # frozen
        parallel: ParallelSettings = ParallelSettings(),  # noqa: B008
        ranks: Ranks = ALONE,
    ) -> None:
        self.objective = objective
        self.settings = settings
        self.ranks = ranks
        share = settings.batch // ranks.data_size
        self.micro_batch = min(execution.micro_batch or share, share)
        self._pass = execution.micro_batch or sys.maxsize
        self.module = distribute(
            objective,
            parallel,
            ranks,
            precision=settings.precision,
            checkpointing=execution.checkpointing,
            compile=execution.compile,
        )
        self.optimizers = objective.optimizers(settings)
        self.average = Average(objective, settings.ema) if settings.ema > 0 else None
        self._steps: list[Tensor] = []

    def step(self, number: int, batch: Any) -> None:
        """Run step `number`, counted from 0, on this rank's share of a batch."""
        self.objective.begin(number)
        pieces = list(cut(batch, self._pass))
        measured = []
        for piece in pieces:
            with accumulating(self.module, piece is pieces[-1]):
                figures = self.measure(piece)
                num_losses = len(figures.loss) * num_samples(batch) / num_samples(piece)  # of the share
                (figures.loss.sum() / num_losses).backward()  # type: ignore[no-untyped-call]
                measured.append(BatchLosses(figures.loss.detach(), figures.parts))
        norm = clip_gradients(self.objective.clipped(), self.settings.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.rate_at(number)
            optimizer.step()
        self.objective.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(number + 1)
        self._steps.append(_row(measured, norm))

    def measure(self, batch: Any) -> BatchLosses:
        """The losses of a batch, in the precision of the settings."""
        with self.precision():
            return self.module(moved(batch, self.ranks.device))

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast if matrix products are in bfloat16."""
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def averaged(self) -> AbstractContextManager[None]:
        """Use the weights that are evaluated and exported: the running average if there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    @torch.no_grad()
    def check(self, done: int, batch: Any) -> None:
        """Refuse weights or losses that are not finite: an update may break weights before any loss shows it."""
        averages = [] if self.average is None else self.average.state.values()
        weights = [local(each.detach()) for each in (*trained(self.objective), *averages)]
        broken = not bool(torch.stack([each.isfinite().all() for each in weights]).all())
        check_finite(math.nan if any_rank(broken) else 0.0, "a weight", f"after step {done:,}")
        self.module.eval()
        loss = float(self.measure(next(cut(batch, self.micro_batch))).loss.mean())
        self.module.train()
        check_finite(math.nan if any_rank(not math.isfinite(loss)) else loss, "the loss", f"after step {done:,}")

    def figures(self, done: int) -> StepMetrics:
        """Means over the steps since the last call; `done` is the total number of steps so far."""
        rows = mean_over_ranks(torch.stack(self._steps)).tolist()
        first = done - len(rows) + 1
        self._steps = []
        for number, (loss, norm, *_) in enumerate(rows, first):
            for name, value in (("the loss", loss), ("the norm of the gradient", norm)):
                check_finite(value, name, f"at step {number:,}")
        columns = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        return StepMetrics(columns[0], part_means(self.objective.parts, columns[2:]), columns[1])


def check_finite(value: float, name: str, when: str) -> None:
    """Refuse a run with a figure that is not finite."""
    if not math.isfinite(value):
        raise InputError(
            f"training diverged: {name} is {value} {when}; the last checkpoint is from before. Try a smaller "
            "--learning-rate or a longer --warmup in another folder"
        )


def _row(measured: Sequence[BatchLosses], norm: Float[Tensor, ""]) -> Float[Tensor, " figures"]:
    """Mean loss, gradient norm, and for each part its sum and the number of samples that have it."""
    loss = torch.cat([each.loss for each in measured]).mean()
    return torch.cat([torch.stack([loss.float(), norm.float()]), part_sums([each.parts for each in measured])])


def part_sums(parts: Sequence[Float[Tensor, "_ parts"]]) -> Float[Tensor, " sums"]:
    """Sums of each part over samples, then the numbers of samples that have it."""
    whole = torch.cat(list(parts)).float()
    return torch.cat([whole.nansum(0), whole.isfinite().sum(0).float()])


def part_means(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Means of the parts that occurred."""
    half = len(names)
    return {name: sums[place] / sums[half + place] for place, name in enumerate(names) if sums[half + place] > 0}


def cut(batch: Any, size: int) -> Iterator[Any]:
    """Pieces of at most `size` samples, views of the batch."""
    for start in range(0, num_samples(batch), size):
        yield tree_map(lambda tensor, start=start: tensor[start : start + size], batch)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on a device."""
    return tree_map(lambda tensor: tensor.to(device, non_blocking=True), batch)


def num_samples(batch: Any) -> int:
    """Length of the first axis, the same in all tensors of a batch."""
    return len(tree_leaves(batch)[0])
