"""Where the figures of a run go: metrics.jsonl, a progress line, and TensorBoard or Weights & Biases where asked for.

Also what utilisation is made of: the machine's measured matrix rate, and the work of a position.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from cogvideo.config import InputError
from cogvideo.files import write_text
from cogvideo.models.transformer import Transformer
from cogvideo.models.upscaler import Upscaler
from cogvideo.runs import RunFolder
from cogvideo.training.loop import ProgressLine

if TYPE_CHECKING:
    import rich.console


class Recorder:
    """Takes what is measured. A context manager, whose end closes everything; all ranks but the first record nothing.

    A row of training is {"step", "loss", each part, "learning_rate", "gradient_norm", "tokens_per_second",
    "utilisation", "seconds", "peak_bytes"}, one of held-out clips {"step", "held_out": {name: {"loss", each part}}}.

    Args:
        folder: of the run.
        done: steps that an earlier run made.
        steps: of the whole run.
        settings: what this is a run of, in nested tables, for Weights & Biases.
        tensorboard: write event files into `tensorboard` in the run's folder (extra `train`).
        wandb: report to Weights & Biases (extra `wandb`), whose own environment variables say to whom and how.
        console: for the progress line; stderr unless given.
        is_first: whether this is the rank that records.

    Raises:
        ValueError: a package is missing; the message names the extra that brings it.
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
        self._is_first = is_first
        self._line = ProgressLine(console or _standard_error(), done, steps)
        self._words = ""
        self._trackers: list[_TensorBoard | _Wandb] = []
        if is_first and tensorboard:
            self._trackers.append(_TensorBoard(folder.path / "tensorboard", done))
        if is_first and wandb:
            self._trackers.append(_Wandb(folder.path, dict(settings or {})))

    def __enter__(self) -> Recorder:
        if self._is_first:
            self._line.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with ExitStack() as stack:  # whatever fails to close, the others are closed
            stack.push(self._line)
            for tracker in self._trackers:
                stack.callback(tracker.close, kind is not None)

    def advance(self, done: int) -> None:
        """A step was made."""
        if self._is_first:
            self._line.advance(done, lambda: self._words)

    def record(self, row: Mapping[str, Any]) -> None:
        """A row of training, or of held-out losses.

        Raises:
            OSError: it cannot be written.
        """
        if not self._is_first:
            return
        self.folder.report(row)
        self._show(row)
        figures = dict(_figures(row))
        for tracker in self._trackers:
            tracker.add(row["step"], figures)

    def _show(self, row: Mapping[str, Any]) -> None:
        """Held-out losses are told on a line of their own."""
        if "held_out" not in row:
            self._words = _words(row)
            self.advance(row["step"])
        elif told := _held_out(row["held_out"]):
            self.say(f"step {row['step']:,}: held out {told}")

    def say(self, text: str) -> None:
        """A line above the progress line."""
        if self._is_first:
            self._line.say(text)

    def picture(self, step: int, sheet: Path) -> None:
        """A contact sheet that was written, for those who show pictures."""
        if self._is_first:
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


def _standard_error() -> rich.console.Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def _words(row: Mapping[str, Any]) -> str:
    """Those of the figures that a person watches, as far as the row has them."""
    words = []
    if "loss" in row:
        words.append(f"loss {row['loss']:.4f}")
    if "tokens_per_second" in row:
        words.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "utilisation" in row:
        words.append(f"utilisation {row['utilisation']:.1%}")
    return "  ".join(words)


def _held_out(entries: Mapping[str, Mapping[str, float]]) -> str:
    """The losses by name, the part of all without one."""
    losses = {name: figures["loss"] for name, figures in entries.items() if "loss" in figures}
    return ", ".join(f"{loss:.4f}" if name == "all" else f"{name} {loss:.4f}" for name, loss in losses.items())


class _TensorBoard:
    """Event files. Those of a run that was killed behind its last checkpoint are hidden by what is made again."""

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
    """A run there, continued under the id that its folder keeps. Steps are a figure of theirs, since its own counter
    refuses to go back to where a killed run continues."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]  # an extra
        except ModuleNotFoundError as error:
            raise InputError(_lacking("wandb", "wandb")) from error
        note = folder / "wandb-id"
        if not note.exists():
            write_text(note, secrets.token_hex(8))
        name = f"{folder.resolve().parent.name}/{folder.name}"
        self._image, self._run = (
            wandb.Image,
            wandb.init(
                project="cogvideo",
                name=name,
                id=note.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(folder),
                config=settings,
            ),
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


def flops_a_position(model: nn.Module) -> float:
    """Floating-point operations of a training step for each position that goes through the model, by convention.

    6 for each trained parameter and 4 for each frozen one of the matrices that a position goes through: two in the
    forward pass, two for the gradient of what comes in, two for that of the weights. Counted are the linear layers and
    the code head, the latter at every position; not counted are embedding lookups, biases, norms and the products of
    attention's scores. Recomputing activations counts nothing more: utilisation is of work that is needed.

    Positions of super-resolution differ, and the result is their mean. Text and low codes go through the base's blocks
    alone; if those are frozen nothing before them learns, and they cost 2 a parameter. High slots go through their own
    attention, the base's feed-forward layers and the code head.

    Args:
        model: `Transformer` or `Upscaler`, before or after it was sharded.
    """
    if isinstance(model, Upscaler):
        layout = model.channel.layout
        low, high = layout.text_slots + layout.low_slots, layout.high_slots
        base = _work(model.base.blocks, 2)
        own = _work(model.channel.blocks) + _work(model.base.blocks, among="mlp") + _head(model)
        return (low * base + high * own) / (low + high)
    assert isinstance(model, Transformer)
    added = 0 if model.channel is None else _work(model.channel.blocks)
    return float(_work(model.base.blocks) + added + _head(model))


def _work(blocks: nn.Module, frozen: int = 4, among: str = "") -> int:
    """Of the linear layers whose name starts with `among`."""
    layers = ((name.rpartition(".")[2], each) for name, each in blocks.named_modules() if isinstance(each, nn.Linear))
    weights = [each.weight for name, each in layers if name.startswith(among)]
    return sum((6 if weight.requires_grad else frozen) * weight.numel() for weight in weights)


def _head(model: Transformer | Upscaler) -> int:
    """Of the product with the code rows of the word embedding."""
    config = model.base.config
    return (6 if model.base.words.weight.requires_grad else 4) * config.hidden * config.num_codes
