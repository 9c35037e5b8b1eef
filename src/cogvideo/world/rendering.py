"""The pictures of a scene: everything in it, drawn over its background frame by frame."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from cogvideo.config import require
from cogvideo.world.drawing import Brush, Plane, blend, boxes
from cogvideo.world.figures import COLORS, FIGURES, Figure, paint, shard
from cogvideo.world.motion import FOOT, GROUND, TOP, Cast, Play, Track
from cogvideo.world.places import background, sky
from cogvideo.world.scenes import ACTS, ROLLING, Scene

SECONDS = 4.0
"""Time from the first to the last frame of a whole clip."""

RADII = {"small": 0.26, "medium": 0.33, "large": 0.41}
"""Radius of a single figure, in units of half the picture."""

CROWDED = 0.82
"""Size of figures in actions of two, as a share of a single figure's."""

STRING = (150.0, 140.0, 140.0)

DURATIONS = {"slowly": 3.8, "quickly": 2.2}
"""Seconds that an action takes."""

MIN_SIZE, MAX_SIZE = 16, 4096
"""Smallest and largest side of a frame."""


def render(
    scene: Scene, size: int = 64, fps: float = 8.0, num_frames: int = 33
) -> UInt8[np.ndarray, "frames {size} {size} 3"]:
    """Frames of a scene, red, green and blue: frame k shows the moment `k / fps` seconds.

    After `SECONDS`, the picture no longer changes. Every size shows the same picture, antialiased.

    Raises:
        ValueError: `size` is not in [16, 4096], or `fps` or `num_frames` is not positive.
    """
    require(MIN_SIZE <= size <= MAX_SIZE, f"size is {size}, expected {MIN_SIZE} to {MAX_SIZE}")
    require(0 < fps < float("inf"), f"fps is {fps}, expected a positive number")
    require(num_frames > 0, f"num_frames is {num_frames}, expected a positive number")
    moments, which = np.unique(phases(scene, np.arange(num_frames) / fps), return_inverse=True)
    frames = np.repeat(background(scene.background, size), len(moments), 0)  # those before and after are drawn once
    cast = _cast(scene)
    _draw(frames, scene, cast, ACTS[scene.action].play(moments, cast))
    return frames[which]


def phases(scene: Scene, seconds: np.ndarray) -> np.ndarray:
    """Share of the action completed at given moments."""
    return np.clip((seconds - scene.delay) / DURATIONS[scene.speed], 0, 1)


def _cast(scene: Scene) -> Cast:
    directions = ACTS[scene.action].directions
    way = -1.0 if scene.direction in ("left", "down", "counterclockwise") else 1.0
    if not {"left", "right"}.intersection(directions) and len(directions) == 1:
        way = 1.0 if scene.facing == "right" else -1.0
    crowded = CROWDED if scene.other_object else 1.0
    radius, other = RADII[scene.size] * crowded, RADII["medium"] * crowded
    return Cast(way, radius, other, scene.object in ROLLING, scene.relation == "behind", scene.shift)


def _draw(frames: np.ndarray, scene: Scene, cast: Cast, play: Play) -> None:
    """Draw everything over the background, the farthest first."""
    actor = (play.actor, scene.object, scene.colour, cast.radius)
    figures = [actor]
    if play.other is not None:
        other = (play.other, scene.other_object, scene.other_colour, cast.other_radius)
        figures = [actor, other] if play.behind else [other, actor]
    for track, _, _, radius in figures:
        if not play.low:
            _shadow(frames, track, radius)
    if play.hangs:
        _string(frames, play.actor, cast.radius)
    visible = sky(scene.background, frames.shape[1]) if play.low else None
    for track, kind, color, radius in figures:
        _figure(frames, track, FIGURES[kind], color, scene.shading, radius, visible)
    for piece in play.pieces:
        _figure(frames, piece, shard, scene.colour, scene.shading, cast.radius, None)


