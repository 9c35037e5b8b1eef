"""What a stage learns, seen from the loop: samples become a batch, and a batch becomes losses.

Losses are means over what one sample predicts. So a batch may be cut anywhere, into micro-batches or among ranks, and
the gradients of its pieces still add up to that of the whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from cogvideo.data.loader import ClipSample


class Measured(NamedTuple):
    """The losses of a batch, in nats a predicted token."""

    loss: Float[Tensor, " batch"]
    """Of each sample: what is minimised."""
    parts: Float[Tensor, "batch parts"]
    """Of each named part of it, without a graph; nan where a sample has no such part."""


class Task(Protocol):
    """What a stage learns. It can be pickled: loading processes call `collate`.

    What is random in it comes from the samples' seeds, so a sample is the same whatever stands beside it.
    """

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the loss."""

    @property
    def num_positions(self) -> int:
        """Slots of one sample that go through the model."""

    def collate(self, samples: list[ClipSample]) -> Any:
        """Samples to a named tuple of tensors, whose first axis is the sample; they may be nested."""

    def losses(self, model: nn.Module, batch: Any) -> Measured:
        """The losses of a batch."""


class Objective(nn.Module):
    """A model with its task: the module whose forward pass is a loss, as data parallelism wants it.

    Args:
        model: what is trained, or partly trained.
        task: what it learns.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Any) -> Measured:
        """The losses of a batch."""
        return self.task.losses(self.model, batch)


def cross_entropy(
    logits: Float[Tensor, "batch slots classes"], targets: Int64[Tensor, "batch slots"]
) -> Float[Tensor, "batch slots"]:
    """Of each slot, in float32 at least, whatever the logits are in."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
