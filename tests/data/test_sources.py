"""Sources: every clip is listed once with its own captions, and whatever cannot be listed is counted or rejected."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cogvideo import world
from cogvideo.data import folders
from cogvideo.data.sources import Item, Listing, SourceOptions, list_source
from cogvideo.data.tars import Member, read_index

CLIP = b"no real video: listing never opens one"


def listed(source: Path | str, **options: Any) -> Listing:
    return list_source(str(source), SourceOptions(**options))


def reasons(listing: Listing) -> dict[str, str]:
    return {rejection.id: rejection.reason for rejection in listing.rejected}


def put(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def put_clips(folder: Path, *names: str) -> Path:
    return put(folder, dict.fromkeys(names, CLIP))


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# ---- folders


def test_folder_lists_clips_with_their_captions(tmp_path: Path) -> None:
    """Checks how clips and captions are paired: at any depth, with uppercase suffixes, one caption per line."""
    files = {"b.mp4": CLIP, "b.txt": "a bee\n\n  a wasp \na bee\n", "in/side/a.WEBM": CLIP, "in/side/a.txt": "a cat"}
    items, rejected = listed(put(tmp_path, files | {"x.txt": "no clip", ".hidden.mp4": CLIP, ".git/c.mp4": CLIP}))
    assert not rejected
    assert [(item.id, item.captions) for item in items] == [
        ("b.mp4", ("a bee", "a wasp")),
        ("in/side/a.WEBM", ("a cat",)),
    ]
    assert items[0].media == tmp_path / "b.mp4"


def test_folder_order_is_that_of_the_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an order that depends on the file system: a reversed directory listing must give the same clips."""
    names = [f"{folder}{number}.mp4" for folder in ("", "a/", "a/b/", "z/") for number in range(4)]
    put_clips(tmp_path, *names)
    put(tmp_path, {name.replace("mp4", "txt"): "a clip" for name in names})
    forwards = listed(tmp_path)
    entries = folders._entries
    monkeypatch.setattr(folders, "_entries", lambda folder: entries(folder)[::-1])
    assert listed(tmp_path) == forwards
    assert [item.id for item in forwards.items] == sorted(names)


def test_links_are_followed_once(tmp_path: Path) -> None:
    """Prevents endless walks through cycles of links, and clips listed under two names."""
    put(tmp_path / "source", {"z/a.mp4": CLIP, "z/a.txt": "a cat"})
    put(tmp_path / "elsewhere", {"b.mp4": CLIP, "b.txt": "a bee"})
    for link, target in {"z/up": "..", "a": "z", "far": "../elsewhere", "far2": "far", "self": "self"}.items():
        (tmp_path / "source" / link).symlink_to(target)
    assert [item.id for item in listed(tmp_path / "source").items] == ["far/b.mp4", "z/a.mp4"]


def test_pipes_are_left_out(tmp_path: Path) -> None:
    """Prevents a run from waiting forever for a pipe that is named like a video."""
    put(tmp_path, {"a.mp4": CLIP, "a.txt": "a cat", "b.txt": "a bee"})
    os.mkfifo(tmp_path / "b.mp4")
    assert [item.id for item in listed(tmp_path).items] == ["a.mp4"]


