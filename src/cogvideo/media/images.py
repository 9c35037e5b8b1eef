"""Pictures with Pillow: images and animations read and written, fitted to a view, and contact sheets of clips."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile

from cogvideo.config import both, require
from cogvideo.files import replacing_by_name
from cogvideo.media.colors import UNKNOWN, ColorCoding, Pixels, to_srgb
from cogvideo.media.shots import Content, Shot, Shots, VideoError, View, ViewedPicture

_LABEL_HEIGHT = 14
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "AVIF")
"""Pillow readers that are used; the JPEG reader also reads MPO, whose first picture counts."""
OPAQUE = 250
"""Alpha from which a pixel counts as opaque: lossy codecs store 255 a little lower."""
MIN_TRANSPARENT = 0.01
"""Share of a picture's pixels through which the background must show for a caption to name it."""
_SUBFILE = 254
"""TIFF tag for the kind of page."""


def read_pictures(file: Content) -> Shots | None:
    """A still image, or an animation; None if Pillow does not know the file."""
    file.seek(0)
    coding = _coding(file.read(2**16))
    image = _opened(file)
    return None if image is None else _animation(image, coding)


def format_name(file: Content) -> str | None:
    """Format of a picture, such as webp; None if Pillow does not know the file."""
    image = _opened(file)
    return None if image is None else str(image.format).lower()


def _opened(file: Content) -> Image.Image | None:
    """The picture, before its pixels are read. Pillow warns at 90 million pixels, and refuses twice as many."""
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        return None


def _animation(image: Image.Image, coding: ColorCoding) -> Shots:
    if image.format == "TIFF":
        _check_pages(cast(TiffImageFile, image))
    num_frames = getattr(image, "n_frames", 1) if image.format in ("WEBP", "PNG", "AVIF") else 1
    begin, first = 0.0, int(image.info.get("default_image", False))  # only programs that cannot animate show it
    for number in range(first, num_frames):
        image.seek(number)
        image.load()
        duration = image.info.get("duration", 0) / 1000 if num_frames > 1 else 0.0
        if num_frames > 1 and duration <= 0.01:
            duration = 0.1  # as browsers do
        shot = Shot(begin, duration, partial(look, upright(image, coding)))
        yield shot.in_hundredths() if num_frames > 1 and round(1000 * begin) % 10 == 0 else shot
        begin += duration


def _check_pages(image: TiffImageFile) -> None:
    """Refuse thumbnails, as in raw photos, and several pages; reduced copies and masks may follow the picture."""
    copy, mask = 1, 4  # of NewSubfileType
    if image.tag_v2.get(_SUBFILE, 0) & copy:
        raise VideoError("raw photo", "its first picture is a thumbnail: convert it to JPEG or PNG")
    for page in range(1, image.n_frames):
        image.seek(page)
        if not image.tag_v2.get(_SUBFILE, 0) & (copy | mask):
            raise VideoError("several pages", f"the file has {image.n_frames}, expected one: save each as a file")
    image.seek(0)


def as_image(picture: Image.Image | np.ndarray) -> Image.Image:
    """A caller's picture, upright and in sRGB.

    Raises:
        ValueError: it is neither a Pillow image nor an array of red, green and blue.
    """
    if isinstance(picture, np.ndarray):
        is_picture = picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8 and picture.size > 0
        got = f"{picture.dtype} of shape {picture.shape}"
        require(is_picture, f"got a picture of type {got}, expected uint8 of shape (height, width, 3)")
        return Image.fromarray(picture)
    got = type(picture).__name__
    require(isinstance(picture, Image.Image), f"got a {got}, expected a Pillow image or a uint8 array")
    return upright(picture)


