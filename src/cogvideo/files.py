"""Files that are never half there: each takes its name when it is whole."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the `with` block ends without an error, and else vanishes.

    Until then it has a name of its own beside it, which ends in `.tmp` and only a killed process leaves behind.

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
        _sync(path.parent)
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
            temporary.replace(path)
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
    with (folder / ".lock").open("w") as file:  # it stays: if it were removed, two processes could each lock another
        if sys.platform != "win32":  # there, two runs in one folder are on their own
            os.register_at_fork(after_in_child=file.close)  # else the lock would last as long as any of them
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"another process is writing to {folder}: wait for it, or give another folder"
                raise ValueError(message) from error
            except OSError as error:  # a file system without locks
                warnings.warn(f"{folder} cannot be locked ({error}): start no second run there", stacklevel=3)
        yield


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`. No other process may be writing there."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make a rename last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
