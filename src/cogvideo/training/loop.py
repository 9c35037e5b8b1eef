"""What every training loop needs around its steps: figures that are watched, a progress line, an orderly end."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from cogvideo.config import InputError

if TYPE_CHECKING:
    import rich.console

Measured = Mapping[str, Float[Tensor, ""]]

MOVING_SECONDS, PLAIN_SECONDS = 0.25, 30.0
"""Between two looks at the words of a moving line, and between two plain lines."""


class Window:
    """What the last steps measured, left on the device so that the host need not wait for it after each of them.

    Args:
        batch: samples of a step.
        unit: what they are, for the speed.
    """

    def __init__(self, batch: int, unit: str = "images") -> None:
        self._batch, self._unit = batch, unit
        self._steps: list[Measured] = []
        self._since = time.monotonic()

    def add(self, measured: Measured) -> None:
        """Figures of one step."""
        self._steps.append(measured)

    def row(self, done: int) -> dict[str, float]:
        """Means of the steps, of which `done` are made in all; the next row begins anew.

        Raises:
            ValueError: a figure is not finite.
        """
        row = self.glance(done)
        self._steps, self._since = [], time.monotonic()
        return row

    def glance(self, done: int) -> dict[str, float]:
        """The row as it is so far, while it goes on.

        Raises:
            ValueError: a figure is not finite.
        """
        values = means(self._steps, done - len(self._steps) + 1)
        seconds = max(time.monotonic() - self._since, 1e-9)
        return {"step": done, **values, f"{self._unit}_per_second": round(len(self._steps) * self._batch / seconds, 1)}


def means(steps: Sequence[Measured], first: int) -> dict[str, float]:
    """Mean of each figure over the steps that have it; `first` is the number of the first step, for messages.

    Raises:
        ValueError: a figure is not finite.
    """
    result = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        numbers = [first + place for place, step in enumerate(steps) if name in step]
        values = torch.stack([step[name] for step in steps if name in step]).tolist()
        for number, value in zip(numbers, values, strict=True):
            if not math.isfinite(value):
                raise InputError(
                    f"training diverged: {name} is {value} at step {number:,}; the last checkpoint is from before. "
                    "Remove the run's folder and begin again with a smaller learning rate"
                )
        result[name] = sum(values) / len(values)
    return result


class ProgressLine:
    """How far something is: a moving line on a terminal, else a plain one every so often. A context manager.

    Args:
        console: where it is shown.
        done: steps that were made before.
        total: of all steps.
        unit: one step, in a word.
    """

    def __init__(self, console: rich.console.Console, done: int, total: int, unit: str = "step") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console, self._unit, self.total = console, unit, total
        self._first = done
        self._since = self._shown = time.monotonic()
        columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"))
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=done, text="")
        self._pause = MOVING_SECONDS if console.is_terminal else PLAIN_SECONDS

    def __enter__(self) -> ProgressLine:
        """Steps are timed from here."""
        self._since, self._shown = time.monotonic(), -PLAIN_SECONDS
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The line stays where it is."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False)

    def advance(self, done: int, words: Callable[[], str]) -> None:
        """Show how many steps are made, and words that are only asked for when they are shown."""
        now = time.monotonic()
        if now - self._shown < self._pause and done < self.total:
            return
        self._shown = now
        text = f"{words()}  {self._remaining(done)}".strip()
        self._bar.update(self._task, completed=done, total=self.total, text=text)
        if not self._console.is_terminal:
            self.say(f"{self._unit} {done:,} of {self.total:,}: {text}")

    def _remaining(self, done: int) -> str:
        """By the mean pace since the start, with all that is not steps."""
        made, left = done - self._first, self.total - done
        if made <= 0 or left <= 0:
            return ""
        return f"{_duration((time.monotonic() - self._since) / made * left)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Interrupt:
    """Whether the run was asked to stop, and by what."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def set(self, number: int) -> None:
        """A signal came."""
        self._signal = number

    def is_set(self) -> bool:
        """Whether one came."""
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
