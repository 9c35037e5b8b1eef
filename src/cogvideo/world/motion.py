"""Actions of the World: positions of things at each moment, as pure functions of the phase, which runs from 0 to 1.

The picture is [-1, 1] wide and high, y upwards. `way` is +1 for actions to the right (or clockwise, or up), -1 for left
(counterclockwise, down): an action to the left is the mirror image of the one to the right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Series = Float[np.ndarray, " frames"]
"""A number for each moment."""

GROUND = -0.62
"""Height of the line that things stand on."""
FOOT = 0.95
"""Distance from a figure's center to the ground it stands on, in radii."""
TOP = 1.15
"""Height from which swinging things hang, just above the picture."""


class Track:
    """The path of a figure; constants apply at all moments.

    Args:
        phase: the moments.
        x: its center, to the right.
        y: its center, upwards.
        angle: its rotation counterclockwise, in radians.
        scale: its size as a multiple of its radius.
        stretch: factor on its height, and the inverse on its width: below 1, it is squashed.
        facing: +1 where it faces right, -1 where it faces left.
    """

    def __init__(
        self,
        phase: Series,
        x: Series | float,
        y: Series | float,
        angle: Series | float = 0.0,
        scale: Series | float = 1.0,
        stretch: Series | float = 1.0,
        facing: Series | float = 1.0,
    ) -> None:
        values = (x, y, angle, scale, stretch, facing)
        series = (np.broadcast_to(np.asarray(value, float), phase.shape) for value in values)
        self.x, self.y, self.angle, self.scale, self.stretch, self.facing = series


class Play(NamedTuple):
    """Figures of a clip."""

    actor: Track
    other: Track | None = None
    pieces: tuple[Track, ...] = ()
    """Pieces of the actor after it has burst."""
    hangs: bool = False
    """A string holds the actor from above."""
    low: bool = False
    """The actor moves behind the horizon, as sun and moon do."""
    behind: bool = False
    """The actor is farther away than the other figure."""


class Cast(NamedTuple):
    """Facts about the figures that an action needs; radii are in units of the picture."""

    way: float
    """+1 or -1, see above; for actions without direction, the side that the figure faces."""
    radius: float
    other_radius: float
    rolls: bool
    """The actor is round: it turns as it moves along the ground."""
    behind: bool
    """The actor passes behind the other figure, not in front of it."""
    shift: float
    """Position in the picture, from -1 to 1; a little variety between clips."""


Action = Callable[[Series, Cast], Play]


def glide(phase: Series, times: tuple[float, ...], values: tuple[float, ...]) -> Series:
    """Values at given times, with smooth transitions between them that start and end at rest."""
    number = np.clip(np.searchsorted(times, phase, side="right") - 1, 0, len(times) - 2)
    start, end = np.array(times)[number], np.array(times)[number + 1]
    part = np.clip((phase - start) / (end - start), 0, 1)
    part = part * part * (3 - 2 * part)
    low, high = np.array(values)[number], np.array(values)[number + 1]
    return low + part * (high - low)


def leaps(phase: Series, times: tuple[float, ...], heights: tuple[float, ...]) -> Series:
    """Height above the ground: a parabola between each pair of neighboring times, 0 before and after."""
    height = np.zeros_like(phase)
    for start, end, most in zip(times[:-1], times[1:], heights, strict=True):
        part = (phase - start) / (end - start)
        height = np.maximum(height, 4 * most * part * (1 - part))
    return height


def squash(phase: Series, times: tuple[float, ...], depth: float = 0.17, width: float = 0.06) -> Series:
    """The stretch of something soft that touches the ground at these times."""
    dips = (np.maximum(0.0, 1 - ((phase - time) / width) ** 2) for time in times)
    return 1 - depth * np.sum(list(dips), axis=0)


def standing(radius: float, stretch: Series | float = 1.0, scale: Series | float = 1.0) -> Series | float:
    """Height of the center of a figure that stands on the ground."""
    return GROUND + FOOT * radius * stretch * scale


def outside(radius: float) -> float:
    """Position of a figure that has just left the picture."""
    return 1.08 + 1.15 * radius


def _rolling(cast: Cast, x: Series) -> Series | float:
    """The angle of something round that has rolled to x without slipping."""
    return -x / (FOOT * cast.radius) if cast.rolls else 0.0


