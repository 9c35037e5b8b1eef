"""Contents of a folder of clips: all files below it in a fixed order, and the captions next to each clip."""

from __future__ import annotations

import os
from collections import deque
from functools import lru_cache
from pathlib import Path
from unicodedata import normalize

from cogvideo.config import InputError, require
from cogvideo.data.tables import LISTS, TABLE_SUFFIXES, RowError

MANIFESTS = tuple(f"{stem}{suffix}" for stem in ("captions", "metadata") for suffix in TABLE_SUFFIXES)
"""Tables that describe the folder they are in."""
LABELS = {"videos": "labels"}
"""Names of video folders, and of the folder next to each that has the captions (CogVideoX)."""


def find_manifest(folder: Path) -> Path | None:
    """The table that describes a folder; None if there is none."""
    tables = [folder / name for name in MANIFESTS if (folder / name).is_file()]
    names = " and ".join(table.name for table in tables)
    require(len(tables) < 2, f"{folder} has {names}: pass one of them as the source")
    return next((path for path in (*tables, folder / LISTS[0]) if is_manifest(path)), None)


def is_manifest(path: Path) -> bool:
    """True if a file names the clips of its folder."""
    return path.name in MANIFESTS or (path.name == LISTS[0] and all(path.with_name(each).is_file() for each in LISTS))


def walk(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it and sorted, without hidden ones.

    Each folder is read once, so cycles of symbolic links end; paths without links are preferred.
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
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():  # entry.is_dir() raises on a cycle of links
                (pending.append if is_link else pending.appendleft)(below)
            elif is_openable(entry.path) if is_link else entry.is_file():
                names.append(below)
    return sorted(names)


def is_openable(path: str | Path) -> bool:
    """False for pipes and devices, which may block or never end; True for a missing file."""
    return os.path.isfile(path) or not os.path.exists(path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error


def existing(path: Path) -> Path:
    """The path, or the only existing one that differs just in how accents are encoded.

    Macs and old archives encode é as two characters (NFD), keyboards and tables as one (NFC).
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
    except OSError:  # no folder, or no permission to read it
        return []


@lru_cache(maxsize=64)
def _names(folder: Path, changed: int) -> dict[str, list[str]]:
    """Names in a folder by their NFC form; the modification time `changed` invalidates the cache."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        names.setdefault(normalize("NFC", name), []).append(name)
    return names


def read_beside(path: Path, suffix: str) -> bytes | None:
    """Content of a video's caption file; None if there is none."""
    file = path.with_suffix(suffix)
    places = [file]
    if path.parent.name in LABELS:
        places.append(path.parent.parent / LABELS[path.parent.name] / file.name)
    for place in map(existing, places):
        if not is_openable(place):
            raise RowError("caption cannot be read", f"{place} is not a file")
        try:
            return place.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RowError("caption cannot be read", f"{place}: {error.strerror}") from error
    return None
