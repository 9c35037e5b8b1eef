"""Facts about an ablation, for `templates/ablation.html`: figures of the finished runs, and paired differences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogvideo.evaluation.preferences import Interval
from cogvideo.evaluation.reader import ALL, ATTRIBUTES
from cogvideo.report.page import RunName, number, precise
from cogvideo.report.plots import Plot, curves
from cogvideo.report.runs import Curve, read_runs
from cogvideo.training.ablation import HELD_OUT, PROTOCOL, ROUNDS, VARIANTS, Experiment, VariantName

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""0.975 quantiles of Student's t, by degrees of freedom from 1."""
FULL = VARIANTS["full"].title
CEILING = "real clips through the tokenizer"
"""Title of the row that no variant can be expected to beat."""
SHARES = (*ATTRIBUTES, ALL, HELD_OUT)
"""Figures of clips that are shares."""
CLIPS, SAMPLES, TIME, PACE = "clips", "equal samples", "equal time", "seconds per step"
NOTES = {
    CLIPS: f"FVD with the verified I3D ({PROTOCOL.frames} frames, 4 per second, enlarged from the model's size), and"
    " percentages of clips whose attribute is right according to the World reader.",
    SAMPLES: "Held-out loss in nats per code, at the end of training.",
    TIME: "Held-out loss when the faster of the two runs ends, read off the curves. The slower one"
    " still has a high learning rate then, which counts against it.",
    PACE: f"Fastest of {ROUNDS} measurements, for which all variants take turns on one machine.",
}


@dataclass
class SeedFigure:
    """A figure of one row, by seed."""

    values: dict[int, float] = field(default_factory=dict)
    differences: dict[int, float] = field(default_factory=dict)
    """Values minus those of the full system with the same seed."""

    def add(self, seed: int, value: float, full: float | None) -> None:
        """Add the value of a seed, and that of the full system if it is to be compared."""
        self.values[seed] = value
        if full is not None:
            self.differences[seed] = value - full

    @property
    def interval(self) -> Interval | None:
        """Mean difference with its 95% interval over seeds; None for fewer than two."""
        return paired([*self.differences.values()])

    def __str__(self) -> str:
        mean = float(np.mean([*self.values.values()]))
        text = number(mean) if mean >= 1 else precise(mean)
        if self.differences:
            text += f"; {_signed(float(np.mean([*self.differences.values()])))}"
        if self.interval is None:
            return text
        _, low, high = self.interval
        is_clear = low < high and (low > 0 or high < 0)  # equal differences of few seeds prove nothing
        return f"{text} ({_signed(low)} to {_signed(high)}){' *' if is_clear else ''}"

    def times(self, factor: float) -> SeedFigure:
        """The figure in another unit."""
        scaled = ({seed: factor * each for seed, each in part.items()} for part in (self.values, self.differences))
        return SeedFigure(*scaled)


def _signed(value: float) -> str:
    return f"{'-' if value < 0 else '+'}{number(abs(value))}"


Figures = Mapping[str, Mapping[str, Mapping[str, SeedFigure]]]
"""Figures by point of comparison, name and row."""
Lines = Mapping[str, Mapping[str, Curve]]
"""Held-out losses by run and name, such as `interpolation, 2 fps`."""
Paces = Mapping[VariantName, Mapping[str, float]]
"""Seconds per step by variant and stage."""


