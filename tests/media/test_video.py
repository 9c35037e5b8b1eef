"""Reading and writing videos: frame timing, formats, colors, alpha, rotation, bad files, memory."""

from __future__ import annotations

import gc
import io
import math
import os
import pickle
import signal
import struct
import warnings
import wave
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, TiffImagePlugin

from cogvideo.media import ffmpeg, images
from cogvideo.media.colors import UNKNOWN, ColorCoding, to_srgb
from cogvideo.media.images import contact_sheet, look, write_image
from cogvideo.media.shots import View
from cogvideo.media.video import VideoError, examine, read_video, write_video

CELLS = 4
FAST = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libsvtav1": {"preset": "7", "crf": "10"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}


def numbered(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A picture whose central square encodes its number in 8 black or white cells, twice; the rest is gray."""
    side = min(width, height)
    cells = np.array([255 * (number >> bit & 1) for bit in range(8)] * 2, np.uint8).reshape(CELLS, CELLS)
    rows = np.arange(side) * CELLS // side
    picture = np.full((height, width, 3), 128, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    picture[top : top + side, left : left + side] = cells[rows][:, rows][..., None]
    return picture


def number_of(frame: np.ndarray) -> int:
    """The number that a square frame encodes."""
    middles = (2 * np.arange(CELLS) + 1) * len(frame) // (2 * CELLS)
    bits = frame[middles][:, middles].mean(-1).ravel() > 127
    assert (bits[:8] == bits[8:]).all(), "no numbered picture"
    return sum(1 << place for place in range(8) if bits[place])


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def encode(
    path: Path,
    pictures: Sequence[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    times: Sequence[int] | None = None,
    last: int = 40,
    rate: int = 25,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
) -> Path:
    """Write pictures (RGB or RGBA) at times in milliseconds (default: constant rate); the last lasts `last` ms."""
    times = [round(1000 * number / rate) for number in range(len(pictures))] if times is None else times
    durations = dict(zip(times, [*np.diff(times).tolist(), last], strict=True))
    with av.open(path, "w", container_options=muxer or {}) as container:
        stream = container.add_stream(codec, rate, options=FAST.get(codec, {}) | (options or {}))
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pix_fmt
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        prepare(stream)
        for time, picture in zip(times, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgba" if picture.shape[2] == 4 else "rgb24")
            space, limits = stream.codec_context.colorspace, stream.codec_context.color_range
            frame = frame.reformat(format=pix_fmt, dst_colorspace=space if space != 2 else None, dst_color_range=limits)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(frame):
                packet.duration = durations[packet.pts]
                container.mux(packet)
        for packet in stream.encode(None):
            packet.duration = durations[packet.pts]
            container.mux(packet)
    return path


def on_screen(times: Sequence[int], last: int, fps: float, start: float, end: float | None) -> list[int]:
    """Oracle, by brute force: times in milliseconds; a frame may appear up to a millisecond early.

    If `end` is past the end of the file, its last frame is held for up to half a frame interval.
    """
    shown, clip_end = [], (times[-1] + last) / 1000
    stop = clip_end if end is None else min(end, clip_end + 0.5 / fps)
    if start + 0.001 >= clip_end:
        return []
    while (time := start + len(shown) / fps) + 0.001 < stop:
        best = 0
        for number, appears in enumerate(times):
            if appears / 1000 <= time + 0.001:
                best = number
        shown.append(best)
    return shown


def clip(count: int, *args: int) -> list[np.ndarray]:
    return [numbered(number, *args) for number in range(count)]


# Frame timing


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.integers(1, 60).map(lambda step: 5 * step), min_size=1, max_size=12),
    last=st.integers(2, 60).map(lambda step: 5 * step),
    fps=st.sampled_from([2.5, 7, 8, 12.5, 24, 29.97]),
    start=st.sampled_from([0, 0, 0.25, 1.3]),
    part=st.sampled_from([None, None, 0.4, 1.1]),
    suffix=st.sampled_from([".mp4", ".mkv"]),
    b_frames=st.sampled_from(["0", "2"]),
)
def test_frames_of_variable_rate_are_those_on_screen(
    tmp_path: Path,
    steps: list[int],
    last: int,
    fps: float,
    start: float,
    part: float | None,
    suffix: str,
    b_frames: str,
) -> None:
    """Catches counting frames instead of reading timestamps, misordered B-frames, and an extra first or last frame."""
    times = [int(time) for time in np.cumsum([0, *steps])]
    path = encode(tmp_path / f"a{suffix}", clip(len(times)), times=times, last=last, options={"bf": b_frames})
    end = None if part is None else start + part
    if b_frames != "0":  # frames stored out of order: the file does not say how long the last one is shown
        end = min(end or math.inf, times[-1] / 1000 + 0.002)
    expected = on_screen(times, last, fps, start, end)
    if not expected:
        with pytest.raises(VideoError, match="no such part"):
            read_video(path, fps, 32, start=start, end=end)
        return
    assert numbers(read_video(path, fps, 32, start=start, end=end).frames) == expected
    assert numbers(read_video(path, fps, 32, start=start, end=end, max_frames=2).frames) == expected[:2]


def test_a_clip_of_whole_seconds_has_both_its_ends(tmp_path: Path) -> None:
    """Guards four-second clips read with an end: 32 frames at 8 fps are one too few for key frames a second apart."""
    path = encode(tmp_path / "a.mp4", clip(100), rate=25)
    assert len(read_video(path, 8, 32).frames) == 32
    shown = numbers(read_video(path, 8, 32, end=4.01).frames)
    assert shown == [*numbers(read_video(path, 8, 32).frames), 99]
    assert len(read_video(path, 8, 32, end=9.0).frames) == 33
    assert len(read_video(path, 8, 32, end=2.01).frames) == 17
    assert len(read_video(path, 1, 32, end=9.0).frames) == 5


def test_rounded_timestamps_do_not_repeat_frames(tmp_path: Path) -> None:
    """Catches frames shown twice due to Matroska's milliseconds at 30 fps and a first timestamp after 0."""
    times = [33 + round(1000 * number / 30) for number in range(30)]
    path = encode(tmp_path / "a.mkv", clip(30), times=times, last=33)
    assert numbers(read_video(path, 30, 32).frames) == list(range(30))
    assert numbers(read_video(path, 10, 32).frames) == list(range(0, 30, 3))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.webm", "a.flv"])
def test_seeking_shows_the_same_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches an index that points past the start, and decoding of everything before it."""
    codec = {"a.avi": "mpeg4", "a.webm": "libvpx-vp9"}.get(name, "libx264")
    bf = {"bf": "2"} if codec == "libx264" else {}
    path = encode(tmp_path / name, clip(150), codec, options={"g": "10", **bf})
    decoded = []
    frames = ffmpeg._frames
    monkeypatch.setattr(ffmpeg, "_frames", lambda *args: (decoded.append(1) or each for each in frames(*args)))
    for start in (1.1, 3.0, 4.17, 5.5):
        found = numbers(read_video(path, 8, 32, start=start, max_frames=3).frames)
        assert found == on_screen([40 * number for number in range(150)], 40, 8, start, None)[:3]
    assert len(decoded) < 4 * 40 or name in ("a.ts", "a.flv"), "it decoded what lies before the start"


def test_index_that_leads_too_far_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches missing frames if a file's index is wrong."""
    path = encode(tmp_path / "a.mp4", clip(75), options={"g": "5"})
    seek = ffmpeg._seek
    monkeypatch.setattr(ffmpeg, "_seek", lambda source, seconds: seek(source, seconds + 0.5))
    assert numbers(read_video(path, 8, 32, start=2.0, max_frames=2).frames) == [50, 53]


@pytest.mark.parametrize("fps", [8, 7.3, 25])
def test_loop_is_seamless(tmp_path: Path, fps: float) -> None:
    """Catches a seam if the clip's length is not a multiple of the interval, and a loop that is too long."""
    path = encode(tmp_path / "a.mp4", clip(17))  # 0.68 s
    frames = read_video(path, fps, 32, loop_to=3.0).frames
    times = [number / fps for number in range(math.ceil((3.0 - 0.001) * fps))]
    assert numbers(frames) == [int((time + 0.001) % 0.68 * 25) for time in times]
    assert len(read_video(path, fps, 32, loop_to=0.5).frames) == math.ceil((0.68 - 0.001) * fps)
    part = numbers(read_video(path, 25, 32, start=0.2, end=0.4, loop_to=0.6, max_frames=12).frames)
    assert part == [5, 6, 7, 8, 9] * 2 + [5, 6]


def test_only_kept_frames_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches converting frames that are discarded, or converting a frame twice."""
    path, converted, see = encode(tmp_path / "a.mp4", clip(50)), [], ffmpeg._see
    monkeypatch.setattr(ffmpeg, "_see", lambda *args: converted.append(1) or see(*args))
    assert len(read_video(path, 5, 32).frames) == 10 == len(converted)
    assert len(read_video(path, 100, 32).frames) == 200 == len(converted) * 200 // 60


# Formats


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "width", "height"),
    [
        ("a.mp4", "libx264", "yuv420p", 64, 48),
        ("a.mkv", "libx264", "yuv420p10le", 64, 48),
        ("a.mov", "libx265", "yuv420p10le", 64, 64),
        ("a.webm", "libvpx-vp9", "yuv420p", 64, 48),
        ("a.webm", "libsvtav1", "yuv420p", 64, 64),
        ("a.webm", "libvpx", "yuv420p", 63, 47),
        ("a.avi", "mpeg4", "yuv420p", 64, 48),
        ("a.mkv", "libx264", "yuv444p", 63, 47),
        ("a.mkv", "ffv1", "yuv420p", 63, 47),
        ("a.mkv", "ffv1", "bgr0", 47, 63),
        ("a.gif", "gif", "rgb8", 63, 47),
        ("a.flv", "flv", "yuv420p", 64, 48),
        ("a.ts", "mpeg4", "yuv420p", 64, 48),
        ("a.h264", "libx264", "yuv420p", 64, 48),
    ],
)
def test_formats(tmp_path: Path, name: str, codec: str, pix_fmt: str, width: int, height: int) -> None:
    """Catches unreadable containers, codecs, bit depths, or odd sizes, by path and by content alone."""
    path = encode(
        tmp_path / name, clip(25, width, height), codec, pix_fmt, options={"bf": "0"} if codec == "libx264" else {}
    )
    last = 22 if codec == "gif" else 21  # in hundredths, 0.88 seconds may mean 0.875
    expected = [0, 3, 6, 9, 12, 15, 18, last]
    found = read_video(path, 8, 32)
    assert numbers(found.frames) == expected
    assert not found.has_alpha
    assert (read_video(io.BytesIO(path.read_bytes()), 8, 32).frames == found.frames).all()
    assert read_video(path, 8).frames.shape == (8, height, width, 3)


def test_missing_duration(tmp_path: Path) -> None:
    """Catches reliance on a duration, which recordings of streams lack."""
    path = encode(tmp_path / "a.mkv", clip(25), muxer={"live": "1"})
    with av.open(path) as container:
        assert container.duration is None
    assert numbers(read_video(path, 8, 32).frames) == [0, 3, 6, 9, 12, 15, 18, 21]


def test_animated_webp_and_png(tmp_path: Path) -> None:
    """Catches animations read at a constant rate, and frames that PyAV cannot read."""
    first, *others = [Image.fromarray(picture) for picture in clip(5)]
    durations = [100, 300, 40, 500, 200]
    for suffix in (".webp", ".png"):
        path = tmp_path / f"a{suffix}"
        first.save(path, save_all=True, append_images=others, duration=durations, lossless=True)
        expected = on_screen([0, 100, 400, 440, 940], 200, 8, 0, None)
        assert numbers(read_video(path, 8, 32).frames) == expected


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_still_images_are_one_frame(tmp_path: Path, suffix: str) -> None:
    """Catches images that last no time at all or forever."""
    path = tmp_path / f"a{suffix}"
    write_image(path, numbered(37))
    for fps in (0.5, 8, 500):
        assert numbers(read_video(path, fps, 32).frames) == [37]
    assert numbers(read_video(path, 8, 32, loop_to=0.5).frames) == [37] * 4


def test_orientation_of_photographs(tmp_path: Path) -> None:
    """Catches photos that come out sideways."""
    image = Image.fromarray(np.rot90(numbered(37)).copy())
    exif = image.getexif()
    exif[0x112] = 6  # rotated clockwise for display
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_video(tmp_path / "a.jpg", 8).frames.shape == (1, 48, 64, 3)
    assert numbers(read_video(tmp_path / "a.jpg", 8, 32).frames) == [37]


# Shape


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_rotation_is_applied(tmp_path: Path, turns: int, mirrored: bool) -> None:
    """Catches phone videos that come out sideways or mirrored."""
    upright = clip(3)
    stored = [np.ascontiguousarray(np.rot90(each[:, ::-1] if mirrored else each, -turns)) for each in upright]
    path = encode(
        tmp_path / "a.mov",
        stored,
        prepare=lambda stream: stream.set_display_rotation(90 * turns, hflip=mirrored),
    )
    assert numbers(read_video(path, 25, 32).frames) == [0, 1, 2]
    assert read_video(path, 25).frames.shape == (3, 48, 64, 3)


@pytest.mark.parametrize("size", [48, 200])
@pytest.mark.parametrize("turns", [0, 1])
def test_oblong_pixels_are_made_square(tmp_path: Path, turns: int, size: int) -> None:
    """Catches squeezed pictures from non-square pixels, as on DVDs, even when rotated."""
    wide = np.full((48, 96, 3), 255, np.uint8)
    wide[:, 24:72] = 0
    squeezed = np.ascontiguousarray(np.rot90(wide, -turns))

    def prepare(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(1, 2)  # pixels are twice as tall as wide
        stream.set_display_rotation(90 * turns)

    path = encode(tmp_path / "a.mov", [squeezed] * 2, prepare=prepare)
    frame = read_video(path, 25, size, fit="letterbox", background=(0, 0, 255)).frames[0]
    bars = ((frame[..., 2] > 200) & (frame[..., 0] < 50)).sum() / frame[..., 0].size
    # 96 x 48 pixels of 1:2 make a square; rotated, the pixels are 2:1 and the picture is 4:1
    assert bars == pytest.approx(0 if turns == 0 else 0.75, abs=0.05)


def test_letterbox_and_crop() -> None:
    """Catches fits that are off-center or of the wrong proportions, and bars of the wrong color."""
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = 200  # the central square
    image = Image.fromarray(picture)
    assert np.abs(look(image, View(20)).pixels.astype(int) - 200).max() <= 15
    boxed = look(image, View(20, "letterbox", (1, 2, 3))).pixels
    assert (boxed[:5] == (1, 2, 3)).all()
    assert (boxed[15:] == (1, 2, 3)).all()
    assert np.abs(boxed[6:14, 7:13].astype(int) - 200).max() <= 10
    assert boxed[5:15, :3].max() <= 10
    tall = look(Image.fromarray(picture.transpose(1, 0, 2).copy()), View(20, "letterbox", (1, 2, 3))).pixels
    assert (tall == boxed.transpose(1, 0, 2)).all()
    upright, wide = View((20, 40)), View((40, 20))
    assert look(image, upright).pixels.shape == (40, 20, 3)
    assert (look(image, upright).pixels == 200).all()  # 20 of 80 columns
    assert np.abs(look(image, wide).pixels.astype(int) - look(image, View(None)).pixels[::2, ::2]).mean() < 5  # whole
    boxed = look(image, View((20, 40), "letterbox", (1, 2, 3))).pixels
    assert (boxed[:15] == (1, 2, 3)).all()
    assert (boxed[25:] == (1, 2, 3)).all()
    assert np.abs(boxed[16:24, 7:13].astype(int) - 200).max() <= 10


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
@pytest.mark.parametrize(("width", "height", "size"), [(160, 90, 33), (90, 160, 64), (161, 91, 48), (160, 90, 150)])
def test_reading_reduces_as_well_as_pillow(
    tmp_path: Path, width: int, height: int, size: int, fit: Literal["crop", "letterbox"]
) -> None:
    """Catches a decoder's scaler that shifts, aliases, or smears colors, and bars of unequal size."""
    frames = moving(2, height, width)
    path = encode(tmp_path / "a.mkv", list(frames), "ffv1", "yuv420p")
    found = read_video(path, 25, size, fit=fit, background=(9, 8, 7)).frames[0]
    scale = size / (min if fit == "crop" else max)(width, height)
    whole = Image.fromarray(read_video(path, 25).frames[0])
    edges = [((side - size / scale) / 2, (side + size / scale) / 2) for side in (width, height)]
    if fit == "crop":
        expected = whole.resize(
            (size, size), Image.Resampling.LANCZOS, [edge[each] for each in (0, 1) for edge in edges]
        )
    else:
        inner = whole.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        expected = Image.new("RGB", (size, size), (9, 8, 7))
        expected.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
        assert ((found != (9, 8, 7)).any(-1) == (np.asarray(expected) != (9, 8, 7)).any(-1)).mean() > 0.99
    mask = (np.asarray(expected) != (9, 8, 7)).any(-1) & (found != (9, 8, 7)).any(-1)
    assert psnr(found[mask], np.asarray(expected)[mask]) > 36
    assert np.abs(found[mask].mean(0) - np.asarray(expected)[mask].mean(0)).max() < 0.7


@pytest.mark.parametrize("size", [8, 20, 32, 47])
def test_downscaling_is_antialiased(tmp_path: Path, size: int) -> None:
    """Catches moiré: the finest checkerboard becomes gray, and stripes stay near their mean."""
    board = (255 * (np.indices((96, 96)).sum(0) % 2)).astype(np.uint8)
    seen = look(Image.fromarray(np.repeat(board[..., None], 3, 2)), View(size)).pixels
    assert np.abs(seen.astype(int) - 127).max() <= 12
    stripes = np.tile((255 * (np.arange(96) % 4 < 2)).astype(np.uint8), (96, 1))
    seen = look(Image.fromarray(np.repeat(stripes[..., None], 3, 2)), View(min(size, 32))).pixels
    assert np.abs(seen.astype(int) - 127).max() <= 50
    path = encode(tmp_path / "a.mkv", [np.repeat(board[..., None], 3, 2)] * 2, "ffv1", "yuv444p")
    assert np.abs(read_video(path, 25, size).frames.astype(int) - 127).max() <= 12


# Alpha


def disc(size: int = 64, shift: int = 0) -> np.ndarray:
    """A red disc whose lower half is semitransparent, on fully transparent black."""
    down, across = np.indices((size, size)) - (size - 1) / 2
    inside = np.hypot(down, across - shift) < size / 3
    alpha = np.where(inside, np.where(down < 0, 255, 128), 0)
    return np.dstack([255 * inside, 0 * alpha, 0 * alpha, alpha]).astype(np.uint8)


@pytest.mark.parametrize("background", [(255, 255, 255), (255, 200, 0)])
@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.webm", "a.mkv", "a.gif"])
def test_alpha_is_put_on_the_background(tmp_path: Path, name: str, background: tuple[int, int, int]) -> None:
    """Catches black behind transparent pixels, dark fringes from them, and decoders that drop alpha."""
    path, pictures = tmp_path / name, [disc(shift=number) for number in range(3)]
    if name in ("a.webm", "a.mkv"):
        codec, pix_fmt = ("libvpx-vp9", "yuva420p") if name == "a.webm" else ("ffv1", "yuva444p")
        encode(path, pictures, codec, pix_fmt, options={"crf": "4", "b": "0"} if codec != "ffv1" else {})
    else:
        first, *others = map(Image.fromarray, pictures)
        first.save(path, save_all=True, append_images=others, duration=40, lossless=True, disposal=2)
    loss = 0 if name in ("a.webp", "a.png") else 12
    found = read_video(path, 25, background=background)
    assert found.has_alpha
    for frame, picture in zip(found.frames, pictures, strict=True):
        alpha = picture[..., 3:] / 255 if name != "a.gif" else (picture[..., 3:] > 127) * 1.0
        expected = picture[..., :3] * alpha + np.array(background) * (1 - alpha)
        assert np.abs(frame - expected).mean() <= loss / 4 + 1
        assert np.abs(frame[24:28, 28:36] - expected[24:28, 28:36]).max() <= loss + 1
        assert np.abs(frame[:4] - expected[:4]).max() <= loss + 1
    small = read_video(path, 25, 16, background=background).frames
    assert small[..., 0].min() >= 255 - 3 * loss - 5, "red is 255 inside and outside: anything less is a dark fringe"


def test_opaque_pictures_have_no_alpha(tmp_path: Path) -> None:
    """Prevents captions that name an invisible background: an alpha channel alone is not transparency."""
    opaque = [np.dstack([numbered(number), np.full((48, 64), 255, np.uint8)]) for number in range(3)]
    first, *others = map(Image.fromarray, opaque)
    first.save(tmp_path / "a.webp", save_all=True, append_images=others, duration=40)
    encode(tmp_path / "a.webm", opaque, "libvpx-vp9", "yuva420p")
    for name in ("a.webp", "a.webm"):
        assert not read_video(tmp_path / name, 25, 32).has_alpha


# Colors


@pytest.mark.parametrize("space", [1, 5, 6, 9, None])
@pytest.mark.parametrize("limits", [1, 2])
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (30, 60, 200), (128, 128, 128), (255, 255, 255)])
def test_colours_are_right(tmp_path: Path, space: int | None, limits: int, colour: tuple[int, int, int]) -> None:
    """Catches the wrong matrix (BT.601, 709, 2020) or range (limited, full): tinted reds, gray blacks."""

    def prepare(stream: Any) -> None:
        stream.codec_context.colorspace, stream.codec_context.color_range = space or 2, limits

    pictures = [np.broadcast_to(np.uint8(colour), (32, 32, 3)).copy()] * 2
    path = encode(tmp_path / "a.mkv", pictures, "ffv1", "yuv444p", prepare=prepare)
    assert np.abs(read_video(path, 25).frames.astype(int) - colour).max() <= 4


