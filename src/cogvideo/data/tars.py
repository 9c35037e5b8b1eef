"""WebDataset tars: the position of each member, found from the headers alone."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from cogvideo.config import InputError, require
from cogvideo.data.tables import reading

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an uncompressed tar, read without unpacking: `num_bytes` bytes from `offset` on."""

    archive: Path
    name: str
    offset: int
    num_bytes: int

    @property
    def suffix(self) -> str:
        """Suffix in lower case, with its dot."""
        return PurePosixPath(self.name).suffix.lower()

    def beside(self, suffix: str) -> tuple[str, ...]:
        """Possible names of this clip's caption file: up to the last dot, or the first (WebDataset)."""
        path = PurePosixPath(self.name)
        stems = dict.fromkeys((path.stem, path.name.partition(".")[0]))
        return tuple(str(path.with_name(stem + suffix)) for stem in stems)

    def read(self) -> bytes:
        """Content of the file."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)


class TarIndex(NamedTuple):
    """Contents of a tar."""

    entries: list[Member]
    """Complete files, in order."""
    cut: list[Member]
    """Files whose content extends past the end of the tar: an interrupted copy or download."""
    damage: str
    """Reason why nothing after the last entry can be read; empty if nothing follows."""


def read_index(path: Path) -> TarIndex:
    """Positions of the files in an uncompressed tar, without hidden files, links and folders; no content is read.

    Nothing after damage is used: each header is found by the length in the one before it.
    """
    with reading(path), path.open("rb") as file:
        start, size = file.read(8), file.seek(0, 2)
        compression = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), "")
        require(not compression, f"{path} is compressed with {compression}, expected a plain tar: unpack or repack it")
        file.seek(0)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is closed above
        except tarfile.TarError as error:
            raise InputError(f"{path} is not a tar: {error}") from error
        entries, damage = _scan(path, tar)
        cut = [each for each in entries if each.offset + each.num_bytes > size]
        whole = [each for each in entries if each not in cut]
        return TarIndex(whole, cut, damage or ("" if cut else _rest(file, tar.offset)))


def _scan(path: Path, tar: tarfile.TarFile) -> tuple[list[Member], str]:
    entries: list[Member] = []
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # else it keeps a large object for every file
            is_hidden = any(part.startswith(".") and part != "." for part in member.name.split("/"))
            if member.isreg() and not member.issparse() and not is_hidden:
                entries.append(Member(path, member.name.removeprefix("./"), member.offset_data, member.size))
    except tarfile.TarError as error:
        return entries, str(error)
    return entries, ""


def _rest(file: BinaryIO, offset: int) -> str:
    """Damage where tarfile found no further header: it does not report broken or truncated headers."""
    file.seek(offset)
    blocks = file.read(2 * tarfile.RECORDSIZE)
    if not blocks:
        return "its end marker is missing: it was cut off"
    if blocks[: tarfile.BLOCKSIZE].strip(b"\0"):
        return "a header is damaged or cut off"
    return "something follows the end of the tar: are two in one file?" if blocks.strip(b"\0") else ""
