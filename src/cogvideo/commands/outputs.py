"""Files of generated clips: names, formats, and sidecars, which record how each was made."""

from __future__ import annotations

import json
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import count
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
from jaxtyping import UInt8

from cogvideo.commands.prompts import stem_of
from cogvideo.config import InputError, require
from cogvideo.files import TEMPORARY_SUFFIX, named, replacing_by_name, write_json
from cogvideo.generation.request import ADDED
from cogvideo.media.colors import Pixels
from cogvideo.media.images import write_image
from cogvideo.media.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, write_video
from cogvideo.text import is_unicode

Format = Literal["mp4", "gif", "webp", "png"]
SUFFIXES = (".mp4", ".gif", ".webp")
"""Suffixes of files that hold a clip; PNG frames are a folder."""
MAX_NAME_BYTES = 200
"""Bytes of a given file name. Most file systems allow 255, and temporary names are longer."""
SIDECAR = ".json"
FRAMES = "-frames"
"""Suffix of a folder of previews."""

Record = dict[str, Any]
"""Record of how a clip was made."""


def is_file(output: Path, clips: int) -> bool:
    """True if the output is the file of a single clip, False if it is a folder."""
    suffix, length = output.suffix.lower(), len(os.fsencode(output.name))
    check_name(output)
    too_long = f"the name {output.name:.20}... has {length} bytes, expected {MAX_NAME_BYTES} at most"
    require(length <= MAX_NAME_BYTES, too_long)
    if suffix in SUFFIXES or (suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not output.is_dir()):
        kinds = f"expected a folder, or a file that ends in {', '.join(SUFFIXES)}"
        require(suffix in SUFFIXES, f"cannot write {output}: {kinds}")
        require(not output.is_dir(), f"{output} is a folder, expected a file, or a folder without {suffix}")
        require(clips == 1, f"output is the file {output} for {clips} clips, expected a folder")
        sidecar = sidecar_of(output)
        is_own = not sidecar.exists() or (read_record(sidecar) or {}).get("file") == output.name
        require(is_own, f"{sidecar} is not the sidecar of {output}: give the clip another name")
        return True
    require(output.is_dir() or not output.exists(), f"{output} is a file, expected a folder or a name with .mp4")
    return False


def check_name(path: Path) -> None:
    """Refuse a name that a record cannot hold."""
    require(is_unicode(str(path)), f"the name {str(path)!r} is not Unicode text: rename it")


def public(path: Path) -> str:
    """A path for records, which are shared: only its name, unless it is relative and inside the working folder."""
    is_inside = not path.is_absolute() and ".." not in path.parts
    return str(path) if is_inside else path.name


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be created, for whatever reason."""
    try:
        with NamedTemporaryFile(dir=folder, prefix=".clip-", suffix=TEMPORARY_SUFFIX):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error.strerror}), expected a folder for the clips") from error


class ClipNames:
    """Different names for clips of prompts; case and the form of accents do not distinguish names."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = {_key(each) for each in taken}
        self._numbers: dict[str, int] = {}

    def add(self, prompt: str) -> str:
        """A new name, also for a folder of frames next to the clip."""
        stem = stem_of(prompt)
        number = self._numbers.get(_key(stem), 1)
        name = stem if number == 1 else f"{stem}-{number}"
        while {_key(name), _key(f"{name}{FRAMES}")} & self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._numbers[_key(stem)] = number
        self._taken |= {_key(name), _key(f"{name}{FRAMES}")}
        return name


