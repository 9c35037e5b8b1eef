"""Frames of an item: read or rendered, at one rate and size, on a background that its caption may name."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Annotated, Literal, NamedTuple

import numpy as np
from einops import reduce
from jaxtyping import UInt8

from cogvideo import world
from cogvideo.config import InputError, Limit, Limited, Positive, Sides, both, joined, require
from cogvideo.data.sources import Item
from cogvideo.data.tars import Member
from cogvideo.media.colors import Pixels
from cogvideo.media.video import MAX_FPS, VideoError, read_video

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (250, 215, 70),
    "green": (70, 170, 90),
    "blue": (50, 110, 220),
    "light blue": (150, 210, 245),
    "purple": (130, 70, 180),
    "pink": (250, 160, 200),
    "brown": (120, 80, 50),
    "gray": (140, 140, 140),
    "black": (15, 15, 15),
    "white": (255, 255, 255),
}
"""Background colors for clips with alpha, by their names in captions."""

_SIDES = re.compile(r"\b(?:[Ll]eft|[Rr]ight)(?=\b|wards?\b)")
_OTHER_SIDES = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


@dataclass(frozen=True)
class FrameSettings(Limited):
    """Rate, size and background of the frames of clips."""

    fps: Annotated[Positive[float], Limit(lambda fps: fps <= MAX_FPS, f"at most {MAX_FPS}")] = 8.0
    """Frames kept per second. Training takes its lower frame rates from these."""
    size: Sides | None = None
    """Width and height of a frame in pixels, such as 128x72, or side of a square; the model's by default."""
    fit: Literal["crop", "letterbox"] = "crop"
    """Treatment of clips of another shape: crop to the center, or add bars in the background color."""
    max_seconds: Positive[float] = 16.0
    """Maximum length in seconds; longer clips are cut. `start` and `end` in a table select another part."""
    min_frames: Positive[int] = 2
    """Minimum number of frames; shorter clips are rejected. 1 also allows images."""
    loop_to: Annotated[float, Limit(lambda seconds: 0 <= seconds < math.inf, "0 or more seconds")] = 0.0
    """Length in seconds to which shorter clips are repeated, for looping animations."""
    background: str = "white"
    """Color name, or `random`, for transparent areas and bars. With `random`, copies of a clip get different colors:
    twelve copies use all twelve, and eleven leave one that is never seen."""
    background_template: str = ""
    """Caption of clips with alpha, such as "{caption}, on {article} {background} background"; empty for no change."""
    smallest: Annotated[float, Limit(lambda share: 0.1 <= share <= 1, "a share in [0.1, 1]")] = 1.0
    """Minimum size of clips with alpha, as a share of the frame; below 1, their size and position are random."""
    mirror: bool = False
    """Mirror every second copy of a clip with alpha whose caption says left or right, and swap these words."""
    seed: int = 0
    """Seed of all random choices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_positive = self.size is None or min(both(self.size)) > 0
        require(is_positive, f"size is {self.size}, expected a positive number")
        expected = f"expected random or one of {', '.join(BACKGROUNDS)}"
        require(self.background in ("random", *BACKGROUNDS), f"background is {self.background!r}, {expected}")
        template = self.background_template
        expected = "expected {caption}, and {article} {background} if you like"
        wrong = f"background_template is {template!r}, {expected}"
        try:
            require(not template or "a cat" in on_background("a cat", "red", template), wrong)
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise InputError(wrong) from error

    @property
    def max_frames(self) -> int:
        """Frames of the longest clip."""
        return max(1, round(self.max_seconds * self.fps))


class Pictures(NamedTuple):
    """An item as pixels; the attributes include the background that it was put on."""

    frames: Pixels
    captions: tuple[str, ...]
    attributes: dict[str, str]


def read_item(item: Item, settings: FrameSettings) -> Pictures:
    """The frames of an item; equal arguments give equal frames. Without a size, frames keep the file's."""
    if isinstance(item.media, world.Scene):
        require(isinstance(settings.size, int), f"size is {settings.size}, expected a square for scenes of the World")
        assert isinstance(settings.size, int)
        num_frames = min(settings.max_frames, round(world.SECONDS * settings.fps) + 1)
        _check_length(num_frames, settings)
        frames = world.render(item.media, settings.size, settings.fps, num_frames)
        return Pictures(frames, item.captions, item.attributes)
    background, size = background_of(item, settings), settings.size
    side, top, left = (None, 0, 0) if size is None else _place(item, settings, size)
    read = partial(
        read_video,
        BytesIO(item.media.read()) if isinstance(item.media, Member) else item.media,
        settings.fps,
        fit=settings.fit,
        start=item.start,
        end=item.end,
        max_frames=settings.max_frames,
        loop_to=settings.loop_to,
        background=BACKGROUNDS[background],
    )
    frames, has_alpha = read(side)
    _check_length(len(frames), settings)
    if not has_alpha:
        return Pictures(frames if side == size else read(size).frames, item.captions, item.attributes)
    captions = item.captions
    if settings.mirror and item.copy % 2 and any(_SIDES.search(caption) for caption in captions):
        frames = frames[:, :, ::-1]
        captions = tuple(_SIDES.sub(lambda found: _OTHER_SIDES[found[0]], caption) for caption in captions)
    if size is not None and side != size:
        width, height = both(size)
        canvas = np.empty((len(frames), height, width, 3), np.uint8)
        canvas[:] = BACKGROUNDS[background]
        canvas[:, top : top + frames.shape[1], left : left + frames.shape[2]] = frames
        frames = canvas
    captions = tuple(on_background(caption, background, settings.background_template) for caption in captions)
    return Pictures(np.ascontiguousarray(frames), captions, item.attributes | {"background": background})


