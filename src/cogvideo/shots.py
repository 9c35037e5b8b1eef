"""A video file as shots: its frames in the order of time, whatever its format, each with when it is on screen.

PyAV decodes; Pillow reads what PyAV cannot: animated WebP and PNG, still images.
"""

from __future__ import annotations

import errno
import math
import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from cogvideo.pictures import Seen, View, eight_bits, fitted_size, look

GRACE = 0.001
"""Seconds by which a frame may come late: Matroska and WebM round timestamps to milliseconds."""

SEEK_FROM = 1.0
"""Seconds from which `start` is looked up in the file's index; what lies before it is not decoded."""

DAMAGED_SHARE = 0.05
"""Share of frames that the decoder may mark as repaired before the file counts as damaged."""

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,ogg,asf,mxf,nut,ivf,h264,hevc,m4v,obu"
)
AUDIO_FORMATS = "mp3,wav,flac,aac,aiff"
"""FFmpeg's readers that are used; not those of playlists, which open other files and addresses, and of text."""

ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave the alpha channel out."""


class VideoError(ValueError):
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


@contextmanager
def opened(file: Path | Content) -> Iterator[Content]:
    """The file, open; whatever goes wrong with it later becomes a VideoError that names it."""
    try:
        if isinstance(file, Path):
            if file.exists() and not file.is_file():
                raise VideoError("not a file")
            with file.open("rb") as content:
                yield content
        else:
            yield file
    except (VideoError, FFmpegError, OSError) as error:
        if _is_systems(error):
            raise
        reason, detail = _explained(error)
        named = [str(file)] if isinstance(file, Path) else []
        raise VideoError(reason, ": ".join([*named, detail] if detail else named)) from error


def _is_systems(error: Exception) -> bool:
    """Whether the system failed, say a network drive or a full table of open files: trying again may help."""
    ours = (VideoError, FFmpegError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return not isinstance(error, ours) and getattr(error, "errno", None) not in (None, errno.ENAMETOOLONG, errno.ELOOP)


def _explained(error: Exception) -> tuple[str, str]:
    """Reason and detail of an error."""
    if isinstance(error, VideoError):
        return error.reason, error.detail
    detail = getattr(error, "strerror", None) or str(error)
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FFmpegError):
        return "file is missing" if isinstance(error, FileNotFoundError) else "cannot be opened", detail
    return "cannot be decoded", detail


def read_shots(file: Content, start: float, unknown: float) -> Shots:
    """All shots from the one on screen at `start` seconds, times from the first of the file, each with its end.

    A shot lasts until the next one appears, the last as long as the file says, or else as long as the one before; where
    nothing is known it lasts `unknown` seconds.
    """
    file.seek(0)
    head = file.read(4096)
    if not head:
        raise VideoError("empty file")
    if _is_cut(file, head):
        raise VideoError("is cut short", "bytes are missing at its end")
    held: Shot | None = None
    for shot in _read_pictures(file) if _is_picture(head) else _decode(file, start):
        if held is not None:
            begin = max(held.begin, shot.begin)
            unknown = begin - held.begin or unknown
            yield held._replace(duration=begin - held.begin)
            shot = shot._replace(begin=begin)
        held = shot
    if held is None:
        raise VideoError("no frames")
    yield held._replace(duration=held.duration or unknown)


def _is_picture(head: bytes) -> bool:
    """Whether the file is Pillow's: still images, WebP, PNG, AVIF."""
    images = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
    return head.startswith(images) or head[8:12] == b"WEBP" or head[4:12] in (b"ftypavif", b"ftypavis")


