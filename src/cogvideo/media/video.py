"""Video files read and written: frames at a given rate and size, whatever the file's rate, size, rotation and format.

Times come from timestamps, never from counting frames. Only the frames that are kept are converted to pixels, one at a
time. Pillow reads animated WebP and PNG and still images, PyAV everything else. Both are imported only when needed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from cogvideo.config import Sides, require
from cogvideo.files import replacing_by_name
from cogvideo.media.colors import Pixels
from cogvideo.media.shots import TOLERANCE, Content, NamedErrors, Shot, Shots, View, ViewedPicture
from cogvideo.media.shots import VideoError as VideoError

MIN_FPS, MAX_FPS = 0.01, 500
"""Lowest and highest frames per second of files to write; any rate up to the highest can be read."""

STILL_SECONDS = 10.0
"""Seconds by which a frame may outlast its duration in the file without a warning."""

ROUNDING = 0.006
"""Seconds by which timestamps in hundredths may be off, a little more than half of one."""

PAUSE_RATIO = 1.8
"""Multiple of the shortest step between frames from which a step counts as a pause."""

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".3gp")
)
"""Videos and animations. Suffixes select the files of a folder; a file is read by its content."""

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".avif"))
"""Still images, read as one frame (an animated PNG as all of its frames)."""


class Video(NamedTuple):
    """Red, green and blue of frames, and whether the background shows through somewhere."""

    frames: Pixels
    has_alpha: bool


class FileInfo(NamedTuple):
    """A file as a whole."""

    codec: str
    """Codec or format, such as h264 or webp."""
    height: int
    """Height of its upright frames, in pixels."""
    width: int
    """Width of its upright frames, in pixels."""
    fps: float
    """Usual frames per second. Pauses, where writers store equal frames as one, do not count; rates near a whole
    number, or one divided by 1.001, are set to it. At this rate, from half a frame after the start, each frame is read
    once."""
    seconds: float
    """Time from its first frame to the end of its last."""
    stills: tuple[tuple[float, float], ...]
    """Parts in which one frame is held more than ten seconds longer than usual."""


def read_video(
    file: Path | Content,
    fps: float,
    size: Sides | None = None,
    *,
    fit: Literal["crop", "letterbox"] = "crop",
    start: float = 0.0,
    end: float | None = None,
    max_frames: int | None = None,
    loop_to: float = 0.0,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Video:
    """Frames of a file at a given rate.

    Frame k is the one on screen `start + k / fps` seconds after the first frame: the last one whose timestamp is not
    later. k runs while that time is before `end` and the end of the last frame.

    Args:
        file: path, or a file open for reading and seeking.
        fps: frames per second of the result.
        size: width and height of the result, or side of a square, antialiased; None for the stored size. Rotation is
            applied in both cases.
        fit: crop pictures of another shape to the center, or add bars in the background color.
        start: seconds after the first frame.
        end: seconds after the first frame; None for the end of the file. If the file ends earlier, its last frame is
            held for half a frame's time: with `end` 4.01, four seconds at 8 per second are 33 frames, not 32.
        max_frames: maximum number of frames to read.
        loop_to: length in seconds to which shorter clips are repeated.
        background: red, green and blue under transparent pixels and in bars.

    Raises:
        VideoError: the file cannot be read, or lacks the requested part.
        ValueError: a setting is invalid.
    """
    view = View(size, fit, background)
    require(0 < fps <= MAX_FPS, f"fps is {fps}, expected a number of frames per second in (0, {MAX_FPS}]")
    require(max_frames is None or max_frames > 0, f"max_frames is {max_frames}, expected a positive number")
    require(0 <= loop_to < math.inf, f"loop_to is {loop_to}, expected 0 or more seconds")
    limit = sys.maxsize if max_frames is None else max_frames
    part = (math.inf if end is None else end) - start
    wanted = min(limit, count_frames(part, fps))
    if not (0 <= start < math.inf and wanted > 0):
        raise VideoError("no such part", f"it goes from {start:g} to {'the end' if end is None else end} seconds")
    with NamedErrors(file), _opened(file) as content:
        shots = partial(_read_shots, content, start, 1 / fps, start + part)
        held = 0.0 if end is None else 0.5 / fps
        seen, clip_end = _look_at(shots(), (start + number / fps for number in range(wanted)), view, held)
        if not seen:
            raise VideoError("no such part", f"it starts at {start:g} seconds, the clip ends at {clip_end:.3f}")
        length = clip_end - start if len(seen) < wanted else part
        missing = range(len(seen), min(limit, count_frames(loop_to, fps)))
        if missing:
            seen += _look_again(shots(), [number / fps for number in missing], start, length, view)
        if len({each.pixels.shape for each in seen}) > 1:
            raise VideoError("changes its size", "give one size to get frames of it")
        return Video(np.stack([each.pixels for each in seen]), any(each.has_alpha for each in seen))


def examine(file: Path | Content) -> FileInfo:
    """Facts about a file. All of its frames are decoded, but only the first is converted to pixels.

    Raises:
        VideoError: the file cannot be read.
    """
    with NamedErrors(file), _opened(file) as content:
        with closing(_read_shots(content, 0.0, 1.0)) as shots:
            last = next(shots)
            height, width, _ = last.see(View()).pixels.shape
            begins = [last.begin]
            for last in shots:
                begins.append(last.begin)
        end = last.begin + last.duration
        fps = _usual_rate(begins, end)
        holds = ((before + 1 / fps, after) for before, after in pairwise(begins))
        stills = tuple((first, last) for first, last in holds if last - first > STILL_SECONDS)
        return FileInfo(_codec(content), height, width, fps, end, stills)


def _codec(file: Content) -> str:
    from cogvideo.media.ffmpeg import codec_name
    from cogvideo.media.images import format_name

    return format_name(file) or codec_name(file)


def _usual_rate(begins: list[float], end: float) -> float:
    """The intended frame rate: rounded timestamps do not add up to it, and some frames are held longer."""
    steady = begins[1:] if len(begins) > 2 else begins  # where times are rounded, the first is not
    gaps = [after - before for before, after in pairwise(steady) if after - before > 1 / MAX_FPS] or [end]
    steps = [gap for gap in gaps if gap < PAUSE_RATIO * min(gaps)]
    span = sum(steps)
    fps = len(steps) / span
    usual = min((round(fps), round(1.001 * fps) / 1.001), key=lambda each: abs(each - fps))
    is_meant = usual > 0 and abs(len(steps) / usual - span) < ROUNDING + 0.005 * span
    return max(MIN_FPS, usual if is_meant else round(fps, 3))


def count_frames(seconds: float, fps: float) -> int:
    """Number of frames in a clip of this length; 0 if it is NaN."""
    if not seconds > TOLERANCE:
        return 0
    return sys.maxsize if seconds == math.inf else math.ceil((seconds - TOLERANCE) * fps)


def _opened(file: Path | Content) -> AbstractContextManager[Content]:
    if not isinstance(file, Path):
        return nullcontext(file)
    if file.exists() and not file.is_file():
        raise VideoError("not a file")
    return file.open("rb")


def _read_shots(file: Content, start: float, unknown: float, end: float = math.inf) -> Shots:
    """All shots from the one on screen at `start` seconds, each with its end; times count from the file's first shot.

    A shot lasts until the next one appears, the last one as long as the file says, or else as long as the one before;
    if nothing is known, it lasts `unknown` seconds. The first shot that lasts much longer than the file says, not
    counting time after `end`, is reported.
    """
    file.seek(0)
    head = file.read(4096)
    if not head:
        raise VideoError("empty file")
    if _is_cut(file, head):
        raise VideoError("is cut short", "bytes are missing at its end")
    held: Shot | None = None
    has_told = False
    for shot in _decoded(file, start):
        if held is not None:
            begin = max(held.begin, shot.begin)
            if min(begin, end) > held.begin + held.duration + STILL_SECONDS and not has_told:
                name = getattr(file, "name", "a video in an archive")
                told = f"its times jump from {held.begin:.3f} to {begin:.3f} seconds: one frame is held until then"
                print(f"{name}: {told}", file=sys.stderr)
                has_told = True
            unknown = begin - held.begin or unknown
            yield held._replace(duration=begin - held.begin)
            shot = shot._replace(begin=begin)
        held = shot
    if held is None:
        raise VideoError("no frames")
    yield held._replace(duration=held.duration or unknown)


def _decoded(file: Content, start: float) -> Shots:
    """Frames by Pillow if it knows the file, else by FFmpeg."""
    from cogvideo.media.ffmpeg import decode
    from cogvideo.media.images import read_pictures

    return read_pictures(file) or decode(file, start)


def _is_cut(file: Content, head: bytes) -> bool:
    """True if bytes are missing at the end, in formats whose decoders do not notice."""
    size = file.seek(0, 2)
    if head.startswith(b"RIFF"):  # AVI, WebP; one byte of padding may be left out, all ones are a recorded stream
        return size + 1 < 8 + int.from_bytes(head[4:8], "little") < 8 + 0xFFFFFFFF
    if head.startswith(b"GIF8"):
        file.seek(0)
        return _is_cut_gif(file.read())
    segment = head.find(b"\x18\x53\x80\x67") + 4
    if not head.startswith(b"\x1a\x45\xdf\xa3") or segment < 4 or not head[segment : segment + 1]:
        return False
    width = 9 - head[segment].bit_length()  # leading zero bits give the length of a Matroska number
    mask = (1 << 7 * width) - 1
    length = int.from_bytes(head[segment : segment + width]) & mask
    return length != mask and segment + width + length > size  # all ones: unknown, as in recordings of streams


def _is_cut_gif(content: bytes) -> bool:
    """True if a GIF ends inside a block. Its trailer may be missing, and anything may follow it."""
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
    """Size in bytes of the palette that a GIF's flags announce."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _look_at(shots: Shots, times: Iterable[float], view: View, held: float = 0.0) -> tuple[list[ViewedPicture], float]:
    """Pictures on screen at ascending times, up to the end of the clip, and the end of the last shot read; the file's
    last picture is held for `held` more seconds."""
    seen: list[ViewedPicture] = []
    awaited, end, shot = iter(times), 0.0, None
    time = next(awaited, None)
    with closing(shots):
        for shot in shots:
            end, picture = shot.begin + shot.duration, None
            while time is not None and time + TOLERANCE < end:
                picture = picture or shot.see(view)
                seen.append(picture)
                time = next(awaited, None)
            if time is None:
                break
    if shot is not None and seen and time is not None and time + TOLERANCE < end + held:
        seen.append(shot.see(view))
    return seen, end


