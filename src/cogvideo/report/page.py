"""HTML of the report: elements that escape what is put into them, tables, bars and columns drawn with CSS alone."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cogvideo.report.style import STYLE

_VOID = ("img", "meta")
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_VISIBLE = _CONTROLS | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Control characters have no place in HTML: pictures of them have."""

_LABELS = 12
"""Columns of a plot that have a label below; the others show theirs when pointed at."""


class Html(str):
    """Text that is HTML. Every other text is escaped when it becomes part of an element."""

    __slots__ = ()


def escape(value: object) -> Html:
    """What shows `value` as text, in an element or in an attribute; HTML stays as it is."""
    if isinstance(value, Html):
        return value
    text = str(value).translate(_VISIBLE).encode(errors="replace").decode()
    return Html(html.escape(text))


def join(parts: Iterable[object]) -> Html:
    """One after the other."""
    return Html("".join(map(escape, parts)))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """An element. `class_` is the attribute class, `aria_label` is aria-label; one that is None is left out."""
    named = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    start = "".join(f' {name}="{escape(str(value))}"' for name, value in named)
    return Html(f"<{tag}{start}>" if tag in _VOID else f"<{tag}{start}>{join(children)}</{tag}>")


def shorten(text: str, limit: int = 300) -> str:
    """The beginning of a text that is too long to show."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def middle(text: str, limit: int = 60) -> str:
    """The beginning and the end of a text that is too long to show: paths differ at the end."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[: half - 1]}…{text[-half:]}"


def count(value: int, thing: str) -> str:
    """`1 clip`, `2 clips`."""
    return f"{number(value)} {thing}{'' if value == 1 else 's'}"


def number(value: float) -> str:
    """Whole numbers with separators, others with three figures."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def compact(value: int) -> str:
    """Three figures and a unit, for narrow places."""
    amount, units = float(value), ["", "k", "M", "G"]
    while amount >= 999.5 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g}{units[0]}"


def percent(part: float, whole: float) -> str:
    """A share; small ones keep a figure that is not 0."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.3g} %" if 0 < share < 1 else f"{share:.1f} %"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{number(round(seconds / 3600, 1))} h"


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


def picture(pixels: UInt8[np.ndarray, "height width colours"], alt: str, quality: int | None = None) -> Html:
    """An image inside the page, as PNG, or as JPEG where a quality is given; a fourth colour is alpha, of PNG alone."""
    from PIL import Image  # a model's card needs none of it

    file, kind = io.BytesIO(), "png" if quality is None else "jpeg"
    options = {"optimize": True} if quality is None else {"quality": quality}
    Image.fromarray(pixels).save(file, kind, **options)
    height, width, _ = pixels.shape
    source = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return element("img", src=source, alt=alt, width=width, height=height)


def note(*parts: object) -> Html:
    """A paragraph in small letters."""
    return element("p", *parts, class_="note")


def paragraph(*parts: object) -> Html:
    """A paragraph."""
    return element("p", *parts)


def panel(title: str, *parts: object) -> Html:
    """A frame with a heading around what belongs together."""
    return element("div", element("h3", title), *parts, class_="card")


def group(kind: Literal["two", "many", "stack"], *parts: object) -> Html:
    """Parts two a line, many side by side, or one below the other."""
    return element("div", *parts, class_=kind)


def bar(share: float) -> Html:
    """A horizontal bar; figures stand beside it, so that it says nothing to a screen reader."""
    filled = element("span", style=f"width:{100 * share:.2f}%") if share > 0 else ""
    return element("span", filled, class_="bar", aria_hidden="true")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> Html:
    """A table whose first cell names the row. Numbers stand on the right; bars take the room that is left.

    Args:
        columns: names; an empty one is for bars. All empty: rows explain themselves.
        rows: cells: text, numbers (int, or text made by this module), HTML.
        caption: above it.
    """
    lines = [list(row) for row in rows]
    numeric = [_is_numeric([row[place] for row in lines]) for place in range(len(columns))]
    head = (_cell("th", name, numeric[place], scope="col") for place, name in enumerate(columns))
    body = (element("tr", *_cells(row, numeric)) for row in lines)
    above = element("caption", caption) if caption else ""
    named = element("thead", element("tr", *head)) if any(columns) else ""
    whole = element("table", above, named, element("tbody", *body))
    return element("div", whole, class_="scroll")


def _is_numeric(cells: Sequence[object]) -> bool:
    return bool(cells) and all(isinstance(cell, (int, float, Figure)) for cell in cells)


