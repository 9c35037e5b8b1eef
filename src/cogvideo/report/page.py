"""Pages of HTML: what they are made of, the numbers in them, and the file that a template makes of both."""

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
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from cogvideo import __version__
from cogvideo.config import require
from cogvideo.files import replacing

_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_VISIBLE = _CONTROLS | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Symbols for control characters, which are not allowed in HTML."""


class Name(NamedTuple):
    """The name of a run, with the color of its lines."""

    text: str
    place: int


class Panel(NamedTuple):
    """A card with a heading. Parts that are empty are left out."""

    title: str
    plot: str = ""
    """SVG of `plots`."""
    legend: Sequence[tuple[Name, str]] = ()
    """Lines of the plot with their last values."""
    heads: Sequence[str] = ()
    """Heads of the table; ">" before the head of a column of numbers."""
    rows: Sequence[Sequence[str | float | Name]] = ()
    """Rows of the table: the first cell names the row, a float is the length of a bar."""
    note: str = ""
    is_wide: bool = False
    is_folded: bool = False
    """Whether the table has to be unfolded."""
    kind: str = ""
    """Name of the table in the style sheet."""


class Picture(NamedTuple):
    """An image and what belongs to it."""

    pixels: UInt8[np.ndarray, "height width colors"] | None
    alt: str
    caption: str | Name
    facts: Sequence[str] = ()
    chips: Sequence[tuple[str, str]] = ()
    more: Sequence[str] = ()
    """Texts to unfold."""
    note: str = ""
    is_lossless: bool = True


class Section(NamedTuple):
    """A part of the page."""

    key: str
    title: str
    notes: Sequence[str] = ()
    panels: Sequence[Panel] = ()
    pictures: Sequence[Picture] = ()
    warnings: Sequence[str] = ()


def check_place(out: Path) -> None:
    """Refuse a place where a page cannot be written.

    Raises:
        ValueError: it is a folder, or in none.
    """
    require(not out.is_dir(), f"{out} is a folder, expected the file of the page")
    require(out.parent.is_dir(), f"there is no folder {out.parent} for the page")


def write_page(out: Path, command: str, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write a page. Every text but the SVG of plots is escaped.

    Raises:
        OSError: the page cannot be written.
    """
    made_by = f"cogvideo {command}, version {__version__}"
    page = _template().render(title=title, lead=lead, sections=sections, made_by=made_by)
    with replacing(out) as file:
        file.write(page.translate(_VISIBLE).encode(errors="replace"))


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("cogvideo.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "embedded": embedded, "shorten": shorten}
    return environment.get_template("page.html")


def bars(title: str, heads: tuple[str, str], counts: Iterable[tuple[str, int]], whole: int, note: str = "") -> Panel:
    """Counts with a bar for each, as long as its share of the largest, and its share of the whole.

    Args:
        title: heading of the panel.
        heads: what it is counted by, and what is counted: ("split", "clips").
        counts: names and counts in their order.
        whole: what shares are of.
        note: text below.
    """
    pairs = list(counts)
    largest = max((total for _, total in pairs), default=0) or 1
    rows = [(middle(name), total / largest, number(total), percent(total, whole)) for name, total in pairs]
    return Panel(title, heads=(heads[0], "", f">{heads[1]}", ">share"), rows=rows, note=note)


def embedded(picture: Picture) -> str:
    """The address of an image that is inside the page."""
    assert picture.pixels is not None
    file = io.BytesIO()
    Image.fromarray(picture.pixels).save(file, "webp", lossless=picture.is_lossless, quality=85)
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
