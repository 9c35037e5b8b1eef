"""Tables of clips as records: CSV, TSV, JSON lines and Parquet, and the values of their cells.

An unreadable table raises InputError, which names the file and the line; an unusable record raises RowError.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from cogvideo.config import InputError, require
from cogvideo.files import plain
from cogvideo.media.shots import VideoError
from cogvideo.text import is_unicode, is_visible

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Files that are read as tables."""
FILE_COLUMNS = ("file", "file_name", "path", "video", "video_path", "video_file_name")
CAPTION_COLUMNS = ("caption", "text", "prompt")
"""Columns of our tables, followed by their names in other data sets; the first that exists is used."""
OPTIONAL_COLUMNS = ("start", "end", "split")
LISTS = ("videos.txt", "prompts.txt")
"""Paths and captions line by line, as tools for CogVideoX use them: read as a table with our column names."""
LINE_SEPARATORS = dict.fromkeys(map(ord, "\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")
"""Line separators of word processors, chats and web pages, for `str.translate`: tokenizers encode them as bytes.
"""
MAX_DIGITS = 20
"""Maximum number of digits; larger numbers are never expected."""


class RowError(VideoError):
    """An unusable record; the other records can still be used."""


class Record(NamedTuple):
    """One row of a table."""

    place: str
    """Place in the table, for messages: `line 7`."""
    values: dict[str, Any]
    """Cells by column: text in a CSV, otherwise values of JSON or Arrow."""
    surplus: int = 0
    """Cells after the last column, which have no column name."""


def is_table(path: Path) -> bool:
    """True if a file has the suffix of a table."""
    return path.suffix.lower() in TABLE_SUFFIXES


def read_columns(path: Path) -> tuple[str, ...]:
    """Names of a table's columns; for JSON lines, all keys that occur."""
    if path.name == LISTS[0]:
        return FILE_COLUMNS[0], CAPTION_COLUMNS[0]
    kind = path.suffix.lower()
    if kind == ".parquet":
        with _parquet(path) as file:
            names = file.schema_arrow.names
    elif kind == ".jsonl":
        names = list(dict.fromkeys(name for record in _json_lines(path) for name in record.values))
    else:
        names = _csv_columns(path)
    expected = "lines" if kind == ".jsonl" else "names of columns"
    require(len(names) > 0, f"{path} is empty, expected {expected}")
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"{path} has the column {', '.join(twice)} twice")
    return tuple(names)


def read_records(path: Path) -> Iterator[Record]:
    """The rows of a table in order, one at a time."""
    if path.name == LISTS[0]:
        return _paired(path)
    if path.suffix.lower() == ".parquet":
        return _parquet_records(path)
    return _json_lines(path) if path.suffix.lower() == ".jsonl" else _csv_records(path)


def meant(columns: Collection[str], asked: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """The requested columns; our own name also matches the first known one that exists."""
    found = [each for each in known if each in columns]
    return tuple(found[:1]) if asked == known[:1] and found else asked


def hints(columns: Collection[str], expected: Iterable[str]) -> list[str]:
    """Hints at columns that may be meant for missing ones: names with a typo, or in capitals."""
    folded = {column.strip().casefold(): column for column in columns}
    near = {name: get_close_matches(name, folded, n=1, cutoff=0.85) for name in expected if name not in columns}
    return [f"unknown column {folded[each]!r}, did you mean {name!r}?" for name in near for each in near[name]]


def captions_of(values: dict[str, Any], columns: Iterable[str]) -> tuple[str, ...]:
    """The captions of a record, each once: the text of every column, or each text of a list."""
    cells = [values.get(column) for column in columns]
    found = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]
    texts = [text for text in found if isinstance(text, str) or not is_missing(text)]
    if not texts:
        raise RowError("missing caption", f"nothing in {', '.join(columns)}")
    return clean(texts)


def clean(captions: Iterable[Any]) -> tuple[str, ...]:
    """Captions without surrounding space, duplicates and empty ones."""
    kept: dict[str, None] = {}
    for caption in captions:
        if not isinstance(caption, str) or not is_unicode(caption):
            raise RowError("caption is not text", f"got {caption!r:.60}")
        if is_visible(caption):
            kept[caption.translate(LINE_SEPARATORS).strip()] = None
    if not kept:
        raise RowError("empty caption")
    return tuple(kept)


def lines_of(text: str) -> list[str]:
    """Lines of a text as editors count them; `str.splitlines` also splits at the characters in `LINE_SEPARATORS`."""
    return re.split(r"\r\n|\r|\n", text)


def is_missing(cell: Any) -> bool:
    """True if a cell is empty: null, no text, or the NaN that other programs put into numeric columns."""
    return cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and cell != cell)