# One figure


def bounce(phase: Series, cast: Cast) -> Play:
    """Comes in along the ground, bounces twice and leaves on the other side."""
    times = (0.24, 0.5, 0.74)
    x = cast.way * np.interp(phase, (0, 1), (-0.95, outside(cast.radius)))
    stretch = squash(phase, times)
    y = standing(cast.radius, stretch) + leaps(phase, times, (0.75, 0.5))
    return Play(Track(phase, x, y, _rolling(cast, x), stretch=stretch, facing=cast.way))


def arc(phase: Series, cast: Cast) -> Play:
    """Rises behind the horizon, crosses the sky and sets."""
    turn = np.pi * (0.02 + 0.96 * phase)
    x = -0.62 * cast.way * np.cos(turn)
    y = -0.42 + 0.95 * np.sin(turn)
    return Play(Track(phase, x, y, -0.35 * x, facing=cast.way), low=True)


def burst(phase: Series, cast: Cast) -> Play:
    """Grows in three puffs, trembles and bursts."""
    end = 0.68
    scale = glide(phase, (0, 0.12, 0.2, 0.34, 0.42, 0.56, 1), (0.65, 0.88, 0.82, 1.15, 1.08, 1.45, 1.5))
    tremble = 0.03 * np.sin(phase * 150) * ((phase > 0.5) & (phase < end))
    x, y = 0.35 * cast.shift, standing(cast.radius, scale=scale) + 0.12
    whole = Track(phase, x + tremble, y, scale=np.where(phase < end, scale, 0.0), facing=cast.way)
    return Play(whole, pieces=tuple(_piece(phase, cast, end, number) for number in range(9)))


def _piece(phase: Series, cast: Cast, start: float, number: int) -> Track:
    """One of the pieces that fly off in all directions, fall and vanish."""
    since, turn = np.maximum(phase - start, 0) / (1 - start), 2 * np.pi * (number + 0.3) / 9
    speed = 0.75 + 0.35 * (number % 3)
    x = 0.35 * cast.shift + np.cos(turn) * (cast.radius * 0.7 + since * speed)
    y = GROUND + cast.radius * 1.4 + 0.12 + np.sin(turn) * (cast.radius * 0.7 + since * speed) - 1.1 * since**2
    scale = np.where(phase < start, 0.0, (0.3 + 0.05 * (number % 4)) * (1 - since))
    return Track(phase, x, y, angle=6 * since, scale=scale)


def topple(phase: Series, cast: Cast) -> Play:
    """Leaps up, spins around once, lands and falls over."""
    spin = -cast.way * 2 * np.pi * glide(phase, (0.04, 0.56), (0, 1))
    fallen = np.clip((phase - 0.66) / 0.2, 0, 1) ** 2
    rebound = leaps(phase, (0.86, 0.98), (0.18,))
    fall = -cast.way * np.pi / 2 * (fallen - rebound)
    stretch = squash(phase, (0.04, 0.6), 0.18)
    y = standing(cast.radius, stretch) + leaps(phase, (0.06, 0.58), (0.55,))
    x = 0.3 * cast.shift - 0.25 * cast.way + cast.way * cast.radius * 0.9 * fallen
    return Play(Track(phase, x, y, spin + fall, stretch=stretch, facing=cast.way))


def hop(phase: Series, cast: Cast) -> Play:
    """Crosses the picture in three hops."""
    times = (0.04, 0.35, 0.66, 0.97)
    stretch = squash(phase, times)
    steps = (-0.72, -0.24, 0.24, 0.72)
    x = cast.way * np.interp(phase, times, steps)
    y = standing(cast.radius, stretch) + leaps(phase, times, (0.55, 0.55, 0.55))
    return Play(Track(phase, x, y, stretch=stretch, facing=cast.way))


def drop(phase: Series, cast: Cast) -> Play:
    """Falls from above, bounces lower and lower and comes to rest."""
    times = (0.24, 0.5, 0.72, 0.9)
    falling = 1.22 * np.maximum(0.0, 1 - (phase / times[0]) ** 2)
    stretch = squash(phase, times[:3], 0.2)
    y = standing(cast.radius, stretch) + falling + leaps(phase, times, (0.75, 0.38, 0.16))
    x = cast.shift * 0.25 + 0.3 * cast.shift * np.minimum(phase / times[-1], 1)
    return Play(Track(phase, x, y, stretch=stretch, facing=-cast.way))


