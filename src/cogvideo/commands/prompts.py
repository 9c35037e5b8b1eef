"""Lists of prompts: a text file with one per line, or a table."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from cogvideo.config import InputError, require
from cogvideo.data import tables
from cogvideo.data.tables import LINE_SEPARATORS, Record, is_missing, is_table, read_columns, read_records
from cogvideo.generation.request import MAX_SEED
from cogvideo.text import is_unicode

COLUMNS = ("prompt", "caption", "text")
"""Columns of a table that may hold the prompts; the first one found is used."""
SEED = "seed"
MAX_STEM_BYTES = 120
"""Maximum number of bytes in a file name made from a prompt."""
MAX_TEXT_BYTES = 64 << 20
"""Maximum number of bytes in a text file of prompts: nobody has more, but some pipes and devices never end."""
ANY_SEED = -1
"""Random seed, as other tools spell it."""
UNREADABLE_SUFFIXES = (".json", ".xlsx", ".xls", ".ods", ".gz", ".zip")
"""Suffixes of files that are neither text nor a readable table."""


class ListedPrompt(NamedTuple):
    """A requested clip."""

    text: str
    seed: int | None = None
    where: str = ""
    """Place in a list, for messages."""


def read_prompts(path: Path) -> list[ListedPrompt]:
    """Prompts of a file, in order: nonempty lines of a text, or rows of a table (.csv, .tsv, .jsonl, .parquet)."""
    is_list = path.suffix.lower() not in UNREADABLE_SUFFIXES
    require(is_list, f"{path} is not a list of prompts, expected a text file, .csv, .tsv, .jsonl or .parquet")
    found = list(_rows(path) if is_table(path) else _lines(path))
    require(len(found) > 0, f"{path} has no prompts, expected one per line, or a table with the column prompt")
    return found


def stem_of(prompt: str) -> str:
    """Name of a prompt's clip, without its suffix."""
    words = re.sub(r"[^\w]+", "-", normalize("NFC", prompt)).strip("-").encode()[:MAX_STEM_BYTES]
    return words.decode(errors="ignore").strip("-") or "clip"


def _lines(path: Path) -> Iterator[ListedPrompt]:
    with path.open("rb") as file:  # a shell's <(...) is a pipe
        content = file.read(MAX_TEXT_BYTES + 1)
    require(
        len(content) <= MAX_TEXT_BYTES, f"{path} has more than {MAX_TEXT_BYTES >> 20} MiB, expected a list of prompts"
    )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {place}: it is not UTF-8 text ({error.reason}), save it as UTF-8") from error
    for number, line in enumerate(tables.lines_of(text), 1):
        if line.strip():
            where = f"{path}, line {number}"
            require("\0" not in line, f"{where}: it holds a zero byte, expected a text file")
            yield ListedPrompt(line.translate(LINE_SEPARATORS).strip(), where=where)


def _rows(path: Path) -> Iterator[ListedPrompt]:
    path.stat()  # a missing file is an OSError, as for texts
    require(path.is_file() or path.is_dir(), f"{path} is a pipe or a device, expected a file: only texts may be piped")
    there = read_columns(path)
    column = next((each for each in COLUMNS if each in there), "")
    message = f"{path} has the columns {', '.join(there)}, expected {' or '.join(COLUMNS)}"
    require(column != "", "; ".join([message, *tables.hints(there, COLUMNS)]))
    for hint in tables.hints(there, (SEED,)):  # other columns are the user's own
        print(f"{path}: {hint}", file=sys.stderr)
    return (_row(f"{path}, {record.place}", column, record) for record in read_records(path))


def _row(where: str, column: str, record: Record) -> ListedPrompt:
    require(not record.surplus, f'{where}: a cell has no column: quote prompts with commas ("...")')
    text, cell = record.values.get(column), record.values.get(SEED)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {column} is {text!r:.60}, expected a text")
    require(is_unicode(text) and "\0" not in text, f"{where}: {column} is {text!r:.60}, expected Unicode text")
    return ListedPrompt(
        text.translate(LINE_SEPARATORS).strip(), None if is_missing(cell) else _seed(where, cell), where
    )


def _seed(where: str, cell: Any) -> int | None:
    number = tables.whole_number(cell)
    if number is None or not ANY_SEED <= number <= MAX_SEED:
        expected = f"expected a whole number in [0, {MAX_SEED}], or -1 for any"
        raise InputError(f"{where}: seed is {cell!r:.60}, {expected}")
    return None if number == ANY_SEED else number
