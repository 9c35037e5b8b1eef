"""Shards and their card: they round-trip and open in other tools; damaged or incomplete ones are rejected."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest

from cogvideo.data.dataset import CARD, Card, Dataset, check_hashes, make_card, read_card, write_card
from cogvideo.data.shards import Row, Shard, ShardInfo, digest, read_info, shard_name, write_shard
from cogvideo.data.sources import Rejection
from cogvideo.files import TEMPORARY_SUFFIX, remove_leftovers

GRID, NUM_CODES, FPS = 4, 1024, 8.0
SETTINGS = {"size": 32, "background": "weiß", "nested": {"b": 1, "a": 2.5}}
INFO = ShardInfo(
    grid=GRID,
    num_codes=NUM_CODES,
    fps=FPS,
    tokenizer_sha256="1" * 64,
    settings_sha256=digest(SETTINGS),
    work_sha256="3" * 64,
)
REJECTED = (Rejection("bad.mp4", "cannot be decoded", 'line 1\nand "more"'), Rejection("short.gif", "too short", ""))


def make_rows(lengths: list[int], high_grid: int = 0, seed: int = 0) -> list[Row]:
    """Rows with random codes, one to three captions, and both splits."""
    generator = np.random.default_rng(seed)

    def codes(length: int, grid: int) -> np.ndarray:
        return generator.integers(0, NUM_CODES, (length, grid, grid), dtype=np.uint16)

    return [
        Row(
            f"clips/{seed}/{index}.mp4",
            tuple(f"a {word} № {index}, 猫\n" for word in ("cat", "dog", "hat")[: 1 + index % 3]),
            {"object": "cat", "colour": f"{index}"} if index % 2 else {},
            FPS,
            codes(length, GRID),
            "validation" if index % 4 == 3 else "train",
            codes(length, high_grid) if high_grid and index % 3 else None,
        )
        for index, length in enumerate(lengths)
    ]


def same(left: Row, right: Row) -> bool:
    """Equality of all fields, including codes."""
    high = (left.high_codes is None) == (right.high_codes is None)
    if high and left.high_codes is not None:
        high = np.array_equal(left.high_codes, right.high_codes)
    codes = left.codes.dtype == right.codes.dtype and np.array_equal(left.codes, right.codes)
    texts = left._replace(codes=None, high_codes=None) == right._replace(codes=None, high_codes=None)
    return bool(high and codes and texts)


@pytest.fixture
def rows() -> list[Row]:
    return make_rows([33, 5, 1, 40, 2])


@pytest.fixture
def shard(tmp_path: Path, rows: list[Row]) -> Path:
    write_shard(tmp_path / shard_name(0), rows, INFO)
    return tmp_path / shard_name(0)


MakeDataset = Callable[..., Path]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """A complete dataset folder: `make_dataset(name, lengths of each shard)`."""

    def make(
        name: str = "data", lengths: tuple[list[int], ...] = ([33, 5, 1, 40, 2], [], [9, 17, 3]), **info: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        files = [shard_name(number) for number in range(len(lengths))]
        for number, (file, each) in enumerate(zip(files, lengths, strict=True)):
            refused = REJECTED[:number]
            write_shard(folder / file, make_rows(each, seed=number), replace(INFO, rejected=refused, **info))
        write_card(folder, make_card(folder, files, source="clips", tokenizer="bundle", settings=SETTINGS))
        return folder

    return make


def edit_card(folder: Path, **changes: Any) -> None:
    """Change fields of the card; None removes a field."""
    values = json.loads((folder / CARD).read_text()) | changes
    (folder / CARD).write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@pytest.mark.parametrize("lengths", [[], [1], [33, 5, 1, 40, 2]])
@pytest.mark.parametrize("high_grid", [0, 3 * GRID])
def test_round_trip(tmp_path: Path, lengths: list[int], high_grid: int) -> None:
    """Catches rows that change on a round trip, also in empty and one-row shards, and with super-resolution codes."""
    rows, info = make_rows(lengths, high_grid), replace(INFO, rejected=REJECTED, high_grid=high_grid)
    write_shard(tmp_path / "x.arrow", rows, info)
    assert read_info(tmp_path / "x.arrow") == info
    shard = Shard(tmp_path / "x.arrow")
    assert len(shard) == len(rows)
    assert all(same(shard.row(index), row) for index, row in enumerate(rows))
    assert shard.num_frames.tolist() == lengths
    assert [shard.num_captions(index) for index in range(len(rows))] == [len(row.captions) for row in rows]
    for split in ("train", "validation", "nothing"):
        assert shard.rows(split).tolist() == [index for index, row in enumerate(rows) if row.split == split]


def test_codes_are_views_of_the_file(shard: Path, rows: list[Row]) -> None:
    """Catches codes that are copied when read, or through which a user's data could be modified."""
    opened = Shard(shard)
    first, third = opened.codes(0), opened.codes(3)
    assert first.base is not None
    assert np.shares_memory(first, opened.codes(0))
    assert not third.flags.writeable
    del opened
    assert np.array_equal(third, rows[3].codes), "a view outlives its shard"


