"""Finished clips as files: the frames that make a clip, and its variants."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cogvideo.media.colors import Pixels
from cogvideo.media.images import contact_sheet
from cogvideo.media.video import write_video

Variant = Literal["video", "gif", "webp", "thumbnail", "spritesheet"]
TYPES: dict[Variant, str] = {
    "video": "video/mp4",
    "gif": "image/gif",
    "webp": "image/webp",
    "thumbnail": "image/webp",
    "spritesheet": "image/jpeg",
}
EAGER_VARIANTS: tuple[Variant, ...] = ("video", "thumbnail", "spritesheet")
"""Variants that are written with the clip; others when they are first requested."""
COLUMNS = 8


def kept(done: Collection[int], num_frames: int) -> range:
    """Indices of the frames that make a clip if it ends now: evenly spaced, over the longest time."""
    steps = [2**power for power in range(num_frames.bit_length() + 1)]
    runs = [(step, list(takewhile(set(done).__contains__, range(0, num_frames, step)))) for step in steps]
    step, places = max(runs, key=lambda run: (run[1][-1:], len(run[1])))
    return range(0, len(places) * step, step)


def to_png(frame: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """A frame as PNG."""
    return _saved(frame, "PNG", compress_level=1)


def from_png(content: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """The frame in a PNG written by `to_png`."""
    return np.asarray(Image.open(io.BytesIO(content), formats=("PNG",)).convert("RGB"))


def render(variant: Variant, frames: Pixels, fps: float, record: dict[str, Any]) -> bytes:
    """The content of a variant; those that move also hold the record of how they were made."""
    if variant == "thumbnail":
        return _saved(frames[len(frames) // 2], "WEBP", quality=85)
    if variant == "spritesheet":
        rows = [frames[first : first + COLUMNS] for first in range(0, len(frames), COLUMNS)]
        return _saved(contact_sheet(rows, COLUMNS, gap=0), "JPEG", quality=90)
    suffix = "mp4" if variant == "video" else variant
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{suffix}"
        write_video(path, frames, fps, {"comment": json.dumps(record, ensure_ascii=variant == "webp")})
        return path.read_bytes()


def _saved(pixels: UInt8[np.ndarray, "height width 3"], format: str, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format, **options)
    return content.getvalue()
