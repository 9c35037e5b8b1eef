"""`cogvideo train report`: facts about training runs, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cogvideo.config import InputError, require
from cogvideo.files import check_place
from cogvideo.report.page import RunName, count, duration, file_size, middle, number, percent, precise, write_page
from cogvideo.report.runs import TOKENIZER, Curve, Run, read_runs

if TYPE_CHECKING:
    from cogvideo.report.plots import Plot

TITLES = {
    TOKENIZER: "Image tokenizer",
    "image": "Image model",
    "sequential": "Key frames (sequential)",
    "interpolation": "Frames in between (interpolation)",
    "superres": "Super-resolution (superres)",
}
QUALITIES = {"psnr": "PSNR in dB", "ssim": "SSIM", "code_usage": "share of codes in use", "perplexity": "perplexity"}
"""Measures of a tokenizer on held-out frames."""
PROGRESS = {
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "images_per_second": "Images per second",
    "utilization": "Utilization of the machine's matrix rate",
}
"""Figures about the progress of a run. All others in metrics.jsonl are parts of the loss."""
MAX_SHEET_SIZE = (1000, 2000)
"""Maximum width and height of a contact sheet, in pixels."""
NOTHING = "–"


def report(runs: tuple[Path, ...], /, *, out: Path) -> None:
    """Write a page about one or several training runs.

    It is one HTML file without scripts, which needs no other file and no network. Runs of one stage share their plots.
    Unfinished runs are shown as far as they got. The same files give the same bytes.

    Args:
        runs: Folders of runs (such as OUT/.sequential-run), or folders with runs inside.
        out: File of the page.
    """
    require(len(runs) > 0, "there is no run, expected one or several folders, such as my-model/.sequential-run")
    check_place(out, "the page")
    found = read_runs(runs)
    num_runs = count(found, "run")
    title = f"{found[0].name}: training" if len({run.name for run in found}) == 1 else "Training runs"
    lead = "Curves show values by step; the numbers below are the last values."
    lead = f"{num_runs}. {lead} Losses of different stages cannot be compared."
    write_page(out, "train report", title, lead, "training.html", facts(found))
    print(f"written: {out}, with {num_runs}")


def facts(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the page shows: an overview, then the runs of each stage."""
    stages = [list(same) for _, same in groupby(runs, key=lambda run: run.stage)]
    return {
        "titles": {"runs": "Runs"} | {same[0].stage: TITLES[same[0].stage] for same in stages},
        "rows": [[name, *_facts(run)] for same in stages for name, run in _named(same)],
        "stages": [_stage(same) for same in stages],
    }


def _named(runs: Sequence[Run]) -> list[tuple[RunName, Run]]:
    return [(RunName(middle(run.name), place), run) for place, run in enumerate(runs)]


def _facts(run: Run) -> list[str]:
    """Cells of the overview, after the name."""
    is_tokenizer, figures = run.stage == TOKENIZER, run.figures
    quality = (lambda value: f"{precise(value)} dB") if is_tokenizer else precise
    return [
        run.stage,
        f"{number(run.done)} of {number(run.num_steps)}",
        _last(figures.get("psnr" if is_tokenizer else "loss"), quality),
        _last(run.validation, quality),
        NOTHING if run.best is None else f"{quality(run.best[1])} at {number(run.best[0])}",
        _last(figures.get("tokens_per_second"), precise),
        _last(figures.get("utilization"), percent),
        NOTHING if run.seconds is None else duration(run.seconds),
        NOTHING if run.peak_bytes is None else file_size(run.peak_bytes),
        "yes" if run.is_finished else "no",
    ]


def _last(curve: Curve | None, show: Callable[[float], str]) -> str:
    return NOTHING if curve is None else show(float(curve.values[-1]))


def _stage(runs: Sequence[Run]) -> dict[str, Any]:
    """Plots, contact sheets and settings, which are split into those that differ between the runs and those that do
    not."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [[name, *(middle(run.settings.get(name, NOTHING), 100) for run in runs)] for name in names]
    return {
        "name": runs[0].stage,
        "plots": list(_plots(runs)),
        "sheets": [(name, run.name, *_sheet(*run.sheet)) for name, run in _named(runs) if run.sheet is not None],
        "heads": ["", *(middle(run.name, 40) for run in runs)],
        "differing": [row for row in rows if len(set(row[1:])) > 1],
        "equal": [row[:2] for row in rows if len(set(row[1:])) == 1],
    }


def _sheet(step: int, path: Path) -> tuple[int, np.ndarray]:
    """A contact sheet, reduced if it is large."""
    try:
        with Image.open(path) as image:
            shown = image.convert("RGB")
        shown.thumbnail(MAX_SHEET_SIZE)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot use {path}: {error}") from error
    return step, np.asarray(shown)


def _plots(runs: Sequence[Run]) -> Iterator[Plot]:
    """All plots of a stage; first its loss, or the PSNR of a tokenizer, as wide as the page."""
    from cogvideo.report.plots import curves  # matplotlib takes a second to import

    stage, names = runs[0].stage, [name for name, _ in _named(runs)]
    is_tokenizer = stage == TOKENIZER

    def plot(title: str, found: Iterable[Curve | None], **options: Any) -> Iterator[Plot]:
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