def test_many_shards_need_no_open_files(tmp_path: Path, shard: Path) -> None:
    """Guards datasets with more shards than a process may have open files."""
    before = len(os.listdir("/proc/self/fd"))
    opened = [Shard(shard) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(len(each) == 5 for each in opened)


def test_equal_rows_give_equal_bytes(tmp_path: Path, make_dataset: MakeDataset) -> None:
    """Catches datasets that differ when built again, so that a resumed run would not match an uninterrupted one."""
    one, two = make_dataset("one"), make_dataset("two")
    names = sorted(path.name for path in one.iterdir())
    assert names == [CARD, *map(shard_name, range(3))]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_order_of_attributes_does_not_matter(tmp_path: Path, rows: list[Row]) -> None:
    """Catches bytes that depend on the order of a table's columns or a tar's keys."""
    for name, attributes in (("a", {"x": "1", "y": "2"}), ("b", {"y": "2", "x": "1"})):
        write_shard(tmp_path / name, [rows[0]._replace(attributes=attributes)], INFO)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_pandas_opens_it(shard: Path, rows: list[Row]) -> None:
    """Catches a format that is Arrow in name only: pandas must read it."""
    table = pandas.read_feather(shard)
    assert table["id"].tolist() == [row.id for row in rows]
    assert [tuple(each) for each in table["captions"]] == [row.captions for row in rows]
    got = [np.array([np.stack(list(frame)) for frame in clip], np.uint16) for clip in table["codes"]]
    assert all(np.array_equal(each, row.codes) for each, row in zip(got, rows, strict=True))


def test_polars_opens_it(shard: Path, rows: list[Row]) -> None:
    """Catches a format that is Arrow in name only: polars must read it, with the shape and type of the codes."""
    table = polars.read_ipc(shard)
    assert table["split"].to_list() == [row.split for row in rows]
    assert [json.loads(each) for each in table["attributes"]] == [row.attributes for row in rows]
    for clip, row in zip(table["codes"], rows, strict=True):
        assert clip.to_numpy().dtype == np.uint16
        assert np.array_equal(clip.to_numpy(), row.codes)
    assert polars.scan_ipc(shard).select("fps").collect()["fps"].to_list() == [FPS] * len(rows)


def test_datasets_opens_it(tmp_path: Path, shard: Path, rows: list[Row]) -> None:
    """Catches a format that is Arrow in name only: Hugging Face datasets must read it."""
    settings = {"cache_dir": str(tmp_path / "cache"), "split": "train"}
    table = datasets.load_dataset("arrow", data_files=str(shard), **settings)
    assert table["id"] == [row.id for row in rows]
    for clip, row in zip(table.with_format("numpy"), rows, strict=True):
        assert np.array_equal(clip["codes"], row.codes)
        assert tuple(clip["captions"]) == row.captions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 4.0}, "4 frames per second, expected 8"),
        ({"captions": ()}, "expected some text"),
        ({"captions": ("a", "")}, "expected some text"),
        ({"captions": ("\ud800",)}, "not Unicode"),
        ({"codes": np.zeros((5, GRID, GRID), np.int64)}, "int64 codes"),
        ({"codes": np.zeros((5, GRID, GRID + 1), np.uint16)}, r"shape \(5, 4, 5\)"),
        ({"codes": np.zeros((0, GRID, GRID), np.uint16)}, "at least one frame"),
        ({"codes": np.full((5, GRID, GRID), NUM_CODES, np.uint16)}, r"code 1024, expected codes in \[0, 1024\)"),
        ({"high_codes": np.zeros((5, 12, 12), np.uint16)}, "super-resolution, expected none"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, rows: list[Row], change: dict[str, Any], message: str
) -> None:
    """Rejects rows with a wrong shape, range, or text, which would surface only in training."""
    with pytest.raises(ValueError, match=message) as error:
        write_shard(tmp_path / "x.arrow", [rows[0], rows[1]._replace(**change)], INFO)
    assert "clips/0/1.mp4" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_high_codes_need_the_frames_of_the_low(tmp_path: Path, rows: list[Row]) -> None:
    """Prevents super-resolution from being trained on codes of other frames."""
    row = rows[1]._replace(high_codes=np.zeros((4, 12, 12), np.uint16))
    with pytest.raises(ValueError, match="more or fewer"):
        write_shard(tmp_path / "x.arrow", [row], replace(INFO, high_grid=12))


