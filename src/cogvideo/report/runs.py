"""What the folders of training runs hold: identities, figures by step, held-out losses, the last contact sheet."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from cogvideo.config import InputError, require
from cogvideo.report.page import flat
from cogvideo.runs import RunFolder
from cogvideo.training.stages import STAGES

TOKENIZER = "tokenizer"
ORDER = (TOKENIZER, *STAGES)
"""Stages, in the order in which a bundle gets them."""
IDENTITY, METRICS, REPORT = "run.json", "metrics.jsonl", "report.json"
EXPECTED = f"expected the folder of a run, such as my-model/.sequential-run with {IDENTITY}, or one with runs inside"


class Curve(NamedTuple):
    """A figure over the steps of a run."""

    steps: Int64[np.ndarray, " points"]
    """Ascending."""
    values: Float64[np.ndarray, " points"]
    """Finite."""


class Point(NamedTuple):
    """Of a curve."""

    step: int
    value: float


class Sheet(NamedTuple):
    """A contact sheet."""

    path: Path
    step: int
    """After which it was drawn."""


@dataclass(frozen=True)
class Run:
    """A run, as far as it went."""

    folder: Path
    name: str
    """What tells it from the others of its stage."""
    stage: str
    """One of `ORDER`."""
    num_steps: int
    """That it is to make."""
    settings: dict[str, str]
    """All that decides the result, as JSON, by names such as `optimization.batch`."""
    figures: dict[str, Curve]
    """Of training, by their names in metrics.jsonl."""
    held_out: dict[str, Curve]
    """Losses by frame rate; of the tokenizer, measures of quality."""
    judged: Curve | None
    """What the best checkpoint is chosen by: the mean over the frame rates; of the tokenizer, its PSNR. None where
    nothing was measured."""
    is_finished: bool
    seconds: float | None
    """Of training."""
    peak_bytes: int | None
    """The most that a process took: of the GPU, or of the whole process on a CPU."""

    @property
    def done(self) -> int:
        """Steps that are reported."""
        if self.is_finished:
            return self.num_steps
        return max((int(each.steps[-1]) for each in self.figures.values()), default=0)

    @property
    def best(self) -> Point | None:
        """The best point of `judged`, of equals the first."""
        if self.judged is None:
            return None
        steps, values = self.judged
        place = values.argmax() if self.stage == TOKENIZER else values.argmin()
        return Point(int(steps[place]), float(values[place]))

    @property
    def sheet(self) -> Sheet | None:
        """The last one; None where none was drawn."""
        drawn = ((each, re.fullmatch(r"step-(\d+)\.png", each.name)) for each in self.folder.glob("samples/*"))
        sheets = [Sheet(path, int(step[1])) for path, step in drawn if step]
        ends = {"before.png": 0, "after.png": self.num_steps} if self.stage == TOKENIZER else {}
        sheets += [Sheet(self.folder / name, step) for name, step in ends.items() if (self.folder / name).exists()]
        return max(sheets, key=lambda each: each.step, default=None)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in some folders, each once, by stage and then in the order given. Damaged ones are left out with a line.

    Args:
        paths: folders of runs, of bundles with runs inside, or of such bundles.

    Raises:
        ValueError: one has no run, or all are damaged.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _find(path)))
    runs: list[Run] = []
    damaged: list[InputError] = []
    for folder, name in zip(folders, _names(folders), strict=True):
        try:
            runs.append(_read(folder, name))
        except InputError as error:
            damaged.append(error)
    if not runs:
        raise damaged[0]
    for each in damaged:
        print(f"One run is left out: {each}", file=sys.stderr)
    return sorted(runs, key=lambda run: ORDER.index(run.stage))


def _find(path: Path) -> list[Path]:
    require(path.is_dir(), f"there is no folder {path}, {EXPECTED}")
    inside = (*path.glob(f"*/{IDENTITY}"), *path.glob(f"*/*/{IDENTITY}"))
    found = [path / IDENTITY] if (path / IDENTITY).exists() else sorted(inside)
    require(len(found) > 0, f"there is no run in {path}, {EXPECTED}")
    return [each.parent.resolve() for each in found]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of their paths, as many as tell them apart; runs inside a bundle have its name."""
    places = [each.parent if re.fullmatch(r"\.\w+-run", each.name) else each for each in folders]
    names: list[str] = []
    for depth in range(1, max(len(each.parts) for each in places) + 1):
        names = ["/".join(each.parts[-depth:]) for each in places]
        if len({(name, folder.name) for name, folder in zip(names, folders, strict=True)}) == len(folders):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    with _naming(folder / IDENTITY):
        identity = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
        stage, num_steps = _stage(identity)
    with _naming(folder / REPORT):
        end = _end(stage, RunFolder(folder).summary)
    with _naming(folder / METRICS):
        rows = [(_step(row), row) for row in RunFolder(folder).rows()]
        figures = _curves((step, row) for step, row in rows if "held_out" not in row)
        measured = {step: _held_out(stage, row["held_out"]) for step, row in rows if "held_out" in row}
    measured = end.held_out | measured
    held_out = _curves(measured.items())
    last, peak = figures.get("seconds"), figures.get("peak_bytes")
    return Run(
        folder=folder,
        name=name,
        stage=stage,
        num_steps=num_steps,
        settings=dict(flat(identity)),
        figures=figures,
        held_out=held_out,
        judged=held_out.get("psnr") if stage == TOKENIZER else _mean(measured),
        is_finished=end.is_finished,
        seconds=float(last.values[-1]) if end.seconds is None and last is not None else end.seconds,
        peak_bytes=int(peak.values.max()) if end.peak_bytes is None and peak is not None else end.peak_bytes,
    )


