"""Curves of several runs in one plot: axes, thinning to what can be seen, and an SVG that grows with the page.

Lines are stretched to the room that there is, while labels are text of the page beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from cogvideo.report.page import Html, compact, element, join, middle, number
from cogvideo.report.runs import Curve

COLUMNS = 320
"""Of a plot, in each of which a curve has no more than its lowest and its highest point."""
SIDE = 1000
"""Units of the SVG across and down."""
NUM_TICKS = 7
"""Of an axis, about."""
LOGARITHMIC_FROM = 20.0
"""Largest value over smallest from which an axis is logarithmic."""
SMOOTHED_FROM = 100
"""Points of a curve from which a running mean is drawn."""
WINDOW = 0.02
"""Of the running mean, as a share of the steps that the plot spans."""
DOTTED_UP_TO = 40
"""Points of a curve that are marked one by one."""
NUM_COLOURS = 8
"""Of the style sheet; further lines have them again, dashed."""


class Line(NamedTuple):
    """A curve of a plot."""

    name: str
    """In the legend."""
    curve: Curve
    """With at least one point."""
    place: int
    """Of its run among those of the stage, which decides the colour."""


@dataclass(frozen=True)
class Axis:
    """From values to places."""

    low: float
    """At 0."""
    high: float
    """At 1."""
    is_logarithmic: bool = False

    @classmethod
    def around(cls, values: Float64[np.ndarray, " values"], from_zero: bool) -> Axis:
        """With room for all values; logarithmic where they differ in size and none has to be seen beside zero."""
        low, high = float(values.min()), float(values.max())
        if from_zero and low >= 0:
            return cls(0.0, 1.05 * high or 1.0)
        if low > 0 and high / low >= LOGARITHMIC_FROM:
            return cls(low / 1.1, high * 1.1, True)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - margin, high + margin)

    def share(self, values: Float64[np.ndarray, " values"]) -> Float64[np.ndarray, " values"]:
        """Places in [0, 1]."""
        if self.is_logarithmic:
            first, last = math.log(self.low), math.log(self.high)
            return (np.log(values) - first) / (last - first)
        return (values - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        chosen = self._powers() if self.is_logarithmic else self._multiples()
        return [each for each in chosen if self.low <= each <= self.high]

    def _multiples(self) -> Iterator[float]:
        rough = (self.high - self.low) / NUM_TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(each * power for each in (1, 2, 5, 10) if each * power >= rough * 0.999)
        return (each * step for each in range(math.ceil(self.low / step), math.floor(self.high / step) + 1))

    def _powers(self) -> Iterator[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every = -(-(last - first) // (NUM_TICKS + 1))
        within = (1, 2, 5) if last - first <= 3 else (1,)
        return (each * 10.0**power for power in range(first, last + 1, every) for each in within)


def running_mean(curve: Curve, window: float) -> Curve:
    """At each point, the mean of those that are at most half a window of steps away."""
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    first = np.searchsorted(curve.steps, curve.steps - window / 2, "left")
    last = np.searchsorted(curve.steps, curve.steps + window / 2, "right")
    return Curve(curve.steps, (sums[last] - sums[first]) / (last - first))


def thinned(curve: Curve, end: int, columns: int = COLUMNS) -> Curve:
    """The lowest and the highest point in each column of a plot from step 0 to `end`, and the first and last of all."""
    if len(curve.steps) <= 2 * columns:
        return curve
    column = curve.steps * columns // (end + 1)
    order = np.lexsort((curve.values, column))
    lowest = np.flatnonzero(np.diff(column[order], prepend=-1))
    highest = np.append(lowest[1:], len(order)) - 1
    kept = np.unique(np.concatenate([order[lowest], order[highest], [0, len(order) - 1]]))
    return Curve(curve.steps[kept], curve.values[kept])


def curves(lines: Sequence[Line], summary: str, from_zero: bool = False, smooth: bool = True) -> Html:
    """Lines over steps, with a legend that gives the last value of each.

    Args:
        lines: at least one.
        summary: what a reader who does not see the plot should know.
        from_zero: let the axis begin at zero, so that heights can be compared.
        smooth: draw long curves thin and their running mean thick.
    """
    end = max(int(each.curve.steps[-1]) for each in lines) or 1
    across = Axis(0.0, float(end))
    up = Axis.around(np.concatenate([each.curve.values for each in lines]), from_zero)
    window = WINDOW * end
    long = [smooth and len(each.curve.steps) > SMOOTHED_FROM for each in lines]
    drawn = (_line(each, across, up, window if mean else 0.0) for each, mean in zip(lines, long, strict=True))
    heights = "".join(f"M0 {(1 - share) * SIDE:.1f}h{SIDE}" for share in up.share(np.array(up.ticks(), np.float64)))
    box = f"0 0 {SIDE} {SIDE}"
    svg = element("svg", element("path", d=heights, class_="grid"), *drawn, viewBox=box, preserveAspectRatio="none")
    told = [
        *([f"Thick: mean over {number(max(round(window), 1))} steps"] if any(long) else []),
        *(["Logarithmic scale"] if up.is_logarithmic else []),
    ]
    return element(
        "figure",
        element("div", svg, _ticks(across, up), class_="curves", role="img", aria_label=summary),
        element("ul", *map(_entry, lines), class_="legend"),
        element("figcaption", ". ".join(told), ".") if told else "",
    )


def swatch(place: int) -> Html:
    """The colour of a line beside its name."""
    return element("span", class_=f"swatch {_colour(place)}", aria_hidden="true")


def figure(value: float) -> str:
    """A value with five figures, or whole; small ones without zeros at the end."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.5g}" if abs(value) >= 0.1 else f"{value:.5g}"