def test_truncated_shards_are_refused(shard: Path) -> None:
    """Rejects copies truncated at any point, rather than accepting them as complete."""
    whole = shard.read_bytes()
    cuts = {0, 1, 5, 6, 7, 8, 100, *range(0, len(whole), 997), *range(len(whole) - 40, len(whole))}
    for length in sorted(cuts):
        shard.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot use the shard") as error:
            read_info(shard)
        assert "\n" not in str(error.value)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """Rejects foreign Arrow files, streams, text, folders, and missing files, with one line each."""
    table = pa.table({"id": ["a"]})
    foreign, stream = tmp_path / "foreign.arrow", tmp_path / "stream.arrow"
    with pa.ipc.new_file(foreign, table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "text.arrow").write_text("some text that is longer than a footer")
    for path in (foreign, stream, tmp_path / "text.arrow", tmp_path, tmp_path / "missing.arrow"):
        with pytest.raises(ValueError, match="cannot use the shard") as error:
            Shard(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], batches: int = 1) -> None:
    """Rewrite a shard with changed metadata, or with its rows more than once."""
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    values = json.loads(table.schema.metadata[b"cogvideo"])
    change(values)
    table = table.replace_schema_metadata({"cogvideo": json.dumps(values)})
    with pa.ipc.new_file(path, table.schema) as writer:
        for _ in range(batches):
            writer.write_batch(table.to_batches()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format_version=2), "newer cogvideo"),
        (lambda values: values.pop("work_sha256"), r"missing \['work_sha256'\]"),
        (lambda values: values.update(extra=1), r"unknown \['extra'\]"),
        (lambda values: values.update(fps="8"), r"ShardInfo\.fps: expected float, got str"),
        (lambda values: values.update(rejected=[["a"]]), r"rejected\[0\]: expected array of length 3, got 1"),
        (lambda values: values.update(grid=5), "columns are not"),
        (lambda values: values.update(high_grid=12), "columns are not"),
        (lambda values: values.update(grid=True), r"\.grid: expected int \| array, got bool"),
    ],
)
def test_changed_metadata_is_refused(shard: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    """Rejects metadata that does not describe the rows, comes from another version, or lacks a field."""
    rewrite(shard, change)
    with pytest.raises(ValueError, match=message):
        read_info(shard)


def test_several_batches_are_refused(shard: Path) -> None:
    """Rejects rows after the first record batch, which would be silently ignored."""
    rewrite(shard, lambda values: None, batches=2)
    with pytest.raises(ValueError, match="2 record batches, expected 1"):
        read_info(shard)


class _FullDisk:
    """A file on a disk that fills up after `room` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(memoryview(data).cast("B"))
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_full_disk_leaves_nothing(tmp_path: Path, rows: list[Row], room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a shard under its final name, leftover files, and an error that does not name the file."""
    path = tmp_path / shard_name(3)
    write_shard(path, rows[:1], INFO)
    before, new_file = path.read_bytes(), pa.ipc.new_file
    monkeypatch.setattr(pa.ipc, "new_file", lambda file, schema: new_file(_FullDisk(file, room), schema))
    with pytest.raises(OSError, match="No space left") as error:
        write_shard(path, rows, INFO)
    assert error.value.filename == str(path)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before, "what was there stays"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from cogvideo.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_writer_leaves_only_a_temporary_file(tmp_path: Path) -> None:
    """A killed writer must leave only a file without a shard's name, which cleanup removes."""
    path = tmp_path / shard_name(0)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(TEMPORARY_SUFFIX)
    with pytest.raises(ValueError, match="interrupted: run the same command again"):
        read_card(tmp_path)
    (tmp_path / "of the user.tmp").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["of the user.tmp"]


def test_card_counts_what_the_shards_hold(make_dataset: MakeDataset) -> None:
    """Catches a card whose counts do not match the data."""
    card = read_card(make_dataset())
    assert card.splits == {"train": 7, "validation": 1}
    assert card.rejected == {"cannot be decoded": 2, "too short": 1}
    assert card.num_rejected == 3
    assert card.lengths == {"1": 1, "2": 1, "3": 1, "5": 1, "9": 1, "17": 1, "33": 1, "40": 1}
    assert card.num_frames == 110
    assert [entry.num_rows for entry in card.shards] == [5, 0, 3]
    assert (card.source, card.tokenizer, card.settings) == ("clips", "bundle", SETTINGS)
    assert (card.grid, card.num_codes, card.fps, card.high_grid) == (GRID, NUM_CODES, FPS, 0)


def test_shards_of_other_runs_do_not_share_a_card(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """Catches leftover shards with other settings or another tokenizer that are taken for part of this run."""
    folder = make_dataset()
    for change in ({"tokenizer_sha256": "9" * 64}, {"settings_sha256": "8" * 64}, {"num_codes": 2000}):
        write_shard(folder / shard_name(2), [], replace(INFO, **change))
        with pytest.raises(ValueError, match=f"{next(iter(change))}.*does not belong"):
            make_card(folder, [shard_name(0), shard_name(2)], source="", tokenizer="", settings=SETTINGS)
    with pytest.raises(ValueError, match="settings_sha256"):
        make_card(folder, [shard_name(0)], source="", tokenizer="", settings={"size": 33})


def test_dataset_rows_are_those_of_its_shards(make_dataset: MakeDataset) -> None:
    """Catches rows miscounted at shard boundaries and around empty shards, or in the wrong split."""
    data, expected = Dataset(make_dataset()), make_rows([33, 5, 1, 40, 2]) + make_rows([9, 17, 3], seed=2)
    assert len(data) == len(expected)
    assert all(same(data.row(index), row) for index, row in enumerate(expected))
    assert all(np.array_equal(data.row(index).codes, row.codes) for index, row in enumerate(expected))
    assert data.num_frames().tolist() == [len(row.codes) for row in expected]
    assert data.rows("validation").tolist() == [3]
    assert data.rows("train").tolist() == [0, 1, 2, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="no split 'test', expected one of train, validation"):
        data.rows("test")
    check_hashes(data.folder)


def test_pickled_dataset_carries_no_maps(make_dataset: MakeDataset) -> None:
    """Prevents the contents of shards from being sent to workers through a pipe."""
    data = Dataset(make_dataset(lengths=([4000], [4000])))
    data.row(1)
    pickled = pickle.dumps(data)
    assert len(pickled) < 4000
    assert same(pickle.loads(pickled).row(1), data.row(1))


def test_other_tokenizer_is_refused(make_dataset: MakeDataset) -> None:
    """Prevents training on codes of another tokenizer, which stand for different pictures."""
    folder = make_dataset()
    Dataset(folder, "1" * 64)
    with pytest.raises(ValueError, match="another image tokenizer") as error:
        Dataset(folder, "7" * 64)
    assert "111111111111" in str(error.value)
    assert "777777777777" in str(error.value)
    assert "\n" not in str(error.value)


def test_incomplete_datasets_are_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """Rejects the output of a killed run, a missing folder, and a folder that never was a dataset."""
    folder = make_dataset()
    (folder / CARD).unlink()
    with pytest.raises(ValueError, match="prepare was interrupted: run the same command again"):
        Dataset(folder)
    with pytest.raises(ValueError, match="there is no folder"):
        Dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected the output of `cogvideo data prepare`"):
        Dataset(tmp_path / "empty")


def test_missing_and_cut_shards_are_refused(make_dataset: MakeDataset) -> None:
    """Rejects a partially copied dataset."""
    folder = make_dataset()
    path = folder / shard_name(2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{path} has {len(whole) - 100} bytes, expected {len(whole)}"):
        Dataset(folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"there is no file {path}"):
        Dataset(folder)


def test_exchanged_shards_are_refused(make_dataset: MakeDataset) -> None:
    """Catches a shard from another dataset, and a flipped bit, which only the hash reveals."""
    folder = make_dataset()
    path = folder / shard_name(2)
    whole = path.read_bytes()
    write_shard(path, make_rows([9, 17, 3], seed=2), replace(INFO, tokenizer_sha256="9" * 64, rejected=REJECTED))
    assert path.stat().st_size == len(whole)
    with pytest.raises(ValueError, match=r"tokenizer_sha256.*does not belong"):
        Dataset(folder).row(6)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="has changed since it was prepared"):
        check_hashes(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "newer cogvideo"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"grid": None}, r"missing \['grid'\]"),
        ({"extra": 1}, r"unknown \['extra'\]"),
        ({"fps": "8"}, r"Card\.fps: expected float, got str"),
        ({"grid": True}, r"Card\.grid: expected int \| array, got bool"),
        ({"splits": {"train": "7"}}, r"splits\[\.\.\.\]: expected int, got str"),
        ({"splits": {"train": -1}}, r"splits\[\.\.\.\]: expected int >= 0"),
        ({"splits": {"train": 9}}, "its shards have 8 clips, its splits 9"),
        ({"settings": {"size": 33}}, "changed by hand"),
        ({"shards": {}}, "shards: expected array, got object"),
        ({"shards": [{"file": "x"}]}, "missing"),
        ({"shards": [{"file": "../x", "num_rows": 8, "num_bytes": 1, "sha256": ""}]}, "plain name"),
    ],
)
def test_changed_cards_are_refused(make_dataset: MakeDataset, change: dict[str, Any], message: str) -> None:
    """Rejects a card with impossible or missing values."""
    folder = make_dataset()
    edit_card(folder, **change)
    with pytest.raises(ValueError, match=message) as error:
        read_card(folder)
    assert str(folder / CARD) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000])
