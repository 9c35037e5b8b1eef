"""Shards: Arrow files with one row per clip.

A shard is an Arrow IPC file (random access) with one record batch, so that it can be memory-mapped and a clip's codes
are a view of the file. `pandas.read_feather`, `polars.read_ipc` and `datasets.load_dataset("arrow")` open it too. The
schema metadata holds its `ShardInfo`. Bytes depend on the content alone.

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

from cogvideo.config import InputError, Sides, both, check_version, from_dict, require
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
    captions: tuple[str, ...]
    """One or more, none empty."""
    attributes: dict[str, str]
    fps: float
    """Base rate: frames per second of the codes."""
    codes: UInt16[np.ndarray, "frames rows columns"]
    split: str
    high_codes: UInt16[np.ndarray, "frames high_rows high_columns"] | None = None
    """Codes of the same frames for super-resolution."""


@dataclass(frozen=True, kw_only=True)
class CodeInfo:
    """Shape and origin of codes, the same for all shards of a dataset."""

    grid: Sides
    """Rows and columns of a frame in codes, or side of a square."""
    num_codes: int
    """Codes lie in `[0, num_codes)`."""
    fps: float
    """Base rate of all rows, in frames per second."""
    high_grid: Sides = 0
    """Like `grid`, for super-resolution codes; 0 for none."""
    tokenizer_sha256: str
    """Hash of the image tokenizer that made the codes."""
    settings_sha256: str

    def __post_init__(self) -> None:
        require(min(both(self.grid)) > 0, f"grid is {self.grid}, expected a positive number")
        require(0 < self.num_codes <= 2**16, f"num_codes is {self.num_codes}, expected a number in [1, {2**16}]")
        require(self.fps > 0, f"fps is {self.fps}, expected a positive number")
        pairs = zip(both(self.high_grid), both(self.grid), strict=True)
        is_multiple = all(high >= 0 and high % low == 0 for high, low in pairs)
        require(is_multiple, f"high_grid is {self.high_grid}, expected a multiple of the grid {self.grid}")


@dataclass(frozen=True, kw_only=True)
class ShardInfo(CodeInfo):
    """Inputs from which a shard was made."""

    work_sha256: str
    """Hash of the list of clips that the shard was made from."""
    rejected: tuple[Rejection, ...] = ()
    """Clips of that list that the shard lacks."""


def digest(values: Any) -> str:
    """SHA-256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def write_shard(path: Path, rows: Sequence[Row], info: ShardInfo) -> None:
    """Write a shard atomically; equal arguments give equal bytes."""
    import pyarrow as pa

    for row in rows:
        _check_row(row, info)
    schema = _schema(info)
    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "captions": [list(row.captions) for row in rows],
        "attributes": [canonical_json(row.attributes) for row in rows],
        "fps": [row.fps for row in rows],
        "codes": _code_column([row.codes for row in rows], info.grid),
        "split": [row.split for row in rows],
    }
    if info.high_grid:
        columns["high_codes"] = _code_column([row.high_codes for row in rows], info.high_grid)
    with replacing(path) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))


def read_info(path: Path) -> ShardInfo:
    """Inputs from which a shard was made; raises the errors of `Shard`."""
    return _read(path)[0]


