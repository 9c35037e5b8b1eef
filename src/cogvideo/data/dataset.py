"""A dataset: a folder of shards and the card `dataset.json`, written last: a folder that has it is complete."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from jaxtyping import Int32, Int64

import cogvideo
from cogvideo.config import InputError, check_version, from_dict, require
from cogvideo.data.shards import FORMAT_VERSION, CodeInfo, Row, Shard, canonical_json, digest, read_info, reason
from cogvideo.data.sources import Rejection
from cogvideo.files import TEMPORARY_SUFFIX, sha256_of, write_json

CARD = "dataset.json"
REJECTED = "rejected.csv"
"""Table of the clips that were left out: id, reason, detail."""

Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class ShardEntry:
    """A shard on the card: its name in the folder, its clips, its size, and the hash of its content."""

    file: str
    num_rows: int
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        require(self.file == Path(self.file).name, f"the shard {self.file!r} is refused, expected a plain name")


@dataclass(frozen=True, kw_only=True)
class Card(CodeInfo):
    """Content of `dataset.json`. It has no timestamps: equal datasets have equal cards."""

    cogvideo: str
    """Version that made the dataset."""
    source: str
    """Source of the clips: an absolute path, or `world:COUNT`."""
    tokenizer: str
    """Source of the image tokenizer: an absolute path, or an id on the Hub."""
    settings: dict[str, Any]
    splits: dict[str, Count]
    """Number of clips in each split."""
    rejected: dict[str, Count]
    """Number of rejected clips, by reason."""
    num_frames: int
    lengths: dict[str, Count]
    """Number of clips by length in frames."""
    shards: tuple[ShardEntry, ...]

    @property
    def num_rejected(self) -> int:
        """Number of rejected clips."""
        return sum(self.rejected.values())

    def check_tokenizer(self, sha256: str, where: object) -> None:
        """Refuse a dataset, called `where` in the message, if a tokenizer with another hash made its codes."""
        own, advice = self.tokenizer_sha256, "prepare the data with this model's tokenizer"
        got = f"{where} holds codes of another image tokenizer ({self.tokenizer}, sha256 {own:.12})"
        require(sha256 == own, f"{got}, expected sha256 {sha256:.12}: {advice}")


def make_card(
    folder: Path,
    files: Sequence[str],
    *,
    source: str,
    tokenizer: str,
    settings: dict[str, Any],
    rejected: Sequence[Rejection] = (),
) -> Card:
    """The card of the shards in `folder`, from their content; `rejected` lists the clips that were left out."""
    require(len(files) > 0, f"{folder} has no shards to describe, expected at least one")
    info = read_info(folder / files[0])
    same = {each.name: getattr(info, each.name) for each in fields(CodeInfo)} | {"settings_sha256": digest(settings)}
    splits, lengths, reasons = Counter[str](), Counter[int](), Counter(each.reason for each in rejected)
    entries = []
    for file in files:
        shard = Shard(folder / file)
        _check_equal(shard, same)
        splits.update(shard.splits)
        lengths.update(shard.num_frames.tolist())
        reasons.update(each.reason for each in shard.info.rejected)
        entries.append(_entry(folder / file, len(shard)))
    return Card(
        **same,
        cogvideo=cogvideo.__version__,
        source=source,
        tokenizer=tokenizer,
        settings=json.loads(canonical_json(settings)),
        splits=dict(sorted(splits.items())),
        rejected=dict(sorted(reasons.items())),
        num_frames=sum(length * count for length, count in lengths.items()),
        lengths={str(length): count for length, count in sorted(lengths.items())},
        shards=tuple(entries),
    )


def write_card(folder: Path, card: Card) -> None:
    """Write `dataset.json`, which completes the dataset."""
    write_json(folder / CARD, {"format_version": FORMAT_VERSION, **asdict(card)})


def read_card(folder: Path) -> Card:
    """The card of the dataset in `folder`."""
    path = folder / CARD
    require(folder.is_dir(), f"there is no folder {folder}, expected a dataset of `cogvideo data prepare`")
    if not path.exists():
        begun = any(folder.glob("shard-*")) or any(folder.glob(f".*{TEMPORARY_SUFFIX}"))
        expected = "expected the output of `cogvideo data prepare`"
        why = "prepare was interrupted: run the same command again" if begun else expected
        raise InputError(f"{folder} is not a complete dataset (no {CARD}); {why}")
    try:
        card = from_dict(Card, check_version(json.loads(path.read_bytes()), FORMAT_VERSION))
        num_rows, in_splits = sum(entry.num_rows for entry in card.shards), sum(card.splits.values())
        require(num_rows == in_splits, f"its shards have {num_rows} clips, its splits {in_splits}")
        is_changed = digest(card.settings) != card.settings_sha256
        require(not is_changed, "its settings are not those of settings_sha256: they were changed by hand")
        return card
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot use {path}: {reason(error)}") from error


def check_hashes(folder: Path) -> None:
    """Refuse a folder whose shards differ from its card; a folder without a card is incomplete and not checked."""
    if not (folder / CARD).exists():
        return
    advice = "remove it, and the same command makes it again"
    for entry in read_card(folder).shards:
        path = folder / entry.file
        is_same = not path.exists() or _entry(path, entry.num_rows) == entry
        require(is_same, f"{path} has changed since it was prepared: {advice}")


class Dataset:
    """The shards of a folder, each opened on first use. A pickled dataset has file names, not memory maps.

    Rows are numbered across all shards, in order.

    Args:
        folder: output of `cogvideo data prepare`.
        tokenizer_sha256: hash of the image tokenizer that must have made the codes; any unless given.
    """

    def __init__(self, folder: Path, tokenizer_sha256: str | None = None) -> None:
        self.folder = folder
        self.card = read_card(folder)
        if tokenizer_sha256 is not None:
            self.card.check_tokenizer(tokenizer_sha256, folder)
        for entry in self.card.shards:
            path, expected = folder / entry.file, entry.num_bytes
            require(path.is_file(), f"the dataset is incomplete: there is no file {path}")
            got = path.stat().st_size
            require(got == expected, f"{path} has {got} bytes, expected {expected}: the copy is incomplete")
        self._starts = [0, *accumulate(entry.num_rows for entry in self.card.shards)]
        self._opened: dict[int, Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def __len__(self) -> int:
        return self._starts[-1]

    def shard(self, number: int) -> Shard:
        """A shard by its number on the card. It stays mapped: address space, but no memory of its own or open file."""
        if number not in self._opened:
            entry = self.card.shards[number]
            shard = Shard(self.folder / entry.file)
            _check_equal(shard, {each.name: getattr(self.card, each.name) for each in fields(CodeInfo)})
            got = f"{shard.path} has num_rows {len(shard)}, expected {entry.num_rows}"
            require(len(shard) == entry.num_rows, f"{got}: it does not belong to this dataset")
            self._opened[number] = shard
        return self._opened[number]

    def find(self, row: int) -> tuple[Shard, int]:
        """The shard of a row, and the row's number in it."""
        number = bisect_right(self._starts, row) - 1
        return self.shard(number), row - self._starts[number]

    def rows(self, split: str) -> Int64[np.ndarray, " rows"]:
        """The rows of a split."""
        known = ", ".join(self.card.splits) or "none: it is empty"
        require(split in self.card.splits, f"{self.folder} has no split {split!r}, expected one of {known}")
        shards = range(len(self.card.shards))
        return np.concatenate([self._starts[each] + self.shard(each).rows(split) for each in shards])

    def num_frames(self) -> Int32[np.ndarray, " rows"]:
        """Number of frames of each row."""
        lengths = [self.shard(each).num_frames for each in range(len(self.card.shards))]
        return np.concatenate([np.zeros(0, np.int32), *lengths])

    def row(self, row: int) -> Row:
        """Everything stored for a clip."""
        shard, number = self.find(row)
        return shard.row(number)


def _check_equal(shard: Shard, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        got = getattr(shard.info, name)
        message = f"{shard.path} has {name} {got}, expected {value}: it does not belong to this dataset"
        require(got == value, message)


def _entry(path: Path, num_rows: int) -> ShardEntry:
    return ShardEntry(path.name, num_rows, path.stat().st_size, sha256_of(path))