def shrink(frames: UInt8[np.ndarray, "frames high_height high_width 3"], ratio: int) -> Pixels:
    """Frames reduced by `ratio`: means of squares of pixels."""
    pattern = "frames (rows down) (columns across) colors -> frames rows columns colors"
    return reduce(frames.astype(np.float32), pattern, "mean", down=ratio, across=ratio).round().astype(np.uint8)


def _check_length(num_frames: int, settings: FrameSettings) -> None:
    if num_frames < settings.min_frames:
        expected = f"expected at least {settings.min_frames}"
        raise VideoError("too short", f"{num_frames} frames at {settings.fps:g} per second, {expected}")


def background_of(item: Item, settings: FrameSettings) -> str:
    """Name of the background color of an item with alpha; a random one depends only on the item and the seed."""
    if settings.background != "random":
        return settings.background
    first = int.from_bytes(_key(item.id.removesuffix(f"~{item.copy}"), settings)[:8], "little")
    return list(BACKGROUNDS)[(first + item.copy) % len(BACKGROUNDS)]


def _place(item: Item, settings: FrameSettings, size: Sides) -> tuple[Sides, int, int]:
    """Size of a clip with alpha in its frame, and its first row and column."""
    if settings.smallest == 1:
        return size, 0, 0
    random = np.random.default_rng(list(_key(item.id, settings)))
    share, (width, height) = random.uniform(settings.smallest, 1), both(size)
    across, down = round(width * share), round(height * share)
    top, left = random.integers(0, [height - down, width - across], endpoint=True)
    return joined(across, down), int(top), int(left)


def _key(id: str, settings: FrameSettings) -> bytes:
    return hashlib.sha256(f"{settings.seed} {id}".encode()).digest()


def on_background(caption: str, background: str, template: str) -> str:
    """The caption of a clip with alpha on a background of this color; an empty template leaves it unchanged."""
    if not template:
        return caption
    article = "an" if background[0] in "aeiou" else "a"
    return template.format(caption=caption, article=article, background=background)
