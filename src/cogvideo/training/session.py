"""A training run: its options, its folder, its trainer and batches, and how it is monitored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from cogvideo.config import Limited, NotNegative, Positive
from cogvideo.data.clips import ClipSampling, FrameRates, Mode
from cogvideo.data.dataset import read_card
from cogvideo.files import exclusive_lock
from cogvideo.runs import RunFolder
from cogvideo.training.optim import StageOptimization
from cogvideo.training.parallel import ParallelSettings, any_rank, is_first
from cogvideo.training.samples import Preview
from cogvideo.training.step import Execution, Trainer


@dataclass(frozen=True)
class LoggingConfig(Limited):
    """Reports and checkpoints. They do not affect the weights."""

    report_every: Positive[int] = 50
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Positive[int] = 500
    """Steps between evaluations on held-out data."""
    checkpoint_every: Positive[int] = 500
    """Steps between checkpoints; a killed run loses the work since the last one."""
    keep: Positive[int] = 2
    """Number of latest checkpoints to keep, in addition to the one with the lowest held-out loss."""
    asynchronous: bool = False
    """Write checkpoints while training goes on; a copy of the weights is then in host memory."""
    tensorboard: bool = False
    """Write TensorBoard event files, too (extra train)."""
    wandb: bool = False
    """Report to Weights & Biases, too (extra wandb)."""


@dataclass(frozen=True)
class DataOptions:
    """Clips and samples."""

    data: tuple[Path, ...]
    """Folders written by `cogvideo data prepare`."""
    split: str = "train"
    """Split to train on."""
    held_out_split: str = "validation"
    """Split to validate on; skipped when the data has no `validation`."""
    rates: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Frame rates of sequences, lowest first: the rate of key frames, then those of the rounds."""
    fixed_rate: float | None = None
    """Single frame rate for all clips, in place of the hierarchy; for comparison."""
    random_offset: bool = True
    """Start sequences anywhere in a clip where they fit, instead of at its first frame."""
    caption_dropout: float = 0.1
    """Share of samples without their caption, which guidance needs."""

    def sampling(self, mode: Mode, seed: int, num_frames: int, **special: Any) -> ClipSampling:
        """Settings of the loader; `special` are those of one stage only."""
        rates = FrameRates(read_card(self.data[0]).fps, self.rates, num_frames)
        fixed, offset, dropout = self.fixed_rate, self.random_offset, self.caption_dropout
        return ClipSampling(mode, rates, fixed, offset, dropout, seed=seed, **special)


@dataclass(frozen=True)
class StageLogging(LoggingConfig):
    """Reports, samples and checkpoints. They do not affect the weights."""

    report_every: Positive[int] = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_samples: Positive[int] = 256
    """Maximum number of held-out clips to measure at each frame rate."""
    sample_every: NotNegative[int] = 500
    """Steps between contact sheets of samples; 0 for none."""
    prompts: tuple[str, ...] = ()
    """Prompts for the samples of the image model and of key frames; captions of held-out clips unless given."""


@dataclass(frozen=True)
class Options:
    """Options of all stages."""

    clips: DataOptions
    out: Path
    """Bundle to put the stage into. The same command continues a run that was killed."""
    init: str | None = None
    """Bundle to start from: a folder, or an ID on the Hugging Face Hub; that of --out by default."""
    device: str = "auto"
    """Device to run on: cpu, cuda, cuda:0, or auto."""
    overwrite: bool = False
    """Replace the stage if the bundle has it."""
    optimization: StageOptimization = field(default_factory=StageOptimization)
    execution: Execution = field(default_factory=Execution)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    logging: StageLogging = field(default_factory=StageLogging)


class Evaluation(NamedTuple):
    """A measurement on held-out data."""

    row: Mapping[str, Any]
    words: str
    loss: float | None = None
    """Loss that selects the best checkpoint; None if nothing is held out."""


class Session(NamedTuple):
    """A run of training."""

    folder: RunFolder
    trainer: Trainer
    batches: Callable[[int], Iterable[Any]]
    """This rank's shares of the batches, from a step on."""
    logging: LoggingConfig
    evaluate: Callable[[int], Evaluation]
    identity: Mapping[str, Any]
    preview: Preview | None = None
    sample_every: int = 0
    """Steps between contact sheets of samples; 0 for none."""

    def has_sample(self, step: int) -> bool:
        """True if a contact sheet is due at a step."""
        is_last = step == self.trainer.settings.steps
        return self.sample_every > 0 and (is_last or step % self.sample_every == 0)


@contextmanager
def claimed(
    folder: RunFolder, identity: Mapping[str, Any], facts: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[bool]:
    """Lock the folder of a run with this identity; yields whether there is anything left to do."""
    with ExitStack() as lock:
        if is_first():
            lock.enter_context(exclusive_lock(folder.path))
            folder.claim(identity, facts)
        yield any_rank(is_first() and folder.summary is None)