def paired(differences: Sequence[float]) -> Interval | None:
    """The mean of differences of pairs with its 95% interval by Student's t; None for fewer than two."""
    count = len(differences)
    if count < 2:
        return None
    mean = float(np.mean(differences))
    half = T95[count - 2] * float(np.std(differences, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def levels(one: Curve, other: Curve, paces: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
    """Values of two curves at the last moment that both reach, interpolated linearly.

    Moments are steps, or times if paces in seconds per step are given.
    """
    (steps, values), (other_steps, other_values) = one, other
    moment = min(steps[-1] * paces[0], other_steps[-1] * paces[1])
    first = np.interp(moment, steps * paces[0], values)
    return float(first), float(np.interp(moment, other_steps * paces[1], other_values))


def facts(experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that the page shows, and the figures for the file next to it."""
    reports = {name: report for name in experiment.runs if (report := experiment.report(name)) is not None}
    lines = {name: dict(_stages(experiment.out / name)) for name in reports}
    paces = experiment.paces or {}
    figures = compare(experiment, reports, lines, paces)
    for name, value in (experiment.ceiling or {}).items():
        figures[CLIPS][name][CEILING].add(experiment.optimization.seed, value, None)
    page = {
        "titles": {"figures": "Figures", "curves": "Curves", "sheets": "Clips"},
        "tables": [(at, ["", *map(_head, names)], _rows(names), NOTES[at]) for at, names in figures.items() if names],
        "plots": list(_plots(experiment, lines, paces)),
        "sheets": list(_sheets(experiment, reports)),
    }
    return page, {"figures": figures, "curves": lines}


def as_json(value: Any) -> Any:
    """Figures and curves as JSON values: an encoder's `default`."""
    if isinstance(value, SeedFigure):
        return vars(value) | {"interval": value.interval}
    return value.tolist()


def compare(
    experiment: Experiment, reports: Mapping[str, Mapping[str, Mapping[str, float]]], lines: Lines, paces: Paces
) -> Figures:
    """Figures of all rows at all points of comparison; without paces, none at equal time."""
    found: Figures = {at: defaultdict(lambda: defaultdict(SeedFigure)) for at in NOTES}
    for run, report in reports.items():
        variant, seed = experiment.runs[run]
        title, full = VARIANTS[variant].title, "" if variant == "full" else f"full-{seed}"
        for row, measured in report.items():
            others = reports.get(full, {}).get(FULL, {})
            for name, value in measured.items():
                found[CLIPS][name][row].add(seed, value, others.get(name))
        for name, losses in lines[run].items():
            other = lines.get(full, {}).get(name)
            moments = {SAMPLES: (1.0, 1.0)}
            if paces:
                stage = name.partition(",")[0]
                moments[TIME] = (paces[variant][stage], paces["full" if other is not None else variant][stage])
            for at, pair in moments.items():
                value, level = levels(losses, losses if other is None else other, pair)
                found[at][name][title].add(seed, value, None if other is None else level)
    for name, stages in paces.items():
        for stage, pace in stages.items():
            full_pace = None if name == "full" else paces["full"].get(stage)
            found[PACE][stage][VARIANTS[name].title].add(experiment.optimization.seed, pace, full_pace)
    return found


def _stages(bundle: Path) -> Iterator[tuple[str, Curve]]:
    """Held-out losses of the runs in a bundle, by stage and frame rate."""
    for run in read_runs([bundle]):
        for rate, losses in run.held_out.items():
            yield f"{run.stage}, {rate}", losses


def _head(name: str) -> str:
    """Head of a column."""
    return name.replace("colour", "color")  # the World's key


def _rows(names: Mapping[str, Mapping[str, SeedFigure]]) -> list[list[str]]:
    """Rows of a table; a column is a name. Shares are shown as percentages."""
    titles = dict.fromkeys(row for rows in names.values() for row in rows)
    shown = [(rows, 100.0 if name in SHARES else 1.0) for name, rows in names.items()]
    return [
        [title, *(str(rows[title].times(factor)) if title in rows else "–" for rows, factor in shown)]
        for title in titles
    ]


def _plots(experiment: Experiment, lines: Lines, paces: Paces) -> Iterator[Plot]:
    """Mean losses over seeds, for each name over samples and, if there are paces, over time."""
    batch = experiment.optimization.batch
    for name in dict.fromkeys(name for each in lines.values() for name in each):
        over: dict[str, dict[RunName, Curve]] = {axis: {} for axis in ("samples", *(["seconds"] if paces else []))}
        for place, variant in enumerate(experiment.ablation.variants):
            stages = [each[name] for run, each in lines.items() if experiment.runs[run][0] == variant and name in each]
            if stages:
                line = RunName(VARIANTS[variant].title, place)
                steps, values = stages[0].steps, np.mean([each.values for each in stages], 0)
                over["samples"][line] = Curve(steps * batch, values)
                if paces:
                    seconds = np.rint(steps * paces[variant][name.partition(",")[0]])
                    over["seconds"][line] = Curve(seconds.astype(np.int64), values)
        for axis, drawn in over.items():
            yield curves("ablation", f"Held-out loss, {name}, over {axis}", drawn, is_smooth=False)


def _sheets(experiment: Experiment, runs: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Contact sheets of the first run of each variant, with titles."""
    first: dict[VariantName, str] = {}
    for run in runs:
        first.setdefault(experiment.runs[run][0], run)
    for variant, run in first.items():
        for overlap in VARIANTS[variant].overlaps:
            with Image.open(experiment.sheet(run, overlap)) as image:
                yield VARIANTS[variant].row(overlap), np.asarray(image.convert("RGB"))
