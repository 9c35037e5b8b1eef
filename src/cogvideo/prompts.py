"""Lists of prompts: a text file with a line each, or a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cogvideo.config import InputError, require
from cogvideo.data.tables import Record, is_table, is_unicode, read_columns, read_records

COLUMNS = ("prompt", "caption")
"""Columns of a table that may hold the prompts; the first that there is does."""
LARGEST_SEED = 2**63 - 1


class Prompt(NamedTuple):
    """What is to be made."""

    text: str
    seed: int | None = None
    """None where the list names none."""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file in their order: lines of a text (empty ones are left out), or rows of a table.

    A table (.csv, .tsv, .jsonl, .parquet) has the column `prompt` or `caption`, and may have `seed`. All else is a
    text, but for .json, which is refused.

    Raises:
        ValueError: it cannot be read, has no prompts, or a row cannot be used; the message says which.
        OSError: there is no such file.
    """
    require(path.suffix.lower() != ".json", f"{path} is no list of prompts, expected JSON lines (.jsonl) or a text")
    found = list(_rows(path) if is_table(path) else _lines(path))
    require(len(found) > 0, f"{path} has no prompts, expected one a line, or a table with the column prompt")
    return found


def _lines(path: Path) -> Iterator[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    return (Prompt(line.strip()) for line in lines if line.strip())


def _rows(path: Path) -> Iterator[Prompt]:
    path.stat()  # a file that does not exist is an OSError for texts and tables alike
    there = read_columns(path)
    column = next((each for each in COLUMNS if each in there), None)
    require(column is not None, f"{path} has the columns {', '.join(there)}, expected {' or '.join(COLUMNS)}")
    assert column is not None
    return (_row(path, column, record) for record in read_records(path))


def _row(path: Path, column: str, record: Record) -> Prompt:
    text = record.values.get(column)
    where = f"{path}, {record.place}"
    require(not record.surplus, f'{where}: {record.surplus} cells have no column: a prompt with commas stands in "..."')
    require(isinstance(text, str) and text.strip() != "", f"{where}: {column} is {text!r:.60}, expected a text")
    assert isinstance(text, str)
    require(is_unicode(text), f"{where}: {column} is {text!r:.60}, which is no text in Unicode")
    return Prompt(text.strip(), _seed(where, record.values.get("seed")))


def _seed(where: str, cell: Any) -> int | None:
    if cell is None or cell == "":
        return None
    text = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()
    fits = text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST_SEED)) and int(text) <= LARGEST_SEED
    require(fits, f"{where}: seed is {cell!r:.60}, expected a number in [0, {LARGEST_SEED}]")
    return int(text)
