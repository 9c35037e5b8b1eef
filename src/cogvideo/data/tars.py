"""WebDataset tars: where each member lies, found from the headers alone."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from cogvideo.config import InputError, require

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an uncompressed tar, where it is read without unpacking."""

    archive: Path
    """The tar."""
    name: str
    """Its name inside."""
    offset: int
    """First byte of its content in the archive."""
    num_bytes: int
    """Length of its content."""

    @property
    def suffix(self) -> str:
        """What follows the last dot, with it and in small letters."""
        return PurePosixPath(self.name).suffix.lower()

    def beside(self, suffix: str) -> tuple[str, ...]:
        """Names that a file with this clip's caption may have: up to the last dot, or the first (WebDataset)."""
        path = PurePosixPath(self.name)
        stems = dict.fromkeys((path.stem, path.name.partition(".")[0]))
        return tuple(str(path.with_name(stem + suffix)) for stem in stems)

    def read(self) -> bytes:
        """Its content.

        Raises:
            ValueError: the tar cannot be read.
        """
        with _opened(self.archive) as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)


class Index(NamedTuple):
    """What is in a tar."""

    entries: list[Member]
    """Whole files, in their order."""
    cut: list[Member]
    """Files whose content goes past the end of the tar: a copy or download that stopped."""
    damage: str
    """Why what follows the last entry cannot be read, empty where nothing follows."""


def read_index(path: Path) -> Index:
    """Where the files of an uncompressed tar lie; their content is not read.

    Hidden files are left out, as are links and folders. After damage nothing is taken: a tar has no other way to find
    the next header than the length in the one before.

    Raises:
        ValueError: it is no tar, is compressed, or cannot be read.
    """
    with _opened(path) as file:
        start, size = file.read(8), file.seek(0, 2)
        compression = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), "")
        require(not compression, f"{path} is compressed with {compression}, expected a plain tar: unpack or repack it")
        file.seek(0)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is closed above
        except tarfile.TarError as error:
            raise InputError(f"{path} is no tar: {error}") from error
        entries, damage = _scan(path, tar)
        whole = [each for each in entries if each.offset + each.num_bytes <= size]
        cut = [each for each in entries if each.offset + each.num_bytes > size]
        return Index(whole, cut, damage or ("" if cut else _rest(file, tar.offset)))


def _scan(path: Path, tar: tarfile.TarFile) -> tuple[list[Member], str]:
    entries: list[Member] = []
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # else it keeps a large object for every file
            hidden = any(part.startswith(".") and part != "." for part in member.name.split("/"))
            if member.isreg() and not member.issparse() and not hidden:
                entries.append(Member(path, member.name.removeprefix("./"), member.offset_data, member.size))
    except tarfile.TarError as error:
        return entries, str(error)
    return entries, ""


def _rest(file: BinaryIO, offset: int) -> str:
    """What is wrong where tarfile found no further header: it says nothing of headers that are broken or cut."""
    file.seek(offset)
    blocks = file.read(2 * tarfile.RECORDSIZE)
    if not blocks:
        return "the mark at its end is missing: it was cut"
    if blocks[: tarfile.BLOCKSIZE].strip(b"\0"):
        return "a header is damaged or cut"
    return "something follows the end of the tar: are two in one file?" if blocks.strip(b"\0") else ""


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
