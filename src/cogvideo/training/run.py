"""The loop of every stage: steps, figures, held-out losses, samples, checkpoints, and an orderly end.

The position in the data follows from the number of steps, so a checkpoint is weights, optimizer and average alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cogvideo.config import require
from cogvideo.data.loader import ClipStream, Loader
from cogvideo.devices import matrix_rate, peak_bytes, slowness
from cogvideo.training.checkpoints import Checkpoints, DamagedError, restore, training_state
from cogvideo.training.held_out import HeldOut, measure
from cogvideo.training.loop import interrupts
from cogvideo.training.parallel import any_rank, largest
from cogvideo.training.recorder import Recorder, flops_a_position
from cogvideo.training.step import Execution, Trainer, check_finite


@dataclass(frozen=True)
class Watching:
    """What a run shows and keeps while it goes on. It has no say in the weights."""

    report_every: int = 20
    """Steps of one line of metrics.jsonl."""
    evaluate_every: int = 500
    """Steps between measurements on held-out clips."""
    evaluate_samples: int = 256
    """Held-out clips of a measurement, at most, for each frame rate."""
    checkpoint_every: int = 500
    """Steps between checkpoints, which is what is lost when a run is killed."""
    keep: int = 2
    """Last checkpoints that are kept, beside the one with the lowest held-out loss."""
    asynchronous: bool = False
    """Write checkpoints while training goes on; the host's memory then holds a copy of what is written."""
    sample_every: int = 500
    """Steps between contact sheets; 0 for none."""
    prompts: tuple[str, ...] = ()
    """What samples of the image model and of key frames show; captions of held-out clips unless given."""
    tensorboard: bool = False
    """Also write TensorBoard's event files (extra train)."""
    wandb: bool = False
    """Also report to Weights & Biases (extra wandb)."""

    def __post_init__(self) -> None:
        for name in ("report_every", "evaluate_every", "evaluate_samples", "checkpoint_every", "keep"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected a positive number")
        require(self.sample_every >= 0, f"sample_every is {self.sample_every}, expected 0 or more")


class Job(NamedTuple):
    """What the loop works on."""

    trainer: Trainer
    stream: ClipStream
    """To learn from."""
    held_out: Sequence[HeldOut]
    """To be judged by; nothing, where no clip is held out."""
    checkpoints: Checkpoints
    execution: Execution
    watching: Watching
    draw: Callable[[int], Path | None]
    """Draws samples after a step and gives the contact sheet on the first rank."""
    lacks: Callable[[int], bool]
    """Whether those of a step are not there, and could be drawn."""


class Clock:
    """Time and work between reports.

    Args:
        trainer: whose work it is.
        seconds: that an earlier run took.
    """

    def __init__(self, trainer: Trainer, seconds: float) -> None:
        self._trainer = trainer
        self._flops = flops_a_position(trainer.objective.model)
        dtype, ranks = trainer.settings.dtype, trainer.ranks
        self._rate = matrix_rate(ranks.device, dtype) * ranks.world_size
        self._began = time.monotonic() - seconds
        self._last, self._done = time.monotonic(), 0

    @property
    def seconds(self) -> float:
        """Since the run began, without what a killed part lost."""
        return time.monotonic() - self._began

    def step(self) -> None:
        """A step was made."""
        self._done += 1

    def pause(self, seconds: float) -> None:
        """Leave out time that was spent on other things than steps."""
        self._last += seconds

    def row(self) -> dict[str, float]:
        """Speed of the steps since the last call."""
        now, work = time.monotonic(), self._done * self._trainer.settings.batch
        positions = work * self._trainer.objective.task.num_positions
        rate = positions / max(now - self._last, 1e-9)
        self._last, self._done = now, 0
        return {
            "tokens_per_second": round(rate, 1),
            "utilisation": round(rate * self._flops / self._rate, 4),
            "seconds": round(self.seconds, 1),
        }


def learn(job: Job, recorder: Callable[[int], Recorder]) -> None:
    """All steps that are left.

    Args:
        job: what to do.
        recorder: makes the recorder, from the number of steps that were made before.

    Raises:
        ValueError: a checkpoint cannot be used, or training diverged.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written.
        SystemExit: SIGTERM; a checkpoint was written.
    """
    trainer, settings = job.trainer, job.trainer.settings
    first, seconds = _resume(job)
    held: dict[str, dict[str, float]] = {}
    with recorder(first) as record, interrupts() as interrupt:
        if first:
            record.say(f"Continuing after step {first:,} of {settings.steps:,}.")
        if first and _shows(job, first) and job.lacks(first):  # it was killed behind the checkpoint, or stopped there
            _sample(job, first, record)
        if slow := slowness(settings.dtype, trainer.ranks.device):
            record.say(slow)
        clock = Clock(trainer, seconds)
        for done, batch in _batches(job, first):
            trainer.step(done - 1, batch)
            clock.step()
            stops = any_rank(interrupt.is_set())
            last = done == settings.steps
            saves = stops or last or done % job.watching.checkpoint_every == 0
            if saves or done % job.watching.report_every == 0 or done % job.watching.evaluate_every == 0:
                with _published(job.checkpoints):
                    _report(job, done, clock, record)
                job.checkpoints.settle()
            else:
                record.advance(done)
            paused = time.monotonic()
            measures = last or (done % job.watching.evaluate_every == 0 and not stops)
            with _published(job.checkpoints):
                if saves:
                    trainer.check(done, batch)
                if measures:
                    held = _measure(job, done)
                    record.record({"step": done, "held_out": held})
            if saves:
                _save(job, done, clock.seconds, held if measures else {})
            if not stops and _shows(job, done):
                _sample(job, done, record)
            if stops:
                job.checkpoints.wait()
                record.say(f"Stopped after step {done:,}; the same command continues.")
                interrupt.leave()
            clock.pause(time.monotonic() - paused)
        job.checkpoints.wait()


def _batches(job: Job, first: int) -> Iterator[tuple[int, Any]]:
    """Number of the step and this rank's share, from the first step that is left."""
    trainer = job.trainer
    settings, ranks = trainer.settings, trainer.ranks
    loader = Loader(
        job.stream,
        settings.batch,
        rank=ranks.data_rank,
        world_size=ranks.data_size,
        position=first * settings.batch,
        num_workers=job.execution.workers(ranks.device),
        collate=trainer.objective.task.collate,
        pin_memory=ranks.device.type == "cuda",
    )
    return zip(range(first + 1, settings.steps + 1), loader, strict=False)


def _resume(job: Job) -> tuple[int, float]:
    """Take up the newest checkpoint that is whole; returns how many steps were made, and in how many seconds.

    Raises:
        ValueError: there are some, and none is whole.
        OSError: one cannot be read.
    """
    trainer, steps = job.trainer, job.checkpoints.steps()
    for step in reversed(steps):
        state = training_state(trainer.module, trainer.optimizers, _average(trainer)) | {"seconds": 0.0}
        try:
            loaded = job.checkpoints.load(step, state)
        except DamagedError as error:
            if step == steps[0]:
                raise
            if trainer.ranks.rank == 0:
                print(f"{error.path} is damaged ({error.reason}): an earlier one is taken.", file=sys.stderr)
            continue
        restore(trainer.module, trainer.optimizers, loaded)
        for damaged in steps[steps.index(step) + 1 :]:
            job.checkpoints.set_aside(damaged)
        return step, float(loaded["seconds"])
    return 0, 0.0


def _save(job: Job, done: int, seconds: float, held: dict[str, dict[str, float]]) -> None:
    trainer = job.trainer
    state = training_state(trainer.module, trainer.optimizers, _average(trainer)) | {"seconds": seconds}
    job.checkpoints.save(done, state, mean_loss(held))


def _average(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    return None if trainer.average is None else trainer.average.state


def mean_loss(held: dict[str, dict[str, float]]) -> float | None:
    """What the best checkpoint is chosen by: the mean over the frame rates; None where nothing is held out."""
    return sum(row["loss"] for row in held.values()) / len(held) if held else None


@contextmanager
def _published(checkpoints: Checkpoints) -> Iterator[None]:
    """If training turns out to have diverged, which all ranks find alike, every checkpoint gets its name first: the one
    that is being written is from before, and good."""
    try:
        yield
    except ValueError:
        checkpoints.wait()
        raise


def _measure(job: Job, done: int) -> dict[str, dict[str, float]]:
    """Held-out losses, with the weights of the moment.

    Raises:
        ValueError: training diverged.
    """
    held = measure(job.trainer, job.held_out, job.trainer.micro_batch)
    for name, row in held.items():
        check_finite(row["loss"], f"the held-out loss ({name})", f"after step {done:,}")
    return held


def _report(job: Job, done: int, clock: Clock, recorder: Recorder) -> None:
    """Record the steps since the last report.

    Raises:
        ValueError: training diverged.
    """
    figures = job.trainer.figures(done)
    recorder.record(
        {
            "step": done,
            "loss": figures.loss,
            **figures.parts,
            "learning_rate": job.trainer.settings.rate_at(done - 1),
            "gradient_norm": figures.gradient_norm,
            **clock.row(),
            "peak_bytes": largest(peak_bytes(job.trainer.ranks.device)),
        }
    )


def _shows(job: Job, done: int) -> bool:
    """Whether a step has a contact sheet."""
    every = job.watching.sample_every
    return every > 0 and (done == job.trainer.settings.steps or done % every == 0)


def _sample(job: Job, done: int, recorder: Recorder) -> None:
    sheet = job.draw(done)
    if sheet is not None:
        recorder.picture(done, sheet)