def test_sources_that_may_never_end_are_refused(tmp_path: Path) -> None:
    """Prevents hanging on pipes without a writer, as tables, archives, or captions, or behind links."""
    for name in ("x.csv", "x.jsonl", "x.parquet", "x.tar", "videos.txt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=r"is a pipe or a device, expected a folder, a file or world:COUNT"):
            listed(tmp_path / name)
    put_clips(tmp_path / "clips", "a.mp4")
    os.mkfifo(tmp_path / "clips" / "a.txt")
    (tmp_path / "clips" / "b.tar").symlink_to(tmp_path / "x.tar")
    assert reasons(listed(tmp_path / "clips")) == {"a.mp4": "caption cannot be read"}


def test_folder_rejections(tmp_path: Path) -> None:
    """Checks the counted reasons: a bad caption file must neither stop a run nor give an empty caption."""
    texts = {
        "empty.txt": " \n\u200b\n\u2581\n",
        "latin.txt": "caf\xe9".encode("latin1"),
        "broken.json": "{",
        "list.json": "[]",
    }
    names = ("none.mp4", "empty.mp4", "latin.mp4", "broken.mp4", "list.mp4", "keyless.mp4")
    put_clips(put(tmp_path, texts | {"keyless.json": '{"words": "a cat"}'}), *names)
    assert reasons(listed(tmp_path)) == {
        "none.mp4": "missing caption",
        "empty.mp4": "empty caption",
        "latin.mp4": "caption is not text",
        "broken.mp4": "caption cannot be read",
        "list.mp4": "caption cannot be read",
        "keyless.mp4": "missing caption",
    }


def test_json_beside_a_clip(tmp_path: Path) -> None:
    """Checks a clip's .json: captions if there is no .txt, and always start, end, split, and attributes."""
    table = {"caption": ["a cat", "a pet"], "start": 1, "end": "0:02.5", "split": "test", "attributes": {"n": 3}}
    files = {"a.mp4": CLIP, "a.json": json.dumps(table), "b.mp4": CLIP, "b.json": json.dumps(table), "b.txt": "a bee"}
    first, second = listed(put(tmp_path, files)).items
    assert first == Item("a.mp4#1-2.5", tmp_path / "a.mp4", ("a cat", "a pet"), {"n": "3"}, 1.0, 2.5, "test", copy=0)
    assert (second.captions, second.split) == (("a bee",), "test")


def test_images_only_where_they_are_asked_for(tmp_path: Path) -> None:
    """Prevents thumbnails next to videos from becoming one-frame clips."""
    put(tmp_path, {"a.mp4": CLIP, "a.txt": "a cat", "a.png": CLIP})
    assert [item.id for item in listed(tmp_path).items] == ["a.mp4"]
    assert [item.id for item in listed(tmp_path, images=True).items] == ["a.mp4", "a.png"]


def test_table_stands_for_its_folder(tmp_path: Path) -> None:
    """Checks that a table overrides .txt files, and that two tables are an error rather than a guess."""
    put(tmp_path, {"a.mp4": CLIP, "b.mp4": CLIP, "a.txt": "from text", "captions.csv": "file,caption\na.mp4,a cat\n"})
    assert [(item.id, item.captions) for item in listed(tmp_path).items] == [("a.mp4", ("a cat",))]
    put(tmp_path, {"metadata.jsonl": "{}"})
    with pytest.raises(ValueError, match=r"has captions\.csv and metadata\.jsonl: pass one of them"):
        listed(tmp_path)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents partial datasets: a folder that cannot be read is an error, not fewer clips."""
    put(tmp_path, {"a.mp4": CLIP, "a.txt": "a cat", "closed/b.mp4": CLIP})
    scandir = os.scandir

    def refuse(path: str) -> Any:  # tests may run as root, which chmod does not stop
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot read the folder .*closed: Permission denied"):
        listed(tmp_path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Prevents a crash when writing a file name in another system's encoding."""
    for suffix, content in ((b".mp4", CLIP), (b".txt", b"a cat")):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9" + suffix)).write_bytes(content)
    (item,) = listed(tmp_path).items
    assert item.id.encode()
    assert isinstance(item.media, Path)
    assert item.media.read_bytes() == CLIP


# ---- tables


def test_csv_quoting_and_lines(tmp_path: Path) -> None:
    """Checks CSV parsing: BOM, commas, quotes, line breaks in cells, blank lines, CRLF, and line numbers."""
    rows = [["file", "caption"], ["a.mp4", 'he says "hi", and\nleaves'], ["gone.mp4", "x"], ["b.mp4", "一只猫"]]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    put_clips(put(tmp_path, {"t.csv": "\ufeff" + text.getvalue().replace("gone", "\r\n\r\ngone")}), "a.mp4", "b.mp4")
    listing = listed(tmp_path / "t.csv")
    assert [item.captions for item in listing.items] == [('he says "hi", and\nleaves',), ("一只猫",)]
    assert reasons(listing) == {"gone.mp4": "file is missing"}
    assert "t.csv, line 6:" in listing.rejected[0].detail, "the true line, behind a cell of two lines and blank ones"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'file, caption, n, start\na.mp4, "a, b", 1, 0.5\n'),
        ("t.tsv", "file\tcaption\tn\tstart\na.mp4\ta, b\t1\t0.5\n"),
        ("t.jsonl", '\n{"file": "a.mp4", "caption": "a, b", "n": 1, "start": 0.5}\r\n\n'),
        ("t.parquet", ""),
    ],
)
def test_every_kind_of_table_says_the_same(tmp_path: Path, name: str, content: str) -> None:
    """Catches table readers that treat types, columns, or spaces differently."""
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, [{"file": "a.mp4", "caption": "a, b", "n": 1, "start": 0.5}])
    else:
        put(tmp_path, {name: content})
    put_clips(tmp_path, "a.mp4")
    (item,) = listed(tmp_path / name, validation=0).items
    assert item == Item("a.mp4#0.5-", tmp_path / "a.mp4", ("a, b",), {"n": "1"}, 0.5, None, "train", 0)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_lists_and_columns_of_captions(tmp_path: Path) -> None:
    """Catches captions that are lost when a clip has several, or that become attributes."""
    rows = [{"file": "a.mp4", "caption": ["one", None, "two"], "zh": "猫", "attributes": {"k": 1.5, "none": None}}]
    put_clips(put(tmp_path, {"t.jsonl": "\n".join(map(json.dumps, rows))}), "a.mp4")
    write_parquet(tmp_path / "t.parquet", rows)
    for name in ("t.jsonl", "t.parquet"):
        (item,) = listed(tmp_path / name, caption_columns=("zh", "caption")).items
        assert (item.captions, item.attributes) == (("猫", "one", "two"), {"k": "1.5"})