def launch(phase: Series, cast: Cast) -> Play:
    """Jumps twice on the spot, each time higher, then shoots up and out of the picture."""
    times = (0.05, 0.25, 0.5)
    start = 0.6
    crouch = 0.35 * glide(phase, (0.5, start - 0.02, start + 0.06), (0, 1, -0.5)) * (phase < 1)
    stretch = squash(phase, times) - crouch
    rising = np.maximum(phase - start, 0) / (1 - start)
    y = standing(cast.radius, stretch) + leaps(phase, times, (0.22, 0.5)) + (1.75 + 1.2 * cast.radius) * rising**1.6
    return Play(Track(phase, 0.45 * cast.shift, y, stretch=stretch, facing=cast.way))


def loop(phase: Series, cast: Cast) -> Play:
    """Flies across the picture and does a loop in the middle."""
    turn = 2 * np.pi * glide(phase, (0.26, 0.74), (0, 1))
    along = np.interp(phase, (0, 0.3, 0.7, 1), (-0.95, -0.12, 0.12, outside(cast.radius)))
    x = cast.way * (along + 0.42 * np.sin(turn))
    y = -0.28 + 0.06 * cast.shift + 0.42 * (1 - np.cos(turn))
    return Play(Track(phase, x, y, cast.way * turn, facing=cast.way))


def visit(phase: Series, cast: Cast) -> Play:
    """Comes in, stops in the middle, nods and goes back out as it came."""
    times, middle = (0, 0.36, 0.62, 1), 0.1 * cast.shift
    x = cast.way * glide(phase, times, (-0.95, middle, middle, -outside(cast.radius)))
    stretch = squash(phase, (0.44, 0.55), 0.2, 0.05)
    return Play(Track(phase, x, standing(cast.radius, stretch), _rolling(cast, x), stretch=stretch, facing=cast.way))


def swing(phase: Series, cast: Cast) -> Play:
    """Hangs from a string, held to one side, and swings less and less until it is still."""
    turn = -0.62 * cast.way * np.cos(3.5 * np.pi * phase) * (1 - 0.8 * phase)
    length = TOP + 0.12
    x, y = length * np.sin(turn) + 0.1 * cast.shift, TOP - length * np.cos(turn)
    return Play(Track(phase, x, y, turn, facing=cast.way), hangs=True)


def vanish(phase: Series, cast: Cast) -> Play:
    """Shrinks away on one side, and appears on the other."""
    scale = glide(phase, (0, 0.12, 0.4, 0.6, 0.88, 1), (0.85, 1, 0, 0, 1.1, 1))
    x = cast.way * np.where(phase < 0.5, -0.52, 0.52)
    turn = -cast.way * np.pi * glide(phase, (0.12, 0.4, 0.6, 0.88), (0, 1, 1, 2))
    y = standing(cast.radius) + 0.35 * glide(phase, (0.12, 0.4, 0.6, 0.88), (0, 1, 1, 0))
    return Play(Track(phase, x, y, turn, scale, facing=cast.way))


def zigzag(phase: Series, cast: Cast) -> Play:
    """Sways from side to side as it sinks like a leaf or, in reverse, as it rises like a bubble."""
    along = 1 - phase if cast.way > 0 else phase
    sway = np.sin(5 * np.pi * along) * np.sqrt(np.maximum(0.0, 1 - along**4))
    high = 0.98 if cast.way < 0 else outside(cast.radius)
    y = high + np.minimum(along / 0.98, 1) * (standing(cast.radius) - high)
    return Play(Track(phase, 0.2 * cast.shift + 0.5 * sway, y, -0.4 * sway))


# Two figures


