"""Records of a run: metrics.jsonl, a progress line, TensorBoard, Weights & Biases."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogvideo.config import InputError
from cogvideo.files import write_text
from cogvideo.runs import RunFolder

if TYPE_CHECKING:
    import rich.console

MOVING_SECONDS, PLAIN_SECONDS = 0.25, 30.0
"""Seconds between two updates of a moving line, and between two plain lines."""


def standard_error() -> rich.console.Console:
    """Console for messages and progress."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


class Recorder:
    """Records metrics. A context manager that closes everything at its end; only the first rank records.

    A row of training is {"step", "loss", each part, "learning_rate", "gradient_norm", "tokens_per_second",
    "utilization", "seconds", "peak_bytes"}, one of held-out clips {"step", "held_out": {name: {"loss", each part}}}.

    Of all `steps`, `done` were made earlier. TensorBoard event files go into the folder (extra `train`); Weights &
    Biases gets the settings (extra `wandb`), and is configured by its own environment variables. The progress line goes
    to stderr unless a console is given.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        done: int,
        steps: int,
        settings: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
        wandb: bool = False,
        console: rich.console.Console | None = None,
        is_first: bool = True,
    ) -> None:
        self.folder = folder
        self._line = ProgressLine(console or standard_error(), done, steps) if is_first else None
        self._words = ""
        self._trackers: list[_TensorBoard | _Wandb] = []
        if is_first and tensorboard:
            self._trackers.append(_TensorBoard(folder.path / "tensorboard", done))
        if is_first and wandb:
            self._trackers.append(_Wandb(folder.path, dict(settings or {})))

    def __enter__(self) -> Recorder:
        if self._line is not None:
            self._line.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with ExitStack() as stack:  # if one fails to close, the others are still closed
            if self._line is not None:
                stack.push(self._line)
            for tracker in self._trackers:
                stack.callback(tracker.close, kind is not None)

    def advance(self, done: int) -> None:
        """Count a step."""
        if self._line is not None:
            self._line.advance(done, lambda: self._words)

    def record(self, row: Mapping[str, Any], words: str = "") -> None:
        """Record a row of training or of held-out samples; `words` are printed on a line of their own."""
        if self._line is None:
            return
        self.folder.report(row)
        if words:
            self.say(f"step {row['step']:,}: {words}")
        elif "learning_rate" in row:
            self._words = _words(row)
            self.advance(row["step"])
        figures = dict(_figures(row))
        for tracker in self._trackers:
            tracker.add(row["step"], figures)

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        if self._line is not None:
            self._line.say(text)

    def picture(self, step: int, sheet: Path | None) -> None:
        """Show a contact sheet, if one was written."""
        if sheet is not None:
            for tracker in self._trackers:
                tracker.picture(step, sheet)


def _figures(row: Mapping[str, Any], above: str = "train") -> Iterator[tuple[str, float]]:
    """`train/loss`, `held_out/2_fps/frame_1`: names that TensorBoard accepts."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _figures(value, _tag(name) if above == "train" else f"{above}/{_tag(name)}")
        elif isinstance(value, int | float) and name != "step":
            yield f"{above}/{_tag(name)}", value


def _tag(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _words(row: Mapping[str, Any]) -> str:
    """Text with the figures to watch that the row has."""
    words = [f"loss {row['loss']:.4f}"] if "loss" in row else []
    words += [f"PSNR {row['psnr']:.1f} dB"] if "psnr" in row else []
    words += [f"{row[name]:,.0f} {name.partition('_')[0]}/s" for name in row if name.endswith("_per_second")]
    words += [f"utilization {row['utilization']:.1%}"] if "utilization" in row else []
    return "  ".join(words)


class ProgressLine:
    """A progress line: updated in place on a terminal, else printed from time to time. A context manager."""

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
        self._since, self._shown = time.monotonic(), -PLAIN_SECONDS
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        self._console.print(text, markup=False)

    def advance(self, done: int, words: Callable[[], str]) -> None:
        """Show the number of finished steps, with `words`, which is only called when they are shown."""
        now = time.monotonic()
        if now - self._shown < self._pause and done < self.total:
            return
        self._shown = now
        text = f"{words()}  {self._remaining(done)}".strip()
        self._bar.update(self._task, completed=done, total=self.total, text=text)
        if not self._console.is_terminal:
            self.say(f"{self._unit} {done:,} of {self.total:,}: {text}")

    def _remaining(self, done: int) -> str:
        """Time left, from the mean pace since the start, including time not spent on steps."""
        made, left = done - self._first, self.total - done
        if made <= 0 or left <= 0:
            return ""
        seconds = (time.monotonic() - self._since) / made * left
        if seconds < 90:
            return f"{seconds:.0f} s left"
        return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"


class _TensorBoard:
    """Event files. Repeated steps hide what a killed run wrote after its last checkpoint."""

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise InputError(_lacking("tensorboard", "train")) from error
        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, sheet: Path) -> None:
        from PIL import Image

        pixels = np.asarray(Image.open(sheet).convert("RGB"))
        self._writer.add_image("samples", pixels, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A Weights & Biases run, resumed under the id stored in its folder. The step is logged as a metric, since the
    built-in counter refuses to go back to where a killed run resumes."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]  # an extra
        except ModuleNotFoundError as error:
            raise InputError(_lacking("wandb", "wandb")) from error
        note = folder / "wandb-id"
        if not note.exists():
            write_text(note, secrets.token_hex(8))
        name = f"{folder.resolve().parent.name}/{folder.name}"
        self._image = wandb.Image
        self._run = wandb.init(
            project="cogvideo",
            name=name,
            id=note.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=settings,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def picture(self, step: int, sheet: Path) -> None:
        self._run.log({"step": step, "samples": self._image(str(sheet))})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _lacking(package: str, extra: str) -> str:
    return f"the package {package} is missing: pip install 'cogvideo[{extra}]', or leave --{package} out"
