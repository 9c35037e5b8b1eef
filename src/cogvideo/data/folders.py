"""Contents of a folder of clips: all files below it in a fixed order, and the captions next to each clip."""

from __future__ import annotations

import os
from collections import deque
from functools import lru_cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

from cogvideo.config import InputError, require
from cogvideo.data.tables import LISTS, TABLE_SUFFIXES, RowError, lines_of, parse_json

MANIFESTS = tuple(f"{stem}{suffix}" for stem in ("captions", "metadata") for suffix in TABLE_SUFFIXES)
"""Tables that stand for the folder they lie in."""
LABELS = {"videos": "labels"}
"""Folders of videos whose captions lie in a folder of that name next to them (CogVideoX)."""


def find_manifest(folder: Path) -> Path | None:
    """The table that stands for a folder; None if there is none.

    Raises:
        ValueError: there are several.
    """
    tables = [folder / name for name in MANIFESTS if (folder / name).is_file()]
    names = " and ".join(table.name for table in tables)
    require(len(tables) < 2, f"{folder} has {names}: pass the one that is meant as the source")
    return next((path for path in (*tables, folder / LISTS[0]) if is_manifest(path)), None)


def is_manifest(path: Path) -> bool:
    """Whether a file names the clips of its folder."""
    return path.name in MANIFESTS or (path.name == LISTS[0] and all(path.with_name(each).is_file() for each in LISTS))


def walk(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it and sorted, without hidden ones.

    Each folder is read once, so that links in a circle end; one that can be reached by a link and without is named
    without.

    Raises:
        ValueError: a folder cannot be read.
    """
    names: list[str] = []
    seen: set[str] = set()
    pending = deque([""])
    while pending:
        inner = pending.popleft()
        path = os.path.join(folder, inner)
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        for entry in _entries(path):
            below = os.path.join(inner, entry.name)
            linked = entry.is_symlink()
            if os.path.isdir(entry.path) if linked else entry.is_dir():  # entry.is_dir() raises on links in a circle
                (pending.append if linked else pending.appendleft)(below)
            elif linked or entry.is_file():  # no pipes: opening one waits for ever
                names.append(below)
    return sorted(names)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error


def existing(path: Path) -> Path:
    """The path, or the one that is there and differs in how accents are written alone.

    Macs and old archives spell é in two signs (NFD), keyboards and tables in one (NFC): names that look alike. Where
    several do, none is meant, and the path stays as it is.
    """
    if str(path).isascii() or os.path.lexists(path):
        return path
    found = Path(path.anchor)
    for name in path.parts[1:] if path.anchor else path.parts:
        if not os.path.lexists(found / name):
            alike = _alike(found, name)
            if len(alike) != 1:
                return path
            name = alike[0]
        found /= name
    return found


def _alike(folder: Path, name: str) -> list[str]:
    try:
        return _names(folder, folder.stat().st_mtime_ns).get(normalize("NFC", name), [])
    except OSError:  # no folder, or one that we may not read
        return []


@lru_cache(maxsize=64)
def _names(folder: Path, changed: int) -> dict[str, list[str]]:
    """Names in a folder by their NFC, as of a time of change."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        names.setdefault(normalize("NFC", name), []).append(name)
    return names


def read_beside(path: Path, suffix: str) -> bytes | None:
    """The content of the file with captions of a video; None where there is none.

    Raises:
        RowError: it is there and cannot be read.
    """
    file = path.with_suffix(suffix)
    found = _content(file)
    if found is None and path.parent.name in LABELS:
        found = _content(path.parent.parent / LABELS[path.parent.name] / file.name)
    return found


def _content(path: Path) -> bytes | None:
    try:
        return existing(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RowError("caption cannot be read", f"{path}: {error.strerror}") from error


def lines_in(content: bytes) -> list[str]:
    """Lines of a file with captions.

    Raises:
        RowError: it is not UTF-8.
    """
    return lines_of(_decoded(content))


def table_in(content: bytes) -> dict[str, Any]:
    """The table in a JSON file with captions.

    Raises:
        RowError: it is not UTF-8, or holds no such table.
    """
    text = _decoded(content)
    try:
        return parse_json(text, "the .json next to it")
    except InputError as error:
        raise RowError("caption cannot be read", str(error)) from error


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("caption is no text", f"byte {error.start} of its file is not UTF-8") from error
