"""Shards: Arrow files with one row a clip.

A shard is an Arrow IPC file (random access) with one record batch, so that it can be memory-mapped and a clip's codes
are a view of the file. `pandas.read_feather`, `polars.read_ipc` and `datasets.load_dataset("arrow")` open it too. What
it was made with stands in the schema metadata. Bytes depend on the content alone.

pyarrow is imported where a shard is read or written: training steps and benchmarks run without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt16

from cogvideo.config import InputError, check_version, from_dict, require
from cogvideo.data.sources import Rejection
from cogvideo.files import replacing

FORMAT_VERSION = 1
_KEY = b"cogvideo"


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.arrow"


class Row(NamedTuple):
    """One clip."""

    id: str
    """Name in its source."""
    captions: tuple[str, ...]
    """One or several, none empty."""
    attributes: dict[str, str]
    """Other things known about it."""
    fps: float
    """Base rate: frames a second of the codes."""
    codes: UInt16[np.ndarray, "frames grid grid"]
    """Image codes."""
    split: str
    """The part of the dataset it belongs to."""
    high_codes: UInt16[np.ndarray, "frames high_grid high_grid"] | None = None
    """Codes of the same frames for super-resolution."""


@dataclass(frozen=True)
class ShardInfo:
    """What a shard was made with."""

    grid: int
    """Side of a frame in codes."""
    num_codes: int
    """Codes lie in `[0, num_codes)`."""
    fps: float
    """Base rate of all rows, in frames a second."""
    tokenizer_sha256: str
    """Of the image tokenizer that made the codes."""
    settings_sha256: str
    """Of the settings of the preparation, see `digest`."""
    work_sha256: str
    """Of the list of clips that the shard was made from."""
    rejected: tuple[Rejection, ...] = ()
    """Clips of that list that are not in it."""
    high_grid: int = 0
    """Side of a frame in codes of super-resolution; 0 for none."""

    def __post_init__(self) -> None:
        require(self.grid > 0, f"grid is {self.grid}, expected a positive number")
        require(0 < self.num_codes <= 2**16, f"num_codes is {self.num_codes}, expected a number in [1, {2**16}]")
        require(self.fps > 0, f"fps is {self.fps}, expected a positive number")
        whole = self.high_grid >= 0 and self.high_grid % self.grid == 0
        require(whole, f"high_grid is {self.high_grid}, expected a multiple of the grid {self.grid}")


def digest(values: Any) -> str:
    """sha256 of what JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def write_shard(path: Path, rows: Sequence[Row], info: ShardInfo) -> None:
    """Write a shard, whole or not at all; equal arguments give equal bytes.

    Raises:
        ValueError: a row does not fit `info`, or has no caption or an empty one.
        OSError: it cannot be written, for instance because the disk is full; nothing is left of it.
    """
    import pyarrow as pa

    for row in rows:
        _check_row(row, info)
    schema = _schema(info)
    batch = pa.record_batch(_columns(rows, info), schema=schema)
    with replacing(path) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)


def read_info(path: Path) -> ShardInfo:
    """What a shard was made with.

    Raises:
        ValueError: the file is missing, truncated or no shard.
    """
    return _read(path)[0]