def test_rejected_rows(tmp_path: Path) -> None:
    """Checks the counted reasons of rows; a part of a file that has its own row is a separate clip."""
    put_clips(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "folder").mkdir()
    table = """file,caption,start,end
        a.mp4,fine,,
        ./b.mp4,fine too,,
        a.mp4,fine,0,
        sub/../b.mp4,fine too,,
        a.mp4,a part,1,2
        a.mp4,another,1,00:00:03.5
        a.mp4,a part,1.0,2.0
        a.mp4,backwards,2,1
        a.mp4,no time,soon,
        a.mp4,never,nan,
        a.mp4,below,-1,
        a.mp4,minutes,0:61,
        a.mp4, ,,
        a.mp4
        ,nothing,,
        gone.mp4,gone,,
        folder,no file,,
        a.mp4,a caption, with a comma,,"""
    put(tmp_path, {"t.csv": "\n".join(line.strip() for line in table.splitlines())})
    listing = listed(tmp_path / "t.csv")
    assert [item.id for item in listing.items] == ["a.mp4", "b.mp4", "a.mp4#1-2", "a.mp4#1-3.5"]
    assert Counter(rejection.reason for rejection in listing.rejected) == {
        "named twice": 3,
        "bad start or end": 5,
        "empty caption": 1,
        "missing caption": 1,
        "missing file name": 1,
        "file is missing": 2,
        "more cells than columns": 1,
    }


@pytest.mark.parametrize(
    "layout",
    [
        {"metadata.csv": "file_name,text\nv/0.mp4,a cat\nv/1.mp4,a dog\n"},
        {"metadata.jsonl": '{"file_name": "v/0.mp4", "text": "a cat"}\n{"file_name": "v/1.mp4", "text": "a dog"}'},
        {"captions.csv": "path,text,num_frames\nv/0.mp4,a cat,\nv/1.mp4,a dog,\n"},
        {"captions.tsv": "video\tprompt\nv/0.mp4\ta cat\nv/1.mp4\ta dog\n"},
        {"videos.txt": "v/0.mp4\r\nv/1.mp4\r\n\r\n", "prompts.txt": "\ufeffa cat\na dog\n"},
        {"v/0.txt": "a cat", "v/1.json": '{"text": "a dog"}'},
    ],
)
def test_layouts_of_other_data_sets(layout: dict[str, str], tmp_path: Path) -> None:
    """Checks that the layouts of Hugging Face, Open-Sora, and CogVideoX tools work unchanged."""
    put_clips(put(tmp_path, dict(layout)), "v/0.mp4", "v/1.mp4")
    listing = listed(tmp_path)
    assert listing.rejected == []
    assert {item.id: item.captions for item in listing.items} == {"v/0.mp4": ("a cat",), "v/1.mp4": ("a dog",)}
    assert all(item.attributes == {} for item in listing.items)