def test_large_videos_that_name_no_matrix_are_taken_for_bt709(tmp_path: Path) -> None:
    """Catches tinted untagged HD videos, which are BT.709 by convention."""
    red = np.broadcast_to(np.uint8((255, 0, 0)), (720, 1280, 3)).copy()
    frame = av.VideoFrame.from_ndarray(red).reformat(format="yuv420p", dst_colorspace=1)
    frame.colorspace = 2
    found = np.asarray(ffmpeg._image(VideoReformatter(), UNKNOWN, 1.0, frame, View())[0])[..., :3]
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 4


# Bad files


def flipped(content: bytes, count: int, low: float, high: float) -> bytes:
    data, random = np.frombuffer(content, np.uint8).copy(), np.random.default_rng(0)
    data[random.integers(int(low * len(data)), int(high * len(data)), count)] ^= 85
    return data.tobytes()


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos with so much detail that most of their bytes are pictures."""
    folder, random = tmp_path_factory.mktemp("good"), np.random.default_rng(0)
    pictures = list(random.integers(0, 255, (20, 48, 64, 3), dtype=np.uint8))
    slow = {"g": "10"}
    encode(folder / "a.mp4", pictures, options=slow, muxer={"movflags": "faststart"})
    encode(folder / "part2.mp4", pictures, "mpeg4", muxer={"movflags": "faststart"})
    encode(folder / "late.mp4", pictures, options=slow)
    encode(folder / "a.mkv", pictures, options=slow)
    encode(folder / "a.webm", pictures, "libvpx-vp9")
    encode(folder / "a.avi", pictures, "mpeg4", options={"bf": "0"})
    encode(folder / "a.gif", pictures, "gif", "rgb8")
    write_video(folder / "a.webp", np.stack(pictures), 25)
    return folder


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["a.mp4", "part2.mp4", "late.mp4", "a.mkv", "a.webm", "a.avi", "a.gif", "a.webp"])
def test_half_a_file_is_refused(good: Path, tmp_path: Path, name: str, share: float) -> None:
    """Catches partially copied files that are taken for short complete ones."""
    content = (good / name).read_bytes()
    assert len(read_video(good / name, 25, 16).frames) == 20
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(VideoError) as caught:
        read_video(tmp_path / name, 25, 16)
    assert caught.value.reason in ("cannot be decoded", "is cut short", "no readable video or picture")
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "part2.mp4"])
def test_damaged_pictures_are_refused(good: Path, tmp_path: Path, name: str) -> None:
    """Prevents training on the gray smears that decoders substitute for data that they cannot read."""
    (tmp_path / name).write_bytes(flipped((good / name).read_bytes(), 300, 0.3, 0.8))
    with pytest.raises(VideoError, match="cannot be decoded"):
        read_video(tmp_path / name, 25, 16)


def test_one_repaired_frame_is_accepted(good: Path, tmp_path: Path) -> None:
    """Keeps clips with one frame that the decoder repaired, but rejects those with many."""
    content = (good / "part2.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(flipped(content, 1, 0.5, 0.52))
    assert len(read_video(tmp_path / "a.mp4", 25, 16).frames) == 20
    (tmp_path / "a.mp4").write_bytes(flipped(content, 30, 0.3, 0.8))
    with pytest.raises(VideoError, match="frames are damaged"):
        read_video(tmp_path / "a.mp4", 25, 16)


def write_sound(path: Path, cover: bool = False) -> None:
    with av.open(path, "w") as container:
        sound = container.add_stream("aac", 8000, layout="mono")
        picture = container.add_stream("mjpeg", 25, pix_fmt="yuvj420p") if cover else None
        if picture is not None:
            picture.width, picture.height, picture.disposition = 64, 48, Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(numbered(0)).reformat(format="yuvj420p")
            container.mux([*picture.encode(frame), *picture.encode(None)])
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, 1024 * number
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


def write_wave(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "file is missing"),
    "folder": (lambda path: path.mkdir(), "not a file"),
    "pipe": (os.mkfifo, "not a file"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_text("no video\n" * 200), "no readable video or picture"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "no readable video or picture"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(50_000)), "no readable video or picture"),
    "playlist": (
        lambda path: path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n"),
        "no readable video or picture",
    ),
    "list": (lambda path: write_list(path), "no readable video or picture"),
    "sound": (write_sound, "no video stream"),
    "sound with cover": (lambda path: write_sound(path, cover=True), "no video stream"),
    "wave": (write_wave, "no video stream"),
    "no frames": (lambda path: encode_nothing(path), "no"),
    "half image": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "no readable video or picture"),
    "half WebP": (lambda path: path.write_bytes(b"RIFF\x00\x10\x00\x00WEBPVP8L" + bytes(100)), "is cut short"),
    "no WebP": (lambda path: path.write_bytes(b"RIFF\x60\x00\x00\x00WEBPVP8L" + bytes(100)), "cannot be decoded"),
    "forbidden": (lambda path: (path.write_bytes(b"x"), path.chmod(0)), "cannot be opened"),
}


def write_list(path: Path) -> None:
    encode(path.parent / "other.mp4", clip(3))
    path.write_text("ffconcat version 1.0\nfile other.mp4\n")


def encode_nothing(path: Path) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", 25)
        stream.width = stream.height = 64
        container.start_encoding()


def test_pictures_of_many_pixels(tmp_path: Path) -> None:
    """Keeps Pillow's warning about large pictures off the screen; above twice its limit, one line rejects them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, side in (("large", 9_600), ("larger", 13_500)):
            Image.new("1", (side, side)).save(tmp_path / f"{name}.png")
        with (tmp_path / "large.png").open("rb") as file:
            assert images.read_pictures(file) is not None
        with pytest.raises(VideoError, match=r"larger\.png: Image size \(182250000 pixels\) exceeds limit"):
            examine(tmp_path / "larger.png")


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_have_counted_reasons(tmp_path: Path, kind: str) -> None:
    """Catches tracebacks, hangs, and playlists that open other files; errors have fixed reasons and name the file."""
    path, (make, reason) = tmp_path / "a.mp4", BAD[kind]
    make(path)
    if kind == "forbidden" and os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(VideoError, match=r"a\.mp4") as caught:
        read_video(path, 8, 32)
    assert caught.value.reason.startswith(reason)
    assert "\n" not in str(caught.value)
    assert "<" not in str(caught.value), "an object of Python"
    if path.is_file() and kind != "forbidden":
        with pytest.raises(VideoError) as again:
            read_video(io.BytesIO(path.read_bytes()), 8, 32)
        assert again.value.reason == caught.value.reason


