"""Videos with FFmpeg, through PyAV: decoded frame by frame, whatever the codec, and encoded as H.264."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image

from cogvideo.pictures import look
from cogvideo.shots import GRACE, Content, Library, Seen, Shot, Shots, VideoError, View, fitted_size

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

_TITLES: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
"""Titles in unknown encodings are no reason to refuse a file; newer versions of PyAV need not be asked."""


def decode(file: Content, start: float) -> Shots:
    """The frames of a video, from the last key frame before `start` where the file's index allows it."""
    with Library(FFmpegError), _container(file) as container:
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
    yield from decode(file, 0.0)  # the index was wrong


@contextmanager
def _container(file: Content) -> Iterator[InputContainer]:
    file.seek(0)
    options = {"format_whitelist": f"{FORMATS},{AUDIO_FORMATS}"}
    try:
        container = av.open(file, "r", container_options=options, **_TITLES)
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
    with Library(FFmpegError):
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


def write_mp4(
    path: Path, frames: UInt8[np.ndarray, "frames height width 3"], fps: float, metadata: Mapping[str, str]
) -> None:
    """Write H.264 with 4:2:0 colours and the metadata."""
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), "edge")
    flags = "+faststart+use_metadata_tags" if metadata else "+faststart"
    with av.open(path, "w", container_options={"movflags": flags}) as container:
        container.metadata.update(metadata)
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.color_range, stream.colorspace = ColorRange.MPEG, Colorspace.ITU709
        stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels)
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