def _look_again(shots: Shots, times: list[float], start: float, length: float, view: View) -> list[ViewedPicture]:
    """Frames on screen at times past the end of a repeated part, whatever its length."""
    phases = [time - math.floor((time + TOLERANCE) / length) * length for time in times]
    order = sorted(range(len(times)), key=phases.__getitem__)
    latest = length - 2 * TOLERANCE  # whatever the rounding, no phase lies after the end
    seen, _ = _look_at(shots, (start + max(0.0, min(phases[index], latest)) for index in order), view)
    return [each for _, each in sorted(zip(order, seen, strict=True), key=lambda pair: pair[0])]


def write_video(
    path: Path,
    frames: Pixels,
    fps: float,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a clip in the format of its suffix.

    `.mp4` is H.264 with 4:2:0 colors that every player opens; odd sides grow by a repeated row or column, since the
    format needs even ones. `.gif` has 256 colors per frame, `.webp` is lossless; both loop forever.

    Args:
        path: file to write; it appears when it is complete.
        frames: red, green and blue.
        fps: frames per second; at most 50 in a GIF, whose unit is 10 ms.
        metadata: names and texts to store; a `.gif` and a `.webp` (EXIF image description) have only a `comment`.

    Raises:
        ValueError: unknown suffix, no frames, or a rate that the format cannot hold.
        OSError: the file cannot be written.
    """
    suffix, suffixes = path.suffix.lower(), (".mp4", ".gif", ".webp")
    require(suffix in suffixes, f"cannot write {path}: expected one of the suffixes {', '.join(suffixes)}")
    check_rate(suffix, fps)
    fits = suffix == ".mp4" or not metadata or set(metadata) == {"comment"}
    require(fits, f"cannot write the metadata {sorted(metadata or ())} to {path}: expected only a comment, or an .mp4")
    require(frames.size > 0, f"cannot write {path}: there are no frames")
    with replacing_by_name(path) as temporary:
        if suffix == ".mp4":
            from cogvideo.media.ffmpeg import write_mp4

            write_mp4(temporary, frames, fps, metadata or {})
        else:
            from cogvideo.media.images import write_animation

            write_animation(temporary, frames, fps, metadata or {})


def check_rate(suffix: str, fps: float) -> None:
    """Refuse a frame rate that a format cannot hold."""
    fastest = 50 if suffix.lower() == ".gif" else MAX_FPS
    require(MIN_FPS <= fps <= fastest, f"fps is {fps}, expected a number in [{MIN_FPS}, {fastest}] for {suffix}")