def test_tables_in_folders_below(tmp_path: Path) -> None:
    """Checks a folder of datasets: clips get captions from their folder's table or from files next to them; a folder
    named like a split sets it; unrelated tables are ignored, and broken ones are counted."""
    put_clips(tmp_path, "train/0.mp4", "train/1.mp4", "val/0.mp4", "test/sub/0.mp4", "x/0.mp4", "y/0.mp4")
    tables = {
        "train/metadata.csv": "file_name,text\n0.mp4,a cat\n",
        "train/1.txt": "a dog",
        "val/metadata.csv": "file_name,text\n0.mp4,a fish\ngone.mp4,a bird\n",
        "test/metadata.csv": "file_name,text,split\nsub/0.mp4,a cow,train\n",
        "x/metadata.csv": "weather\nsun\n",
        "x/0.txt": "a bee",
        "y/videos.txt": "0.mp4\n",
        "y/prompts.txt": "a fly\na moth\n",
    }
    listing = listed(put(tmp_path, tables), validation=0.0)
    assert {item.id: (item.captions, item.split) for item in listing.items} == {
        "test/sub/0.mp4": (("a cow",), "train"),
        "train/0.mp4": (("a cat",), "train"),
        "train/1.mp4": (("a dog",), "train"),
        "val/0.mp4": (("a fish",), "validation"),
        "x/0.mp4": (("a bee",), "train"),
    }
    assert reasons(listing) == {
        "val/gone.mp4": "file is missing",
        "y/videos.txt": "table cannot be read",
        "y/0.mp4": "missing caption",
    }
    with pytest.raises(ValueError, match=r"videos.txt has 1 lines and prompts.txt 2, expected a caption for each"):
        listed(tmp_path / "y")


def test_captions_of_cogvideox_lie_in_labels(tmp_path: Path) -> None:
    """Checks that labels/x.txt captions videos/x.mp4."""
    put_clips(put(tmp_path, {"labels/0.txt": "a cat"}), "videos/0.mp4", "other/0.mp4")
    listing = listed(tmp_path)
    assert [(item.id, item.captions) for item in listing.items] == [("videos/0.mp4", ("a cat",))]
    assert reasons(listing) == {"other/0.mp4": "missing caption"}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_whose_accents_are_written_otherwise(form: Any, tmp_path: Path) -> None:
    """Checks names that look alike: from Macs and old archives (NFD), and from keyboards and tables (NFC)."""
    there, told = (partial(normalize, each) for each in (form, "NFD" if form == "NFC" else "NFC"))
    put_clips(tmp_path, there("é/café.mp4"))
    put(tmp_path, {"captions.csv": f"file,caption\n{told('é/café.mp4')},a cat\n{there('é/café.mp4')},a dog\n"})
    (item,) = listed(tmp_path).items
    assert (item.id, item.captions) == (there("é/café.mp4"), ("a cat", "a dog"))
    (tmp_path / "captions.csv").unlink()
    put(tmp_path, {f"{there('é')}/{told('café.txt')}": "a cat"})
    assert [each.captions for each in listed(tmp_path).items] == [("a cat",)]
    assert [each.captions for each in listed(told(str(tmp_path / "é"))).items] == [("a cat",)]
    tar = write_tar(tmp_path / "x.tar", [(there("ü.mp4"), CLIP), (told("ü.txt"), b"a cat")])
    assert [each.captions for each in listed(tar).items] == [("a cat",)]
    put_clips(tmp_path, there("é") + "/" + told("café.mp4"))
    put(tmp_path, {"captions.csv": f"file,caption\n{told('é/café.mp4')},a cat\n"})
    assert reasons(listed(tmp_path)) in ({}, {told("é/café.mp4"): "file is missing"}), "which one is meant is not known"


@pytest.mark.parametrize("sign", "\v\f\x1c\x1d\x1e\x85\u2028\u2029")
def test_signs_that_end_no_line(sign: str, tmp_path: Path) -> None:
    """Checks captions with characters that only `str.splitlines` treats as line breaks; they become spaces."""
    expected, caption = ("a cat on a mat",), f"a cat{sign}on a mat"
    put(put_clips(tmp_path, "a.mp4"), {"a.txt": f"{caption}\r\n"})
    assert listed(tmp_path).items[0].captions == expected
    put(tmp_path, {"a.jsonl": json.dumps({"file": "a.mp4", "caption": caption}, ensure_ascii=False)})
    put(tmp_path, {"a.csv": f"file,caption\na.mp4,{caption}\n", "a.tsv": f"file\tcaption\na.mp4\t{caption}\n"})
    for table in ("a.jsonl", "a.csv", "a.tsv"):
        assert listed(tmp_path / table).items[0].captions == expected


