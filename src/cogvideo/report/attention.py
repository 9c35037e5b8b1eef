"""A picture of the attention of the temporal channel: frames, where they look layer by layer, gates, heads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager, style
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cogvideo.evaluation.attention import StageAttention
from cogvideo.files import replacing
from cogvideo.media.colors import Pixels
from cogvideo.report.page import percent

WIDTH, HEIGHT, DPI = 12.0, 7.6, 120
"""Width and height of a stage's part in inches, and pixels per inch."""
LEFT, RIGHT = 0.07, 0.88
"""Ends of the plots, as shares of the width."""
REACH = 4
"""Rows and columns shown to each side of the same position, for a head."""
MAX_CHARACTERS = 120
"""Maximum number of the prompt's characters in the heading."""
TEXT_COLOR = "#c8c8c8"
NAMES = {"sequential": "Key frames", "interpolation": "Interpolation"}
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei")
"""Fonts for prompts in English and Chinese; those that are installed are used."""
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "magma",
}


def write_picture(path: Path, prompt: str, stages: Sequence[tuple[StageAttention, Sequence[float], Pixels]]) -> None:
    """Draw stages, each with the seconds of its frames and the frames, one below the other as a PNG."""
    fonts = [each for each in FONTS if each in font_manager.get_font_names()]
    with style.context(["default", STYLE | {"font.family": fonts}]), replacing(path) as file:
        figure = Figure(figsize=(WIDTH, HEIGHT * len(stages)))
        parts = figure.subfigures(len(stages), squeeze=False)
        for part, stage in zip(parts[:, 0], stages, strict=True):
            _draw_stage(part, prompt, *stage)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # if no font has a prompt's characters
            figure.savefig(file, format="png", dpi=DPI)


def _draw_stage(
    figure: SubFigure, prompt: str, stage: StageAttention, seconds: Sequence[float], frames: Pixels
) -> None:
    count = len(frames)
    frame_grid = figure.add_gridspec(2, count, left=LEFT, right=RIGHT, top=0.88, bottom=0.42, hspace=0.15, wspace=0.2)
    grid = figure.add_gridspec(1, 3, left=LEFT, right=RIGHT, top=0.31, bottom=0.08, width_ratios=(2, 2.4, 1.4))
    windows = f"windows of {stage.window} x {stage.window}" if stage.window else "full attention"
    figure.text(LEFT, 0.955, f"{NAMES[stage.name]}, {windows}", fontsize=13, fontweight="bold")
    figure.text(LEFT, 0.93, f"Attention of the temporal channel: {shorten(prompt, MAX_CHARACTERS)}", color="gray")
    colors = list(colormaps["viridis"](np.linspace(0, 1, count)))
    _draw_frames(figure, frame_grid, stage, seconds, frames, colors)
    patches = [Patch(color=color, label=f"frame {place}") for place, color in enumerate(colors)]
    handles = [Patch(color=TEXT_COLOR, label="text"), *patches]
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (RIGHT, 0.52), "frameon": False}
    figure.legend(handles=handles, title="attention goes to", **place)
    _draw_gates(figure.add_subplot(grid[0]), stage)
    _draw_heads(figure, figure.add_subplot(grid[1]), stage)
    _draw_head(figure, figure.add_subplot(grid[2]), stage)


def _draw_frames(
    figure: SubFigure,
    grid: GridSpec,
    stage: StageAttention,
    seconds: Sequence[float],
    frames: Pixels,
    colors: Sequence[Any],
) -> None:
    """Each frame in its color, and below it where it looks."""
    shares = stage.shares.mean(1).numpy()
    layers = range(len(shares))
    first: Axes | None = None
    for place, (frame, color) in enumerate(zip(frames, colors, strict=True)):
        picture = figure.add_subplot(grid[0, place])
        picture.imshow(frame)
        picture.set(xticks=[], yticks=[])
        picture.spines[:].set(visible=True, color=color, linewidth=4)
        kind = "generated" if place in stage.layout.loss_places else "given"
        picture.set_title(f"frame {place}, {seconds[place]:g} s, {kind}")
        axes = figure.add_subplot(grid[1, place], sharey=first)
        below = np.zeros(len(shares))
        for target, target_color in enumerate([TEXT_COLOR, *colors]):
            axes.bar(layers, shares[:, place, target], 0.9, below, color=target_color)
            below += shares[:, place, target]
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        if first is not None:
            axes.tick_params(labelleft=False)
        first = first or axes
    assert first is not None
    first.set_ylabel("attention, mean over slots and heads")


def _draw_gates(axes: Axes, stage: StageAttention) -> None:
    gates = stage.gates.numpy()
    layers = range(len(gates))
    low, high = np.quantile(gates, (0.1, 0.9), axis=1)
    axes.fill_between(layers, gates.min(1), gates.max(1), color="#dbe6f4", label="all channels")
    axes.fill_between(layers, low, high, color="#9dbbe0", label="80% of them")
    axes.plot(layers, gates.mean(1), color="#1f4e9c", marker="o", markersize=3, label="mean")
    axes.axhline(0.5, color="gray", linestyle="--", linewidth=0.8)
    axes.set(title="Weight of the temporal channel (gate)", xlabel="layer")
    axes.set_ylim(min(0.45, gates.min() - 0.01), max(0.55, gates.max()) + 0.02)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", columnspacing=1.0, handlelength=1.0)


def _draw_heads(figure: SubFigure, axes: Axes, stage: StageAttention) -> None:
    found = stage.same_place.T.numpy()
    image = axes.imshow(found, aspect="auto", origin="lower", norm=PowerNorm(0.5, vmin=0))  # so that small shares show
    axes.set(title="Attention to the same place in the frame before", xlabel="layer", ylabel="head")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.colorbar(image, ax=axes, format=PercentFormatter(1))


def _draw_head(figure: SubFigure, axes: Axes, stage: StageAttention) -> None:
    """Attention around the same position, of the head that attends to it the most."""
    layer, head = np.unravel_index(int(stage.same_place.argmax()), stage.same_place.shape)
    reach = min(REACH, *stage.middle)
    near = [slice(middle - reach, middle + reach + 1) for middle in stage.middle]
    share = float(stage.same_place[layer, head])
    edge = reach + 0.5
    shown = stage.steps[layer, head, near[0], near[1]].numpy()
    image = axes.imshow(shown, norm=PowerNorm(0.5, vmin=0), extent=(-edge, edge, edge, -edge))
    figure.colorbar(image, ax=axes, format=PercentFormatter(1))
    axes.set(xticks=range(-reach, reach + 1, 2), yticks=range(-reach, reach + 1, 2))
    axes.set(title=f"Layer {layer}, head {head}: {percent(share)} at the same place")
    axes.set(xlabel="columns away", ylabel="rows away")
