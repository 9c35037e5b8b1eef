"""A video file as shots: its frames in the order of time, whatever its format, each with when it is on screen.

PyAV decodes; Pillow reads what PyAV cannot: animated WebP and PNG, still images. Both are imported where needed.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cogvideo.config import InputError, require

GRACE = 0.001
"""Seconds by which a frame may come late: Matroska and WebM round timestamps to milliseconds."""


STILL = 10.0
"""Seconds by which a frame may outlast what the file says of it, without a word."""


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


@contextmanager
def opened(file: Path | Content) -> Iterator[Content]:
    """The file, open.

    Raises:
        VideoError: it is a folder, a pipe, or else no file.
        OSError: it cannot be opened.
    """
    if not isinstance(file, Path):
        yield file
        return
    if file.exists() and not file.is_file():
        raise VideoError("not a file")
    with file.open("rb") as content:
        yield content


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


def read_shots(file: Content, start: float, unknown: float) -> Shots:
    """All shots from the one on screen at `start` seconds, times from the first of the file, each with its end.

    A shot lasts until the next one appears, the last as long as the file says, or else as long as the one before; where
    nothing is known it lasts `unknown` seconds. The first that lasts much longer than the file says is told of.
    """
    file.seek(0)
    head = file.read(4096)
    if not head:
        raise VideoError("empty file")
    if _is_cut(file, head):
        raise VideoError("is cut short", "bytes are missing at its end")
    held: Shot | None = None
    has_told = False
    for shot in _shots(file, head, start):
        if held is not None:
            begin = max(held.begin, shot.begin)
            if begin > held.begin + held.duration + STILL and not has_told:
                _tell_of_jump(file, held.begin, begin)
                has_told = True
            unknown = begin - held.begin or unknown
            yield held._replace(duration=begin - held.begin)
            shot = shot._replace(begin=begin)
        held = shot
    if held is None:
        raise VideoError("no frames")
    yield held._replace(duration=held.duration or unknown)


def _tell_of_jump(file: Content, here: float, there: float) -> None:
    name = getattr(file, "name", "a video in an archive")
    told = f"its times jump from {here:.3f} to {there:.3f} seconds: one frame is held till then"
    print(f"{name}: {told}", file=sys.stderr)


def _shots(file: Content, head: bytes, start: float) -> Shots:
    """The frames as Pillow or FFmpeg gives them."""
    if _is_picture(head):
        from cogvideo.media.images import read_pictures

        return read_pictures(file)
    from cogvideo.media.ffmpeg import decode

    return decode(file, start)


def _is_picture(head: bytes) -> bool:
    """Whether the file is Pillow's: still images, WebP, PNG, AVIF."""
    images = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    brands = head[8 : int.from_bytes(head[:4])] if head[4:8] == b"ftyp" else b""
    return head.startswith(images) or head[8:12] == b"WEBP" or b"avif" in brands or b"avis" in brands


def _is_cut(file: Content, head: bytes) -> bool:
    """Whether bytes are missing at the end, in the formats where decoders do not notice."""
    size = file.seek(0, 2)
    if head.startswith(b"RIFF"):  # AVI, WebP; one byte of padding may be left out, all ones are a recorded stream
        return size + 1 < 8 + int.from_bytes(head[4:8], "little") < 8 + 0xFFFFFFFF
    if head.startswith(b"GIF8"):
        file.seek(0)
        return _is_cut_gif(file.read())
    segment = head.find(b"\x18\x53\x80\x67") + 4
    if not head.startswith(b"\x1a\x45\xdf\xa3") or segment < 4 or not head[segment : segment + 1]:
        return False
    width = 9 - head[segment].bit_length()  # leading zeros say how long a number of Matroska is
    mask = (1 << 7 * width) - 1
    length = int.from_bytes(head[segment : segment + width]) & mask
    return length != mask and segment + width + length > size  # all ones: unknown, as in recordings of streams


def _is_cut_gif(content: bytes) -> bool:
    """Whether a GIF ends inside of a block. Its trailer may be missing, and anything may follow it."""
    place = 13 + _palette_bytes(content[10:11])
    while content[place : place + 1] in (b"\x21", b"\x2c"):  # an extension, a picture
        if content[place] == 0x21:
            place += 2
        else:
            place += 11 + _palette_bytes(content[place + 9 : place + 10])
        while (length := content[place : place + 1]) and length != b"\0":
            place += 1 + length[0]
        place += 1
    return place > len(content)


def _palette_bytes(flags: bytes) -> int:
    """Bytes of the palette that a GIF's flags announce."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


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
