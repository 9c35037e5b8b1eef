"""Files are never half-written, even on systems whose folders cannot be synced."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvideo.files import replacing_by_name, write_text


def write_by_name(path: Path, text: str) -> None:
    with replacing_by_name(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("write", [write_text, write_by_name])
def test_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None]
) -> None:
    """Guards against failed writes on Windows, which cannot open folders, and on drives that cannot sync them."""
    synced, fsync, open_file = [], os.fsync, os.open

    def fails(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(is_folder)
        if is_folder:
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    def opens_no_folder(path: str | Path, *args: int, **options: int | None) -> int:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *args, **options)

    monkeypatch.setattr(os, "fsync", fails)
    write(tmp_path / "a.txt", "drive")
    assert synced == [False, True], "file and folder are synced"
    assert (tmp_path / "a.txt").read_text() == "drive"
    monkeypatch.setattr(os, "open", opens_no_folder)
    with monkeypatch.context() as windows:
        windows.setattr(sys, "platform", "win32")
        write(tmp_path / "a.txt", "windows")
    assert (tmp_path / "a.txt").read_text() == "windows"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
