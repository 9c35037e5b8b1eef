"""Frames of a file, views of them, and errors: shared by the readers of videos and pictures."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cogvideo.config import InputError, Sides, both, require

TOLERANCE = 0.001
"""Seconds by which a frame may come late: Matroska and WebM round timestamps to milliseconds."""

Content = BinaryIO | BytesIO
"""An open file. BytesIO lacks the name and mode of a BinaryIO."""


@dataclass(frozen=True)
class View:
    """The frame and the background that pictures are fitted to."""

    size: Sides | None = None
    """Width and height of the frame in pixels, or side of a square; None leaves pictures as they are."""
    fit: Literal["crop", "letterbox"] = "crop"
    """Treatment of pictures of another shape: crop to the center, or add bars in the background color."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Red, green and blue under transparent pixels and in bars."""

    def __post_init__(self) -> None:
        is_positive = self.size is None or min(both(self.size)) > 0
        require(is_positive, f"size is {self.size}, expected a positive number of pixels")
        require(self.fit in ("crop", "letterbox"), f"fit is {self.fit!r}, expected crop or letterbox")
        is_color = len(self.background) == 3 and all(0 <= level <= 255 for level in self.background)
        require(is_color, f"background is {self.background}, expected red, green and blue in [0, 255]")

    def fitted(self, width: float, height: float) -> tuple[int, int]:
        """Sides of a picture in the frame, before cropping, in whole pixels; a crop cuts both sides equally.

        Args:
            width: displayed width of the picture, in units of its pixels' height.
            height: height of the picture in its pixels.
        """
        across, down = both(self.size or 0)
        scales = across / width, down / height
        if self.fit == "letterbox":
            return max(1, round(width * min(scales))), max(1, round(height * min(scales)))
        wide, high = width * max(scales), height * max(scales)
        return across + 2 * round((wide - across) / 2), down + 2 * round((high - down) / 2)

    def kept(self, width: float, height: float) -> tuple[float, float]:
        """Sides of the part of a picture that a crop keeps, in units of the picture."""
        across, down = both(self.size or 0)
        if across == down:
            return min(width, height), min(width, height)
        return min(width, height * across / down), min(height, width * down / across)


class ViewedPicture(NamedTuple):
    """Red, green and blue of a picture through a view, and whether the background shows through."""

    pixels: UInt8[np.ndarray, "height width 3"]
    has_alpha: bool


class Shot(NamedTuple):
    """A frame of a file, in the order of time."""

    begin: float
    """Seconds at which it appears."""
    duration: float
    """Seconds until the next one according to the file; 0 if it does not say."""
    see: Callable[[View], ViewedPicture]
    """Converts it to pixels."""

    def in_hundredths(self) -> Shot:
        """The frame, half a hundredth of a second earlier: formats in hundredths may round it that much too late."""
        return self._replace(begin=max(0.0, self.begin - 0.005))


Shots = Generator[Shot, None, None]


class VideoError(InputError):
    """A file or record that cannot be used.

    Args:
        reason: a few fixed words, so that reasons can be counted.
        detail: values that were found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both, so that the error survives pickling between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class NamedErrors:
    """Turn any failure with a file, even a bug in a library, into a VideoError that names the file.

    System failures pass through, such as a lost network drive or too many open files: trying again may help.

    A class, because a generator that replaces an error keeps the stack of the old one, with decoded frames, in a cycle.
    """

    def __init__(self, file: Path | Content) -> None:
        self._names = [str(file)] if isinstance(file, Path) else []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, MemoryError | AssertionError):
            return
        from av.error import FFmpegError

        reason = "cannot be decoded"
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, VideoError):
            reason, detail = error.reason, error.detail
        elif isinstance(error, OSError) and error.errno is not None and not isinstance(error, FFmpegError):
            if not isinstance(error, _OF_NAMES) and error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
                return
            reason = "file is missing" if isinstance(error, FileNotFoundError) else "cannot be opened"
        raise VideoError(reason, ": ".join([*self._names, detail] if detail else self._names)) from error


_OF_NAMES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