@pytest.mark.parametrize("text", ["no video\n" * 200, "猫と犬", "\0\0\0\0"])
def test_a_file_of_another_kind_says_what_was_got(tmp_path: Path, text: str) -> None:
    """Catches a bare "Invalid argument" for a text file passed as a picture."""
    (tmp_path / "a.png").write_text(text, encoding="utf-8")
    with pytest.raises(VideoError) as caught:
        read_video(tmp_path / "a.png", 8, 32)
    assert f"a.png: it begins with {text.encode()[:24].decode()!r}, expected a video such as mp4" in str(caught.value)


def test_names_and_titles_in_other_encodings(tmp_path: Path) -> None:
    """Catches readable videos rejected for a title in another encoding or a name that looks like a URL."""
    path = encode(tmp_path / "a.mkv", clip(3))
    with av.open(path) as source, av.open(tmp_path / "b.mkv", "w") as target:
        target.metadata["title"] = "QQQQQQ"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    odd = tmp_path / "http:é %03d.mkv"
    odd.write_bytes((tmp_path / "b.mkv").read_bytes().replace(b"QQQQQQ", b"\xff\xfe\x80\xe9QQ"))
    assert numbers(read_video(odd, 25, 32).frames) == [0, 1, 2]


def test_errors_survive_pickling() -> None:
    """Catches reasons that are lost when a worker process sends its error."""
    error = pickle.loads(pickle.dumps(VideoError("cannot be decoded", "a.mp4: why")))
    assert (error.reason, error.detail, str(error)) == (
        "cannot be decoded",
        "a.mp4: why",
        "cannot be decoded: a.mp4: why",
    )
    assert str(VideoError("empty file")) == "empty file"


