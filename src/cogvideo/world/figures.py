"""Figures of the World: each paints itself into [-1, 1], facing right and standing at -0.95."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cogvideo.world.drawing import Brush, Color, Plane, disc, ellipse, polygon, segment
from cogvideo.world.drawing import box as rectangle
from cogvideo.world.drawing import star as five_points

COLORS: dict[str, Color] = {
    "red": (224, 52, 48),
    "orange": (250, 140, 24),
    "yellow": (253, 216, 53),
    "green": (52, 162, 72),
    "turquoise": (40, 200, 192),
    "blue": (44, 96, 222),
    "purple": (140, 74, 204),
    "pink": (250, 136, 188),
    "brown": (134, 82, 46),
    "white": (250, 250, 248),
    "black": (50, 48, 58),
}
"""Colors in full light."""

SHADINGS = ("soft", "flat", "outlined")
"""Round with a highlight; in two tones; in one tone with a dark outline."""

INK: Color = (38, 32, 44)
CREAM: Color = (250, 238, 214)
GLASS: Color = (196, 230, 250)


Figure = Callable[[Brush, Plane, Plane, Color], None]


def toward(color: Color, goal: float, part: float) -> Color:
    """A color shifted toward black (`goal` 0) or white (255)."""
    red, green, blue = (value + part * (goal - value) for value in color)
    return red, green, blue


def darker(color: Color) -> Color:
    """The color of a figure's secondary parts; black gets lighter instead."""
    return toward(color, 255, 0.22) if sum(color) < 240 else toward(color, 0, 0.25)


def lighter(color: Color) -> Color:
    """The color of marks on a figure; white gets darker instead."""
    return toward(color, 0, 0.14) if sum(color) > 720 else toward(color, 255, 0.55)


def _eyes(brush: Brush, x: float, y: float, apart: float, main: Color) -> None:
    """Two dots that look to the right."""
    ink = CREAM if sum(main) < 240 else INK
    brush.fill(disc(np.abs(brush.x - x) - apart, brush.y - y, 0.1), ink)


