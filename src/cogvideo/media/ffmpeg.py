"""Videos with FFmpeg, through PyAV: decoded frame by frame, whatever the codec, and encoded as H.264."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import av.filter
import numpy as np
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from cogvideo.media.colors import ColorCoding, Pixels, to_srgb
from cogvideo.media.images import look
from cogvideo.media.shots import TOLERANCE, Content, Shot, Shots, VideoError, View, ViewedPicture

SEEK_FROM = 1.0
"""Smallest `start`, in seconds, for which the file's index is used to skip decoding earlier frames."""

DAMAGED_SHARE = 0.05
"""Share of frames that the decoder may mark as repaired before the file counts as damaged."""

JOINED_FORMATS = ("mpegts", "mpeg", "flv")
"""Broadcast and streaming formats, often joined from parts: times may jump, and no index can be trusted."""

MAX_BACKWARD, MAX_FORWARD = 0.5, 10.0
"""Seconds by which times may jump back, or ahead in joined formats, before a new recording is assumed."""

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,ogg,asf,mxf,nut,ivf"
RAW_FORMATS = "h264,hevc,m4v,obu"
AUDIO_FORMATS = "mp3,wav,flac,aac,aiff"
"""FFmpeg demuxers that are used; those for text and for playlists, which open other files and URLs, are not."""

ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that keep the alpha channel, unlike FFmpeg's own."""

_TITLES: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
"""Metadata in unknown encodings must not make a file unreadable; newer versions of PyAV need no option for this."""


class _Source(NamedTuple):
    """The main video stream of an open file, and its decoder."""

    container: InputContainer
    stream: VideoStream
    decoder: VideoCodecContext
    coding: ColorCoding
    """Colors of the container; those of frames take precedence."""


def decode(file: Content, start: float) -> Shots:
    """The frames of a video, from the last key frame before `start` if the file's index allows it."""
    with _container(file) as container:
        stream = _stream(container)
        decoder = _decoder(stream)
        named = stream.codec_context  # until its decoder overwrites it
        source = _Source(container, stream, decoder, ColorCoding(named.color_primaries, named.color_trc))
        is_joined, is_gif = container.format.name in JOINED_FORMATS, container.format.name == "gif"
        frames = _continuous(_timed(source, 0.0), MAX_FORWARD if is_joined else math.inf)
        first = next(frames, None)
        if first is None:
            return
        origin, landed = first.begin, first
        if start > SEEK_FROM and not is_joined:
            frames = _seek(source, origin + start)
            landed = next(frames, None) or first._replace(begin=math.inf)
        if landed.begin <= origin + start + TOLERANCE:
            for shot in chain([landed], frames):
                shot = shot._replace(begin=shot.begin - origin)
                yield shot.in_hundredths() if is_gif else shot
            return
    yield from decode(file, 0.0)  # the index was wrong


def codec_name(file: Content) -> str:
    """Codec of a video, such as h264."""
    with _container(file) as container:
        return _stream(container).codec_context.name


@contextmanager
def _container(file: Content) -> Iterator[InputContainer]:
    file.seek(0)
    options = {"format_whitelist": f"{FORMATS},{RAW_FORMATS},{AUDIO_FORMATS}"}
    try:
        container = av.open(file, "r", container_options=options, **_TITLES)
    except FFmpegError as error:
        file.seek(0)
        begin = file.read(24).decode(errors="backslashreplace")
        expected = "expected a video such as mp4 or webm, or a picture such as png or jpg"
        got = f"it begins with {begin!r}, {expected}"
        if not isinstance(error, ArgumentError):  # FFmpeg raises it for other kinds of files, such as text
            got = f"{error.strerror}; {got}"
        raise VideoError("no readable video or picture", got) from error
    with container:
        yield container


