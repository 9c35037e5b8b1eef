"""Files that are never half there: each takes its name when it is whole."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import filter as matching
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from cogvideo.config import InputError

TEMPORARY_SUFFIX = ".tmp"
LOCK = ".lock"
"""File of a folder that is locked while one process writes there. It stays: it holds nothing."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the `with` block ends without an error, and else vanishes.

    Until then it has another name in the same folder, which ends in `.tmp` and remains only if the process is killed.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    temporary = path.parent / f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, in UTF-8, that takes the place of `path` when it is whole.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing_by_name(path: Path) -> Iterator[Path]:
    """The same for writers that open their file by name: a temporary name with the suffix of `path`.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    try:
        with TemporaryDirectory(prefix=f".{path.name}-", suffix=TEMPORARY_SUFFIX, dir=path.parent) as folder:
            temporary = Path(folder) / f"new{path.suffix}"
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that call this out of a folder; however this one ends, the folder is free again.

    Children that are forked meanwhile do not count: they may work for this process, and may outlive it for a moment.

    Raises:
        ValueError: another one is in there.
        OSError: the folder cannot be written to.
    """
    with _held(FileLock(folder / LOCK, timeout=0), folder):
        yield


@contextmanager
def turn_in(folder: Path) -> Iterator[None]:
    """The same, but wait until the folder is free. Calls inside of each other are one turn.

    Raises:
        OSError: the folder cannot be written to.
    """
    with _held(FileLock(folder / LOCK, is_singleton=True), folder):
        yield


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
    """Paths in a folder whose names match a pattern, in order; none where there is no such folder.

    `Path.glob` takes a folder that cannot be read for an empty one, from Python 3.12 on.

    Raises:
        OSError: the folder cannot be read.
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
    """Make the content of a file, or the names in a folder, last through a power failure."""
    if sys.platform == "win32" and path.is_dir():  # there, folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as network drives answer
            raise
    finally:
        os.close(descriptor)