def _figure(
    frames: np.ndarray,
    track: Track,
    figure: Figure,
    color: str,
    shading: str,
    radius: float,
    visible: np.ndarray | None,
) -> None:
    """Draw a figure in all frames where it is visible."""
    size, unit = frames.shape[1], radius * track.scale
    tall = track.scale * np.maximum(track.stretch, 1 / track.stretch)
    reach = radius * 1.22 * float(tall.max(initial=0))
    seen = (track.scale > 0.02) & (np.abs(track.x) < 1 + reach) & (np.abs(track.y) < 1 + reach)
    numbers = np.flatnonzero(seen)
    for part, where in boxes(size, numbers, track.x[numbers], track.y[numbers], reach, reach):
        which = numbers[part]
        x, y = where.places(size)
        x = (x - _planes(track.x, which)) / _planes(unit / track.stretch, which)
        y = (y - _planes(track.y, which)) / _planes(unit * track.stretch, which)
        cosine, sine = _planes(np.cos(track.angle), which), _planes(np.sin(track.angle), which)
        across, along = cosine * x + sine * y, cosine * y - sine * x
        pixel = (2 / size) / _planes(unit, which)
        brush = Brush(across * _planes(track.facing, which), along, pixel, shading == "outlined")
        paint(brush, figure, COLORS[color], shading, x, y)
        planes, alpha = brush.color, brush.alpha
        if visible is not None:
            mask = where.gather(visible)
            planes, alpha = [plane * mask for plane in planes], alpha * mask
        blend(frames, where, planes, alpha)


def _planes(values: np.ndarray, numbers: np.ndarray | slice) -> Plane:
    """Values of some frames, to be broadcast over the pixels of their boxes."""
    return values[numbers, None, None].astype(np.float32)


def _shadow(frames: np.ndarray, track: Track, radius: float) -> None:
    """A soft shadow on the ground, fainter and smaller the higher the figure is."""
    size, lift = frames.shape[1], track.y - GROUND - FOOT * radius * track.scale * track.stretch
    height = np.clip(lift / 1.2, 0, 1)
    widths = radius * track.scale * (1 - 0.4 * height)
    numbers = np.flatnonzero((widths > 0.01) & (height < 1) & (np.abs(track.x) < 1 + radius))
    if not len(numbers):
        return
    wide = float(widths[numbers].max()) * 1.1
    feet = GROUND + np.minimum(lift, 0)
    for part, where in boxes(size, numbers, track.x[numbers], feet[numbers], wide, wide * 0.3):
        which = numbers[part]
        x, y = where.places(size)
        narrow = _planes(1 / (1.1 * widths[which]), slice(None))
        across = (x - _planes(track.x, which)) * narrow
        along = (y - _planes(feet, which)) * narrow * (1 / 0.28)
        depth = np.maximum(1 - across * across - along * along, 0)
        depth *= _planes(0.42 * (1 - height), which)
        blend(frames, where, [depth * value for value in (16, 14, 40)], depth)


def _string(frames: np.ndarray, track: Track, radius: float) -> None:
    """The string from above the picture that a swinging figure hangs on."""
    size, sine, cosine = frames.shape[1], np.sin(track.angle), np.cos(track.angle)
    hand_x, hand_y = track.x - 0.7 * radius * sine, track.y + 0.7 * radius * cosine
    top_x = track.x - (TOP - track.y) * sine / cosine
    width, height = np.abs(top_x - hand_x).max() / 2 + 0.05, (TOP - hand_y).max() / 2
    numbers = np.arange(len(frames))
    for part, where in boxes(size, numbers, (top_x + hand_x) / 2, (TOP + hand_y) / 2, width, height):
        pivot, end, across, along = (_planes(each, part) for each in (top_x, hand_y, cosine, sine))
        brush = Brush(*where.places(size), np.full((1, 1, 1), 2 / size, np.float32))
        away = np.abs((brush.x - pivot) * across + (brush.y - TOP) * along) - 0.02
        brush.fill(np.maximum(away, end - brush.y), STRING)
        blend(frames, where, brush.color, brush.alpha)
