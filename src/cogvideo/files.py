"""Files that are never half-written: each gets its name once it is complete.

If a file cannot be written, the OSError names the target file, or the folder.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import filter as matching
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from cogvideo.config import InputError, require

TEMPORARY_SUFFIX = ".tmp"
LOCK = ".lock"
"""Lock file of a folder, held while one process writes there. It is empty and never removed."""


def check_place(path: Path, content: str) -> None:
    """Refuse a path where a file with this content, such as `the page`, cannot be written."""
    require(not path.is_dir(), f"{path} is a folder, expected the file of {content}")
    require(path.parent.is_dir(), f"there is no folder {path.parent} for {content}")


@contextmanager
def replacing_by_name(path: Path) -> Iterator[Path]:
    """Temporary path, with the suffix of `path`, of a file that replaces `path` when the `with` block ends.

    After an error, the file is removed. Its folder, whose name ends in `.tmp`, remains if the process is killed.
    """
    try:
        with TemporaryDirectory(prefix=f".{path.name}-", suffix=TEMPORARY_SUFFIX, dir=path.parent) as folder:
            temporary = Path(folder) / f"new{path.suffix}"
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing, that replaces `path` when the `with` block ends without an error."""
    with replacing_by_name(path) as temporary, temporary.open("xb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file that replaces `path` once it is complete."""
    with replacing(path) as file:
        file.write(plain(text).encode())


def write_json(path: Path, values: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write values as JSON; `default` converts those that JSON cannot represent."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, default=default) + "\n")


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a table whose first row has the column names."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(text: str) -> str:
    """Text that can be written as UTF-8: lone surrogates, such as undecodable bytes of file names, are escaped."""
    return text.encode(errors="backslashreplace").decode()


def exclusive_lock(folder: Path) -> AbstractContextManager[None]:
    """Keep out other processes that call this for the same folder; the lock is released however this one ends.

    Children forked in the meantime do not hold the lock: they may work for this process, and briefly outlive it.
    """
    return _held(FileLock(folder / LOCK, timeout=0), folder)


def wait_for_lock(folder: Path) -> AbstractContextManager[None]:
    """Wait until the folder is free, then keep other processes out; reentrant."""
    return _held(FileLock(folder / LOCK, is_singleton=True), folder)


@contextmanager
def _held(lock: BaseFileLock, folder: Path) -> Iterator[None]:
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another process is writing to {folder}: wait for it, or give another folder") from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    try:
        yield
    finally:
        lock.release()


def named(folder: Path, pattern: str) -> list[Path]:
    """Sorted paths in a folder whose names match a pattern; none if the folder does not exist.

    Unlike this, `Path.glob` treats an unreadable folder as empty from Python 3.12 on.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(matching(names, pattern))]


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`. No other process may be writing there."""
    for path in named(folder, f".*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power failure."""
    if sys.platform == "win32" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # raised by network drives
            raise
    finally:
        os.close(descriptor)
