"""Lists of prompts: a text file with one on each line, or a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cogvideo.config import InputError, require
from cogvideo.data.tables import (
    SPACES,
    Record,
    hints,
    is_missing,
    is_table,
    lines_of,
    read_columns,
    read_records,
    whole_number,
)
from cogvideo.text import is_unicode

COLUMNS = ("prompt", "caption", "text")
"""Columns of a table that may hold the prompts; the first that there is does."""
SEED = "seed"
LARGEST_SEED = 2**63 - 1
NO_LISTS = (".json", ".xlsx", ".xls", ".ods", ".gz", ".zip")
"""Suffixes of files that are neither a text nor a table that is read."""
ANY_SEED = -1
"""Random seed, as other tools spell it."""


class Prompt(NamedTuple):
    """A clip that is wanted."""

    text: str
    seed: int | None = None
    """None where the list names none."""
    where: str = ""
    """Place in a list, for messages."""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file in their order: lines of a text (empty ones are left out), or rows of a table.

    A table (.csv, .tsv, .jsonl, .parquet) has the column `prompt`, `caption` or `text`, and may have `seed`. All else
    is a text, but for spreadsheets, archives and .json, which are refused.

    Raises:
        ValueError: it cannot be read, has no prompts, or a row cannot be used; the message says which.
        OSError: there is no such file.
    """
    kind = path.suffix.lower()
    require(kind not in NO_LISTS, f"{path} is no list of prompts, expected a text, .csv, .tsv, .jsonl or .parquet")
    found = list(_rows(path) if is_table(path) else _lines(path))
    require(len(found) > 0, f"{path} has no prompts, expected one a line, or a table with the column prompt")
    return found


def _lines(path: Path) -> Iterator[Prompt]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {place}: it is no text in UTF-8 ({error.reason}), save it as UTF-8") from error
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            where = f"{path}, line {number}"
            require("\0" not in line, f"{where}: it holds a zero byte, expected a text file")
            yield Prompt(line.translate(SPACES).strip(), where=where)


def _rows(path: Path) -> Iterator[Prompt]:
    path.stat()  # a file that does not exist is an OSError for texts and tables alike
    there = read_columns(path)
    column = next((each for each in COLUMNS if each in there), None)
    message = f"{path} has the columns {', '.join(there)}, expected {' or '.join(COLUMNS)}"
    require(column is not None, "; ".join([message, *hints(there, COLUMNS)]))
    assert column is not None
    for hint in hints(there, (SEED,)):  # other columns are the user's own
        print(f"{path}: {hint}", file=sys.stderr)
    return (_row(path, column, record) for record in read_records(path))


def _row(path: Path, column: str, record: Record) -> Prompt:
    text = record.values.get(column)
    where = f"{path}, {record.place}"
    require(not record.surplus, f'{where}: {record.surplus} cells have no column: a prompt with commas stands in "..."')
    require(isinstance(text, str) and text.strip() != "", f"{where}: {column} is {text!r:.60}, expected a text")
    assert isinstance(text, str)
    require(is_unicode(text) and "\0" not in text, f"{where}: {column} is {text!r:.60}, which is no text in Unicode")
    return Prompt(text.translate(SPACES).strip(), _seed(where, record.values.get(SEED)), where)


def _seed(where: str, cell: Any) -> int | None:
    if is_missing(cell):
        return None
    number = whole_number(cell)
    fits = number is not None and ANY_SEED <= number <= LARGEST_SEED
    require(fits, f"{where}: seed is {cell!r:.60}, expected a whole number in [0, {LARGEST_SEED}], or -1 for any")
    return None if number == ANY_SEED else number
