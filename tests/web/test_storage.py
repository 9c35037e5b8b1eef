"""Files of videos and keys: what is stored, where, and what somebody who reads the disk can learn."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cogvideo.config import InputError
from cogvideo.web.keys import Keys
from cogvideo.web.storage import Store


@pytest.mark.parametrize("url", ["{}", "file://{}", "memory://{}"])
def test_files_of_a_video(url: str, tmp_path: Path) -> None:
    """Checks folders and S3-like stores alike: files can be replaced, and removing a video removes its files only."""
    store = Store(url.format(tmp_path / "files"))
    assert store.get("one", "video") is None
    for content in (b"first", b"second"):
        store.put("one", "video", content)
        assert store.get("one", "video") == content
    store.put("two", "video", b"other")
    for _ in range(2):
        store.remove("one")
    assert (store.get("one", "video"), store.get("two", "video")) == (None, b"other")
    with pytest.raises(InputError, match="cannot store files at nothing"):
        Store("nothing://x")


def test_a_store_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards clips while S3 is down: its client raises its own errors, but workers only wait after an OSError."""
    store = Store("memory://files")
    for name in ("pipe_file", "cat_file", "exists"):
        monkeypatch.setattr(MemoryFileSystem, name, Mock(side_effect=RuntimeError("no connection")))
    with pytest.raises(OSError, match=r"cannot reach .*files: no connection"):
        store.put("one", "video", b"")
    with pytest.raises(OSError, match=r"cannot reach .*files: no connection"):
        store.get("one", "video")
    with pytest.raises(OSError, match=r"cannot reach .*files: no connection"):
        store.remove("one")
    local = Store(str(tmp_path))
    monkeypatch.setattr(local._system, "cat_file", Mock(side_effect=RuntimeError("a mistake of ours")))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        local.get("one", "video")


def test_keys_on_disk(tmp_path: Path) -> None:
    """Checks that the file does not reveal keys, that changes apply at once, and that errors name the bad line."""
    keys = Keys(tmp_path / "keys")
    ann, bob = keys.add("ann"), Keys(tmp_path / "keys").add("bob")
    assert [keys.owner(key) for key in (ann, bob, "", "cv-", ann[:-1], "\ud800")] == ["ann", "bob", *4 * [None]]
    text = keys.path.read_text()
    assert ann not in text
    assert [line.split()[0] for line in text.splitlines()] == ["ann", "bob"]
    for name in ("ann", "local", "", "a b", "x" * 61, "../x"):
        with pytest.raises(InputError):
            keys.add(name)
    keys.path.write_text(text + "carl secret\n")
    with pytest.raises(InputError, match="key 3: expected a name and a hash"):
        keys.read()