@pytest.mark.parametrize(
    "wrong",
    [
        *({"fps": value} for value in (0, -1, math.nan, math.inf, 1000)),
        *({"size": value} for value in (0, -3)),
        {"fit": "stretch"},
        {"max_frames": 0},
        *({"loop_to": value} for value in (-1.0, math.inf, math.nan)),
        {"background": (0, 0, 256)},
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_bad_settings_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """Rejects settings that would hang or give nothing, without blaming the file."""
    with pytest.raises(ValueError, match=r"expected|stretch") as caught:
        read_video(tmp_path / "none.mp4", **{"fps": 8, **wrong})
    assert not isinstance(caught.value, VideoError)


@pytest.mark.parametrize(
    ("start", "end"),
    [(1.0, None), (50.0, None), (0.5, 0.5), (0.5, 0.2), (-1.0, None), (math.nan, None), (0.0, math.nan)],
)
def test_parts_that_the_clip_does_not_have(tmp_path: Path, start: float, end: float | None) -> None:
    """Prevents empty clips: a table's row may ask for a part past the clip's end, or one that ends before it starts."""
    path = encode(tmp_path / "a.mp4", clip(25))
    with pytest.raises(VideoError) as caught:
        read_video(path, 8, 32, start=start, end=end)
    assert caught.value.reason == "no such part"


def test_frames_of_two_sizes(tmp_path: Path) -> None:
    """Rejects a clip whose frames cannot be stacked, unless a size is given."""
    first = encode(tmp_path / "a.h264", clip(3))
    second = encode(tmp_path / "b.h264", clip(3, 96, 64))
    (tmp_path / "c.h264").write_bytes(first.read_bytes() + second.read_bytes())
    assert numbers(read_video(tmp_path / "c.h264", 25, 32).frames) == [0, 1, 2, 0, 1, 2]
    with pytest.raises(VideoError, match="changes its size"):
        read_video(tmp_path / "c.h264", 25)


# Memory


def resident() -> float:
    """Resident memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_thousands_of_files_do_not_fill_the_memory(good: Path, tmp_path: Path) -> None:
    """Catches decoders, containers, and file handles that are never closed, for good and bad files."""
    bad = tmp_path / "bad.mp4"
    bad.write_bytes((good / "a.mp4").read_bytes()[:-2000])
    files = [*(good / name for name in ("a.mp4", "a.mkv", "a.webm", "a.gif", "a.webp")), bad]

    def read_all(rounds: int) -> None:
        for _ in range(rounds):
            for path in files:
                try:
                    read_video(path, 8, 16, max_frames=3 if path.suffix == ".mkv" else None)
                except VideoError:
                    assert path == bad

    read_all(10)
    before, handles = resident(), len(os.listdir("/proc/self/fd"))
    read_all(50)
    assert resident() - before < 8
    assert len(os.listdir("/proc/self/fd")) == handles


def test_no_frame_outlives_reading(good: Path, tmp_path: Path) -> None:
    """Catches frames in reference cycles, which fill memory until the next garbage collection."""
    bad = tmp_path / "bad.mp4"
    bad.write_bytes((good / "a.mp4").read_bytes()[:-2000])
    alpha = encode(tmp_path / "alpha.webm", [disc()] * 5, "libvpx-vp9", "yuva420p")
    turned = encode(tmp_path / "a.mov", clip(5), prepare=lambda stream: stream.set_display_rotation(90))
    gc.collect()
    gc.disable()
    try:
        for path in (good / "a.mp4", good / "a.gif", alpha, turned, bad):
            with nullcontext() if path != bad else pytest.raises(VideoError):
                read_video(path, 8, 16, max_frames=2 if path != bad else None)
        frames = [each for each in gc.get_objects() if type(each) is av.VideoFrame and each.width > 2]
    finally:
        gc.enable()
    assert not frames


# Writing


def moving(count: int = 20, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth moving pattern, (frames, height, width, 3)."""
    time, down, across = np.mgrid[:count, :height, :width].astype(float)
    waves = [np.sin((across + speed * time) / 7 + down / (5 + speed)) for speed in (1, 2, 3)]
    return (127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def psnr(frames: np.ndarray, other: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(1e-9, np.square(frames.astype(float) - other).mean()))


def _seconds(image: Any, number: int) -> float:
    image.seek(number)
    image.load()
    return image.info["duration"] / 1000


@pytest.mark.parametrize("fps", [8, 12.5, 23.976])
@pytest.mark.parametrize(("suffix", "least"), [(".mp4", 30), (".gif", 25), (".webp", 90)])
def test_written_clips_are_read_back(tmp_path: Path, suffix: str, least: float, fps: float) -> None:
    """Catches lost frames, wrong rates, colors from the wrong matrix, and lossy WebP."""
    frames = moving()
    write_video(tmp_path / f"a{suffix}", frames, fps)
    found = read_video(tmp_path / f"a{suffix}", fps)
    assert found.frames.shape == frames.shape
    assert psnr(found.frames, frames) > least
    assert [each.name for each in tmp_path.iterdir()] == [f"a{suffix}"]
    if suffix != ".mp4":
        with Image.open(tmp_path / f"a{suffix}") as image:
            seconds = [_seconds(image, number) for number in range(image.n_frames)]
        assert sum(seconds) == pytest.approx(20 / fps, abs=0.006)


def test_every_player_opens_mp4(tmp_path: Path) -> None:
    """Catches MP4s that browsers reject: colors other than 4:2:0, odd sides, an index at the end, missing tags."""
    frames = moving(height=47, width=63)
    write_video(tmp_path / "a.mp4", frames, 8, {"prompt": 'a cat: "jumps"', "title": "猫"})
    content = (tmp_path / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")
    with av.open(tmp_path / "a.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (64, 48, 8, 20)
        assert (stream.colorspace, stream.color_range, stream.color_primaries, stream.color_trc) == (1, 1, 1, 1)
        assert container.metadata["prompt"] == 'a cat: "jumps"'
        assert container.metadata["title"] == "猫"
    assert psnr(read_video(tmp_path / "a.mp4", 8).frames[:, :47, :63], frames) > 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_same_frames_give_the_same_mp4(tmp_path: Path) -> None:
    """Guards "the same seed gives the same clip" down to bytes: memory is filled with new junk before each file."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (5, 12, 12, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    contents, junk = set(), []
    for number in range(24):
        junk.append(np.random.default_rng(number).integers(0, 255, 20_000 * (1 + number % 7)).astype(np.uint8))
        junk = junk[:: 1 + (number % 3 == 0)]
        write_video(tmp_path / "x.mp4", frames, 1)
        contents.add((tmp_path / "x.mp4").read_bytes())
    assert len(contents) == 1


def test_a_forked_process_can_write(tmp_path: Path) -> None:
    """Catches a hang on threads left in the parent: PyAV converts all frames of a process with one scaler."""
    frames = np.stack([numbered(number) for number in range(3)])
    av.VideoFrame.from_ndarray(frames[0]).reformat(32, 32, "yuv420p", threads=2)
    if not (process := os.fork()):
        signal.alarm(30)  # ends a hung process
        with suppress(Exception):
            write_video(tmp_path / "a.mp4", frames, 8)
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert len(read_video(tmp_path / "a.mp4", 8).frames) == 3


def test_written_colours_are_right(tmp_path: Path) -> None:
    """Catches clips tinted by a matrix that does not match the tag."""
    for colour in ((255, 0, 0), (0, 0, 255), (20, 200, 90)):
        write_video(tmp_path / "a.mp4", np.broadcast_to(np.uint8(colour), (3, 32, 32, 3)).copy(), 8)
        assert np.abs(read_video(tmp_path / "a.mp4", 8).frames.astype(int) - colour).max() <= 5


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents half-written files: a failed write keeps the old file and says why in one line."""
    frames = moving(3)
    for path, fps, metadata in [
        (tmp_path / "a.avi", 8, None),
        (tmp_path / "a", 8, None),
        (tmp_path / "a.mp4", 0, None),
        (tmp_path / "a.gif", 60, None),
        (tmp_path / "a.gif", 8, {"title": "x"}),
    ]:
        with pytest.raises(ValueError, match=r"cannot write|fps is"):
            write_video(path, frames, fps, metadata)
    with pytest.raises(FileNotFoundError, match=r"none/a\.mp4"):
        write_video(tmp_path / "none" / "a.mp4", frames, 8)
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "a.mp4", frames[:0], 8)
    with pytest.raises(ValueError, match="cannot write"):
        write_image(tmp_path / "a.txt", frames[0])
    assert not list(tmp_path.iterdir())

    def fails(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    write_video(tmp_path / "a.mp4", frames, 8)
    before = (tmp_path / "a.mp4").read_bytes()
    monkeypatch.setattr(ffmpeg, "write_mp4", fails)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.mp4"):
        write_video(tmp_path / "a.mp4", frames, 8)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_contact_sheet() -> None:
    """Catches frames in the wrong cell, and first or last frames that are missing."""
    long = np.stack([np.full((10, 12, 3), number, np.uint8) for number in range(50, 61)])
    short = np.stack([np.full((8, 8, 3), number, np.uint8) for number in (100, 200)])
    sheet = contact_sheet([long, short], 3, gap=2)
    assert sheet.shape == (10 + 2 + 8, 3 * 12 + 2 * 2, 3)
    assert [sheet[5, column, 0] for column in (0, 11, 12, 14, 28, 39)] == [50, 50, 255, 55, 60, 60]
    assert [sheet[15, column, 0] for column in (0, 8, 14, 28)] == [100, 255, 200, 255]
    labelled = contact_sheet([long, short], 3, labels=["one", "二"])
    assert labelled.shape[0] > sheet.shape[0]
    assert (labelled[-1, 0] == 100).all()
    for rows, columns, labels in (([], 3, None), ([long], 0, None), ([long], 3, ["a", "b"]), ([long[:0]], 3, None)):
        with pytest.raises(ValueError, match="expected"):
            contact_sheet(rows, columns, labels=labels)


def test_written_images_are_read_back(tmp_path: Path) -> None:
    """Catches swapped channels or sides."""
    pixels = moving(1, 30, 50)[0]
    write_image(tmp_path / "a.png", pixels)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == pixels).all()


# Files from other programs


def text_of(call: Callable[[], object]) -> str:
    """The message with which a file is rejected."""
    with pytest.raises(VideoError) as caught:
        call()
    return str(caught.value)


def test_photographs_with_exif_in_a_video(tmp_path: Path) -> None:
    """Catches PyAV's error on side data that it does not know, which used to end a whole run."""
    path = tmp_path / "lapse.avi"
    with av.open(path, "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 48, "yuvj420p", Fraction(1, 8)
        for number in range(4):
            exif, content = Image.Exif(), io.BytesIO()
            exif[0x010F] = "Camera"
            Image.fromarray(numbered(number)).save(content, "JPEG", quality=95, exif=exif)
            packet = av.Packet(content.getvalue())
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 8), number, number
            packet.is_keyframe = True
            container.mux(packet)
    assert numbers(read_video(path, 8, 32).frames) == [0, 1, 2, 3]


def test_what_a_library_raises_is_told_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents bugs in PyAV and Pillow from ending a run, and files from being blamed for a lack of memory."""

    def raises(error: Exception) -> Callable[..., Any]:
        def fails(*_: object) -> None:
            raise error

        return fails

    write_image(tmp_path / "a.png", numbered(3))
    path = encode(tmp_path / "a.mp4", clip(3))
    for error in (KeyError("odd"), UnicodeDecodeError("utf-8", b"", 0, 1, "odd"), RuntimeError("odd")):
        for module, name, file in ((ffmpeg, "_image", path), (images, "upright", tmp_path / "a.png")):
            monkeypatch.setattr(module, name, raises(error))
            assert "cannot be decoded" in text_of(lambda file=file: read_video(file, 8))
    monkeypatch.setattr(ffmpeg, "_image", raises(MemoryError()))
    with pytest.raises(MemoryError):
        read_video(path, 8)


def test_photos_in_tiles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents one corner of a HEIC photo from being taken for the whole picture."""
    path = Path(__file__).parent / "files" / "tiles.heic"  # 2 x 2 tiles of 64 x 64
    assert text_of(lambda: read_video(path, 8)).startswith("picture in tiles")


def test_pages_and_thumbnails_are_no_picture(tmp_path: Path) -> None:
    """Prevents a document's first page or a raw photo's thumbnail from being taken for the whole picture."""
    first, second = map(Image.fromarray, clip(2))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    assert text_of(lambda: read_video(tmp_path / "a.tif", 8)).startswith("several pages")
    small = first.resize((8, 6))
    copy = TiffImagePlugin.ImageFileDirectory_v2()
    copy[254] = 1
    small.encoderinfo = {"tiffinfo": copy}  # type: ignore[attr-defined]
    first.save(tmp_path / "b.tif", save_all=True, append_images=[small])
    assert numbers(read_video(tmp_path / "b.tif", 8, 32).frames) == [0]
    small.save(tmp_path / "c.tif", tiffinfo=copy)
    assert text_of(lambda: read_video(tmp_path / "c.tif", 8)).startswith("raw photo")
    first.save(tmp_path / "d.jpg", "MPO", save_all=True, append_images=[second])
    assert numbers(read_video(tmp_path / "d.jpg", 8, 32).frames) == [0]


def test_hidden_default_image_is_not_shown(tmp_path: Path) -> None:
    """Skips the picture of an animated PNG that only programs without animation support show."""
    hidden, *shown = map(Image.fromarray, clip(5))
    hidden.save(tmp_path / "a.png", save_all=True, append_images=shown, duration=125, default_image=True)
    assert numbers(read_video(tmp_path / "a.png", 8, 32).frames) == [1, 2, 3, 4]


@pytest.mark.parametrize("brand", [b"avif", b"mif1"])
def test_avif_is_a_picture(tmp_path: Path, brand: bytes) -> None:
    """Catches stills that last a second, alpha lost under a generic brand, and crashes on damaged files."""
    image = Image.fromarray(np.dstack([numbered(37), np.full((48, 64), 255, np.uint8)]))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.paste((0, 0, 0, 0), (0, 0, 8, 48))
    image.save(tmp_path / "a.avif", quality=95)
    content = (tmp_path / "a.avif").read_bytes()
    content = content[:8] + brand + content[12:]
    found = read_video(io.BytesIO(content), 8, background=(255, 0, 0))
    assert found.frames.shape == (1, 48, 64, 3)
    assert found.has_alpha
    for number in range(0, len(content) - 1, 7):
        damaged = content[:number] + bytes([content[number] ^ 255]) + content[number + 1 :]
        with suppress(VideoError):
            read_video(io.BytesIO(damaged), 8)


@pytest.mark.parametrize("behind", [b"", b"\x3b<!-- saved -->", b"\0" * 9, b"\x3b" + bytes(2000)])
def test_gif_without_its_last_byte_and_with_more(tmp_path: Path, behind: bytes) -> None:
    """Catches being stricter than every viewer; bytes that are really missing are still reported."""
    first, *others = map(Image.fromarray, clip(8))
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=120)
    content = (tmp_path / "a.gif").read_bytes().removesuffix(b"\x3b")
    assert numbers(read_video(io.BytesIO(content + behind), 8, 32).frames) == list(range(8))
    if not behind:
        for missing in (1, 2, 30):
            assert "is cut short" in text_of(lambda missing=missing: read_video(io.BytesIO(content[:-missing]), 8))


@pytest.mark.parametrize("fps", [8, 7.5, 12, 24, 30])
def test_gif_of_our_own_has_each_frame_once(tmp_path: Path, fps: float) -> None:
    """Catches GIF's hundredths of a second, which delay frames so that the previous one is shown twice."""
    write_video(tmp_path / "a.gif", np.stack(clip(33)), fps)
    assert numbers(read_video(tmp_path / "a.gif", fps, 32).frames) == list(range(33))
    first, *others = map(Image.fromarray, clip(33))
    durations = [10 * (round(100 * (k + 1) / fps) - round(100 * k / fps)) for k in range(33)]
    first.save(tmp_path / "a.webp", save_all=True, append_images=others, duration=durations, lossless=True)
    assert numbers(read_video(tmp_path / "a.webp", fps, 32).frames) == list(range(33))  # as converted from a GIF


def record(
    path: Path, pictures: Sequence[np.ndarray], codec: str, first: float = 0.0, pause: float = 0.0, **options: str
) -> Path:
    """Write pictures at 25 fps, as broadcast formats need, from second `first` on; the last is `pause` seconds late."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, 25, options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture).reformat(format="yuv420p")
            late = pause if number == len(pictures) - 1 else 0.0
            frame.pts, frame.time_base = round(25 * (first + late)) + number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "mpeg2video"), ("a.mpg", "mpeg2video"), ("a.flv", "flv")])
def test_times_that_begin_again_go_on(tmp_path: Path, name: str, codec: str) -> None:
    """Catches a second recording in the same file whose frames are dropped or come a minute late."""
    shown = [[numbered(20 * part + each) for each in range(20)] for part in range(3)]
    parts = [
        record(tmp_path / f"{part}{name}", shown[part], codec, first=60.0 if part == 2 else 0.0, b="4M").read_bytes()
        for part in range(3)
    ]
    headers = 13 if name == "a.flv" else 0  # they appear only once
    (tmp_path / name).write_bytes(parts[0] + b"".join(part[headers:] for part in parts[1:]))
    found = numbers(read_video(tmp_path / name, 25, 32).frames)
    assert 57 <= len(found) <= 63
    assert len(set(range(60)) - set(found)) <= 3, "frames were left out"
    assert found == sorted(found)
    assert numbers(read_video(tmp_path / name, 25, 32, start=1.4, max_frames=3).frames) == found[35:38]


def test_long_stills_in_a_recording_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents pauses in screen recordings from being taken for a new recording. A still due to a jump of the
    timestamps is reported; one whose length the file states is not."""
    path = record(tmp_path / "a.mkv", clip(3), "mpeg4", pause=30.0)
    assert numbers(read_video(path, 0.1, 32).frames) == [0, 1, 1, 1]
    told = "its times jump from 0.040 to 30.080 seconds: one frame is held until then\n"
    assert capsys.readouterr().err == f"{path}: {told}"
    read_video(io.BytesIO(path.read_bytes()), 0.1, 32)
    assert capsys.readouterr().err == f"a video in an archive: {told}"
    read_video(path, 25, 32, end=0.04)
    slides = encode(tmp_path / "b.mkv", clip(3), times=[0, 12_000, 24_000])
    assert numbers(read_video(slides, 0.1, 32).frames) == [0, 0, 1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"flags": "+ilme+ildct", "x264-params": "tff=1", "crf": "5"}),
        ("a.mpg", "mpeg2video", {"flags": "+ilme+ildct", "b": "8M"}),
    ],
)
def test_interlaced_video_has_no_combs(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    """Catches frames whose alternating rows show two moments, and frames that a filter swallows."""
    frames = np.full((10, 96, 128, 3), 40, np.uint8)
    for number in range(10):
        for field in (0, 1):
            left = 4 + 4 * (2 * number + field)
            frames[number, field::2, left : left + 24] = 220
    found = read_video(record(tmp_path / name, frames, codec, **options), 25).frames
    assert len(found) == 10
    assert _combs(found) < 1 < 4 < _combs(frames)
    for number in range(10):
        assert found[number, 48, 8 * number + 16].min() > 200


def _combs(frames: np.ndarray) -> float:
    """Mean difference between rows and the mean of their neighbors."""
    rows = frames.astype(float)
    return float(np.abs(rows[:, 1:-1] - (rows[:, :-2] + rows[:, 2:]) / 2).mean())


# Colors of other displays


PATCHES = np.array([[255, 255, 255], [128, 128, 128], [220, 30, 30], [30, 160, 60]])
BT2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]  # from BT.709 (BT.2087)


