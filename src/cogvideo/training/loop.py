"""The training loop: steps, figures, held-out losses, samples, checkpoints, and an orderly end.

Batches are a function of the step, so a checkpoint is weights, optimizers and average alone.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from cogvideo.config import InputError
from cogvideo.devices import matrix_rate, peak_bytes, slowness
from cogvideo.models.transformer import Transformer
from cogvideo.models.upscaler import Upscaler
from cogvideo.planning.training import flops_a_position
from cogvideo.training.checkpoints import Checkpoints, DamagedError, restore, training_state
from cogvideo.training.parallel import any_rank, is_first, largest
from cogvideo.training.recorder import Recorder
from cogvideo.training.session import Evaluation, Session
from cogvideo.training.step import Trainer


def learn(session: Session) -> None:
    """Make all steps that are left.

    Raises:
        ValueError: a checkpoint cannot be used, or training diverged.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written.
        SystemExit: SIGTERM; a checkpoint was written.
    """
    trainer, logging, steps = session.trainer, session.logging, session.trainer.settings.steps
    checkpoints = session.checkpoints()
    first, seconds = _resume(session, checkpoints)
    with _recorder(session, first) as record, interrupts() as interrupt:
        _greet(session, first, record)
        clock = Clock(trainer, seconds)
        for done, batch in zip(range(first + 1, steps + 1), session.batches(first), strict=False):
            trainer.step(done - 1, batch)
            clock.step()
            stops = any_rank(interrupt.is_set())
            measures = done == steps or (done % logging.evaluate_every == 0 and not stops)
            saves = stops or done == steps or done % logging.checkpoint_every == 0
            if saves or measures or done % logging.report_every == 0:
                with _published(checkpoints):
                    _report(trainer, done, clock, record)
                checkpoints.settle()
            else:
                record.advance(done)
            paused = time.monotonic()
            held_out = None
            with _published(checkpoints):
                if saves:
                    trainer.check(done, batch)
                if measures:
                    held_out = session.evaluate(done)
                    _record(held_out, done, record)
            if saves:
                state = _state(trainer, clock.seconds)
                checkpoints.save(done, state, None if held_out is None else held_out.loss)
            if session.has_sample(done) and not stops:
                _sample(session, done, record)
            if stops:
                checkpoints.wait()
                record.say(f"Stopped after step {done:,}; the same command continues.")
                interrupt.leave()
            clock.pause(time.monotonic() - paused)
        checkpoints.wait()


def _recorder(session: Session, first: int) -> Recorder:
    logging = session.logging
    if is_first():
        session.folder.forget_after(first)
    return Recorder(
        session.folder,
        done=first,
        steps=session.trainer.settings.steps,
        settings=session.identity,
        tensorboard=logging.tensorboard,
        wandb=logging.wandb,
        is_first=is_first(),
    )


def _greet(session: Session, first: int, record: Recorder) -> None:
    """Say where the run stands, and draw the samples that a killed run owes."""
    settings, device = session.trainer.settings, session.trainer.ranks.device
    if first:
        record.say(f"Continuing after step {first:,} of {settings.steps:,}.")
    if first and session.has_sample(first) and session.preview is not None and session.preview.lacks(first):
        _sample(session, first, record)
    if slow := slowness(settings.dtype, device):
        record.say(slow)


def _resume(session: Session, checkpoints: Checkpoints) -> tuple[int, float]:
    """Take up the newest checkpoint that is whole; returns how many steps were made, and in how many seconds.

    Raises:
        ValueError: there are some, and none is whole.
        OSError: one cannot be read.
    """
    trainer, steps = session.trainer, checkpoints.steps()
    for step in reversed(steps):
        try:
            loaded = checkpoints.load(step, _state(trainer, 0.0))
        except DamagedError as error:
            if step == steps[0]:
                raise
            if is_first():
                print(f"{error.path} is damaged ({error.reason}): an earlier one is taken.", file=sys.stderr)
            continue
        restore(trainer.module, trainer.optimizers, loaded)
        for damaged in steps[steps.index(step) + 1 :]:
            checkpoints.set_aside(damaged)
        return step, float(loaded["seconds"])
    old = session.folder.old_checkpoint()
    if old is None:
        return 0, 0.0
    trainer.objective.load_old(old.state, trainer.optimizers)
    return old.step, 0.0


def _state(trainer: Trainer, seconds: float) -> dict[str, Any]:
    average = None if trainer.average is None else trainer.average.state
    return training_state(trainer.module, trainer.optimizers, average) | {"seconds": seconds}


@contextmanager
def _published(checkpoints: Checkpoints) -> Iterator[None]:
    """Publish the checkpoint that is being written before an error of divergence, which all ranks find alike, ends the
    run: it is from before, and good."""
    try:
        yield
    except InputError:
        checkpoints.wait()
        raise


def _report(trainer: Trainer, done: int, clock: Clock, recorder: Recorder) -> None:
    """Record the steps since the last report.

    Raises:
        ValueError: training diverged.
    """
    figures = trainer.figures(done)
    row = {
        "step": done,
        "loss": figures.loss,
        **figures.parts,
        "learning_rate": trainer.settings.rate_at(done - 1),
        "gradient_norm": figures.gradient_norm,
    }
    recorder.record(row | clock.row() | {"peak_bytes": largest(peak_bytes(trainer.ranks.device))})


def _record(found: Evaluation, done: int, recorder: Recorder) -> None:
    recorder.record({"step": done, **found.row}, found.words)


def _sample(session: Session, done: int, recorder: Recorder) -> None:
    assert session.preview is not None
    sheet = session.preview(done)
    if sheet is not None:
        recorder.picture(done, sheet)


class Clock:
    """Time and work between reports.

    Args:
        trainer: whose work it is.
        seconds: that an earlier run took.
    """

    def __init__(self, trainer: Trainer, seconds: float) -> None:
        objective, ranks, settings = trainer.objective, trainer.ranks, trainer.settings
        self._unit = objective.unit
        self._work = settings.batch * objective.num_positions
        is_known = isinstance(objective.model, Transformer | Upscaler)
        self._flops = flops_a_position(objective.model) if is_known else 0.0
        self._rate = matrix_rate(ranks.device, settings.dtype) * ranks.world_size if self._flops else 0.0
        self._began = time.monotonic() - seconds
        self._last, self._steps = time.monotonic(), 0

    @property
    def seconds(self) -> float:
        """Seconds since the run began, without what a killed part lost."""
        return time.monotonic() - self._began

    def step(self) -> None:
        """Count a step."""
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Leave out time that was spent on other things than steps."""
        self._last += seconds

    def row(self) -> dict[str, float]:
        """Speed of the steps since the last call."""
        now = time.monotonic()
        rate = self._steps * self._work / max(now - self._last, 1e-9)
        self._last, self._steps = now, 0
        used = {"utilisation": round(rate * self._flops / self._rate, 4)} if self._flops else {}
        return {f"{self._unit}_per_second": round(rate, 1), **used, "seconds": round(self.seconds, 1)}


class Interrupt:
    """A request to stop the run: whether there is one, and by which signal."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def set(self, number: int) -> None:
        """Note a signal."""
        self._signal = number

    def is_set(self) -> bool:
        """Whether a signal came."""
        return self._signal is not None

    def leave(self) -> NoReturn:
        """End as the signal asks: Ctrl-C as an interrupt, SIGTERM with its usual exit status.

        Raises:
            KeyboardInterrupt: Ctrl-C, here or on another rank.
            SystemExit: SIGTERM.
        """
        if self._signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Ctrl-C and SIGTERM are noted instead of breaking off a step; the second one breaks off as usual."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only the main one may handle signals
        yield interrupt
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        interrupt.set(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