def whole_number(cell: Any) -> int | None:
    """The whole number in a cell such as 7, 7.0, "7.0" or "1e3"; None for others, and for a float beyond 2**53."""
    text = str(cell).strip()
    if isinstance(cell, bool) or not re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d{1,3})?", text, re.ASCII):
        return None
    number = Decimal(text)
    if number.adjusted() > MAX_DIGITS or number != number.to_integral_value():
        return None
    return None if isinstance(cell, float) and abs(cell) > 2**53 else int(number)


def attributes_of(values: dict[str, Any], known: frozenset[str]) -> dict[str, str]:
    """Other columns of a record, and the keys of a table called `attributes`, as text; empty ones are left out."""
    inner = values.get("attributes")
    if isinstance(inner, dict) and inner:
        known |= {"attributes"}
    else:
        inner = {}
    said = inner | {key: value for key, value in values.items() if key not in known}
    is_empty = {key: value in (None, "") or value != value for key, value in said.items()}  # NaN is empty, too
    return {_text(str(key)): _text(value) for key, value in said.items() if not is_empty[key]}


def span_of(values: dict[str, Any]) -> tuple[float, float | None]:
    """`start` and `end` of a record in seconds; 0 and None by default."""
    start = _seconds("start", values.get("start")) or 0.0
    end = _seconds("end", values.get("end"))
    if end is not None and end <= start:
        raise RowError("bad start or end", f"the clip ends at {end:g} s and starts at {start:g} s")
    return start, end


def _seconds(name: str, cell: Any) -> float | None:
    """Seconds as a number, `ss.s`, `mm:ss.s` or `hh:mm:ss.s`; None for an empty cell."""
    if is_missing(cell):
        return None
    try:
        parts = [float(part) for part in str(cell).split(":")]
    except ValueError:
        parts = [math.nan]
    is_time = len(parts) <= 3 and all(0 <= part < math.inf for part in parts) and all(part < 60 for part in parts[1:])
    if not is_time or isinstance(cell, bool):
        raise RowError("bad start or end", f"{name} is {cell!r:.40}, expected seconds or hh:mm:ss")
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def _text(value: Any) -> str:
    return plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors in reading a file into an InputError, one line that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: line {_first_bad_line(path)} is not UTF-8, save it as UTF-8") from error


def _first_bad_line(path: Path) -> int:
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 1


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Non-blank rows with the line they start on; quoted cells may span lines."""
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    with reading(path), path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=delimiter == ",", strict=True)
        start = 1
        try:
            for row in reader:
                if row:
                    yield start, row
                start = reader.line_num + 1
        except csv.Error as error:
            hint = 'put a cell with quotes or commas in "...", and double the quotes in it'
            hint = "a cell is too long" if "limit" in str(error) else hint
            raise InputError(f"{path}, line {start}: {error} ({hint})") from error


def _csv_columns(path: Path) -> list[str]:
    return [name.strip() for name in next(_csv_rows(path), (1, []))[1]]


def _csv_records(path: Path) -> Iterator[Record]:
    names = _csv_columns(path)
    for line, row in islice(_csv_rows(path), 1, None):
        yield Record(f"line {line}", dict(zip(names, row, strict=False)), max(0, len(row) - len(names)))


def _json_lines(path: Path) -> Iterator[Record]:
    with reading(path), path.open(newline="\n", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Record(f"line {number}", parse_json(line, f"{path}, line {number}"))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """The object in a JSON text; messages call it `where`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(";")[0]  # the rest is advice to programmers
        raise InputError(f"{where}: it is not JSON ({reason})") from error
    require(isinstance(values, dict), f'{where}: got {values!r:.40}, expected {{"name": value, ...}}')
    return values


def _paired(videos: Path) -> Iterator[Record]:
    """Lines of `videos.txt` with those of `prompts.txt`; empty lines at the end do not count."""
    prompts = videos.with_name(LISTS[1])
    columns = []
    for path in (videos, prompts):
        with reading(path):
            columns.append(lines_of(path.read_text("utf-8-sig").rstrip()))
    files, captions = columns
    got = f"{videos} has {len(files)} lines and {prompts.name} {len(captions)}"
    require(len(files) == len(captions), f"{got}, expected a caption for each video")
    for number, cells in enumerate(zip(files, captions, strict=True), 1):
        yield Record(f"line {number}", dict(zip(read_columns(videos), cells, strict=True)))


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path} needs pyarrow: pip install 'cogvideo[train]'") from error
    with reading(path):
        try:
            with ParquetFile(path) as file:
                yield file
        except pyarrow.ArrowException as error:
            raise InputError(f"cannot read {path}: {error}") from error


def _parquet_records(path: Path) -> Iterator[Record]:
    with _parquet(path) as file:
        rows = (values for batch in file.iter_batches(1024) for values in batch.to_pylist())
        for number, values in enumerate(rows, 1):
            yield Record(f"row {number}", values)
