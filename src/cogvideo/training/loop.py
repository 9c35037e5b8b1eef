"""The training loop: steps, metrics, held-out losses, samples, checkpoints, and a clean shutdown.

Batches are a function of the step, so a checkpoint holds only weights, optimizers and average.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cogvideo.config import InputError
from cogvideo.devices import matrix_rate, peak_bytes, slowness
from cogvideo.models.transformer import Transformer
from cogvideo.models.upscaler import Upscaler
from cogvideo.planning.training import flops_per_position
from cogvideo.training.checkpoints import Checkpoints, DamagedError, restore, training_state
from cogvideo.training.parallel import any_rank, is_first, largest
from cogvideo.training.recorder import Recorder
from cogvideo.training.session import Session
from cogvideo.training.step import Trainer


def learn(session: Session) -> None:
    """Run all remaining steps.

    Raises:
        ValueError: a checkpoint cannot be used, or training diverged.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written.
        SystemExit: SIGTERM; a checkpoint was written.
    """
    trainer, logging, steps = session.trainer, session.logging, session.trainer.settings.steps
    folder = session.folder.path / "checkpoints"
    checkpoints = Checkpoints(folder, logging.keep, logging.asynchronous)
    first, seconds = _resume(session, checkpoints)
    if is_first():
        session.folder.forget_after(first)
    recorder = Recorder(
        session.folder,
        done=first,
        steps=steps,
        settings=session.identity,
        tensorboard=logging.tensorboard,
        wandb=logging.wandb,
        is_first=is_first(),
    )
    with recorder as record, interrupts() as caught:
        _greet(session, first, record)
        clock = Clock(trainer, first, seconds)
        done = first
        for done, batch in zip(range(first + 1, steps + 1), session.batches(first), strict=False):
            trainer.step(done - 1, batch)
            stops = any_rank(bool(caught))
            measures = done == steps or (done % logging.evaluate_every == 0 and not stops)
            saves = stops or done == steps or done % logging.checkpoint_every == 0
            reports = saves or measures or done % logging.report_every == 0
            held_out = None
            try:
                if reports:
                    _report(trainer, done, clock, record)
                else:
                    record.advance(done)
                paused = time.monotonic()
                if saves:
                    trainer.check(done, batch)
                if measures:
                    held_out = session.evaluate(done)
                    record.record({"step": done, **held_out.row}, held_out.words)
            except InputError:  # training diverged: the checkpoint being written is from before, and good
                checkpoints.wait()
                raise
            if reports:
                checkpoints.settle()
            if saves:
                state = _state(trainer, clock.seconds)
                checkpoints.save(done, state, None if held_out is None else held_out.loss)
            if session.preview is not None and session.has_sample(done) and not stops:
                record.picture(done, session.preview(done))
            if stops:
                break
            clock.pause(time.monotonic() - paused)
        checkpoints.wait()
        if any_rank(bool(caught)):  # also during the evaluation after the last step
            record.say(f"Stopped after step {done:,}; run the same command to continue.")
            if signal.SIGTERM in caught:
                raise SystemExit(128 + signal.SIGTERM)
            raise KeyboardInterrupt  # here or on another rank


def _greet(session: Session, first: int, record: Recorder) -> None:
    """Print where the run stands, and generate the samples that a killed run still owes."""
    settings, preview = session.trainer.settings, session.preview
    if first:
        record.say(f"Continuing after step {first:,} of {settings.steps:,}.")
        if preview is not None and session.has_sample(first) and preview.lacks(first):
            record.picture(first, preview(first))
    if slow := slowness(settings.dtype, session.trainer.ranks.device):
        record.say(slow)


def _resume(session: Session, checkpoints: Checkpoints) -> tuple[int, float]:
    """Load the newest intact checkpoint; returns the number of finished steps, and their seconds."""
    trainer, steps = session.trainer, checkpoints.steps()
    for step in reversed(steps):
        try:
            loaded = checkpoints.load(step, _state(trainer, 0.0))
        except DamagedError as error:
            if step == steps[0]:
                raise
            if is_first():
                print(f"{error.path} is damaged ({error.reason}): an earlier one is used.", file=sys.stderr)
            continue
        restore(trainer.module, trainer.optimizers, loaded)
        for damaged in steps[steps.index(step) + 1 :]:
            checkpoints.set_aside(damaged)
        return step, float(loaded["seconds"])
    old = session.folder.old_checkpoint()
    if old is None:
        return 0, 0.0
    step, state = old
    trainer.objective.load_old(state, trainer.optimizers)
    return step, 0.0


def _state(trainer: Trainer, seconds: float) -> dict[str, Any]:
    average = None if trainer.average is None else trainer.average.state
    return training_state(trainer.module, trainer.optimizers, average) | {"seconds": seconds}


def _report(trainer: Trainer, done: int, clock: Clock, recorder: Recorder) -> None:
    """Record the steps since the last report."""
    figures = trainer.figures(done)
    row = {
        "step": done,
        "loss": figures.loss,
        **figures.parts,
        "learning_rate": trainer.settings.rate_at(done - 1),
        "gradient_norm": figures.gradient_norm,
    }
    recorder.record(row | clock.row(done) | {"peak_bytes": largest(peak_bytes(trainer.ranks.device))})


class Clock:
    """Time and throughput between reports; earlier parts of the run made `done` steps in `seconds`."""

    def __init__(self, trainer: Trainer, done: int, seconds: float) -> None:
        objective, ranks, settings = trainer.objective, trainer.ranks, trainer.settings
        self._unit = objective.unit
        self._work = settings.batch * objective.num_positions
        is_known = isinstance(objective.model, Transformer | Upscaler)
        self._flops = flops_per_position(objective.model) if is_known else 0.0
        self._rate = matrix_rate(ranks.device, settings.dtype) * ranks.world_size if self._flops else 0.0
        self._began = time.monotonic() - seconds
        self._last, self._done = time.monotonic(), done

    @property
    def seconds(self) -> float:
        """Seconds since the run began, without work that a killed process lost."""
        return time.monotonic() - self._began

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on steps."""
        self._last += seconds

    def row(self, done: int) -> dict[str, float]:
        """Speed of the steps since the last call; `done` is the total number of steps so far."""
        now = time.monotonic()
        rate = (done - self._done) * self._work / max(now - self._last, 1e-9)
        self._last, self._done = now, done
        used = {"utilization": round(rate * self._flops / self._rate, 4)} if self._flops else {}
        return {f"{self._unit}_per_second": round(rate, 1), **used, "seconds": round(self.seconds, 1)}


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of interrupting a step; a second one interrupts as usual."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield caught
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        caught.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
