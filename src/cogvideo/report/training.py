"""`cogvideo train report`: the curves of training runs, as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from cogvideo.config import InputError, require
from cogvideo.report.page import (
    Name,
    Panel,
    Picture,
    Section,
    check_place,
    count,
    duration,
    file_size,
    middle,
    number,
    percent,
    precise,
    write_page,
)
from cogvideo.report.runs import TOKENIZER, Curve, Run, read_runs

TITLES = {
    TOKENIZER: "Image tokenizer",
    "image": "Image model",
    "sequential": "Key frames (sequential)",
    "interpolation": "Frames in between (interpolation)",
    "superres": "Super-resolution (superres)",
}
HEADS = (
    *("run", "stage", ">steps", ">loss", ">held out", ">best", ">tokens/s", ">utilization", ">time", ">memory"),
    "finished",
)
QUALITIES = {"psnr": "PSNR in dB", "ssim": "SSIM", "code_usage": "share of codes in use", "perplexity": "perplexity"}
"""Measures of a tokenizer on held-out frames."""
PROGRESS = {
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "images_per_second": "Images per second",
    "utilisation": "Utilization of the machine's matrix rate",
}
"""Figures about the progress of a run. All others in metrics.jsonl are parts of the loss."""
LARGEST_SHEET = (1000, 2000)
"""Pixels across and down of a contact sheet."""
NOTHING = "–"


def training(runs: tuple[Path, ...], /, *, out: Path) -> None:
    """Write a page about one or several training runs.

    It is one HTML file without scripts, which needs no other file and no network. Runs of one stage share their plots.
    Unfinished runs are shown as far as they went. The same files give the same bytes.

    Args:
        runs: Folders of runs (such as OUT/.sequential-run), or folders with runs inside.
        out: File of the page.

    Raises:
        ValueError: there is no run, or the files of all are damaged.
        OSError: the page cannot be written.
    """
    require(len(runs) > 0, "there is no run, expected one or several folders, such as my-model/.sequential-run")
    check_place(out)
    found = read_runs(runs)
    title = f"{found[0].name}: training" if len({run.name for run in found}) == 1 else "Training runs"
    lead = (
        f"{count(found, 'run')}. Curves show values by step; the numbers below are the last values. Losses of "
        "different stages cannot be compared."
    )
    stages = [list(same) for _, same in groupby(found, key=lambda run: run.stage)]
    sections = [Section("runs", "Runs", panels=[_overview(stages)]), *map(_stage, stages)]
    write_page(out, "train report", title, lead, sections)
    print(f"written: {out}, with {count(found, 'run')}")


def _overview(stages: Sequence[Sequence[Run]]) -> Panel:
    rows: list[list[str | Name]] = [[name, *_facts(run)] for runs in stages for name, run in _named(runs)]
    note = (
        "Loss, held-out loss and tokens per second are the latest values. The held-out loss is the mean over the frame "
        "rates; for a tokenizer, both losses are PSNR. Memory is the peak of one process."
    )
    return Panel("All runs", heads=HEADS, rows=rows, note=note, is_wide=True, kind="runs")


def _named(runs: Sequence[Run]) -> list[tuple[Name, Run]]:
    return [(Name(middle(run.name), place), run) for place, run in enumerate(runs)]


def _facts(run: Run) -> Iterator[str]:
    """Cells of the overview, after the name."""
    is_tokenizer, best, figures = run.stage == TOKENIZER, run.best, run.figures
    quality = _decibels if is_tokenizer else precise
    yield run.stage
    yield f"{number(run.done)} of {number(run.num_steps)}"
    yield _last(figures.get("psnr" if is_tokenizer else "loss"), quality)
    yield _last(run.validation, quality)
    yield NOTHING if best is None else f"{quality(best[1])} at {number(best[0])}"
    yield _last(figures.get("tokens_per_second"), precise)
    yield _last(figures.get("utilisation"), percent)
    yield NOTHING if run.seconds is None else duration(run.seconds)
    yield NOTHING if run.peak_bytes is None else file_size(run.peak_bytes)
    yield "yes" if run.is_finished else "no"


def _decibels(value: float) -> str:
    return f"{precise(value)} dB"


def _last(curve: Curve | None, show: Callable[[float], str]) -> str:
    return NOTHING if curve is None else show(float(curve.values[-1]))


def _stage(runs: Sequence[Run]) -> Section:
    """Everything about the runs of one stage."""
    plots = list(_plots(runs))
    notes = [] if plots else ["Nothing has been measured yet."]
    pictures = [_picture(name, run, *run.sheet) for name, run in _named(runs) if run.sheet is not None]
    stage = runs[0].stage
    return Section(stage, TITLES[stage], notes, [*_settings(runs), *plots], pictures)


def _picture(name: Name, run: Run, step: int, path: Path) -> Picture:
    """A contact sheet, made smaller if it is large."""
    try:
        with Image.open(path) as image:
            shown = image.convert("RGB")
        shown.thumbnail(LARGEST_SHEET)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot use {path}: {error}") from error
    after = f"after {count(step, 'step')}"
    return Picture(np.asarray(shown), f"Contact sheet of {run.name} {after}", name, [after], is_lossless=False)


def _settings(runs: Sequence[Run]) -> Iterator[Panel]:
    """Settings that differ between the runs, and those that do not."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [[name, *(middle(run.settings.get(name, NOTHING), 100) for run in runs)] for name in names]
    equal = [row[:2] for row in rows if len(set(row[1:])) == 1]
    if len(runs) > 1:
        differing = [row for row in rows if len(set(row[1:])) > 1]
        heads = ["", *(middle(run.name, 40) for run in runs)]
        note = "" if differing else "These runs have the same settings."
        yield Panel("Differences", heads=heads, rows=differing, note=note, is_wide=True, kind="code")
    title = "Settings in common" if len(runs) > 1 else "Settings"
    yield Panel(title, heads=("", ""), rows=equal, is_wide=True, is_folded=True, kind="code")