def _is_cut(file: Content, head: bytes) -> bool:
    """Whether bytes are missing at the end, in the formats where decoders do not notice."""
    size = file.seek(0, 2)
    if head.startswith(b"RIFF"):  # AVI; one byte of padding may be left out
        return 8 + int.from_bytes(head[4:8], "little") > size + 1
    if head.startswith(b"GIF8"):
        file.seek(max(0, size - 1024))
        return not file.read().rstrip(b"\0\r\n").endswith(b"\x3b")  # the trailer of GIF
    segment = head.find(b"\x18\x53\x80\x67") + 4
    if not head.startswith(b"\x1a\x45\xdf\xa3") or segment < 4 or not head[segment : segment + 1]:
        return False
    width = 9 - head[segment].bit_length()  # leading zeros say how long a number of Matroska is
    mask = (1 << 7 * width) - 1
    length = int.from_bytes(head[segment : segment + width]) & mask
    return length != mask and segment + width + length > size  # all ones: unknown, as in recordings of streams


def _read_pictures(file: Content) -> Shots:
    """A still image or an animation with Pillow."""
    file.seek(0)
    try:
        with Image.open(file) as image:
            yield from _animation(image)
    except (ValueError, EOFError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise VideoError("cannot be decoded", str(error)) from error


def _animation(image: Image.Image) -> Shots:
    num_frames = getattr(image, "n_frames", 1) if image.format in ("WEBP", "PNG", "AVIF") else 1
    begin = 0.0
    for number in range(num_frames):
        image.seek(number)
        image.load()
        duration = image.info.get("duration", 0) / 1000
        if num_frames > 1 and duration <= 0.01:
            duration = 0.1  # as browsers do
        yield Shot(begin, duration, partial(look, eight_bits(ImageOps.exif_transpose(image)).convert("RGBA")))
        begin += duration


def _decode(file: Content, start: float) -> Shots:
    """The frames of a video with PyAV, from the last key frame before `start` where the file's index allows it."""
    with _container(file) as container:
        stream = _stream(container)
        decoder = _decoder(stream)
        frames = _timed(container, stream, decoder, 0.0)
        first = next(frames, None)
        if first is None:
            return
        origin, landed = first.begin, first
        if start > SEEK_FROM:
            frames = _seek(container, stream, decoder, origin + start)
            landed = next(frames, None) or first._replace(begin=math.inf)
        if landed.begin <= origin + start + GRACE:
            yield landed._replace(begin=landed.begin - origin)
            for shot in frames:
                yield shot._replace(begin=shot.begin - origin)
            return
    yield from _decode(file, 0.0)  # the index was wrong


@contextmanager
def _container(file: Content) -> Iterator[InputContainer]:
    file.seek(0)
    options = {"format_whitelist": f"{FORMATS},{AUDIO_FORMATS}"}
    try:
        container = av.open(file, "r", container_options=options, metadata_errors="replace")
    except FFmpegError as error:
        raise VideoError("no readable video or picture", error.strerror or "") from error
    with container:
        yield container


def _stream(container: InputContainer) -> VideoStream:
    """The main video stream; covers and thumbnails are none."""
    still = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & still]
    if not streams:
        raise VideoError("no video stream")
    best = container.streams.best("video")
    return next((stream for stream in streams if stream is best), streams[0])


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """A decoder of one thread: files are read by many processes at a time."""
    decoder = getattr(stream, "codec_context", None)
    if decoder is None:
        raise VideoError("cannot be decoded", "its codec is unknown")
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ALPHA_DECODERS:
        decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
    decoder.thread_count = 1
    return cast(VideoCodecContext, decoder)


def _seek(container: InputContainer, stream: VideoStream, decoder: VideoCodecContext, seconds: float) -> Shots:
    """The frames from the last key frame before that time; infinitely late ones where timestamps are missing."""
    try:
        container.seek(int(seconds / (stream.time_base or 1)), stream=stream)
    except FFmpegError:
        return
    decoder.flush_buffers()
    yield from _timed(container, stream, decoder, math.inf)