def test_numbers_of_every_table(tmp_path: Path) -> None:
    """Checks times as programs write them: whole, decimal, text, exponent; gaps mean none, booleans are invalid."""
    put_clips(tmp_path, "a.mp4")
    nan = float("nan")
    for start, end, expected in (
        (1, 2, "a.mp4#1-2"),
        (1.0, 2.0, "a.mp4#1-2"),
        ("1", "2.0", "a.mp4#1-2"),
        ("1e0", 2e0, "a.mp4#1-2"),
        (Decimal("1.50"), timedelta(seconds=2), "a.mp4#1.5-2"),
        (nan, nan, "a.mp4"),
        (None, None, "a.mp4"),
        (True, None, None),
    ):
        row = {"file": ["a.mp4"], "caption": ["x"], "start": [start], "end": [end], "split": [nan], "other": [nan]}
        pq.write_table(pa.table(row), tmp_path / "a.parquet")
        tables = ["a.parquet"]
        if not isinstance(start, Decimal):
            put(tmp_path, {"a.jsonl": json.dumps({name: value for name, (value,) in row.items()})})
            tables.append("a.jsonl")
        for table in tables:
            listing = listed(tmp_path / table, validation=0.0)
            assert [item.id for item in listing.items] == ([] if expected is None else [expected]), (table, start)
            assert all(item.split == "train" and item.attributes == {} for item in listing.items)


def test_rows_of_one_clip_add_captions(tmp_path: Path) -> None:
    """Checks tables with one row per caption, as in many public datasets."""
    put_clips(tmp_path, "a.mp4", "b.mp4")
    rows = "file,caption,start\na.mp4,one,\nb.mp4,other,\na.mp4,two,\na.mp4,a part,1\na.mp4,one,\n"
    listing = listed(put(tmp_path, {"t.csv": rows}) / "t.csv", copies=2)
    found = {item.id: item.captions for item in listing.items}
    assert found["a.mp4"] == found["a.mp4~1"] == ("one", "two")
    assert (found["b.mp4"], found["a.mp4#1-"]) == (("other",), ("a part",))
    assert list(reasons(listing).values()) == ["named twice"]


