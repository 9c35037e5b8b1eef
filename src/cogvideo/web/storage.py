"""Files of videos, in a folder or in any store that fsspec supports. Names never come from requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from cogvideo.config import InputError
from cogvideo.files import replacing


class Store:
    """A folder for each video.

    Args:
        url: folder, or a URL such as `s3://bucket/folder`.
    """

    def __init__(self, url: str) -> None:
        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InputError(
                f"cannot store files at {urlsplit(url).scheme}://... ({error}), expected a folder"
            ) from error
        self._is_local = "file" in self._system.protocol

    def put(self, video: str, name: str, content: bytes) -> None:
        """Write or replace a file atomically; stores other than folders do this themselves."""
        path = self._path(video, name)
        if not self._is_local:
            with self._reaching():
                self._system.pipe_file(path, content)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as file:
            file.write(content)

    def get(self, video: str, name: str) -> bytes | None:
        """Content of a file; None if there is none."""
        try:
            with self._reaching():
                return bytes(self._system.cat_file(self._path(video, name)))
        except FileNotFoundError:
            return None

    def remove(self, video: str) -> None:
        """Delete the files of a video."""
        folder = f"{self._root}/{video}"
        with self._reaching():
            if self._system.exists(folder):
                self._system.rm(folder, recursive=True)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn a store's own errors, such as a broken connection to S3, into an OSError."""
        try:
            yield
        except Exception as error:
            if self._is_local or isinstance(error, OSError):
                raise
            raise OSError(f"cannot reach {self._root}: {error}") from error

    def _path(self, video: str, name: str) -> str:
        return f"{self._root}/{video}/{name}"


def frame_name(place: int) -> str:
    """File name of a frame."""
    return f"{place:05}.png"
