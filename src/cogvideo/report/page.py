"""Pages of HTML: the file that a template makes from facts, and the filters that templates use."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from cogvideo import __version__
from cogvideo.config import Sides, both
from cogvideo.files import replacing
from cogvideo.media.colors import Pixels

_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_VISIBLE = _CONTROLS | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Symbols for control characters, which are not allowed in HTML."""


class RunName(NamedTuple):
    """The name of a run, with the color of its lines."""

    text: str
    place: int


class Column(NamedTuple):
    """A column of a histogram."""

    label: str
    meaning: str
    height: int


def write_page(out: Path, command: str, title: str, lead: str, template: str, facts: dict[str, Any]) -> None:
    """Write a page. Every text but the SVG of plots is escaped."""
    made_by = f"cogvideo {command}, version {__version__}"
    page = environment().get_template(template).render(facts, title=title, lead=lead, made_by=made_by)
    with replacing(out) as file:
        file.write(page.translate(_VISIBLE).encode(errors="replace"))


@cache
def environment() -> Environment:
    """The templates, with the following functions as filters."""
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    found = Environment(loader=PackageLoader("cogvideo.report"), autoescape=True, **options)
    filters = {count, duration, embedded, file_size, flat, histogram, middle, moving, number, percent, shares, shorten}
    found.filters |= {each.__name__: each for each in {*filters, sides}}
    return found


def sides(value: Sides) -> str:
    """Both sides of a frame."""
    return "{} × {}".format(*both(value))


def shares(counts: Iterable[Sequence[Any]], whole: int) -> list[tuple[str, float, int, str]]:
    """Rows with a bar for each count, in proportion to the largest count, and its share of the whole.

    Names and counts are the last two of each entry.
    """
    pairs = [each[-2:] for each in counts]
    largest = max((total for _, total in pairs), default=0) or 1
    return [(middle(name), total / largest, total, percent(total, whole)) for name, total in pairs]


def histogram(columns: Sequence[Column], is_wide: bool) -> Markup:
    """A plot of columns."""
    from cogvideo.report.plots import histogram  # matplotlib takes a second to import

    return histogram(columns, is_wide)


def embedded(pixels: UInt8[np.ndarray, "height width colors"], is_lossless: bool) -> str:
    """The data URL of an image embedded in the page."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "webp", lossless=is_lossless, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def moving(frames: Pixels, fps: float) -> str:
    """The data URL of a looping clip embedded in the page."""
    file = io.BytesIO()
    first, *others = map(Image.fromarray, frames)
    first.save(file, "webp", save_all=True, append_images=others, duration=round(1000 / fps), loop=0, quality=75)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def shorten(text: str, limit: int = 300) -> str:
    """The beginning of a long text."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def middle(text: str, limit: int = 60) -> str:
    """The beginning and the end of a long text: paths differ at the end."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[: half - 1]}…{text[-half:]}"


def count(things: int | Sized, thing: str) -> str:
    """`1 clip`, `2 clips`."""
    value = things if isinstance(things, int) else len(things)
    return f"{value:,} {thing}{'' if value == 1 else 's'}"


def number(value: float) -> str:
    """A whole or large number with separators, any other with three digits."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def precise(value: float) -> str:
    """A number with five digits; whole or large ones with separators."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.5g}" if abs(value) >= 0.1 else f"{value:.5g}"


def percent(part: float, whole: float = 1) -> str:
    """A share. Small ones are not rounded to 0."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.3g}%" if 0 < share < 1 else f"{share:.1f}%"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def file_size(num_bytes: int) -> str:
    """Bytes with a decimal prefix."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested tables as rows of names and JSON: `optimization.batch`, `16`."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from flat(each, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value, ensure_ascii=False)