class Shard:
    """A memory-mapped shard. Views of its codes stay valid as long as they are used, and cannot be written.

    Raises:
        ValueError: the file is missing, truncated or no shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info, batch = _read(path)
        self._splits = batch.column("split")
        self._ids, self._attributes, self._split = (
            _Texts(batch.column(each)) for each in ("id", "attributes", "split")
        )
        captions = batch.column("captions")
        self._caption_offsets, self._captions = captions.offsets.to_numpy(), _Texts(captions.values)
        self._codes = _Codes(batch.column("codes"), self.info.grid)
        self._high = _Codes(batch.column("high_codes"), self.info.high_grid) if self.info.high_grid else None

    def __len__(self) -> int:
        return len(self._splits)

    @property
    def splits(self) -> list[str]:
        """The split of each row."""
        return self._splits.to_pylist()

    @property
    def num_frames(self) -> Int32[np.ndarray, " rows"]:
        """Frames of each row."""
        return np.diff(self._codes.offsets)

    def rows(self, split: str) -> Int64[np.ndarray, " rows"]:
        """The rows of a split."""
        import pyarrow.compute as pc

        return np.flatnonzero(pc.equal(self._splits, split).to_numpy(zero_copy_only=False))

    def codes(self, row: int) -> UInt16[np.ndarray, "frames grid grid"]:
        """The codes of a clip: a view of the file."""
        return self._codes[row]

    def high_codes(self, row: int) -> UInt16[np.ndarray, "frames high_grid high_grid"] | None:
        """The codes of super-resolution, a view of the file; None if the clip has none."""
        codes = None if self._high is None else self._high[row]
        return codes if codes is not None and len(codes) else None

    def check(self, row: int, codes: UInt16[np.ndarray, "..."]) -> None:
        """Refuse codes of a clip that no tokenizer gives. What a disk changes within their range, hashes alone find.

        Raises:
            ValueError: one is out of range.
        """
        if codes.max() >= self.info.num_codes:  # no `require`: its message would be made for every sample
            raise InputError(
                f"{self.path} is damaged: the clip {self._ids[row]!r} has the code {codes.max()}, expected codes in "
                f"[0, {self.info.num_codes}); the command that prepared the data finds what was changed"
            )

    def num_captions(self, row: int) -> int:
        """How many captions a clip has."""
        return int(self._caption_offsets[row + 1]) - int(self._caption_offsets[row])

    def caption(self, row: int, number: int) -> str:
        """One caption of a clip, without reading the others."""
        return self._captions[int(self._caption_offsets[row]) + number]

    def row(self, row: int) -> Row:
        """All of a clip."""
        captions = tuple(self.caption(row, number) for number in range(self.num_captions(row)))
        attributes = json.loads(self._attributes[row])
        codes, high = self.codes(row), self.high_codes(row)
        return Row(self._ids[row], captions, attributes, self.info.fps, codes, self._split[row], high)


class _Texts:
    """A column of strings, each decoded when it is asked for (pyarrow's scalars take ten times as long)."""

    def __init__(self, column: Any) -> None:
        _, offsets, data = column.buffers()
        # Arrow allows the buffers of a column without rows to be missing.
        self._offsets = np.frombuffer(offsets, np.int32) if offsets else np.zeros(1, np.int32)
        self._data = memoryview(data) if data else memoryview(b"")

    def __getitem__(self, index: int) -> str:
        return str(self._data[self._offsets[index] : self._offsets[index + 1]], "utf-8")


class _Codes:
    """A column of codes as views of the file."""

    def __init__(self, column: Any, grid: int) -> None:
        self.offsets: np.ndarray = column.offsets.to_numpy()
        self._codes = column.values.values.values.to_numpy().reshape(-1, grid, grid)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._codes[self.offsets[row] : self.offsets[row + 1]]


def canonical_json(values: Any) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _schema(info: ShardInfo) -> Any:
    import pyarrow as pa

    metadata = {"format_version": FORMAT_VERSION, **asdict(info)}
    high = [pa.field("high_codes", _code_type(info.high_grid))] if info.high_grid else []
    columns = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("attributes", pa.string(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("codes", _code_type(info.grid), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        *high,
    ]
    return pa.schema(columns, metadata={_KEY: canonical_json(metadata).encode()})


def _code_type(grid: int) -> Any:
    """Lists of fixed squares: polars makes a uint16 array of (frames, grid, grid) of it, and numpy a view."""
    import pyarrow as pa

    return pa.list_(pa.list_(pa.list_(pa.uint16(), grid), grid))


def _columns(rows: Sequence[Row], info: ShardInfo) -> list[Any]:
    import pyarrow as pa

    return [
        pa.array([row.id for row in rows], pa.string()),
        pa.array([list(row.captions) for row in rows], pa.list_(pa.string())),
        pa.array([canonical_json(row.attributes) for row in rows], pa.string()),
        pa.array([row.fps for row in rows], pa.float64()),
        _code_column([row.codes for row in rows], info.grid),
        pa.array([row.split for row in rows], pa.string()),
        *([_code_column([row.high_codes for row in rows], info.high_grid)] if info.high_grid else []),
    ]


def _code_column(clips: Sequence[np.ndarray | None], grid: int) -> Any:
    import pyarrow as pa

    present = [clip for clip in clips if clip is not None]
    codes = np.concatenate([np.zeros((0, grid, grid), np.uint16), *present])
    squares = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(codes.reshape(-1), grid), grid)
    offsets = np.cumsum([0, *(0 if clip is None else len(clip) for clip in clips)], dtype=np.int32)
    missing = pa.array([clip is None for clip in clips], pa.bool_()) if len(present) < len(clips) else None
    return pa.ListArray.from_arrays(pa.array(offsets), squares, mask=missing)


def _check_row(row: Row, info: ShardInfo) -> None:
    where = f"the clip {row.id!r}"
    require(row.fps == info.fps, f"{where} has {row.fps:g} frames a second, expected {info.fps:g}")
    require(len(row.captions) > 0 and all(row.captions), f"{where} has the captions {row.captions}, expected some text")
    _check_codes(where, row.codes, info.grid, info.num_codes)
    if row.high_codes is not None:
        require(info.high_grid > 0, f"{where} has codes of super-resolution, expected none")
        _check_codes(where, row.high_codes, info.high_grid, info.num_codes)
        require(len(row.high_codes) == len(row.codes), f"{where} has more or fewer high codes than frames")
    try:
        "".join((row.id, row.split, *row.captions)).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has a text that is no Unicode: {error.reason}") from error


def _check_codes(where: str, codes: np.ndarray, grid: int, num_codes: int) -> None:
    fits = codes.dtype == np.uint16 and codes.ndim == 3 and len(codes) > 0 and codes.shape[1:] == (grid, grid)
    got = f"{codes.dtype} codes of shape {codes.shape}"
    require(fits, f"{where} has {got}, expected uint16 (frames, {grid}, {grid}) with at least one frame")
    require(int(codes.max()) < num_codes, f"{where} has the code {codes.max()}, expected codes in [0, {num_codes})")


def _read(path: Path) -> tuple[ShardInfo, Any]:
    """What a shard was made with, and its rows in a memory map that lives as long as they do; the file is closed."""
    import pyarrow as pa

    try:
        # From a buffer of the map: reads of the map itself take turns with pyarrow's threads for slow files.
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file.read_buffer()) as reader:
            info = _parse_info((reader.schema.metadata or {}).get(_KEY))
            require(reader.schema.equals(_schema(info)), "its columns are not those of a shard")
            batches = reader.num_record_batches
            require(batches == 1, f"it has {batches} record batches, expected 1")
            batch = reader.get_batch(0)
            batch.validate()
            return info, batch
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"cannot use the shard {path}: {reason(error)}; prepare the data again") from error


def reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.partition("\n")[0]


def _parse_info(metadata: bytes | None) -> ShardInfo:
    if metadata is None:
        raise InputError("it is an Arrow file that cogvideo did not write")
    return from_dict(ShardInfo, check_version(json.loads(metadata), FORMAT_VERSION))