def test_garbage_is_no_card(make_dataset: MakeDataset, text: str) -> None:
    """Rejects a truncated or overwritten card with an error, not a traceback."""
    folder = make_dataset()
    (folder / CARD).write_text(text)
    with pytest.raises(ValueError, match="cannot use"):
        read_card(folder)


def test_card_round_trip(make_dataset: MakeDataset) -> None:
    """Catches a card that changes when it is read and written again."""
    folder = make_dataset()
    before, card = (folder / CARD).read_bytes(), read_card(folder)
    assert isinstance(card, Card)
    write_card(folder, card)
    assert (folder / CARD).read_bytes() == before


def test_digest_is_of_the_content() -> None:
    """Catches equal settings with different hashes, and different settings with the same hash."""
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": (1, 2)}) == digest({"a": [1, 2]})


def test_a_dataset_of_the_first_format() -> None:
    """Guards files that version 0.1.0 wrote in November 2026: the card, a shard, and codes of both sizes."""
    data = Dataset(Path(__file__).parent / "files")
    check_hashes(data.folder)
    assert (len(data), data.card.splits, data.card.grid) == (4, {"train": 3, "validation": 1}, 4)
    row = data.row(3)
    assert (row.captions, row.split, row.codes.shape) == (("clip 3 moves",), "validation", (9, 4, 4))
    assert row.high_codes is not None
    assert row.high_codes.shape == (9, 8, 8)
    assert data.shard(0).info.rejected == ()