class _End(NamedTuple):
    """What a run reports when it is over."""

    is_finished: bool
    held_out: dict[int, dict[str, float]]
    """By the last step. The tokenizer tells it here alone."""
    seconds: float | None
    peak_bytes: int | None


def _end(stage: str, summary: Mapping[str, Any] | None) -> _End:
    if summary is None:
        return _End(False, {}, None, None)
    last = {int(summary["steps"]): _held_out(stage, summary["held_out"])}
    if stage == TOKENIZER:
        return _End(True, last, None, None)
    return _End(True, last, float(summary["time"]["seconds"]), int(summary["memory"]["peak_bytes"]))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever is wrong inside becomes one line that names the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(reason if str(path) in reason else f"cannot use {path}: {reason}") from error


def _stage(identity: Mapping[str, Any]) -> tuple[str, int]:
    """Which one, and of how many steps."""
    if "stage" not in identity and "autoencoder" in identity:
        return TOKENIZER, int(identity["settings"]["steps"])
    stage = identity["stage"]
    require(stage in ORDER, f"it is a run of {stage!r:.60}, expected one of {', '.join(ORDER)}")
    return stage, int(identity["optimization"]["steps"])


def _step(row: Any) -> int:
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int) or step < 0:  # told only now: a hundred thousand rows are fine
        raise InputError(f"expected the number of a step in every line, got {row!r:.60}")
    return step


def _held_out(stage: str, entries: Mapping[str, Any]) -> dict[str, float]:
    """Losses by frame rate; of the tokenizer, its measures."""
    return {name: float(entry if stage == TOKENIZER else entry["loss"]) for name, entry in entries.items()}


def _mean(held_out: Mapping[int, Mapping[str, float]]) -> Curve | None:
    """Over the frame rates."""
    means = ((step, {"mean": sum(each.values()) / len(each)}) for step, each in held_out.items() if each)
    return _curves(means).get("mean")


def _curves(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Curve]:
    """Each figure over the steps that have it."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for step, figures in rows:
        for name, value in figures.items():
            steps, values = points.setdefault(name, ([], []))
            steps.append(step)
            values.append(float(value))
    points.pop("step", None)
    curves = {name: _curve(*each) for name, each in points.items()}
    return {name: curve for name, curve in curves.items() if len(curve.steps)}


def _curve(steps: list[int], values: list[float]) -> Curve:
    places, heights = np.array(steps, np.int64), np.array(values)
    order = np.argsort(places, kind="stable")
    kept = order[np.isfinite(heights[order])]
    return Curve(places[kept], heights[kept])
