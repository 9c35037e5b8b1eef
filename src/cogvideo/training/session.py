"""A run of training: its folder, what learns, from what, and how it is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from cogvideo.config import require
from cogvideo.files import alone_in
from cogvideo.runs import RunFolder
from cogvideo.training.checkpoints import Checkpoints
from cogvideo.training.parallel import any_rank, is_first
from cogvideo.training.step import Trainer


@dataclass(frozen=True)
class LoggingConfig:
    """Reports and checkpoints of a run. They have no say in the weights."""

    report_every: int = 50
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 500
    """Steps between measurements on held-out data."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a killed run loses what it did since the last one."""
    keep: int = 2
    """Number of last checkpoints to keep, in addition to the one with the lowest held-out loss."""
    asynchronous: bool = False
    """Write checkpoints while training goes on; the host's memory then holds a copy of what is written."""
    tensorboard: bool = False
    """Also write TensorBoard event files (extra train)."""
    wandb: bool = False
    """Also report to Weights & Biases (extra wandb)."""

    def __post_init__(self) -> None:
        for name in ("report_every", "evaluate_every", "checkpoint_every", "keep"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected a positive number")


class Evaluation(NamedTuple):
    """A measurement on held-out data."""

    row: Mapping[str, Any]
    """Figures for metrics.jsonl."""
    told: str
    """Figures in words."""
    loss: float | None = None
    """Loss that the best checkpoint has the lowest of; None where nothing is held out."""


class Preview(Protocol):
    """Samples of the model while it learns. All ranks call it."""

    def __call__(self, step: int) -> Path | None:
        """Draw samples after a step; the contact sheet on the first rank, None where nothing can be drawn."""

    def lacks(self, step: int) -> bool:
        """Whether the contact sheet of a step could be drawn, and is not there."""


class Session(NamedTuple):
    """A run of training."""

    folder: RunFolder
    trainer: Trainer
    batches: Callable[[int], Iterable[Any]]
    """This rank's shares of the batches, from a step on."""
    logging: LoggingConfig
    evaluate: Callable[[int], Evaluation]
    """Measures the model after a step, on held-out data."""
    identity: Mapping[str, Any]
    """Everything that decides the result, in nested tables."""
    preview: Preview | None = None
    sample_every: int = 0
    """Steps between contact sheets; 0 for none."""

    def checkpoints(self) -> Checkpoints:
        """The checkpoints of the run."""
        return Checkpoints(self.folder.path / "checkpoints", self.logging.keep, self.logging.asynchronous)

    def has_sample(self, step: int) -> bool:
        """Whether a contact sheet belongs to a step."""
        if self.preview is None or self.sample_every == 0:
            return False
        return step == self.trainer.settings.steps or step % self.sample_every == 0


@contextmanager
def claimed(
    folder: RunFolder, identity: Mapping[str, Any], facts: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[bool]:
    """Keep other processes out of a run's folder; yields whether the run is to be done, or is over.

    Args:
        folder: of the run.
        identity: all that decides the result.
        facts: what is also to be known of it.

    Raises:
        ValueError: another run began there, or one is at work.
    """
    with ExitStack() as lock:
        if is_first():
            lock.enter_context(alone_in(folder.path))
            folder.claim(identity, facts)
        yield any_rank(is_first() and folder.summary is None)
