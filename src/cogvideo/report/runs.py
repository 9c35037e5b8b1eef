"""Training runs, read from their folders: identity, figures by step, held-out losses, the last contact sheet."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from cogvideo.config import InputError, require
from cogvideo.report.page import flat
from cogvideo.runs import IDENTITY, RunFolder, naming
from cogvideo.training.finetune import RUN as CHAIN
from cogvideo.training.stages import STAGES

TOKENIZER = "tokenizer"
ORDER = (TOKENIZER, *STAGES)
"""Stages, in the order in which a bundle gets them."""
EXPECTED = f"expected the folder of a run, such as my-model/.sequential-run with {IDENTITY}, or one with runs inside"
MAX_VALUE = 1e300
"""Largest value in a plot, so that differences stay finite."""


class Curve(NamedTuple):
    """A figure over the steps of a run."""

    steps: Int64[np.ndarray, " points"]
    """Ascending."""
    values: Float64[np.ndarray, " points"]
    """Finite."""


@dataclass(frozen=True)
class Run:
    """A run, as far as it got."""

    folder: Path
    name: str
    """Name that distinguishes it from the others of its stage."""
    stage: str
    num_steps: int
    settings: dict[str, str]
    """Everything that determines the result, as JSON, by names such as `optimization.batch`."""
    figures: dict[str, Curve]
    """Figures of training, by their names in metrics.jsonl."""
    held_out: dict[str, Curve]
    """Losses by frame rate; measures of quality of a tokenizer."""
    validation: Curve | None
    """Mean loss over the frame rates, or PSNR of a tokenizer, which selects the best checkpoint; None if unknown."""
    is_finished: bool
    seconds: float | None
    peak_bytes: int | None
    """Peak memory of a process: of the GPU, or of the whole process on a CPU."""

    @property
    def done(self) -> int:
        """Number of steps that were reported."""
        if self.is_finished:
            return self.num_steps
        return max((int(each.steps[-1]) for each in self.figures.values()), default=0)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the best point of `validation`, the first of equal ones."""
        if self.validation is None:
            return None
        steps, values = self.validation
        place = values.argmax() if self.stage == TOKENIZER else values.argmin()
        return int(steps[place]), float(values[place])

    @property
    def sheet(self) -> tuple[int, Path] | None:
        """Step and file of the last contact sheet, if there is one."""
        found = ((re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in self.folder.glob("samples/*"))
        sheets = [(int(match[1]), path) for match, path in found if match]
        ends = {"before.png": 0, "after.png": self.num_steps} if self.stage == TOKENIZER else {}
        sheets += [(step, self.folder / name) for name, step in ends.items() if (self.folder / name).exists()]
        return max(sheets, default=None)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in some folders, each once, by stage and then in the order given; damaged ones are left out.

    Args:
        paths: folders of runs, of bundles with runs inside, or of such bundles.
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
    inside = sorted((*path.glob(f"*/{IDENTITY}"), *path.glob(f"*/*/{IDENTITY}")))
    inside = [each for each in inside if each.parent.name != CHAIN]
    found = [path / IDENTITY] if (path / IDENTITY).exists() else inside
    require(len(found) > 0, f"there is no run in {path}, {EXPECTED}")
    return [each.parent.resolve() for each in found]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of their paths, as many as distinguish them; runs inside a bundle have its name."""
    places = [each.parent if re.fullmatch(r"\.\w+-run", each.name) else each for each in folders]
    for depth in range(1, max(len(each.parts) for each in places) + 1):
        names = ["/".join(each.parts[-depth:]) for each in places]
        if len({(name, folder.name) for name, folder in zip(names, folders, strict=True)}) == len(folders):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    run = RunFolder(folder)
    with naming(folder / IDENTITY):
        identity = run.identity
        stage, num_steps = _stage(identity)
    held_out = {}
    with naming(folder / "report.json"):
        summary = run.summary
        seconds = peak_bytes = None
        if summary is not None:
            held_out[int(summary["steps"])] = _held_out(stage, summary["held_out"])
            if stage != TOKENIZER:
                seconds, peak_bytes = float(summary["time"]["seconds"]), int(summary["memory"]["peak_bytes"])
    with naming(folder / "metrics.jsonl"):
        rows = [(_step(row), row) for row in run.rows()]
        figures = _curves((step, row) for step, row in rows if "held_out" not in row)
        held_out |= {step: _held_out(stage, row["held_out"]) for step, row in rows if "held_out" in row}
        measured = _curves(held_out.items())
        means = ((step, {"mean": sum(each.values()) / len(each)}) for step, each in held_out.items() if each)
    if seconds is None and "seconds" in figures:
        seconds = float(figures["seconds"].values[-1])
    if peak_bytes is None and "peak_bytes" in figures:
        peak_bytes = int(figures["peak_bytes"].values.max())
    validation = measured.get("psnr") if stage == TOKENIZER else _curves(means).get("mean")
    settings, took = dict(flat(identity)), (summary is not None, seconds, peak_bytes)
    return Run(folder, name, stage, num_steps, settings, figures, measured, validation, *took)


def _stage(identity: Mapping[str, Any]) -> tuple[str, int]:
    """The stage and its number of steps."""
    if "stage" not in identity and "autoencoder" in identity:
        return TOKENIZER, int(identity["settings"]["steps"])
    stage = identity["stage"]
    require(stage in ORDER, f"it is a run of {stage!r:.60}, expected one of {', '.join(ORDER)}")
    return stage, int(identity["optimization"]["steps"])


def _step(row: Any) -> int:
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int) or step < 0:  # no `require`: it would format its message for every row
        raise InputError(f"expected the number of a step in every line, got {row!r:.60}")
    return step


def _held_out(stage: str, entries: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(entry if stage == TOKENIZER else entry["loss"]) for name, entry in entries.items()}


def _curves(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Curve]:
    """Each figure over the steps that have it, without non-finite values."""
    points: dict[str, dict[int, float]] = {}
    for step, figures in rows:
        for name, value in figures.items():
            if abs(value := float(value)) < MAX_VALUE:
                points.setdefault(name, {})[step] = value
    points.pop("step", None)
    curves = {}
    for name, each in points.items():
        steps = sorted(each)
        curves[name] = Curve(np.array(steps, np.int64), np.array([each[step] for step in steps]))
    return curves