def test_splits_are_words(tmp_path: Path) -> None:
    """Prevents clips that no loader would find: split names are lowercased, and invalid ones are rejected."""
    put_clips(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    rows = 'file,caption,split\na.mp4,x,Train\nb.mp4,x,VAL\nc.mp4,x,../evil\nd.mp4,x,"a\nb"\n'
    listing = listed(put(tmp_path, {"t.csv": rows}) / "t.csv")
    assert [item.split for item in listing.items] == ["train", "validation"]
    assert list(reasons(listing).values()) == ["bad split"] * 2


def test_text_that_is_no_unicode_is_counted(tmp_path: Path) -> None:
    """Guards a run of days against a single row: lone surrogates, which JSON can encode, in any cell."""
    put_clips(tmp_path, "a.mp4", "b.mp4")
    rows = [
        {"file": "a.mp4", "caption": "fine", "other \ud83d": "x \ud83d"},
        {"file": "b.mp4", "caption": "x", "split": "t\ud83dx"},
        {"file": "c\ud83d.mp4", "caption": "x"},
    ]
    listing = listed(put(tmp_path, {"t.jsonl": "\n".join(map(json.dumps, rows))}) / "t.jsonl")
    assert [item.id for item in listing.items] == ["a.mp4"]
    json.dumps(listing.items[0].attributes, ensure_ascii=False).encode()
    assert len(listing.rejected) == 2
    "".join(part for each in listing.rejected for part in each).encode()


def test_absolute_paths_and_those_above(tmp_path: Path) -> None:
    """Checks file ids: all spellings of a path give the same one, and paths outside the table's folder work."""
    put_clips(tmp_path, "in/a.mp4", "out/b.mp4")
    rows = f"file,caption\n{tmp_path}/in/a.mp4,x\na.mp4,x\n../out/b.mp4,z\n{tmp_path}/out/b.mp4,z\n"
    listing = listed(put(tmp_path, {"in/t.csv": rows}) / "in/t.csv")
    assert [item.id for item in listing.items] == ["a.mp4", "../out/b.mp4"]
    assert list(reasons(listing).values()) == ["named twice"] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", "file,caption\n", "is empty"),
        ("t.csv", "file,caption,caption\n", "column caption twice"),
        (
            "t.csv",
            "file,words,fps\na,b,c\n",
            "no column 'caption', it has file, words, fps: .* --caption-columns",
        ),
        ("t.csv", "name,caption\na,b\n", "no column 'file', it has name, caption: choose with --file-column"),
        ("t.csv", "file,Text\na,b\n", r"choose with --caption-columns; unknown column 'Text', did you mean 'text'\?$"),
        ("t.csv", "Path,caption\na,b\n", r"choose with --file-column; unknown column 'Path', did you mean 'path'\?$"),
        ("t.csv", 'file,caption\na.mp4,x\nb.mp4,"y" z\n', "line 3: .*double the quotes in it"),
        ("t.csv", 'file,caption\na.mp4,x\nb.mp4,"never closed\nc.mp4,z\n', "line 3: "),
        ("t.csv", b"file,caption\na.mp4,caf\xe9\n", "not UTF-8"),
        ("t.jsonl", "", "is empty"),
        ("t.jsonl", '{"file": "a", "caption": "b"}\n\n{"file": \n', "line 3: it is not JSON"),
        ("t.jsonl", "[1]\n", r"line 1: got \[1\]"),
        ("t.jsonl", "[" * 100_000, "line 1: it is not JSON"),
        ("t.jsonl", '{"file": "a", "words": "b"}\n', "no column 'caption', it has file, words"),
        ("t.parquet", "no parquet", "cannot read .*parquet"),
        ("t.xlsx", "x", "cannot be a source by itself, expected a folder, a table"),
        ("t.tar", "no tar" * 200, "is not a tar"),
        ("t.tar.gz", gzip.compress(b"x", mtime=0), "is compressed with gzip, expected a plain tar"),
        ("folder/readme.md", "x", "has no clips, expected .*mp4"),
    ],
)
def test_one_clear_error(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    """Checks the messages: one line says why a source cannot be used at all, and what to do."""
    put(tmp_path, {name: content})
    with pytest.raises(ValueError, match=message):
        listed(tmp_path / name.split("/")[0])


def test_a_misspelt_column_of_times_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches times and splits silently ignored because of a misspelled column name."""
    put_clips(put(tmp_path, {"t.csv": "file,caption,Start,end,splits,trend\na.mp4,x,1,2,test,up\n"}), "a.mp4")
    (item,) = listed(tmp_path / "t.csv", validation=0).items
    assert (item.start, item.end, item.split) == (0, 2, "train")
    told = [("Start", "start"), ("splits", "split")]
    lines = [f"{tmp_path / 't.csv'}: unknown column {got!r}, did you mean {meant!r}?\n" for got, meant in told]
    assert capsys.readouterr().err == "".join(lines)


def test_no_such_source(tmp_path: Path) -> None:
    """Prevents a mistyped path from being treated as an empty source."""
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        listed(tmp_path / "nowhere")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the message for a missing extra, which other tables do not need."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    put_clips(put(tmp_path, {"t.csv": "file,caption\na.mp4,a cat\n", "t.parquet": "x"}), "a.mp4")
    assert len(listed(tmp_path / "t.csv").items) == 1
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'cogvideo\[train\]'"):
        listed(tmp_path / "t.parquet")


def test_lone_surrogates_are_no_text(tmp_path: Path) -> None:
    """Rejects captions that JSON can encode but no file can store."""
    put_clips(put(tmp_path, {"t.jsonl": '{"file": "a.mp4", "caption": "\\ud83d"}'}), "a.mp4")
    assert reasons(listed(tmp_path / "t.jsonl")) == {"a.mp4": "caption is not text"}


@pytest.mark.usefixtures("without_shape_checks")
def test_tables_are_fast(tmp_path: Path) -> None:
    """Catches quadratic listing: ten times the rows should take about ten times as long."""
    put_clips(tmp_path, "a.mp4")
    seconds = []
    for number in (3_000, 3_000, 30_000):  # the first run warms up imports and file lookups
        rows = "\n".join(f"a.mp4,a caption of clip {row},{row},{row + 1},cat" for row in range(number))
        put(tmp_path, {"t.csv": f"file,caption,start,end,kind\n{rows}\n"})
        began = time.process_time()
        assert len(listed(tmp_path / "t.csv").items) == number
        seconds.append(time.process_time() - began)
    assert seconds[2] < 30 * seconds[1]


# ---- splits, copies, limit


def make_table(folder: Path, rows: int, line: Callable[[int], str], columns: str = "") -> Path:
    put_clips(folder, *(f"{number}.mp4" for number in range(rows)))
    lines = "\n".join(line(number) for number in range(rows))
    return put(folder, {"t.csv": f"file,caption{columns}\n{lines}\n"}) / "t.csv"


def test_split_is_drawn_by_the_file(tmp_path: Path) -> None:
    """Prevents leaks: copies and parts of a file are in the same split, wherever the source is located."""
    lines = "\n".join(f"{n}.mp4,part {part},{part},{part + 1}" for n in range(200) for part in range(3))
    splits = []
    for place in ("here", "there"):
        table = make_table(tmp_path / place, 200, lambda number: f"{number}.mp4,whole,,", ",start,end")
        put(tmp_path / place, {"t.csv": table.read_text() + lines})
        items = listed(table, copies=2, validation=0.25).items
        assert len({item.id for item in items}) == len(items) == 1600
        by_file = {(item.media.name, item.split) for item in items if isinstance(item.media, Path)}
        assert len(by_file) == 200
        splits.append(by_file)
    assert splits[0] == splits[1]
    assert 30 < sum(split == "validation" for _, split in splits[0]) < 70
    assert {item.split for item in listed(table, validation=0).items} == {"train"}
    assert {item.split for item in listed(table, validation=1).items} == {"validation"}


def test_named_splits_are_kept(tmp_path: Path) -> None:
    """Prevents a random split from replacing the user's own."""
    names = ("train", "val", "held_out", "")
    table = make_table(tmp_path, 4, lambda number: f"{number}.mp4,x,{names[number]}", ",split")
    assert [item.split for item in listed(table, validation=0).items] == ["train", "validation", "held_out", "train"]


def test_copies_and_limit(tmp_path: Path) -> None:
    """Checks the ids and numbers of copies, and that the limit counts clips, not copies."""
    table = make_table(tmp_path, 5, lambda number: f"{number}.mp4,x")
    items = listed(table, copies=3, limit=2).items
    assert [(item.id, item.copy) for item in items[:4]] == [("0.mp4", 0), ("0.mp4~1", 1), ("0.mp4~2", 2), ("1.mp4", 0)]
    assert len(items) == 6


@pytest.mark.parametrize(
    "wrong",
    [{"copies": 0}, {"validation": 1.5}, {"limit": 0}],
    ids=lambda each: next(iter(each)),
)
def test_bad_options(wrong: dict[str, Any]) -> None:
    """Rejects options that would silently list nothing or make no sense."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*expected"):
        SourceOptions(**wrong)


# ---- tars


def test_tar_members_lie_where_they_are_said_to(tmp_path: Path) -> None:
    """Checks offsets (long names have extra headers), captions by stem or key, attributes, and reading."""
    long = "d/" + "n" * 150
    members = [
        ("b.mp4", b"first clip"),
        ("b.txt", b"a bee\na wasp"),
        (f"{long}.webm", b"second clip"),
        (f"{long}.json", b'{"caption": "a cat", "kind": 7, "start": 1}'),
        ("./c.left.mp4", b"third clip"),
        ("c.txt", b"from the key"),
        ("c.cls", b"3"),
        (".hidden.mp4", b"no"),
        ("no_caption.mp4", b"fourth"),
    ]
    listing = listed(write_tar(tmp_path / "s.tar", members))
    by_id = {item.id: item for item in listing.items}
    assert list(by_id) == ["s.tar/b.mp4", "s.tar/c.left.mp4", f"s.tar/{long}.webm#1-"]
    assert [item.captions for item in listing.items] == [("a bee", "a wasp"), ("from the key",), ("a cat",)]
    assert by_id[f"s.tar/{long}.webm#1-"].attributes == {"kind": "7"}
    assert reasons(listing) == {"s.tar/no_caption.mp4": "missing caption"}
    contents = []
    for item in listing.items:
        assert isinstance(item.media, Member)
        data = item.media.archive.read_bytes()
        contents.append(data[item.media.offset : item.media.offset + item.media.num_bytes])
    assert contents == [b"first clip", b"third clip", b"second clip"]


def test_folder_of_tars(tmp_path: Path) -> None:
    """Checks that clips of a shard have the same ids and splits whether it is passed alone or with its folder."""
    for number in range(3):
        members = [(f"{number}{key}.{kind}", b"text") for key in "ab" for kind in ("mp4", "txt")]
        write_tar(tmp_path / f"{number}.tar", members)
    put(tmp_path, {"3.tar.gz": gzip.compress(b"x", mtime=0), "loose.mp4": CLIP, "loose.txt": "loose"})
    listing = listed(tmp_path)
    assert len(listing.items) == 7
    assert listing.items[:2] == listed(tmp_path / "0.tar").items
    assert reasons(listing) == {"3.tar.gz": "tar cannot be read"}


def test_tar_that_was_cut(tmp_path: Path) -> None:
    """Catches half a clip taken for a whole one, wherever a copy stopped, and truncation that goes unreported."""
    members = [(f"{number}.{kind}", b"x" * 700) for number in range(3) for kind in ("txt", "mp4")]
    data = write_tar(tmp_path / "whole.tar", members).read_bytes()
    whole = read_index(tmp_path / "whole.tar")
    assert (whole.cut, whole.damage) == ([], "")
    end_of_last = whole.entries[-1].offset + whole.entries[-1].num_bytes
    for size in range(512, end_of_last, 128):
        cut = put(tmp_path, {"cut.tar": data[:size]}) / "cut.tar"
        index = read_index(cut)
        inside = {each.name for each in whole.entries if each.offset + each.num_bytes <= size}
        assert {each.name for each in index.entries} == inside
        assert all(len(each.read()) == each.num_bytes for each in index.entries)
        at_border = any(size == each.offset + 1024 for each in whole.entries)  # looks like a complete tar
        assert at_border or index.cut or index.damage
    listing = listed(put(tmp_path, {"cut.tar": data[: end_of_last - 1]}) / "cut.tar")
    assert [item.id for item in listing.items] == ["cut.tar/0.mp4", "cut.tar/1.mp4"]
    assert reasons(listing)["cut.tar/2.mp4"] == "cut off"


def test_damaged_tar(tmp_path: Path) -> None:
    """Catches a damaged header or two concatenated tars, at which tarfile stops silently."""
    members = [(f"{number}.{kind}", b"x") for number in range(3) for kind in ("txt", "mp4")]
    data = bytearray(write_tar(tmp_path / "whole.tar", members).read_bytes())
    put(tmp_path, {"two.tar": bytes(data + data)})
    data[2 * 1024 : 2 * 1024 + 300] = b"\xff" * 300
    put(tmp_path, {"bad.tar": bytes(data)})
    for name, number in (("bad.tar", 1), ("two.tar", 3)):
        listing = listed(tmp_path / name)
        assert (len(listing.items), reasons(listing)) == (number, {name: "tar is damaged"})


# ---- World


def test_world_is_listed_by_index() -> None:
    """Checks that items match the World's scenes at their indices, and the forms of the source."""
    items = listed("world:40:60").items
    assert items == listed("world:60").items[40:]
    for index, item in zip(range(40, 60), items, strict=True):
        scene = world.scene(index)
        assert (item.id, item.media) == (f"world/{index:06}", scene)
        assert (item.captions, item.attributes) == (world.captions(scene), world.attributes(scene))
        assert item.split in ("train", "validation", "held_out")
    (item,) = listed("world:simple:7:8").items
    assert (item.id, item.media) == ("world-simple/000007", world.scene(7, "simple"))
    assert item.captions == world.captions(world.scene(7, "simple"))


@pytest.mark.parametrize(
    "source",
    [
        "world:",
        "world:0",
        "world:-3",
        "world:5:5",
        "world:9:5",
        "world:a",
        "world:1:2:3",
        "world:simple",
        "world:simple:0",
    ],
)
def test_bad_world(source: str) -> None:
    """Checks the message for an empty or malformed range."""
    with pytest.raises(ValueError, match="expected world:COUNT or world:FIRST:END"):
        listed(source)


def test_clips_without_captions_are_listed_where_none_are_asked_for(tmp_path: Path) -> None:
    """Guards the evaluation of uncaptioned clips: folders without text files, and tables without captions."""
    (tmp_path / "a.mp4").touch()
    options = SourceOptions(caption_columns=())
    assert [item.captions for item in list_source(str(tmp_path), options).items] == [()]
    (tmp_path / "table.csv").write_text("path,start\na.mp4,1\n")
    assert [(item.start, item.captions) for item in list_source(str(tmp_path / "table.csv"), options).items] == [
        (1, ())
    ]