def _stream(container: InputContainer) -> VideoStream:
    """The main video stream; cover art and thumbnails do not count."""
    still = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & still]
    if not streams:
        raise VideoError("no video stream")
    if any(stream.disposition & Disposition.dependent for stream in streams):
        raise VideoError("picture in tiles", "HEIC photos of several parts are not read: convert it to JPEG or PNG")
    best = container.streams.best("video")
    return next((stream for stream in streams if stream is best), streams[0])


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """A single-threaded decoder: many processes read files at a time."""
    decoder = getattr(stream, "codec_context", None)
    if decoder is None:
        raise VideoError("cannot be decoded", "its codec is unknown")
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ALPHA_DECODERS:
        decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
    decoder.thread_count = 1
    return cast(VideoCodecContext, decoder)


def _seek(source: _Source, seconds: float) -> Shots:
    """Frames from the last key frame before this time; without timestamps, their times are infinite."""
    try:
        source.container.seek(int(seconds / (source.stream.time_base or 1)), stream=source.stream)
    except FFmpegError:
        return
    source.decoder.flush_buffers()
    yield from _timed(source, math.inf)


def _continuous(shots: Shots, ahead: float) -> Shots:
    """Shots with continuous times where the file's times restart, or jump ahead by more than `ahead`."""
    shift, end, before = 0.0, 0.0, -math.inf
    for shot in shots:
        if not (before == -math.inf or -MAX_BACKWARD <= shot.begin + shift - before <= ahead):
            shift = end - shot.begin
        before = shot.begin + shift
        end = before + shot.duration
        yield shot._replace(begin=before)


def _timed(source: _Source, begin: float) -> Shots:
    """Frames with their timestamps; a frame without one follows the previous frame, or starts at `begin`."""
    stream = source.stream
    step = 1 / (stream.average_rate or stream.guessed_rate or 25)
    see: Callable[[av.VideoFrame, View], ViewedPicture] | None = None
    for frame in _deinterlaced(_frames(source)):
        aspect = float(stream.sample_aspect_ratio or 1)
        see = see or partial(_see, VideoReformatter(), source.coding, aspect, _display_matrix(frame))
        unit = frame.time_base or stream.time_base or Fraction(0)
        begin = begin if frame.pts is None else float(frame.pts * unit)
        yield Shot(begin, float(frame.duration * unit if frame.duration > 0 else 0), partial(see, frame))
        begin += float(step)


def _frames(source: _Source) -> Generator[av.VideoFrame, None, None]:
    """Decoded frames; a file that ends within a packet, or has too many repaired frames, is damaged."""
    num_frames = num_damaged = 0
    for packet in source.container.demux(source.stream):
        if packet.is_corrupt and source.container.format.name not in JOINED_FORMATS:
            raise VideoError("cannot be decoded", f"bytes are missing after {num_frames} frames")
        num_damaged += packet.is_corrupt  # in a joined file, where the next part begins
        for frame in source.decoder.decode(packet):
            num_frames += 1
            num_damaged += frame.is_corrupt
            if num_damaged > 1 + DAMAGED_SHARE * num_frames:
                raise VideoError("cannot be decoded", f"{num_damaged} of the first {num_frames} frames are damaged")
            yield frame


