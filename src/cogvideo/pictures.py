"""Single pictures: fitting one into a square, images on disk, contact sheets of clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from cogvideo.config import require
from cogvideo.files import replacing_by_name

OPAQUE = 250
"""Alpha from which a pixel counts as opaque: lossy codecs store 255 a little lower."""
LEAST_TRANSPARENT = 0.01
"""Share of a picture's pixels through which its background must show to be worth a word."""


@dataclass(frozen=True)
class View:
    """How pictures are seen: on what, and in what square."""

    size: int | None = None
    """Side of the square in pixels; None leaves pictures as they are."""
    fit: Literal["crop", "letterbox"] = "crop"
    """What happens to pictures that are not square: cut to the centre, or bars in the background's colour."""
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


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture with 16 bits a pixel in grey levels of 8 bits, as it is meant; any other one as it is.

    Raises:
        ValueError: it has floating-point pixels, which say nothing of what is white.
    """
    require(image.mode != "F", "the picture has floating-point pixels, expected 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))


def look(image: Image.Image, view: View, pixel_aspect: float = 1.0) -> Seen:
    """The picture on the view's background, antialiased to its square.

    Transparent pictures are put on the background before they are resized: the same as resizing with premultiplied
    alpha, so that the colour of invisible pixels never bleeds into an edge.

    Args:
        image: mode RGB, RGBA, or RGBX (three colours and a byte without meaning).
        view: background and square.
        pixel_aspect: width of a stored pixel over its height; ignored where the view has no size.
    """
    has_alpha = image.mode == "RGBA" and _shows_through(image.getchannel("A"), view)
    if image.mode == "RGBA":
        image = _on_background(image, view.background)
    if view.size is not None:
        image = _fitted(image, view.size, view, pixel_aspect)
    return Seen(np.ascontiguousarray(np.asarray(image)[..., :3]), has_alpha)


def _shows_through(alpha: Image.Image, view: View) -> bool:
    """Whether enough of what is kept of the picture is transparent for one to speak of its background."""
    if view.size is not None and view.fit == "crop":
        side = min(alpha.size)
        left, top = (alpha.width - side) // 2, (alpha.height - side) // 2
        alpha = alpha.crop((left, top, left + side, top + side))
    return float((np.asarray(alpha) < OPAQUE).mean()) >= LEAST_TRANSPARENT


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGBA", image.size, (*background, 255))
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


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


def _fitted(image: Image.Image, size: int, view: View, pixel_aspect: float) -> Image.Image:
    """Bicubic: Pillow's filter grows with the reduction, which is what antialiasing is."""
    width, height = image.width * pixel_aspect, float(image.height)
    if view.fit == "crop":
        across, down = min(width, height) / pixel_aspect, min(width, height)
        left, top = (image.width - across) / 2, (image.height - down) / 2
        if across == down == size and left % 1 == top % 1 == 0:
            return image.crop((int(left), int(top), int(left) + size, int(top) + size))
        return image.resize((size, size), _BICUBIC, (left, top, left + across, top + down), reducing_gap=3.0)
    inner = fitted_size(width, height, view)
    canvas = Image.new(image.mode, (size, size), (*view.background, 255)[: len(image.getbands())])
    canvas.paste(image.resize(inner, _BICUBIC, reducing_gap=3.0), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return canvas


_BICUBIC = Image.Resampling.BICUBIC


def write_image(
    path: Path, pixels: UInt8[np.ndarray, "height width 3"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write an image in the format of its suffix (`.png`, `.jpg`, `.webp`, ...); metadata is for PNG alone.

    Raises:
        ValueError: the suffix is none of an image, or none that can hold the metadata.
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


def evenly(count: int, most: int) -> Int64[np.ndarray, " places"]:
    """Places of at most so many of `count` things, evenly spread from the first to the last; none twice."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)


def contact_sheet(
    rows: Sequence[UInt8[np.ndarray, "_ _ _ 3"]],
    columns: int = 8,
    *,
    gap: int = 2,
    labels: Sequence[str] | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
) -> UInt8[np.ndarray, "height width 3"]:
    """Clips as one picture: a row each, of evenly chosen frames from the first to the last.

    Args:
        rows: clips (frames, height, width, 3); their lengths and sizes may differ, frames keep theirs.
        columns: frames of a row; a shorter clip shows all of its frames once.
        gap: pixels between frames.
        labels: a line of text above each row.
        background: red, green and blue of gaps.

    Raises:
        ValueError: no rows, no columns, or another number of labels than rows.
    """
    require(
        len(rows) > 0 and columns > 0, f"got {len(rows)} clips and {columns} columns, expected at least one of each"
    )
    require(all(len(clip) > 0 for clip in rows), "a clip has no frames, expected at least one")
    require(
        labels is None or len(labels) == len(rows),
        f"got {len(labels or ())} labels, expected one for each of {len(rows)} clips",
    )
    cell_width = max(clip.shape[2] for clip in rows)
    heights = [clip.shape[1] + (_LABEL_HEIGHT if labels else 0) for clip in rows]
    size = columns * (cell_width + gap) - gap, sum(heights) + gap * (len(rows) - 1)
    sheet, top = Image.new("RGB", size, background), 0
    for number, clip in enumerate(rows):
        if labels:
            _write_label(sheet, labels[number], top, background)
        for column, frame in enumerate(clip[evenly(len(clip), columns)]):
            below = top + heights[number] - clip.shape[1]
            sheet.paste(Image.fromarray(frame), (column * (cell_width + gap), below))
        top += heights[number] + gap
    return np.array(sheet)


_LABEL_HEIGHT = 14


def _write_label(sheet: Image.Image, text: str, top: int, background: tuple[int, int, int]) -> None:
    ink = (0, 0, 0) if sum(background) > 384 else (255, 255, 255)
    ImageDraw.Draw(sheet).text((1, top + 1), text, fill=ink, font=ImageFont.load_default(10))