class Shard:
    """A memory-mapped shard. Views of its codes stay valid while they are used, and are read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info, batch = _read(path)
        self._batch = batch
        captions = batch.column("captions")
        self._caption_offsets, self._captions = captions.offsets.to_numpy(), captions.values
        self._codes = self._column("codes", self.info.grid)
        self._high = self._column("high_codes", self.info.high_grid) if self.info.high_grid else None

    def __len__(self) -> int:
        return len(self._batch)

    @property
    def splits(self) -> list[str]:
        """The split of each row."""
        return self._batch.column("split").to_pylist()

    @property
    def num_frames(self) -> Int32[np.ndarray, " rows"]:
        """Number of frames of each row."""
        return np.diff(self._codes[0])

    def rows(self, split: str) -> Int64[np.ndarray, " rows"]:
        """The rows of a split."""
        return np.flatnonzero([each == split for each in self.splits])

    def codes(self, row: int) -> UInt16[np.ndarray, "frames rows columns"]:
        """The codes of a clip: a view of the file."""
        return self._clip(row, *self._codes)

    def high_codes(self, row: int) -> UInt16[np.ndarray, "frames high_rows high_columns"] | None:
        """The codes of super-resolution, a view of the file; None if the clip has none."""
        codes = None if self._high is None else self._clip(row, *self._high)
        return codes if codes is not None and len(codes) else None

    def check(self, row: int, codes: UInt16[np.ndarray, "..."]) -> None:
        """Refuse out-of-range codes of a clip; only hashes detect damage within the range."""
        if codes.max() >= self.info.num_codes:  # no `require`: it would format its message for every sample
            got = f"the clip {self._text('id', row)!r} has the code {codes.max()}"
            expected = f"expected codes in [0, {self.info.num_codes})"
            advice = "the command that prepared the data finds what was changed"
            raise InputError(f"{self.path} is damaged: {got}, {expected}; {advice}")

    def num_captions(self, row: int) -> int:
        """Number of captions of a clip."""
        return int(self._caption_offsets[row + 1]) - int(self._caption_offsets[row])

    def caption(self, row: int, number: int) -> str:
        """One caption of a clip, without reading the others."""
        return str(self._captions[int(self._caption_offsets[row]) + number])

    def row(self, row: int) -> Row:
        """Everything stored for a clip."""
        captions = tuple(self.caption(row, number) for number in range(self.num_captions(row)))
        return Row(
            self._text("id", row),
            captions,
            json.loads(self._text("attributes", row)),
            self.info.fps,
            self.codes(row),
            self._text("split", row),
            self.high_codes(row),
        )

    def _column(self, name: str, grid: Sides) -> tuple[np.ndarray, np.ndarray]:
        """Offsets of the clips in a column of codes, and its codes, as views of the file."""
        column = self._batch.column(name)
        return column.offsets.to_numpy(), column.values.values.values.to_numpy().reshape(-1, *both(grid))

    def _clip(self, row: int, offsets: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return codes[offsets[row] : offsets[row + 1]]

    def _text(self, column: str, row: int) -> str:
        return str(self._batch.column(column)[row])


def canonical_json(values: Any) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _schema(info: ShardInfo) -> Any:
    import pyarrow as pa

    columns = {
        "id": pa.string(),
        "captions": pa.list_(pa.string()),
        "attributes": pa.string(),
        "fps": pa.float64(),
        "codes": _code_type(info.grid),
        "split": pa.string(),
    }
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
    if info.high_grid:
        fields.append(pa.field("high_codes", _code_type(info.high_grid)))
    metadata = canonical_json({"format_version": FORMAT_VERSION, **asdict(info)})
    return pa.schema(fields, metadata={_KEY: metadata.encode()})


def _code_type(grid: Sides) -> Any:
    """Lists of fixed shape: polars reads them as a uint16 array (frames, rows, columns), numpy as a view."""
    import pyarrow as pa

    rows, columns = both(grid)
    return pa.list_(pa.list_(pa.list_(pa.uint16(), columns), rows))


def _code_column(clips: Sequence[np.ndarray | None], grid: Sides) -> Any:
    import pyarrow as pa

    present = [clip for clip in clips if clip is not None]
    rows, columns = both(grid)
    codes = np.concatenate([np.zeros((0, rows, columns), np.uint16), *present])
    lines = pa.FixedSizeListArray.from_arrays(codes.reshape(-1), columns)
    frames = pa.FixedSizeListArray.from_arrays(lines, rows)
    offsets = np.cumsum([0, *(0 if clip is None else len(clip) for clip in clips)], dtype=np.int32)
    missing = pa.array([clip is None for clip in clips], pa.bool_()) if len(present) < len(clips) else None
    return pa.ListArray.from_arrays(pa.array(offsets), frames, mask=missing)


def _check_row(row: Row, info: ShardInfo) -> None:
    where = f"the clip {row.id!r}"
    require(row.fps == info.fps, f"{where} has {row.fps:g} frames per second, expected {info.fps:g}")
    require(len(row.captions) > 0 and all(row.captions), f"{where} has the captions {row.captions}, expected some text")
    _check_codes(where, row.codes, info.grid, info.num_codes)
    if row.high_codes is not None:
        require(info.high_grid != 0, f"{where} has codes of super-resolution, expected none")
        _check_codes(where, row.high_codes, info.high_grid, info.num_codes)
        require(len(row.high_codes) == len(row.codes), f"{where} has more or fewer high codes than frames")
    try:
        "".join((row.id, row.split, *row.captions)).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has a text that is not Unicode: {error.reason}") from error


def _check_codes(where: str, codes: np.ndarray, grid: Sides, num_codes: int) -> None:
    rows, columns = both(grid)
    fits = codes.dtype == np.uint16 and codes.ndim == 3 and len(codes) > 0 and codes.shape[1:] == (rows, columns)
    got = f"{codes.dtype} codes of shape {codes.shape}"
    require(fits, f"{where} has {got}, expected uint16 (frames, {rows}, {columns}) with at least one frame")
    require(int(codes.max()) < num_codes, f"{where} has the code {codes.max()}, expected codes in [0, {num_codes})")


def _read(path: Path) -> tuple[ShardInfo, Any]:
    """The info of a shard, and its rows in a memory map that lives as long as they do; the file is closed."""
    import pyarrow as pa

    try:
        # From a buffer of the map: reads of the map itself take turns with pyarrow's threads for slow files.
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file.read_buffer()) as reader:
            metadata = (reader.schema.metadata or {}).get(_KEY, b"")
            require(metadata != b"", "it is an Arrow file that cogvideo did not write")
            info = from_dict(ShardInfo, check_version(json.loads(metadata), FORMAT_VERSION))
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