def _deinterlaced(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Frames; from the first interlaced one on, through a filter that changes only interlaced frames."""
    graph: av.filter.Graph | None = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = _deinterlacer(frame)
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from _pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


def _deinterlacer(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    size: dict[str, Any] = {"width": frame.width, "height": frame.height}
    source = graph.add_buffer(**size, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("bwdif", mode="send_frame", deint="interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """Frames that the filter has output so far."""
    while True:
        try:
            yield cast(av.VideoFrame, graph.pull())
        except (BlockingIOError, EOFError):
            return


def _display_matrix(frame: av.VideoFrame) -> list[int]:
    """Ends of a step to the right and a step down (x, y, _, x, y): how the phone was held."""
    # reading side data makes a frame refer to itself and stay in memory, so a tiny copy is used
    scaler = VideoReformatter()
    copy = scaler.reformat(frame, width=2, height=2, format="gray", interpolation=Interpolation.POINT, threads=1)
    try:
        matrix = copy.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a type that PyAV does not know, such as EXIF: mirroring goes unnoticed
        turn = math.radians(-frame.rotation)
        cosine, sine = round(2**16 * math.cos(turn)), round(2**16 * math.sin(turn))
        return [cosine, -sine, 0, sine, cosine]
    if matrix is None:
        return [1, 0, 0, 0, 1]
    return np.frombuffer(cast(memoryview, matrix), np.int32)[:5].tolist()


def _see(
    scaler: VideoReformatter, coding: ColorCoding, aspect: float, matrix: list[int], frame: av.VideoFrame, view: View
) -> ViewedPicture:
    """An upright frame through a view; `aspect` is the width of a stored pixel over its height."""
    image, aspect = _image(scaler, coding, aspect, frame, view)
    across, turned_down, _, turned_across, down = matrix
    if turns := abs(turned_down) > abs(across):
        image, across, down = image.transpose(Image.Transpose.TRANSPOSE), turned_across, turned_down
    if across < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if down < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return look(image, view, 1 / aspect if turns else aspect)


def _image(
    scaler: VideoReformatter, coding: ColorCoding, aspect: float, frame: av.VideoFrame, view: View
) -> tuple[Image.Image, float]:
    """Full-range colors of a frame, and the width of a pixel over its height."""
    layout = frame.format
    if frame.colorspace in _UNKNOWN_SPACES:
        raise VideoError("unknown colors", f"its color matrix is {frame.colorspace} of H.273, as in Dolby Vision")
    opaque = not (layout.has_palette or any(part.is_alpha for part in layout.components))
    coding = ColorCoding(frame.color_primaries, frame.color_trc).or_else(coding)
    stored = frame.width, frame.height
    size = _reduced(stored, aspect, view) if opaque else stored
    unnamed = frame.colorspace == 2 and not layout.is_rgb
    converted = scaler.reformat(
        frame,
        *size,
        format="rgba64le" if coding.is_foreign else "rgba",
        src_colorspace=Colorspace.ITU709 if unnamed and min(stored) >= 720 else None,  # by convention
        interpolation=_BICUBIC,
        threads=1,
    )
    pixels: np.ndarray = converted.to_ndarray()
    mode = "RGBX" if opaque else "RGBA"
    if coding.is_foreign:
        pixels = np.dstack([to_srgb(pixels[..., :3], coding), (pixels[..., 3] >> 8).astype(np.uint8)])
    image = Image.frombuffer(mode, size, np.ascontiguousarray(pixels), "raw", mode, 0, 1)
    return image, aspect if size == stored else 1.0


_UNKNOWN_SPACES = (14, 15)
"""ICtCp and IPT, which FFmpeg's scaler misinterprets."""

_BICUBIC = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
"""FFmpeg's filter widens with the reduction. Without the flags, neighbors share colors and values are rounded down."""


def _reduced(stored: tuple[int, int], aspect: float, view: View) -> tuple[int, int]:
    """Size to which an opaque frame is converted: its size in the view if smaller, which saves most of the work."""
    if view.size is None:
        return stored
    width, height = view.fitted(stored[0] * aspect, stored[1])
    return (width, height) if width <= stored[0] and height <= stored[1] else stored


def write_mp4(path: Path, frames: Pixels, fps: float, metadata: Mapping[str, str]) -> None:
    """Write H.264 with 4:2:0 colors and the metadata."""
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), "edge")
    flags = "+faststart+use_metadata_tags" if metadata else "+faststart"
    absolute = path.absolute()  # else a name with a colon is taken for a URL
    with av.open(absolute, "w", container_options={"movflags": flags}) as container:
        container.metadata.update(metadata)
        # x264's macroblock tree reads uninitialized memory: the same frames would give different files
        options = {"crf": "18", "mbtree": "0"}
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.color_range, stream.colorspace = ColorRange.MPEG, Colorspace.ITU709
        stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        scaler = VideoReformatter()  # PyAV's own is shared by the whole process, and hangs after a fork
        target: dict[str, Any] = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels)
            frame = scaler.reformat(frame, format="yuv420p", threads=1, **target)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