def _timed(container: InputContainer, stream: VideoStream, decoder: VideoCodecContext, begin: float) -> Shots:
    """Frames with their timestamps; one without gets the time after the one before, the first `begin`."""
    step = 1 / (stream.average_rate or stream.guessed_rate or 25)
    see: Callable[[av.VideoFrame, View], Seen] | None = None
    for frame in _frames(container, stream, decoder):
        aspect = float(stream.sample_aspect_ratio or 1)
        see = see or partial(_see, VideoReformatter(), aspect, _display_matrix(frame))
        unit = frame.time_base or stream.time_base or Fraction(0)
        begin = begin if frame.pts is None else float(frame.pts * unit)
        yield Shot(begin, float(max(0, frame.duration) * unit), partial(see, frame))
        begin += float(step)


def _frames(
    container: InputContainer, stream: VideoStream, decoder: VideoCodecContext
) -> Generator[av.VideoFrame, None, None]:
    """Decoded frames; a file that ends in a packet, or of which much was repaired, is damaged."""
    num_frames = num_damaged = 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise VideoError("cannot be decoded", f"bytes are missing after {num_frames} frames")
        for frame in decoder.decode(packet):
            num_frames += 1
            num_damaged += frame.is_corrupt
            if num_damaged > 1 + DAMAGED_SHARE * num_frames:
                raise VideoError("cannot be decoded", f"{num_damaged} of the first {num_frames} frames are damaged")
            yield frame


def _display_matrix(frame: av.VideoFrame) -> list[int]:
    """Where a step to the right and a step down lead (x, y, _, x, y), which is how telephones say they were turned."""
    # a frame that is asked for its side data refers to itself, and stays in memory for long: a tiny copy is asked
    copy = frame.reformat(width=2, height=2, format="gray", interpolation=Interpolation.POINT, threads=1)
    matrix = copy.side_data.get("DISPLAYMATRIX")
    return [1, 0, 0, 0, 1] if matrix is None else np.frombuffer(cast(memoryview, matrix), np.int32)[:5].tolist()


def _see(scaler: VideoReformatter, aspect: float, matrix: list[int], frame: av.VideoFrame, view: View) -> Seen:
    """An upright frame through a view; `aspect` is the width of a stored pixel over its height."""
    image, aspect = _image(scaler, aspect, frame, view)
    across, turned_down, _, turned_across, down = matrix
    if turns := abs(turned_down) > abs(across):
        image, across, down = image.transpose(Image.Transpose.TRANSPOSE), turned_across, turned_down
    if across < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if down < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return look(image, view, 1 / aspect if turns else aspect)


def _image(scaler: VideoReformatter, aspect: float, frame: av.VideoFrame, view: View) -> tuple[Image.Image, float]:
    """Full-range colours of a frame, and the width of a pixel over its height."""
    layout = frame.format
    opaque = not (layout.has_palette or any(part.is_alpha for part in layout.components))
    stored = frame.width, frame.height
    size = _reduced(stored, aspect, view) if opaque else stored
    unnamed = frame.colorspace == 2 and not layout.is_rgb
    converted = scaler.reformat(
        frame,
        *size,
        format="rgba",
        src_colorspace=Colorspace.ITU709 if unnamed and min(stored) >= 720 else None,  # by custom
        interpolation=_BICUBIC,
        threads=1,
    )
    mode = "RGBX" if opaque else "RGBA"
    image = Image.frombuffer(mode, size, np.ascontiguousarray(converted.to_ndarray()), "raw", mode, 0, 1)
    return image, aspect if size == stored else 1.0


_BICUBIC = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
"""FFmpeg's filter grows with the reduction. Without the flags it shares colours between neighbours and rounds down."""


def _reduced(stored: tuple[int, int], aspect: float, view: View) -> tuple[int, int]:
    """The size that an opaque frame is converted at: that in its view if it is smaller, which saves most work."""
    if view.size is None:
        return stored
    width, height = fitted_size(stored[0] * aspect, stored[1], view)
    return (width, height) if width <= stored[0] and height <= stored[1] else stored