def linear(levels: np.ndarray) -> np.ndarray:
    """Linear light from sRGB levels."""
    share = levels / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def perceptual_quantizer(candelas: np.ndarray) -> np.ndarray:
    """The inverse EOTF of BT.2100, table 4, with its constants in decimals."""
    power = np.clip(candelas / 10000, 0, 1) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hybrid_log_gamma(scene: np.ndarray) -> np.ndarray:
    """The OETF of BT.2100, table 5."""
    log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)


def stripes(values: np.ndarray) -> np.ndarray:
    """Four colors (0 to 1) side by side, in 16 bits."""
    return np.repeat(np.repeat(np.round(values * 65535).astype(np.uint16)[None], 32, 1), 64, 0)


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_videos_look_like_ordinary_ones(tmp_path: Path, transfer: int) -> None:
    """Catches gray, faded frames from phone HDR videos whose transfer curve is ignored."""
    light = linear(PATCHES) @ np.array(BT2020).T * 203
    coded = perceptual_quantizer(light) if transfer == 16 else hybrid_log_gamma((light / 1000) ** (1 / 1.2))
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("ffv1", 8)
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv420p10le"
        stream.color_primaries, stream.color_trc, stream.colorspace, stream.color_range = 9, transfer, 9, 1
        frame = av.VideoFrame.from_ndarray(stripes(coded), "rgb48le")
        frame = frame.reformat(format="yuv420p10le", dst_colorspace=9, dst_color_range=1)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for size, fit in ((None, "crop"), (64, "letterbox")):
        found = read_video(tmp_path / "a.mkv", 8, size, fit=fit).frames[0].astype(int)
        middle = found[found.shape[0] // 2]
        patches = middle[[(2 * place + 1) * len(middle) // 8 for place in range(4)]]
        assert np.abs(patches - PATCHES).max() <= 32


def test_brighter_than_white_keeps_its_shape() -> None:
    """Catches clipped highlights, and a curve that is not monotonic or leaves the range."""
    light = np.geomspace(1, 10000, 64)
    levels = np.round(perceptual_quantizer(light) * 65535).astype(np.uint16)
    found = to_srgb(np.repeat(levels[None, :, None], 3, 2), ColorCoding(9, 16))[0, :, 0].astype(int)
    assert (np.diff(found) >= 0).all()
    assert found[-1] == 255
    assert len(np.unique(found[(light > 203) & (light < 800)])) > 5
    same = np.arange(256, dtype=np.uint16)[None, :, None].repeat(3, 2) * 257
    assert (to_srgb(same, ColorCoding(1, 13)) == same // 257).all()


def wide_profile() -> bytes:
    """An ICC profile of Display P3: that of sRGB with other primaries and another name."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for place in range(132, 132 + 12 * int.from_bytes(content[128:132]), 12):
        name, offset, size = struct.unpack(">4sII", content[place : place + 12])
        if name in primaries:
            values = [round(65536 * each) for each in primaries[name]]
            struct.pack_into(">3i", content, offset + 8, *values)
        if name == b"desc":
            content[offset : offset + size] = content[offset : offset + size].replace(b"s\0R\0G", b"p\0R\0G")
    return bytes(content)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif"])
def test_colour_profiles_are_applied(tmp_path: Path, name: str) -> None:
    """Catches faded photos from phones and cameras, and files blamed for a damaged profile."""
    image, inside = Image.new("RGB", (64, 48), (200, 60, 30)), (217, 42, 0)
    options = {"quality": 95} if name != "a.webp" else {"lossless": True}
    options = {} if name in ("a.png", "a.tif") else options
    for mode in ("RGB", "RGBA"):
        if mode == "RGBA" and name == "a.jpg":
            continue
        image.convert(mode).save(tmp_path / name, icc_profile=wide_profile(), **options)
        assert np.abs(read_video(tmp_path / name, 8).frames[0, 20, 20].astype(int) - inside).max() <= 4
    if name != "a.avif":
        for profile in (b"nonsense" * 20, wide_profile()[:200]):
            image.save(tmp_path / name, icc_profile=profile, **options)
            assert np.abs(read_video(tmp_path / name, 8).frames[0, 20, 20].astype(int) - (200, 60, 30)).max() <= 4


def test_pictures_whose_colours_are_named_by_numbers(tmp_path: Path) -> None:
    """Catches gray HDR pictures: PNG specifies its curve in cICP, AVIF in colr."""
    pixels = np.full((48, 64, 3), 148, np.uint8)  # PQ for 203 nits: white
    write_image(tmp_path / "a.png", pixels)
    content = (tmp_path / "a.png").read_bytes()
    chunk = b"cICP" + bytes((9, 16, 0, 1))
    content = content[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    assert (read_video(io.BytesIO(content), 8).frames > 230).all()
    write_image(tmp_path / "a.avif", pixels)
    coded = bytearray((tmp_path / "a.avif").read_bytes())
    struct.pack_into(">HH", coded, coded.index(b"colrnclx") + 8, 9, 16)
    assert (read_video(io.BytesIO(bytes(coded)), 8).frames > 230).all()


@pytest.mark.parametrize("name", ["12:30.mp4", "http:x.gif", "file:x.webp", "concat:a|b.mp4", "C:x.mp4"])
def test_names_like_addresses_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Prevents the loss of a finished clip because FFmpeg takes its relative name for a URL."""
    monkeypatch.chdir(tmp_path)
    write_video(Path(name), np.stack(clip(3)), 8)
    assert numbers(read_video(Path(name), 8, 32).frames) == [0, 1, 2]
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_facts_of_a_file(tmp_path: Path) -> None:
    """Guards comparisons of clips: rate, size, length, and codec are what was written, whatever the format."""
    frames = np.random.default_rng(0).integers(0, 256, (12, 16, 24, 3), np.uint8)
    for name, codec in {"a.mp4": "h264", "a.webp": "webp", "a.gif": "gif"}.items():
        write_video(tmp_path / name, frames, 25)
        assert examine(tmp_path / name) == (codec, 16, 24, 25, pytest.approx(12 / 25, abs=0.006), ())
    write_video(tmp_path / "slow.mp4", frames[:1], 2)
    assert examine(tmp_path / "slow.mp4").fps == 2
    still = frames.repeat(3, 0)[:-2]  # each frame but the last is held; these formats store it once
    moving = np.concatenate([frames, still])
    for name in ("a.webp", "a.gif"):
        write_video(tmp_path / name, moving, 10)
        facts = examine(tmp_path / name)
        assert (facts.fps, facts.seconds) == (10, pytest.approx(len(moving) / 10, abs=0.006))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"text\.mp4"):
        examine(tmp_path / "text.mp4")