class Folder:
    """An output folder, which need not exist: its clips, and names for more clips of a format."""

    def __init__(self, path: Path, format: Format) -> None:
        self.path, self.format = path, format
        self._names = ClipNames(each.stem for each in path.iterdir()) if path.is_dir() else ClipNames()
        self._used: set[str] = set()

    @cached_property
    def _records(self) -> dict[tuple[str, str], deque[tuple[str, Record]]]:
        """Sidecars, by prompt and seed, and by prompt alone."""
        found: dict[tuple[str, str], deque[tuple[str, Record]]] = defaultdict(deque)
        for path in named(self.path, f"*{SIDECAR}"):
            record = read_record(path) or {}
            seed = record.get("seed")
            for each in (seed, None) if isinstance(seed, int) and not isinstance(seed, bool) else ():
                found[repr(record.get("prompt")), repr(each)].append((path.stem, ADDED | record))
        return found

    def take(self, alike: Record, prompt: str, seed: int | None) -> bool:
        """Take a finished clip with this record, prompt and seed; False if none is left.

        `alike` is the same in all calls, so each sidecar is checked at most twice.
        """
        left = self._records.get((repr(prompt), repr(seed)), deque())
        while left:
            stem, record = left.popleft()
            is_free = stem not in self._used and record.items() >= alike.items()
            if is_free and self._is_there(record.get("file", stem)):
                self._used.add(stem)
                return True
        return False

    def name(self, prompt: str) -> Path:
        """A new path for a clip of a prompt, in this folder."""
        name = self._names.add(prompt)
        return self.path / (name if self.format == "png" else f"{name}.{self.format}")

    @contextmanager
    def holding(self, path: Path) -> Iterator[Path]:
        """The path of a clip to write in the `with` block, or another one if it was taken in the meantime.

        No other process gets the name: until the clip is written, an empty sidecar reserves it, for all formats.
        """
        stem = sidecar_of(path).stem
        while not _hold(path):
            path = self.name(stem)
        try:
            yield path
        finally:
            if _is_held(path):
                sidecar_of(path).unlink()

    def _is_there(self, name: Any) -> bool:
        path = self.path / str(name)
        if self.format == "png":
            return path.is_dir() and any(path.iterdir())
        return path.suffix.lower() == f".{self.format}" and path.is_file() and path.stat().st_size > 0


def _key(name: str) -> str:
    """Normal form of a name: equal for names that a file system may not distinguish."""
    return normalize("NFC", name).casefold()


def _hold(path: Path) -> bool:
    if path.exists():
        return False
    try:
        sidecar_of(path).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _is_held(path: Path) -> bool:
    sidecar = sidecar_of(path)
    return sidecar.exists() and sidecar.stat().st_size == 0


def read_record(path: Path) -> Record | None:
    """The record in a sidecar; None if it is not one, such as a pipe, which may never end."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def sidecar_of(path: Path) -> Path:
    """Path of the sidecar of a clip."""
    return path.with_name(f"{path.stem if path.suffix.lower() in SUFFIXES else path.name}{SIDECAR}")


def make_frames_folder(path: Path) -> Path:
    """Create a new folder next to a clip, for previews of its frames. An existing one may belong to somebody."""
    for number in count(1):
        folder = path.with_name(f"{path.stem}{FRAMES}{f'-{number}' if number > 1 else ''}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def write_clip(path: Path, frames: Pixels, fps: float, record: Mapping[str, Any]) -> None:
    """Write a clip (a file by its suffix, or a folder of PNG frames), then its sidecar with the record of how it was
    made, which is also stored in the file, as a comment.

    No interruption leaves a clip with the sidecar of another one. A clip is replaced when the new one is complete.
    """
    text = json.dumps(record, ensure_ascii=path.suffix.lower() == ".webp")  # EXIF is ASCII
    sidecar = sidecar_of(path)
    if path.suffix.lower() in SUFFIXES:
        with replacing_by_name(path) as temporary:
            write_video(temporary, frames, fps, {"comment": text})
            if not _is_held(path):
                sidecar.unlink(missing_ok=True)
    else:
        path.mkdir()
        for place, frame in enumerate(frames):
            write_frame(path, place, frame, text)
    write_json(sidecar, record)


def write_frame(folder: Path, place: int, frame: UInt8[np.ndarray, "height width 3"], comment: str = "") -> None:
    """Write a frame of a clip as a PNG file, named by its place."""
    write_image(folder / f"{place:03}.png", frame, {"comment": comment} if comment else None)
