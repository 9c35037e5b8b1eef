"""Backgrounds of the World: a sky or wall, a ground or floor, and a few things that belong there."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from cogvideo.world.drawing import Brush, Color, Plane, box, disc, ellipse, polygon, segment

HORIZON = -0.4
"""Height at which ground and sky meet in the middle of the picture."""

WHITE: Color = (255, 255, 255)


def _at(brush: Brush, x: float, y: float) -> tuple[Plane, Plane]:
    """Coordinates relative to a position."""
    return brush.x - x, brush.y - y


def _cloud(brush: Brush, x: float, y: float, size: float, color: Color = WHITE) -> None:
    across, along = _at(brush, x, y)
    puffs = [disc(across, along, 0.17 * size), disc(across - 0.2 * size, along, 0.12 * size)]
    puffs.append(disc(across + 0.19 * size, along, 0.11 * size))
    base = box(across, along + 0.06 * size, 0.36 * size, 0.07 * size, 0.07 * size)
    brush.fill(np.minimum.reduce([*puffs, base]), color, 0.85)


def _hill(brush: Brush, x: float, width: float, height: float, color: Color) -> None:
    """Half an ellipse that stands on the horizon."""
    brush.fill(ellipse(*_at(brush, x, HORIZON - 0.05), width, height + 0.05), color)


def _fir(brush: Brush, x: float, height: float, color: Color) -> None:
    across, along = _at(brush, x, HORIZON - 0.04)
    for low, high, width in ((0.0, 0.6, 0.3), (0.4, 1.0, 0.22)):
        corners = ((-width * height, low * height), (0.0, high * height), (width * height, low * height))
        brush.fill(polygon(across, along, *corners), color)


def _dots(brush: Brush, places: tuple[tuple[float, float, float], ...], color: Color, opacity: float = 1.0) -> None:
    """Discs at (x, y) of some radius; the smallest fade rather than vanish between pixels."""
    for x, y, radius in places:
        brush.fill(disc(*_at(brush, x, y), radius), color, opacity)


def _meadow(brush: Brush, ground: Brush) -> None:
    _cloud(brush, -0.55, 0.68, 0.9)
    _cloud(brush, 0.5, 0.42, 0.7)
    _hill(brush, -0.6, 0.9, 0.26, (150, 206, 120))
    _hill(brush, 0.7, 0.8, 0.2, (134, 196, 108))
    _dots(ground, ((-0.8, -0.55, 0.035), (-0.1, -0.9, 0.045), (0.55, -0.84, 0.04), (0.86, -0.5, 0.03)), WHITE)
    _dots(ground, ((-0.5, -0.84, 0.045), (0.2, -0.52, 0.03), (0.9, -0.92, 0.045)), (255, 226, 90))


def _beach(brush: Brush, ground: Brush) -> None:
    brush.fill(disc(*_at(brush, 0.62, 0.62), 0.2), (255, 244, 190))
    _cloud(brush, -0.5, 0.6, 0.8)
    brush.fill(brush.y + 0.06, (46, 140, 196))
    brush.fill(box(*_at(brush, 0.1, -0.2), 1.2, 0.02, 0.02), (120, 192, 224), 0.7)
    x, y = _at(brush, -0.55, -0.08)
    brush.fill(polygon(x, y, (-0.02, 0.0), (-0.02, 0.34), (0.2, 0.0)), WHITE)
    brush.fill(polygon(x, y, (-0.16, -0.02), (0.2, -0.02), (0.12, -0.1), (-0.08, -0.1)), (150, 84, 60))
    ground.fill(HORIZON - 0.03 - ground.y, WHITE, 0.55)
    ground.fill(ground.y - (HORIZON - 0.06), (238, 214, 160))
    _dots(ground, ((-0.7, -0.82, 0.04), (0.3, -0.9, 0.03), (0.76, -0.7, 0.04)), (226, 186, 130))


def _night(brush: Brush, ground: Brush) -> None:
    bright = ((-0.8, 0.8), (-0.42, 0.5), (-0.1, 0.86), (0.24, 0.62), (0.62, 0.84), (0.85, 0.5), (-0.75, 0.25))
    faint = ((-0.55, 0.95), (0.05, 0.4), (0.45, 0.3), (-0.3, 0.18), (0.92, 0.2), (-0.95, 0.5), (0.4, 0.95))
    _dots(brush, tuple((x, y, 0.03) for x, y in bright), (255, 250, 214))
    _dots(brush, tuple((x, y, 0.022) for x, y in faint), (190, 200, 240), 0.8)
    _hill(brush, -0.5, 0.8, 0.2, (30, 44, 86))
    _hill(brush, 0.6, 0.7, 0.28, (26, 38, 78))


def _snow(brush: Brush, ground: Brush) -> None:
    _hill(brush, 0.1, 1.1, 0.3, (226, 234, 244))
    for x, height in ((-0.82, 0.62), (-0.5, 0.4), (0.6, 0.46), (0.88, 0.7)):
        _fir(brush, x, height, (70, 116, 112))
    flakes = ((-0.6, 0.7), (-0.2, 0.5), (0.1, 0.85), (0.42, 0.62), (0.75, 0.8), (-0.9, 0.4), (0.2, 0.2), (-0.35, 0.95))
    _dots(brush, tuple((x, y, 0.03) for x, y in flakes), WHITE)


def _desert(brush: Brush, ground: Brush) -> None:
    brush.fill(disc(*_at(brush, -0.55, 0.6), 0.2), (255, 250, 226))
    _hill(brush, 0.5, 0.9, 0.2, (226, 168, 104))
    x, y = _at(brush, 0.7, HORIZON)
    right = (((0.0, 0.2), (0.16, 0.26)), ((0.16, 0.26), (0.16, 0.4)))
    left = (((0.0, 0.12), (-0.14, 0.2)), ((-0.14, 0.2), (-0.14, 0.32)))
    for start, end in (((0.0, 0.0), (0.0, 0.5)), *right, *left):
        brush.fill(segment(x, y, start, end, 0.055), (92, 140, 84))


def _sea(brush: Brush, ground: Brush) -> None:
    for x, width in ((-0.55, 0.12), (0.05, 0.2), (0.65, 0.1)):
        slanted = brush.x - x + (1 - brush.y) * 0.25
        brush.mix(brush.coverage(np.abs(slanted) - width), WHITE, 0.1)
    for x, height in ((-0.9, 0.5), (-0.76, 0.34), (0.84, 0.6), (0.94, 0.36)):
        brush.fill(segment(*_at(brush, x, HORIZON), (0.0, -0.1), (0.05, height), 0.04), (34, 132, 110))
    bubbles = ((-0.5, 0.3, 0.05), (-0.44, 0.5, 0.035), (-0.54, 0.66, 0.045), (0.5, 0.55, 0.04), (0.55, 0.8, 0.05))
    _dots(brush, bubbles, WHITE, 0.4)


def _room(brush: Brush, ground: Brush) -> None:
    brush.fill(box(*_at(brush, -0.5, 0.42), 0.34, 0.34, 0.03), WHITE)
    across, along = _at(brush, -0.5, 0.42)
    brush.fill(box(np.abs(across) - 0.145, np.abs(along) - 0.145, 0.115, 0.115), (158, 212, 244))
    brush.fill(box(*_at(brush, 0.55, 0.46), 0.22, 0.27), (150, 106, 72))
    brush.fill(box(*_at(brush, 0.55, 0.46), 0.17, 0.22), (246, 240, 228))
    brush.fill(disc(*_at(brush, 0.55, 0.46), 0.1), (226, 130, 110))
    brush.fill(box(*_at(brush, 0, HORIZON + 0.03), 1.2, 0.05), WHITE)
    for y in (-0.5, -0.64, -0.82):
        ground.fill(box(*_at(ground, 0, y), 1.2, 0.012), (160, 110, 70), 0.6)


def _sunset(brush: Brush, ground: Brush) -> None:
    brush.fill(disc(*_at(brush, 0.0, HORIZON + 0.1), 0.36), (255, 236, 150))
    for x, y, width in ((-0.5, 0.5, 0.4), (0.6, 0.32, 0.32), (0.3, 0.74, 0.3)):
        brush.fill(box(*_at(brush, x, y), width, 0.035, 0.035), (255, 190, 160), 0.7)
    _hill(brush, -0.85, 0.5, 0.22, (132, 62, 104))
    _hill(brush, 0.85, 0.6, 0.3, (120, 56, 100))


def _city(brush: Brush, ground: Brush) -> None:
    towers = ((-0.85, 0.2, 0.7), (-0.42, 0.18, 1.0), (-0.02, 0.16, 0.56), (0.4, 0.2, 0.86), (0.84, 0.18, 0.6))
    above = brush.y - np.round(brush.y * 5) * 0.2  # offset from the nearest row of windows
    for x, width, height in towers:
        brush.fill(box(*_at(brush, x, HORIZON), width, height), (142, 158, 188))
        windows = box(np.abs(brush.x - x) - width / 2.2, above, 0.045, 0.055)
        inside = box(*_at(brush, x, HORIZON), width - 0.03, height - 0.06)
        brush.fill(np.maximum(windows, inside), (226, 234, 208))
    ground.fill(box(*_at(ground, 0, HORIZON), 1.2, 0.06), (196, 198, 204))
    for x in (-0.75, -0.25, 0.25, 0.75):
        ground.fill(box(*_at(ground, x, -0.82), 0.14, 0.025), (240, 236, 214))


class Place(NamedTuple):
    """One background: colors from the top to the horizon, and from there to the bottom, and things on them."""

    sky: tuple[Color, Color]
    ground: tuple[Color, Color]
    rise: float
    """Height of the ground in the middle above that at the sides."""
    clashes: tuple[str, ...]
    """Colors that are hard to see here: no figure has them."""
    things: Callable[[Brush, Brush], None] = lambda brush, ground: None
    """Paints things in front of the sky and on the ground."""


PLACES: dict[str, Place] = {
    "meadow": Place(((104, 184, 246), (206, 236, 252)), ((126, 196, 92), (84, 164, 70)), 0.06, ("green",), _meadow),
    "beach": Place(((120, 202, 246), (222, 242, 250)), ((240, 216, 164), (230, 200, 140)), 0.0, ("yellow",), _beach),
    "night": Place(((14, 18, 52), (46, 60, 120)), ((34, 58, 82), (20, 38, 60)), 0.05, ("black",), _night),
    "snow": Place(((158, 190, 224), (214, 228, 242)), ((244, 248, 252), (220, 230, 244)), 0.08, ("white",), _snow),
    "desert": Place(
        ((250, 202, 138), (255, 232, 186)),
        ((236, 184, 112), (214, 152, 84)),
        -0.06,
        ("orange", "yellow", "brown"),
        _desert,
    ),
    "sea": Place(
        ((64, 176, 222), (20, 92, 160)), ((196, 184, 146), (150, 142, 122)), 0.06, ("blue", "turquoise"), _sea
    ),
    "room": Place(((250, 232, 204), (244, 220, 188)), ((196, 142, 92), (176, 122, 76)), 0.0, ("brown", "white"), _room),
    "sunset": Place(
        ((96, 66, 150), (255, 158, 96)), ((98, 48, 88), (64, 32, 70)), 0.04, ("orange", "purple", "black"), _sunset
    ),
    "city": Place(((170, 210, 238), (226, 236, 242)), ((128, 132, 142), (106, 110, 120)), 0.0, ("black",), _city),
    "gray": Place(((208, 210, 214), (188, 190, 196)), ((160, 162, 168), (176, 178, 184)), 0.0, ("white",)),
    "pink": Place(((255, 204, 218), (250, 186, 206)), ((236, 160, 186), (242, 172, 196)), 0.0, ("pink", "red")),
    "yellow": Place(((255, 240, 168), (252, 230, 138)), ((238, 208, 104), (244, 216, 118)), 0.0, ("yellow", "orange")),
}
"""Backgrounds by name."""


@lru_cache(maxsize=32)
def background(name: str, size: int) -> UInt8[np.ndarray, "1 size size 3"]:
    """The picture of a background, drawn once and read-only."""
    place, brush, below = PLACES[name], _whole(size), _whole(size)
    ground = _ground(brush, place)
    _gradient(brush, place.sky, 1.0, HORIZON)
    _gradient(below, place.ground, HORIZON, -1.0)
    place.things(brush, below)
    planes = [above + ground * (under - above) for above, under in zip(brush.color, below.color, strict=True)]
    picture = np.stack(planes, -1) + 0.5
    pixels = np.clip(picture, 0, 255).astype(np.uint8)
    pixels.flags.writeable = False
    return pixels


@lru_cache(maxsize=32)
def sky(name: str, size: int) -> Float32[np.ndarray, "1 size size"]:
    """The part of each pixel that lies above the ground."""
    part = 1 - _ground(_whole(size), PLACES[name])
    part.flags.writeable = False
    return part


def _whole(size: int) -> Brush:
    middle = ((np.arange(size) * 2 + 1) / size - 1).astype(np.float32)
    return Brush(middle[None, None, :], -middle[None, :, None], np.full((1, 1, 1), 2 / size, np.float32))


def _ground(brush: Brush, place: Place) -> Plane:
    height = HORIZON + place.rise * (0.5 - brush.x * brush.x)
    return brush.coverage(brush.y - height)


def _gradient(brush: Brush, colors: tuple[Color, Color], high: float, low: float) -> None:
    part = np.clip((high - brush.y) * (1 / (high - low)), 0, 1)
    for plane, start, end in zip(brush.color, *colors, strict=True):
        plane += start + part * (end - start)
    brush.alpha += 1