def ball(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    """A ball with a light band that shows it rolling."""
    whole = disc(x, y, 0.95)
    brush.fill(whole, main)
    brush.fill(np.maximum(whole + 0.02, np.abs(y) - 0.2), lighter(main))


def box(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    brush.fill(rectangle(x, y + 0.15, 0.8, 0.8, 0.12), main)
    brush.fill(rectangle(x, y - 0.5, 0.92, 0.24, 0.1), darker(main))
    brush.fill(rectangle(x, y + 0.1, 0.16, 0.84), lighter(main))
    bow = ellipse(np.abs(x) - 0.22, y - 0.84, 0.22, 0.14)
    brush.fill(bow, lighter(main))


def star(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    brush.fill(five_points(x, y + 0.05, 1.02, 0.5) - 0.1, main)
    _eyes(brush, 0.08, 0.02, 0.2, main)


def heart(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    x = np.abs(x)
    lobe = disc(x - 0.44, y - 0.32, 0.53)
    tip = polygon(x, y, (-0.4, 0.3), (0.0, 0.72), (0.44, 0.85), (0.83, -0.04), (0.0, -0.98), (-0.3, -0.7))
    brush.fill(np.minimum(lobe, tip), main)


def pyramid(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    whole = np.maximum(polygon(x, y, (-0.98, -0.92), (0.0, 0.94), (0.98, -0.92)), y - 0.88)
    whole -= 0.04
    brush.fill(whole, main)
    brush.fill(np.maximum(whole, 0.3 - x - (y + 0.95) * 0.16), darker(main))


def ring(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    """A ring with four light marks that show it rolling."""
    around = np.abs(disc(x, y, 0.7)) - 0.26
    brush.fill(around, main)
    marks = np.minimum(np.abs(x + y), np.abs(x - y)) - 0.16
    brush.fill(np.maximum(around + 0.03, marks), lighter(main))


def flower(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    green: Color = (58, 140, 60)
    brush.fill(rectangle(x, y + 0.5, 0.08, 0.46), green)
    x = np.abs(x)
    brush.fill(ellipse(x - 0.3, y + 0.76 - x * 0.4, 0.3, 0.14), green)
    y = np.abs(y - 0.22)
    petals = np.minimum(disc(x - 0.46, y, 0.33), disc(x - 0.23, y - 0.4, 0.33))
    brush.fill(petals, main)
    heart_color: Color = CREAM if COLORS["yellow"] == main else (255, 208, 64)
    brush.fill(disc(x, y, 0.27), heart_color)


def fish(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    tail = polygon(x, np.abs(y), (-0.84, 0.0), (-1.06, 0.54), (-0.94, 0.62), (-0.3, 0.0))
    brush.fill(tail - 0.04, darker(main))
    brush.fill(polygon(x, y, (-0.35, 0.4), (-0.15, 0.85), (0.35, 0.45)) - 0.04, darker(main))
    body = ellipse(x - 0.18, y, 0.82, 0.58)
    brush.fill(body, main)
    brush.fill(np.maximum(body, np.abs(x + 0.05) - 0.1), lighter(main))
    brush.fill(disc(x - 0.58, y - 0.14, 0.17), (255, 255, 255))
    brush.fill(disc(x - 0.62, y - 0.14, 0.1), INK)


def bird(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    brush.fill(segment(np.abs(x + 0.05), y, (0.2, -0.6), (0.2, -0.9), 0.06), (214, 120, 30))
    brush.fill(polygon(x, y, (-1.05, 0.2), (-0.95, 0.4), (-0.4, 0.1), (-0.5, -0.3)) - 0.04, darker(main))
    brush.fill(polygon(x, y, (0.75, 0.12), (0.7, 0.5), (1.1, 0.28)) - 0.03, (246, 158, 40))
    body = ellipse(x + 0.1, y + 0.15, 0.75, 0.6)
    brush.fill(np.minimum(body, disc(x - 0.36, y - 0.34, 0.47)), main)
    brush.fill(ellipse(x + 0.25, y + 0.12, 0.4, 0.28), darker(main))
    brush.fill(disc(x - 0.5, y - 0.42, 0.16), (255, 255, 255))
    brush.fill(disc(x - 0.54, y - 0.42, 0.095), INK)


def car(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    brush.fill(rectangle(x + 0.1, y - 0.22, 0.6, 0.42, 0.26), main)
    brush.fill(rectangle(x, y + 0.28, 1.05, 0.38, 0.2), main)
    brush.fill(rectangle(np.abs(x + 0.1) - 0.26, y - 0.24, 0.2, 0.22, 0.08), GLASS)
    brush.fill(disc(x - 0.92, y + 0.2, 0.1), (255, 240, 150))
    wheel, high = np.abs(x) - 0.55, y + 0.65
    brush.fill(disc(wheel, high, 0.3), INK)
    brush.fill(disc(wheel, high, 0.13), (206, 206, 212))


def balloon(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    brush.fill(segment(x, y, (0.0, -0.6), (0.07, -0.98), 0.035), INK)
    brush.fill(polygon(x, y, (-0.16, -0.74), (0.0, -0.5), (0.16, -0.74)), darker(main))
    taper = 1 + 0.16 * (0.2 - y)
    brush.fill(ellipse(x * taper, y - 0.2, 0.72, 0.82), main)


def mushroom(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    brush.fill(rectangle(x, y + 0.45, 0.36, 0.5, 0.16), CREAM)
    _eyes(brush, 0.06, -0.42, 0.15, CREAM)
    cap = np.maximum(ellipse(x, y + 0.1, 1.0, 1.0), -y - 0.08) - 0.03
    brush.fill(cap, main)
    spots = np.minimum(disc(np.abs(x) - 0.52, y - 0.2, 0.15), disc(x, y - 0.52, 0.2))
    brush.fill(spots, lighter(main))


def moon(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    whole, bite = disc(x, y, 0.95), disc(x - 0.52, y - 0.16, 0.68)
    brush.fill(np.maximum(whole, -bite), main)
    brush.fill(disc(x + 0.5, y - 0.2, 0.1), CREAM if sum(main) < 240 else INK)


def house(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    brush.fill(rectangle(x - 0.5, y - 0.6, 0.13, 0.3), darker(darker(main)))
    brush.fill(rectangle(x, y + 0.38, 0.72, 0.57, 0.04), main)
    roof = polygon(x, y, (-0.98, 0.1), (0.0, 0.92), (0.98, 0.1)) - 0.05
    brush.fill(roof, darker(darker(main)))
    brush.fill(rectangle(x + 0.32, y + 0.6, 0.2, 0.35, 0.06), lighter(lighter(main)))
    brush.fill(rectangle(x - 0.32, y + 0.36, 0.2, 0.2, 0.04), GLASS)


def tree(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    brush.fill(rectangle(x, y + 0.55, 0.15, 0.4, 0.04), (96, 62, 42))
    sides = disc(np.abs(x) - 0.42, y + 0.02, 0.46)
    brush.fill(np.minimum(sides, disc(x, y - 0.42, 0.55)), main)
    leaves = np.minimum(disc(x + 0.25, y - 0.5, 0.13), disc(x - 0.32, y, 0.13))
    brush.fill(leaves, lighter(main))


FIGURES = {
    each.__name__: each
    for each in (ball, box, star, heart, pyramid, ring, flower, fish, bird, car, balloon, mushroom, moon, house, tree)
}
"""Functions that paint an object in a color, by the object's name."""


def shard(brush: Brush, x: Plane, y: Plane, main: Color) -> None:
    """A piece of something that has burst."""
    brush.fill(polygon(x, y, (-0.8, -0.6), (-0.2, 0.8), (0.9, -0.3)) - 0.1, main)


def paint(brush: Brush, figure: Figure, color: Color, shading: str, x: Plane, y: Plane) -> None:
    """Paint a figure in the coordinates of the brush.

    `x` and `y` are the coordinates before rotation: light always comes from above.
    """
    figure(brush, brush.x, brush.y, color)
    if shading == "soft":
        slope = np.clip(0.30 - 0.24 * y + 0.10 * x, 0, 0.5)
        brush.tint(slope * slope * 1.2, (50, 20, 60))
        gleam = np.maximum(1 - (np.square(x + 0.3) + np.square(y - 0.45)) * 3, 0)
        brush.tint(0.5 * gleam * gleam, (255, 255, 255))
    elif shading == "flat":
        beyond = disc(x + 0.28, y - 0.36, 1.0)
        brush.tint(0.2 * brush.coverage(-beyond), (40, 10, 60))
    else:
        brush.outline(0.1, INK)
