"""Antialiased shapes in numpy: signed distances become coverage, and coverage mixes colors.

Pixels are computed only by additions, products, quotients, square roots and comparisons, exactly defined by IEEE 754.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

Plane = Float32[np.ndarray, "..."]
"""A number for each pixel of a stack of patches (frames, height, width), or an array that broadcasts to it."""
Color = tuple[float, float, float]
"""Red, green and blue from 0 to 255."""

CHUNK = 14_000
"""Pixels painted at a time, so that planes stay in the CPU cache and memory does not grow with the frame."""


class Brush:
    """Paints shapes over each other into a stack of patches.

    Shapes are signed distances (negative inside) in the units of `x` and `y`, the centers of pixels to the right and
    upwards, and of `pixel`, a pixel's side. Colors are premultiplied by alpha. An outlined brush remembers its edges.
    """

    def __init__(self, x: Plane, y: Plane, pixel: Plane, outlined: bool = False) -> None:
        self.x = x
        self.y = y
        self.sharpness = 1 / pixel
        shape = np.broadcast_shapes(x.shape, y.shape)
        self.color = [np.zeros(shape, np.float32) for _ in range(3)]
        self.alpha = np.zeros(shape, np.float32)
        self.nearest = np.full(shape, 9, np.float32) if outlined else None

    def coverage(self, distance: Plane) -> Plane:
        """The part of each pixel that lies inside a shape, 0 to 1."""
        inside = distance * -self.sharpness
        inside += 0.5
        return np.clip(inside, 0, 1, out=inside)

    def fill(self, distance: Plane, color: Color, opacity: float = 1.0) -> None:
        """Paint a shape over what is there."""
        if self.nearest is not None:
            np.minimum(self.nearest, distance, out=self.nearest)
        self.mix(self.coverage(distance), color, opacity)

    def mix(self, coverage: Plane, color: Color, opacity: float = 1.0) -> None:
        """Paint a color over what is there, as thick as `coverage` says."""
        if opacity != 1:
            coverage = coverage * opacity
        for plane, value in zip((*self.color, self.alpha), (*color, 1.0), strict=True):
            plane += coverage * (value - plane)

    def outline(self, width: float, color: Color) -> None:
        """Paint a line around everything that was filled."""
        assert self.nearest is not None
        rest = self.coverage(self.nearest - width) * (1 - self.alpha)
        for plane, value in zip((*self.color, self.alpha), (*color, 1.0), strict=True):
            plane += rest * value

    def tint(self, coverage: Plane, color: Color) -> None:
        """Mix a color into what is there, without painting empty areas."""
        for plane, value in zip(self.color, color, strict=True):
            plane += coverage * (value * self.alpha - plane)


def disc(x: Plane, y: Plane, radius: float) -> Plane:
    """Distance to a circle around the origin."""
    return np.sqrt(x * x + y * y) - radius


def ellipse(x: Plane, y: Plane, width: float, height: float) -> Plane:
    """Distance to an ellipse with these semi-axes, to first order near its edge."""
    across, along = x * (1 / width), y * (1 / height)
    level = np.sqrt(across * across + along * along)
    across, along = across * (1 / width), along * (1 / height)
    slope = np.sqrt(across * across + along * along) + 1e-6
    return level * (level - 1) / slope


def box(x: Plane, y: Plane, width: float, height: float, corner: float = 0.0) -> Plane:
    """Distance to a rectangle with these half-sides and rounded corners."""
    across = np.abs(x) - (width - corner)
    along = np.abs(y) - (height - corner)
    inside = np.minimum(np.maximum(across, along), 0)
    across, along = np.maximum(across, 0), np.maximum(along, 0)
    return np.sqrt(across * across + along * along) + inside - corner


def segment(x: Plane, y: Plane, start: tuple[float, float], end: tuple[float, float], radius: float) -> Plane:
    """Distance to a line segment with round ends."""
    across, along = end[0] - start[0], end[1] - start[1]
    x, y = x - start[0], y - start[1]
    part = (x * across + y * along) * (1 / (across**2 + along**2))
    np.clip(part, 0, 1, out=part)
    return disc(x - part * across, y - part * along, radius)


def polygon(x: Plane, y: Plane, *corners: tuple[float, float]) -> Plane:
    """Distance to a convex polygon, given clockwise; exact at its sides, too small beyond a corner."""
    distance: Plane | None = None
    for (left, low), (right, high) in zip(corners, (*corners[1:], corners[0]), strict=True):
        length = float(np.hypot(right - left, high - low))
        across, along = (low - high) / length, (right - left) / length
        side = x * across + (y * along - (left * across + low * along))
        distance = side if distance is None else np.maximum(distance, side)
    assert distance is not None
    return distance


def star(x: Plane, y: Plane, radius: float, inner: float) -> Plane:
    """Distance to a star of five points, by folding the plane onto one half of a point."""
    x, y = np.abs(x), y
    for across, along in ((0.809017, -0.587785), (-0.809017, -0.587785)):
        beyond = np.maximum(x * across + y * along, 0)
        beyond *= 2
        x, y = x - beyond * across, y - beyond * along
    x, y = np.abs(x), y - radius
    # The edge runs from the point (0, radius) to the notch between two points, at 36 degrees.
    notch = (0.587785 * inner, 0.809017 * inner - radius)
    part = np.clip((x * notch[0] + y * notch[1]) / (notch[0] ** 2 + notch[1] ** 2), 0, 1)
    away = disc(x - part * notch[0], y - part * notch[1], 0)
    return np.copysign(away, x * -notch[1] + y * notch[0])


class FrameBoxes(NamedTuple):
    """Rectangles of pixels of equal size, one in each of some frames; they may reach beyond the frame."""

    numbers: tuple[int, ...]
    """Numbers of the frames."""
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    height: int
    width: int

    def gather(self, frames: np.ndarray) -> np.ndarray:
        """Content of the boxes, (boxes, height, width, ...), zero beyond the frame; a single frame serves all boxes."""
        shape = (len(self.numbers), self.height, self.width, *frames.shape[3:])
        patches = np.zeros(shape, frames.dtype)
        for patch, number, (there, here) in zip(patches, self.numbers, self._slices(frames), strict=True):
            patch[here] = frames[number if len(frames) > 1 else 0][there]
        return patches

    def scatter(self, patches: np.ndarray, frames: np.ndarray) -> None:
        """Put patches where `gather` took them."""
        for patch, number, (there, here) in zip(patches, self.numbers, self._slices(frames), strict=True):
            frames[number][there] = patch[here]

    def _slices(self, frames: np.ndarray) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """Slices of the part of each box inside the frame: in the frame, and in the patch."""
        rows, columns = frames.shape[1:3]
        for top, left in zip(self.tops, self.lefts, strict=True):
            above, before = max(top, 0), max(left, 0)
            below, behind = max(min(top + self.height, rows), above), max(min(left + self.width, columns), before)
            there = slice(above, below), slice(before, behind)
            yield there, (slice(above - top, below - top), slice(before - left, behind - left))

    def places(self, size: int) -> tuple[Plane, Plane]:
        """Centers of the pixels in a frame that is [-1, 1] wide and high: (boxes, 1, width) and (boxes, height, 1)."""
        columns = np.array(self.lefts)[:, None, None] + np.arange(self.width)[None, None]
        rows = np.array(self.tops)[:, None, None] + np.arange(self.height)[None, :, None]
        x, y = (columns * 2 + 1) / size - 1, 1 - (rows * 2 + 1) / size
        return x.astype(np.float32), y.astype(np.float32)


def boxes(
    size: int, numbers: np.ndarray, x: np.ndarray, y: np.ndarray, width: float, height: float
) -> Iterator[tuple[slice, FrameBoxes]]:
    """Boxes around positions (x, y) in the frames `numbers`, with half sides `width` and `height`, a few at a time.

    Yields: the positions as a slice, and their boxes.
    """
    rows, columns = (2 * (int(np.ceil(half * size / 2)) + 1) for half in (height, width))
    tops = np.floor((1 - y) * size / 2).astype(int) - rows // 2
    lefts = np.floor((1 + x) * size / 2).astype(int) - columns // 2
    step = max(1, CHUNK // (rows * columns))
    for start in range(0, len(numbers), step):
        part = slice(start, start + step)
        chosen, top, left = (tuple(each[part].tolist()) for each in (numbers, tops, lefts))
        yield part, FrameBoxes(chosen, top, left, rows, columns)


def blend(frames: UInt8[np.ndarray, "frames size size 3"], where: FrameBoxes, color: list[Plane], alpha: Plane) -> None:
    """Put a premultiplied color over the frames."""
    patches = where.gather(frames)
    keep = 1 - alpha
    for channel, plane in enumerate(color):
        patches[..., channel] = patches[..., channel] * keep + (plane + 0.5)
    where.scatter(patches, frames)