def _plots(runs: Sequence[Run]) -> Iterator[Panel]:
    """All plots of a stage; first its loss, or the PSNR of a tokenizer, as wide as the page."""
    from cogvideo.report.plots import curves  # matplotlib takes a second to import

    stage, names = runs[0].stage, [name for name, _ in _named(runs)]
    is_tokenizer = stage == TOKENIZER

    def plot(title: str, found: Iterable[Curve | None], **options: bool) -> Iterator[Panel]:
        known = {name: curve for name, curve in zip(names, found, strict=True) if curve is not None}
        if known:
            yield curves(stage, title, known, **options)

    def figures(name: str) -> list[Curve | None]:
        return [run.figures.get(name) for run in runs]

    main = "psnr" if is_tokenizer else "loss"
    yield from plot("PSNR in dB" if is_tokenizer else "Loss", figures(main), is_wide=True)
    rates = list(dict.fromkeys(rate for run in runs for rate in run.held_out))
    if not is_tokenizer and len(rates) > 1:
        yield from plot("Held out, mean over the frame rates", [run.validation for run in runs], is_smooth=False)
    for rate in rates:
        title = "Held out" if rate == "all" else f"Held out, {QUALITIES.get(rate, rate)}"
        yield from plot(title, [run.held_out.get(rate) for run in runs], is_smooth=False)
    known = dict.fromkeys(figure for run in runs for figure in run.figures)
    parts = [figure for figure in known if figure not in (main, "seconds", "peak_bytes", *PROGRESS)]
    for part in parts if len(parts) > 1 else []:
        words = part.replace("_", " ")
        yield from plot(words.capitalize() if is_tokenizer else f"Loss, {words}", figures(part))
    for figure, title in PROGRESS.items():
        options = {"from_zero": figure != "gradient_norm", "is_smooth": figure != "learning_rate"}
        yield from plot(title, figures(figure), **options)