def upright(image: Image.Image, coding: ColorCoding = UNKNOWN) -> Image.Image:
    """The picture rotated as its EXIF data says, in 8-bit sRGB, mode RGB or RGBA.

    Raises:
        ValueError: it has floating-point pixels, for which white is unknown.
    """
    profile = image.info.get("icc_profile")
    image = _eight_bits(ImageOps.exif_transpose(image))
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    alpha = image.convert("RGBA").getchannel("A") if has_alpha else None
    image = image.convert({"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))
    if coding.is_foreign:
        pixels = np.asarray(image.convert("RGB")).astype(np.uint16) * 257
        image = Image.fromarray(to_srgb(pixels, coding))
    else:
        image = _in_srgb(image, profile)
    if alpha is not None:
        image.putalpha(alpha)
    return image


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colors by the picture's profile; a profile that is damaged, or for another mode, is ignored, as in browsers."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile)) if profile else None
        if source is not None and not ImageCms.getProfileDescription(source).startswith("sRGB"):
            target = ImageCms.createProfile("sRGB")
            return cast(Image.Image, ImageCms.profileToProfile(image, source, target, outputMode="RGB"))
    except (ImageCms.PyCMSError, OSError):
        pass
    return image.convert("RGB")


def _coding(head: bytes) -> ColorCoding:
    """Color coding of an AVIF or PNG by its H.273 numbers, which Pillow does not read."""
    if head.startswith(b"\x89PNG"):
        found, form = head.find(b"cICP") + 4, ">BB"
    else:
        found, form = head.find(b"colrnclx") + 8 if head[4:8] == b"ftyp" else -1, ">HH"
    return ColorCoding(*struct.unpack_from(form, head, found)) if 8 <= found < len(head) - 4 else UNKNOWN


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit gray picture in 8 bits; any other picture unchanged."""
    require(image.mode != "F", "the picture has floating-point pixels, expected 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))


def look(image: Image.Image, view: View, pixel_aspect: float = 1.0) -> ViewedPicture:
    """The picture on the view's background, antialiased to its frame.

    Transparent pictures are put on the background before they are resized: the same as resizing with premultiplied
    alpha, so that the color of invisible pixels never bleeds into an edge.

    Args:
        image: mode RGB, RGBA, or RGBX (three colors and a byte without meaning).
        view: background and frame.
        pixel_aspect: width of a stored pixel over its height; ignored if the view has no size.
    """
    has_alpha = image.mode == "RGBA" and _shows_through(image.getchannel("A"), view)
    if image.mode == "RGBA":
        canvas = Image.new("RGBA", image.size, (*view.background, 255))
        canvas.alpha_composite(image)
        image = canvas.convert("RGB")
    if view.size is not None:
        image = _fitted(image, both(view.size), view, pixel_aspect)
    return ViewedPicture(np.ascontiguousarray(np.asarray(image)[..., :3]), has_alpha)


def _shows_through(alpha: Image.Image, view: View) -> bool:
    """True if enough of the visible part is transparent for a caption to name the background."""
    if view.size is not None and view.fit == "crop":
        across, down = map(round, view.kept(*alpha.size))
        left, top = (alpha.width - across) // 2, (alpha.height - down) // 2
        alpha = alpha.crop((left, top, left + across, top + down))
    return float((np.asarray(alpha) < OPAQUE).mean()) >= MIN_TRANSPARENT


def _fitted(image: Image.Image, size: tuple[int, int], view: View, pixel_aspect: float) -> Image.Image:
    """Bicubic and antialiased: Pillow's filter widens with the reduction."""
    width, height = image.width * pixel_aspect, float(image.height)
    if view.fit == "crop":
        across, down = view.kept(width, height)
        across /= pixel_aspect
        left, top = (image.width - across) / 2, (image.height - down) / 2
        box = (left, top, left + across, top + down)
        if across == size[0] and down == size[1] and left % 1 == top % 1 == 0:
            return image.crop((int(left), int(top), int(left) + size[0], int(top) + size[1]))
        return image.resize(size, _BICUBIC, box, reducing_gap=3.0)
    inner = view.fitted(width, height)
    canvas = Image.new(image.mode, size, (*view.background, 255)[: len(image.getbands())])
    corner = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    canvas.paste(image.resize(inner, _BICUBIC, reducing_gap=3.0), corner)
    return canvas


_BICUBIC = Image.Resampling.BICUBIC


def write_image(
    path: Path, pixels: UInt8[np.ndarray, "height width 3"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write an image in the format of its suffix (`.png`, `.jpg`, `.webp`, ...); only PNG can hold metadata.

    Raises:
        ValueError: the suffix is not that of an image, or its format cannot hold the metadata.
        OSError: the file cannot be written.
    """
    suffixes = Image.registered_extensions()
    require(path.suffix.lower() in suffixes, f"cannot write {path}: expected a suffix such as .png, .jpg or .webp")
    require(not metadata or path.suffix.lower() == ".png", f"cannot write metadata to {path}: expected the suffix .png")
    texts = PngInfo()
    for name, text in (metadata or {}).items():
        texts.add_itxt(name, text)
    with replacing_by_name(path) as temporary:
        Image.fromarray(pixels).save(temporary, quality=95, pnginfo=texts)


def write_animation(path: Path, frames: Pixels, fps: float, metadata: Mapping[str, str]) -> None:
    """Write an animated GIF or WebP that loops forever, with a `comment` if the metadata has one."""
    first, *others = map(Image.fromarray, frames)
    is_gif = path.suffix.lower() == ".gif"
    options: dict[str, Any] = {"lossless": True}
    if "comment" in metadata:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = metadata["comment"]
        options |= {"comment": metadata["comment"].encode()} if is_gif else {"exif": exif}
    unit = 10 if is_gif else 1
    marks = [round(1000 * number / fps / unit) * unit for number in range(len(frames) + 1)]
    durations = [after - before for before, after in pairwise(marks)]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, **options)


def evenly(count: int, max_count: int) -> Int64[np.ndarray, " places"]:
    """Indices of at most `max_count` of `count` things, evenly spread from the first to the last, without repeats."""
    return np.linspace(0, count - 1, min(max_count, count)).round().astype(np.int64)


def contact_sheet(
    rows: Sequence[UInt8[np.ndarray, "_ _ _ 3"]], columns: int = 8, *, gap: int = 2, labels: Sequence[str] | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Clips as one picture on white: each is a row of evenly spaced frames, from the first to the last.

    Lengths and sizes of clips may differ. A clip with fewer frames than `columns` shows all of them once. There are
    `gap` pixels between frames, and a line of text above each row if there are labels.

    Raises:
        ValueError: no rows, no columns, no frames, or not one label per row.
    """
    got = f"got {len(rows)} clips and {columns} columns"
    require(len(rows) > 0 and columns > 0, f"{got}, expected at least one of each")
    require(all(len(clip) > 0 for clip in rows), "a clip has no frames, expected at least one")
    names = [""] * len(rows) if labels is None else labels
    require(len(names) == len(rows), f"got {len(names)} labels, expected one for each of {len(rows)} clips")
    cell_width = max(clip.shape[2] for clip in rows)
    heights = [clip.shape[1] + (_LABEL_HEIGHT if labels else 0) for clip in rows]
    size = columns * (cell_width + gap) - gap, sum(heights) + gap * (len(rows) - 1)
    sheet, top = Image.new("RGB", size, "white"), 0
    for clip, height, text in zip(rows, heights, names, strict=True):
        if text:
            ImageDraw.Draw(sheet).text((1, top + 1), text, fill="black", font=ImageFont.load_default(10))
        for column, frame in enumerate(clip[evenly(len(clip), columns)]):
            sheet.paste(Image.fromarray(frame), (column * (cell_width + gap), top + height - clip.shape[1]))
        top += height + gap
    return np.array(sheet)