def meet(phase: Series, cast: Cast) -> Play:
    """Two figures come from both sides and meet; the actor turns back."""
    gap = cast.radius + cast.other_radius + 0.02
    middle = (cast.radius - cast.other_radius) / 2
    stretch = squash(phase, (0.42,), 0.15)
    x = glide(phase, (0, 0.42, 0.58, 1), (-0.95, middle - gap / 2, middle - gap / 2 - 0.05, -outside(cast.radius)))
    facing = cast.way * np.where(phase < 0.55, 1.0, -1.0)
    y = standing(cast.radius, stretch)
    actor = Track(phase, cast.way * x, y, _rolling(cast, cast.way * x), stretch=stretch, facing=facing)
    there = glide(phase, (0, 0.42, 0.55, 1), (0.95, middle + gap / 2, middle + gap / 2 + 0.04, 0.3))
    return Play(actor, _stands(phase, cast, cast.way * there, stretch, -cast.way))


def _stands(
    phase: Series,
    cast: Cast,
    x: Series | float,
    stretch: Series | float = 1.0,
    facing: float = 1.0,
    angle: Series | float = 0.0,
) -> Track:
    """The other figure, upright on the ground."""
    return Track(phase, x, standing(cast.other_radius, stretch), angle, stretch=stretch, facing=facing)


def chase(phase: Series, cast: Cast) -> Play:
    """The other figure hops away and out of the picture, the actor runs after it and falls behind."""
    x = cast.way * glide(phase, (0, 0.92), (-0.95, 0.25))
    flight = np.interp(phase, (0, 0.72), (-0.95 + cast.radius + cast.other_radius + 0.08, outside(cast.other_radius)))
    times = (0.0, 0.18, 0.36, 0.54, 0.72)
    y = standing(cast.other_radius) + leaps(phase, times, (0.28,) * 4)
    actor = Track(phase, x, standing(cast.radius), _rolling(cast, x), facing=cast.way)
    return Play(actor, Track(phase, cast.way * flight, y, facing=cast.way))


def overtake(phase: Series, cast: Cast) -> Play:
    """The actor passes a standing figure, behind or in front of it, and leaves on the other side."""
    x = cast.way * np.interp(phase, (0, 1), (-0.95, outside(cast.radius)))
    depth = 0.16 if cast.behind else -0.16
    y = standing(cast.radius) + depth
    actor = Track(phase, x, y, _rolling(cast, x), facing=cast.way)
    return Play(actor, _stands(phase, cast, 0.1 * cast.shift, facing=-cast.way), behind=cast.behind)


def jump(phase: Series, cast: Cast) -> Play:
    """The actor runs up, jumps over the other figure and goes on a little."""
    times, reach = (0.3, 0.7), 0.6
    x = cast.way * np.interp(phase, (0, *times, 0.9, 1), (-0.95, -reach + 0.08, reach - 0.08, reach, reach + 0.06))
    stretch = squash(phase, times)
    height = 2 * FOOT * cast.other_radius + 0.3
    y = standing(cast.radius, stretch) + leaps(phase, times, (height,))
    actor = Track(phase, x, y, _rolling(cast, x), stretch=stretch, facing=cast.way)
    return Play(actor, _stands(phase, cast, 0.0, squash(phase, (0.5,), 0.18, 0.16), -cast.way))


def push(phase: Series, cast: Cast) -> Play:
    """The actor comes in, runs into the other figure and pushes it out of the picture."""
    gap, hit = 0.88 * (cast.radius + cast.other_radius), 0.34
    end = outside(cast.other_radius)
    there = np.interp(phase, (0, hit, 0.95), (0.12, 0.12, end))
    x = np.interp(phase, (0, hit, 0.95, 1), (-0.95, 0.12 - gap, end - gap, end - gap))
    actor = Track(phase, cast.way * x, standing(cast.radius), _rolling(cast, cast.way * x), facing=cast.way)
    tilt = -cast.way * 0.12 * (phase > hit)
    return Play(actor, _stands(phase, cast, cast.way * there, facing=-cast.way, angle=tilt))


def orbit(phase: Series, cast: Cast) -> Play:
    """The actor goes round the other figure, which floats in the middle, almost one and a half times."""
    turn = cast.way * 2 * np.pi * 1.4 * phase + 2 * np.pi * (0.75 + 0.1 * cast.shift)
    x, y = 0.66 * np.sin(turn), 0.06 + 0.6 * np.cos(turn)
    middle = Track(phase, 0.0, 0.06 + 0.03 * np.sin(4 * np.pi * phase))
    return Play(Track(phase, x, y, facing=np.where(cast.way * y > 0, 1.0, -1.0)), middle)
