"""Objectives as seen by the training loop: samples become a batch, and a batch becomes losses.

Losses are means over the targets of one sample. So a batch may be split anywhere, into micro-batches or among ranks,
and the gradients of its pieces still add up to the gradient of the whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from cogvideo.data.loader import ClipSample
from cogvideo.layout import SequenceLayout, UpscaleLayout
from cogvideo.models.upscaler import Upscaler
from cogvideo.training.optim import make_optimizers, trained


class BatchLosses(NamedTuple):
    """The losses of a batch, in nats per predicted token."""

    loss: Float[Tensor, " batch"]
    """Loss of each sample, which is minimized."""
    parts: Float[Tensor, "batch parts"]
    """Value of each named part, without a graph; nan where a sample has no such part."""


class Task(Protocol):
    """Task of a stage. It can be pickled: loading processes call `collate`.

    Its randomness comes from the samples' seeds, so a sample does not depend on the rest of the batch.
    """

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the loss."""

    @property
    def layout(self) -> SequenceLayout | UpscaleLayout:
        """Slots of one sample, all of which go through the model."""

    def collate(self, samples: list[ClipSample]) -> Any:
        """Turn samples into a named tuple of tensors, which may be nested; the first axis is the sample."""

    def losses(self, model: nn.Module, batch: Any) -> BatchLosses:
        """The losses of a batch."""


class Objective(nn.Module):
    """A model, perhaps partly frozen, with its task: its forward pass is a loss, as data parallelism requires."""

    unit = "tokens"
    """Unit in which throughput is counted: the positions of a sample."""

    def __init__(self, model: nn.Module, task: Any) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Any) -> BatchLosses:
        """The losses of a batch."""
        measured: BatchLosses = self.task.losses(self.model, batch)
        return measured

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the columns of `BatchLosses.parts`."""
        return tuple(self.task.parts)

    @property
    def num_positions(self) -> int:
        """Number of `unit` in a sample."""
        return int(self.task.layout.length)

    @property
    def has_unused_parameters(self) -> bool:
        """True if a step leaves some trained parameters without a gradient.

        Nothing reads the last low level of super-resolution, so parts of its base have none if the base is trained.
        """
        return isinstance(self.model, Upscaler) and any(each.requires_grad for each in self.model.base.parameters())

    def begin(self, step: int) -> None:
        """Prepare for a step, counted from 0."""

    def optimizers(self, settings: Any) -> list[torch.optim.Optimizer]:
        """Optimizers that together update all trained parameters."""
        return make_optimizers(self, settings)

    def clipped(self) -> list[nn.Parameter]:
        """Parameters whose gradient is clipped, by its norm over all of them."""
        return trained(self)

    def load_old(self, state: dict[str, Any], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Load the state of a run that began when its objective had its own checkpoint format."""
        raise NotImplementedError


def generator(seed: int, *purpose: str | int, device: torch.device | None = None) -> torch.Generator:
    """Random generator for one purpose, with the same numbers whenever it is created."""
    return torch.Generator(device or "cpu").manual_seed(key(seed, *purpose))


def key(*parts: str | int) -> int:
    """A seed derived from numbers and words."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def cross_entropy(
    logits: Float[Tensor, "batch slots classes"], targets: Int64[Tensor, "batch slots"]
) -> Float[Tensor, "batch slots"]:
    """Cross entropy of each slot, in float32 at least, whatever the dtype of the logits."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
