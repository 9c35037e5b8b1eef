"""`cogvideo train report`: loss curves of several runs, as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cogvideo import __version__
from cogvideo.config import InputError, require
from cogvideo.files import replacing
from cogvideo.report.curves import Line, curves, figure, swatch
from cogvideo.report.page import (
    Figure,
    Html,
    Section,
    count,
    duration,
    element,
    file_size,
    group,
    join,
    middle,
    note,
    number,
    page,
    panel,
    percent,
    picture,
    table,
)
from cogvideo.report.runs import TOKENIZER, Curve, Run, read_runs

FOOT = f"Made by cogvideo train report, version {__version__}. This page needs no other file and no network."
TITLES = {
    TOKENIZER: "Image tokenizer",
    "image": "Image model",
    "sequential": "Key frames (sequential)",
    "interpolation": "Frames between frames (interpolation)",
    "superres": "Super-resolution (superres)",
}
FACTS = ("run", "stage", "steps", "loss", "held out", "best", "tokens/s", "utilisation", "time", "memory", "finished")
"""Columns of the overview."""
QUALITIES = {"psnr": "PSNR in dB", "ssim": "SSIM", "code_usage": "share of the codes used", "perplexity": "perplexity"}
"""Of a tokenizer on the frames held out."""
COURSE = {
    "learning_rate": "Learning rate",
    "gradient_norm": "Norm of the gradient",
    "tokens_per_second": "Tokens a second",
    "images_per_second": "Images a second",
    "utilisation": "Utilisation, of the machine's matrix rate",
}
"""Figures about how a run goes. What else is in metrics.jsonl is a part of the loss."""
LARGEST_SHEET, QUALITY = (1000, 2000), 85
"""Pixels across and down of a contact sheet, and its quality as JPEG."""
NOTHING = Figure("–")

Pick = Callable[[Run], Curve | None]


def training(runs: tuple[Path, ...], /, *, out: Path) -> None:
    """Write a page about one or several runs.

    It is one HTML file without scripts, which needs no other file and no network. Runs of one stage share their plots.
    Runs that go on or were killed are shown as far as they went. The same files give the same bytes.

    Args:
        runs: folders of runs (such as OUT/.sequential-run), or folders with runs inside.
        out: file of the page.

    Raises:
        ValueError: no run is there, or the files of all are damaged.
        OSError: the page cannot be written.
    """
    require(len(runs) > 0, "there is no run, expected one or several folders, such as my-model/.sequential-run")
    require(not out.is_dir(), f"{out} is a folder, expected the file of the page")
    require(out.parent.is_dir(), f"there is no folder {out.parent} for the page")
    found = read_runs(runs)
    stages = [list(same) for _, same in groupby(found, key=lambda run: run.stage)]
    parts = [Section("runs", "Runs", overview(stages))]
    parts += [Section(same[0].stage, TITLES[same[0].stage], section(same)) for same in stages]
    content = page(_title(found), _lead(found), parts, FOOT)
    with replacing(out) as file:
        file.write(content)
    print(f"written: {out}, with {count(len(found), 'run')}")


def _title(runs: Sequence[Run]) -> str:
    return f"{runs[0].name}: training" if len({run.name for run in runs}) == 1 else "Training runs"


def _lead(runs: Sequence[Run]) -> Html:
    text = "Curves are over steps, with their last values below. Losses of different stages cannot be compared."
    return element("p", f"{count(len(runs), 'run')}. {text}", class_="lead")


def overview(stages: Sequence[Sequence[Run]]) -> Html:
    """All runs, a line each."""
    rows = ((_name(place, run), *_facts(run)) for runs in stages for place, run in enumerate(runs))
    told = (
        "Loss and tokens/s are the last ones, held out is the mean over the frame rates. Tokenizers are judged by "
        "PSNR. Memory is the most that a process took."
    )
    return element("div", table(FACTS, rows), note(told), class_="card runs")


def _name(place: int, run: Run) -> Html:
    return join([swatch(place), element("bdi", middle(run.name))])


def _facts(run: Run) -> Iterator[object]:
    """Cells of the overview, behind the name."""
    is_tokenizer, best, figures = run.stage == TOKENIZER, run.best, run.figures
    show = (lambda value: f"{figure(value)} dB") if is_tokenizer else figure
    yield run.stage
    yield Figure(f"{number(run.done)} of {number(run.num_steps)}")
    yield _last(figures.get("psnr" if is_tokenizer else "loss"), show)
    yield _last(run.judged, show)
    yield NOTHING if best is None else Figure(f"{show(best.value)} at {number(best.step)}")
    yield _last(figures.get("tokens_per_second"), figure)
    yield _last(figures.get("utilisation"), lambda share: percent(share, 1))
    yield NOTHING if run.seconds is None else Figure(duration(run.seconds))
    yield NOTHING if run.peak_bytes is None else Figure(file_size(run.peak_bytes))
    yield "yes" if run.is_finished else "no"


def _last(curve: Curve | None, show: Callable[[float], str]) -> Figure:
    return NOTHING if curve is None else Figure(show(float(curve.values[-1])))


def section(runs: Sequence[Run]) -> Html:
    """All about the runs of one stage."""
    measured = list(dict.fromkeys(name for run in runs for name in run.figures))
    main = "psnr" if runs[0].stage == TOKENIZER else "loss"
    title = "PSNR in dB" if runs[0].stage == TOKENIZER else "Loss"
    others = [name for name in measured if name not in (main, "seconds", "peak_bytes", *COURSE)]
    plots = [
        *held_out(runs),
        *(_plot(_part(name, runs[0].stage), runs, _figure(name)) for name in others if len(others) > 1),
        *(
            _plot(words, runs, _figure(name), from_zero=name != "gradient_norm", smooth=name != "learning_rate")
            for name, words in COURSE.items()
        ),
    ]
    return group(
        "stack",
        settings(runs),
        _plot(title, runs, _figure(main)) if main in measured else note("Nothing is measured yet."),
        group("two", *plots),
        sheets(runs),
    )


def held_out(runs: Sequence[Run]) -> Iterator[Html]:
    """A plot for each frame rate, and of their mean where there are several."""
    names = list(dict.fromkeys(name for run in runs for name in run.held_out))
    if runs[0].stage != TOKENIZER and len(names) > 1:
        yield _plot("Held out, mean over the frame rates", runs, lambda run: run.judged, smooth=False)
    for name in names:
        title = "Held out" if name == "all" else f"Held out, {QUALITIES.get(name, name)}"
        yield _plot(title, runs, _measure(name), smooth=False)


def _figure(name: str) -> Pick:
    return lambda run: run.figures.get(name)


def _measure(name: str) -> Pick:
    return lambda run: run.held_out.get(name)


def _part(name: str, stage: str) -> str:
    words = name.replace("_", " ")
    return words.capitalize() if stage == TOKENIZER else f"Loss, {words}"


def _plot(title: str, runs: Sequence[Run], pick: Pick, from_zero: bool = False, smooth: bool = True) -> Html:
    """One figure of the runs that have it; nothing if none has."""
    picked = ((run.name, pick(run), place) for place, run in enumerate(runs))
    lines = [Line(name, curve, place) for name, curve, place in picked if curve is not None]
    if not lines:
        return Html()
    summary = f"{title} by step, of {count(len(lines), 'run')}; below are the last values."
    return panel(title, curves(lines, summary, from_zero, smooth))


def settings(runs: Sequence[Run]) -> Html:
    """What differs between the runs, and to unfold, what does not."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name, NOTHING) for run in runs] for name in names}
    differ = {name: each for name, each in values.items() if len(set(each)) > 1}
    equal = {name: each[:1] for name, each in values.items() if name not in differ}
    heads = ("", *(middle(run.name, 40) for run in runs))
    told = note("They have the same settings.")
    compared = panel("What differs", _settings(heads, differ) if differ else told) if len(runs) > 1 else Html()
    words = "Settings that are the same" if len(runs) > 1 else "Settings"
    folded = element("details", element("summary", words), _settings(("", ""), equal))
    return join([compared, folded])


def _settings(heads: Sequence[str], values: dict[str, list[str]]) -> Html:
    rows = ((name, *(element("code", middle(value, 100)) for value in each)) for name, each in values.items())
    return table(heads, rows)


def sheets(runs: Sequence[Run]) -> Html:
    """The last contact sheet of each."""
    shown = [(place, run, run.sheet) for place, run in enumerate(runs)]
    figures = [
        element(
            "figure",
            picture(_pixels(sheet.path), f"Contact sheet of {run.name} after {count(sheet.step, 'step')}", QUALITY),
            element("figcaption", _name(place, run), f" after {count(sheet.step, 'step')}"),
            class_="clip card",
        )
        for place, run, sheet in shown
        if sheet is not None
    ]
    heading = element("h3", "Last contact sheets")
    return join([heading, element("div", *figures, class_="sheets")]) if figures else Html()


def _pixels(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """A picture, made smaller if it is large."""
    try:
        with Image.open(path) as image:
            shown = image.convert("RGB")
        shown.thumbnail(LARGEST_SHEET)
        return np.asarray(shown)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot use {path}: {error}") from error
