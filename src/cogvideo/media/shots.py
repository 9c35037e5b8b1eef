"""A frame of a file and how it is seen, and what becomes of errors: what readers of videos and of pictures share."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cogvideo.config import InputError, require

GRACE = 0.001
"""Seconds by which a frame may come late: Matroska and WebM round timestamps to milliseconds."""


@dataclass(frozen=True)
class View:
    """How pictures are seen: on what, and in what square."""

    size: int | None = None
    """Side of the square in pixels; None leaves pictures as they are."""
    fit: Literal["crop", "letterbox"] = "crop"
    """Treatment of pictures that are not square: crop to the center, or add bars in the background color."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Red, green and blue behind transparent pixels and in bars."""

    def __post_init__(self) -> None:
        require(self.size is None or self.size > 0, f"size is {self.size}, expected a positive number of pixels")
        require(self.fit in ("crop", "letterbox"), f"fit is {self.fit!r}, expected crop or letterbox")
        require(
            len(self.background) == 3 and all(0 <= level <= 255 for level in self.background),
            f"background is {self.background}, expected red, green and blue in [0, 255]",
        )


class Seen(NamedTuple):
    """A picture through a view."""

    pixels: UInt8[np.ndarray, "height width 3"]
    """Red, green and blue."""
    has_alpha: bool
    """Whether the background shows through."""


class VideoError(InputError):
    """A file whose frames cannot be had.

    Args:
        reason: a few fixed words, so that reasons can be counted.
        detail: what exactly was found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both, so that the error survives pickling between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Shot(NamedTuple):
    """A frame of a file, in the order of time."""

    begin: float
    """Seconds at which it appears."""
    duration: float
    """Seconds until the next one as the file says; 0 where it does not."""
    see: Callable[[View], Seen]
    """Convert it to pixels."""


Shots = Generator[Shot, None, None]

Content = BinaryIO | BytesIO
"""An open file. BytesIO lacks the name and mode of a BinaryIO."""


class Naming:
    """Whatever goes wrong with a file becomes a VideoError that names it.

    No generator: where one replaces an error, it keeps the old one's frames in a cycle, and what they decoded.
    """

    def __init__(self, file: Path | Content) -> None:
        self._names = [str(file)] if isinstance(file, Path) else []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, VideoError | OSError) and not _is_systems(error):
            reason, detail = _explained(error)
            raise VideoError(reason, ": ".join([*self._names, detail] if detail else self._names)) from error


def _is_systems(error: Exception) -> bool:
    """Whether the system failed, say a network drive or a full table of open files: trying again may help."""
    ours = (VideoError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return not isinstance(error, ours) and getattr(error, "errno", None) not in (None, errno.ENAMETOOLONG, errno.ELOOP)


def _explained(error: Exception) -> tuple[str, str]:
    """Reason and detail of an error."""
    if isinstance(error, VideoError):
        return error.reason, error.detail
    detail = getattr(error, "strerror", None) or str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return "file is missing" if isinstance(error, FileNotFoundError) else "cannot be opened", detail
    return "cannot be decoded", detail


class Library:
    """Whatever a library raises at a file, be it a mistake of its own, says that the file cannot be decoded.

    Errors of the system stay what they are, but for those that the library itself calls so.

    Args:
        own: types of the library's errors.
    """

    def __init__(self, *own: type[Exception]) -> None:
        self._own = own

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        is_own = isinstance(error, self._own)
        if is_own or (isinstance(error, Exception) and not isinstance(error, _KEPT)):
            detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise VideoError("cannot be decoded", detail) from error


_KEPT = (VideoError, OSError, MemoryError, AssertionError)


def in_hundredths(shot: Shot) -> Shot:
    """A frame of a format that counts hundredths of seconds: rounding made it and its end late by up to half of one."""
    return shot._replace(begin=max(0.0, shot.begin - 0.005))


def fitted_size(width: float, height: float, view: View) -> tuple[int, int]:
    """Sides of a picture in the view's square, before what hangs over is cut, in whole pixels on both sides alike.

    Args:
        width: of the picture as it is shown, in pixels as high as its own.
        height: of the picture in its pixels.
        view: with a size.
    """
    size = view.size or 0
    if view.fit == "letterbox":
        scale = size / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))
    scale = size / min(width, height)
    return size + 2 * round((width * scale - size) / 2), size + 2 * round((height * scale - size) / 2)
