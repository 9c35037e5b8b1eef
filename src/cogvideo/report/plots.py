"""Plots by matplotlib, as SVG inside a page: text stays text, and colors come from the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from cogvideo.report.page import Column, RunName, precise
from cogvideo.report.runs import Curve

MIN_LOG_RATIO = 20.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
MIN_SMOOTHED = 100
"""Number of points from which a curve is drawn thin, and its running mean thick."""
WINDOW = 0.02
"""Window of the running mean, as a share of the steps of a plot."""
MAX_DOTS = 40
"""Number of points up to which each has a dot."""
NUM_LABELS = 12
"""Number of columns with a label."""
NUM_COLORS = 8
"""Number of colors of lines. Further lines repeat them, dashed."""

_VARIABLES = ("muted", "line", "fill", *(f"line-{number}" for number in range(NUM_COLORS)))
_COLORS = {name: f"#0000{number:02x}" for number, name in enumerate(_VARIABLES, 1)}
"""Placeholders in the SVG for variables of the style sheet, which have light and dark values."""
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cogvideo",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.axisbelow": True,
    "axes.edgecolor": _COLORS["muted"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _COLORS["line"],
    "text.color": _COLORS["muted"],
    "xtick.color": _COLORS["muted"],
    "xtick.major.size": 0,
    "ytick.color": _COLORS["muted"],
    "ytick.major.size": 0,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 1.0,
}
_NEEDLESS = re.compile(
    r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"|<metadata>.*?</metadata>|<style.*?</style>'
    r'| transform="rotate\(-0[^"]*"|(?<=\.\d\d)\d+(?=[ "\n])| *\n *',
    re.DOTALL,
)
"""Parts of matplotlib's SVG that mean nothing inside a page, and digits too small to see."""


class Plot(NamedTuple):
    """Curves, with their title and legend."""

    title: str
    svg: Markup
    legend: list[tuple[RunName, str]]
    """Lines with their last values."""
    note: str
    is_wide: bool


def curves(
    stage: str,
    title: str,
    curves: Mapping[RunName, Curve],
    *,
    is_wide: bool = False,
    from_zero: bool = False,
    is_smooth: bool = True,
    marked: tuple[int, float] | None = None,
) -> Plot:
    """Draw curves over steps, with a legend that gives the last value of each, and a mark at the best step.

    The stage and the title are unique on the page. With `from_zero`, the value axis begins at zero, so that heights can
    be compared; with `is_smooth`, long curves are thin and their running means thick.
    """
    end = max(int(each.steps[-1]) for each in curves.values()) or 1
    window, note = WINDOW * end, ""
    with style.context(["default", _STYLE | {"svg.hashsalt": f"{stage} {title}"}]):
        figure = Figure(figsize=(11.0, 3.4) if is_wide else (5.4, 2.4), layout="constrained")
        axes = figure.subplots()
        for name, curve in curves.items():
            look: dict[str, Any] = {"color": _COLORS[f"line-{name.place % NUM_COLORS}"], "clip_on": False}
            look["linestyle"] = "--" if name.place >= NUM_COLORS else "-"
            if is_smooth and len(curve.steps) > MIN_SMOOTHED:
                axes.plot(*curve, linewidth=0.8, alpha=0.35, **look)
                axes.plot(*running_mean(curve, window), **look)
                note = f"Thick line: mean over {max(round(window), 1):,} steps. "
            else:
                axes.plot(*curve, marker="o" if len(curve.steps) <= MAX_DOTS else "", **look)
        if marked is not None:
            axes.plot(*marked, marker="*", markersize=12, color=_COLORS["muted"], clip_on=False)
            note += f"Star: the best step, {marked[0]:,}, with {precise(marked[1])}. "
        if _scale(axes, np.concatenate([each.values for each in curves.values()]), from_zero):
            note += "Logarithmic scale."
        axes.set_xlim(0, end)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.xaxis.set_major_formatter(_tick)
        axes.grid(axis="y", clip_on=False)
        legend = [(name, precise(float(curve.values[-1]))) for name, curve in curves.items()]
        return Plot(title, _svg(figure), legend, note, is_wide)


def _scale(axes: Axes, values: np.ndarray, from_zero: bool) -> bool:
    """Set up the value axis; returns whether it is logarithmic."""
    low, high = values.min(), values.max()
    is_logarithmic = bool(not from_zero and low > 0 and high / low >= MIN_LOG_RATIO)
    if is_logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axes.minorticks_off()
    elif from_zero and low >= 0:
        axes.set_ylim(0, 1.05 * high or 1)
    axes.yaxis.set_major_formatter(_tick)
    return is_logarithmic


def running_mean(curve: Curve, window: float) -> Curve:
    """At each point, the mean of the points at most half a window of steps away."""
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    first = np.searchsorted(curve.steps, curve.steps - window / 2, "left")
    last = np.searchsorted(curve.steps, curve.steps + window / 2, "right")
    return Curve(curve.steps, (sums[last] - sums[first]) / (last - first))


def histogram(columns: Sequence[Column], is_wide: bool) -> Markup:
    """Draw columns with their heights above; some labels are left out if there are many."""
    places, heights = range(len(columns)), [each.height for each in columns]
    shown = places[:: -(-len(columns) // NUM_LABELS)]
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(11.0, 2.8) if is_wide else (5.4, 2.8), layout="constrained")
        axes = figure.subplots()
        bars = axes.bar(places, heights, width=0.94, color=_COLORS["fill"], clip_on=False)
        labels = [_tick(float(f"{height:.3g}")) if height else "" for height in heights]
        axes.bar_label(bars, labels, padding=2, fontsize=7)
        axes.set_xticks(shown, [columns[each].label for each in shown])
        axes.set_xlim(-0.5, max(len(columns), NUM_LABELS) - 0.5)
        axes.set_yticks([])
        return _svg(figure)


def _tick(value: float, _: float = 0) -> str:
    """`0.05`, `1.5k`."""
    return EngFormatter(sep="")(value) if 1000 <= abs(value) < 1e15 else f"{value:g}"


def _svg(figure: Figure) -> Markup:
    """The SVG of a figure, ready to be embedded in a page. Its only texts are numbers."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = _NEEDLESS.sub("", svg[svg.index("<svg") :])
    for name, color in _COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return Markup(svg)