def _colour(place: int) -> str:
    return f"line-{place % NUM_COLOURS}{' dashed' if place >= NUM_COLOURS else ''}"


def _line(line: Line, across: Axis, up: Axis, window: float) -> Html:
    """The curve, below its running mean if there is a window."""
    end = int(across.high)
    points = _points(thinned(line.curve, end), across, up)
    parts = [_polyline(points, "thin" if window else "thick")]
    if window:
        parts += [_polyline(_points(thinned(running_mean(line.curve, window), end), across, up), "thick")]
    if len(points) <= DOTTED_UP_TO:  # lines without length have round ends, which is a dot
        parts += [element("path", d="".join(f"M{x:g} {y:g}h0" for x, y in points), class_="dots")]
    return element("g", element("title", line.name), *parts, class_=_colour(line.place))


def _polyline(points: Sequence[tuple[float, float]], kind: str) -> Html:
    return element("polyline", points=" ".join(f"{x:g},{y:g}" for x, y in points), class_=kind)


def _points(curve: Curve, across: Axis, up: Axis) -> list[tuple[float, float]]:
    x, y = across.share(curve.steps.astype(np.float64)), 1 - up.share(curve.values)
    return list(zip((x * SIDE).round(1).tolist(), (y * SIDE).round(1).tolist(), strict=True))


def _ticks(across: Axis, up: Axis) -> Html:
    steps = [each for each in across.ticks() if each == int(each)]
    return join([*_labels(across, steps, "x", "left"), *_labels(up, up.ticks(), "y", "bottom")])


def _labels(axis: Axis, values: Sequence[float], kind: str, side: str) -> Iterator[Html]:
    for value, share in zip(values, axis.share(np.array(values, np.float64)), strict=True):
        yield element("span", _round(value), class_=f"tick {kind}", style=f"{side}:{100 * share:.2f}%")


def _round(value: float) -> str:
    return compact(int(value)) if abs(value) >= 1000 and value == int(value) else f"{value:g}"


def _entry(line: Line) -> Html:
    last = element("b", figure(float(line.curve.values[-1])))
    return element("li", swatch(line.place), element("bdi", middle(line.name, 40)), last)