def _cells(row: Sequence[object], numeric: Sequence[bool]) -> Iterator[Html]:
    yield _cell("th", row[0], False, scope="row")
    for cell, right in zip(row[1:], numeric[1:], strict=True):
        yield _cell("td", cell, right)


def _cell(tag: str, value: object, right: bool, **attributes: str) -> Html:
    is_bar = isinstance(value, Html) and 'class="bar"' in value
    shown = number(value) if isinstance(value, (int, float)) else value
    return element(tag, shown, class_="number" if right else "wide" if is_bar else None, **attributes)


class Figure(str):
    """A number that is text already, such as `12.5 %` or `4.1 s`."""

    __slots__ = ()


def bars(names: tuple[str, str], counts: Iterable[tuple[object, int]], whole: int, caption: str = "") -> Html:
    """A table of counts with a bar for each, as long as its share of the largest, and its share of the whole.

    Args:
        names: of what is counted by, and of what is counted: ("split", "clips").
        counts: what to show, in this order.
        whole: what shares are of.
        caption: above the table.
    """
    pairs = list(counts)
    largest = max((count for _, count in pairs), default=0)
    rows = (
        (name, bar(count / largest if largest else 0), count, Figure(percent(count, whole))) for name, count in pairs
    )
    return table((names[0], "", names[1], "share"), rows, caption)


class Column(NamedTuple):
    """A column of a plot."""

    label: str
    """Below it."""
    height: int
    """Its height."""
    meaning: str
    """What is counted, in words: for pointers and for the table below the plot."""
    marked: bool = False
    """Whether it is another kind of column than the others."""


def plot(columns: Sequence[Column], summary: str, caption: str, names: tuple[str, str]) -> Html:
    """Columns side by side, with the same figures as a table to unfold.

    Args:
        columns: from left to right.
        summary: what a reader who does not see the plot should know.
        caption: below it.
        names: heads of the table: of what columns mean, and of what is counted.
    """
    largest = max((each.height for each in columns), default=0) or 1
    step = -(-len(columns) // _LABELS)
    drawn = (_column(each, each.height / largest, place % step == 0) for place, each in enumerate(columns))
    figures = table(names, ((each.meaning, each.height) for each in columns))
    return element(
        "figure",
        element("div", *drawn, class_="columns", role="img", aria_label=summary),
        element("figcaption", caption),
        element("details", element("summary", "The same as a table"), figures),
    )


def _column(column: Column, share: float, labelled: bool) -> Html:
    top = element("span", compact(column.height), class_="top", style=f"bottom:{92 * share:.2f}%")
    return element(
        "div",
        top if column.height else "",
        element("span", class_="fill", style=f"height:{92 * share:.2f}%"),
        element("span", column.label, class_="tick") if labelled else "",
        class_="column marked" if column.marked else "column",
        title=f"{column.meaning}: {number(column.height)}",
    )


def word_list(counts: Sequence[tuple[str, int]]) -> Html:
    """Words with their counts, most frequent first, each on a bar as long as its share of the first."""
    largest = max((count for _, count in counts), default=1)
    return element(
        "ol",
        *(
            element(
                "li",
                element("span", class_="share", style=f"width:{100 * count / largest:.2f}%", aria_hidden="true"),
                element("bdi", shorten(word, 40)),
                element("span", number(count), class_="count"),
            )
            for word, count in counts
        ),
        class_="words",
    )


def tiles(values: Iterable[tuple[str, str, str]]) -> Html:
    """Key figures: name, value, and what else is to be said about it."""
    return element(
        "dl",
        *(
            element(
                "div",
                element("dt", name),
                element("dd", element("span", value, class_="value"), element("span", more, class_="more")),
                class_="tile",
            )
            for name, value, more in values
        ),
        class_="tiles",
    )


class Section(NamedTuple):
    """A part of the page."""

    key: str
    """Its name in links."""
    title: str
    """Its heading."""
    body: Html
    """What stands below."""


def page(title: str, lead: Html, sections: Sequence[Section], foot: str) -> bytes:
    """The whole page, encoded. Its policy forbids scripts and whatever would come from elsewhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    links = (element("li", element("a", each.title, href=f"#{each.key}")) for each in sections)
    nav = element("nav", element("ul", *links), aria_label="Sections")
    top = element("header", element("h1", title), lead, nav)
    main = element("main", *map(_section, sections))
    body = element("body", element("div", top, main, element("footer", foot), class_="page"))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n".encode()


def _section(section: Section) -> Html:
    heading = element("h2", section.title, id=f"{section.key}-title")
    return element("section", heading, section.body, id=section.key, aria_labelledby=f"{section.key}-title")
