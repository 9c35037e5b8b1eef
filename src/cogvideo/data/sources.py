"""A source of captioned clips as a list of items: a folder, a table, WebDataset tars or the World (docs/data.md).

A table `captions.*` or `metadata.*` describes its folder, as do `videos.txt` and `prompts.txt`. In any other folder or
a tar, the captions of `x.mp4` are the lines of `x.txt` next to it, or else those in `x.json`, whose other keys are
treated as table columns. Hidden files and folders are ignored. Listing opens tables and captions, never a video.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from cogvideo import world
from cogvideo.config import InputError, Limited, Positive, Share, require
from cogvideo.data import tables
from cogvideo.data.folders import existing, find_manifest, is_manifest, is_openable, read_beside, walk
from cogvideo.data.tables import CAPTION_COLUMNS, FILE_COLUMNS, LISTS, OPTIONAL_COLUMNS, Record, RowError
from cogvideo.data.tars import Member, read_index
from cogvideo.files import plain
from cogvideo.media.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES

_SPLITS = {"val": "validation", "valid": "validation", "dev": "validation"}  # names in other data sets
SPLITS = ("train", "validation", "test", *_SPLITS)
"""Folder names that give the split of the table inside."""
_TARS = (".tar", ".tgz", ".tbz2", ".txz")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

Media = Path | Member | world.Scene
"""Source of frames: a video or image on disk or in a tar, or a scene to render."""


@dataclass(frozen=True, slots=True)
class Item:
    """One clip of a source, before it is read."""

    id: str
    """Name, unique in the source: the path below the source, with the part of the file."""
    media: Media
    captions: tuple[str, ...]
    """One or more captions, none empty; no captions if no `caption_columns` are requested."""
    attributes: dict[str, str] = field(default_factory=dict)
    start: float = 0.0
    """Seconds from the first frame of the file to the first frame of the clip."""
    end: float | None = None
    """Seconds from the first frame of the file to the end of the clip; None for the end of the file."""
    split: str | None = None
    """Split of the clip, if the source gives one."""
    copy: int = 0
    """Number of this copy of the clip; copies differ in random choices."""


class Rejection(NamedTuple):
    """A clip that is left out: its id or place in the source, a fixed reason that can be counted, and details."""

    id: str
    reason: str
    detail: str


class Listing(NamedTuple):
    """Usable clips of a source, and rejected ones; their order depends only on the content."""

    items: list[Item]
    rejected: list[Rejection]


@dataclass(frozen=True)
class SourceOptions(Limited):
    """Columns of a source, and treatment of its clips."""

    caption_columns: tuple[str, ...] = CAPTION_COLUMNS[:1]
    """Columns of a table, or keys of a JSON file, with captions; otherwise text or prompt."""
    file_column: str = FILE_COLUMNS[0]
    """Column of a table with the path of the video; otherwise file_name, path, video, video_path or video_file_name."""
    copies: Positive[int] = 1
    """Copies of each clip. They differ in random choices, such as the background."""
    images: bool = False
    """Read still images in folders and tars, too, as clips of one frame. Tables may always name images."""
    validation: Share = 0.05
    """Share of clips in the split `validation`, if the source names no split. All parts and copies of a file are in the
    same split, which depends only on its relative path."""
    limit: Positive[int] | None = None
    """Maximum number of clips, not counting copies; the first ones are used."""

    @property
    def suffixes(self) -> frozenset[str]:
        """Suffixes of files to list."""
        return frozenset(VIDEO_SUFFIXES) | frozenset(IMAGE_SUFFIXES if self.images else ())


Found = Iterator[Item | Rejection]


def list_source(source: str, options: SourceOptions) -> Listing:
    """Clips of a source.

    Args:
        source: a path, or `world:COUNT` or `world:FIRST:END`; a file with such a name is `./world:5`.
        options: columns, and treatment of the clips.
    """
    rejected: list[Rejection] = []
    clips: dict[str, Item] = {}
    for each in _find(source, options):
        if isinstance(each, Rejection):
            rejected.append(Rejection(*map(plain, each)))
            continue
        known = clips.get(each.id)
        if known is None:
            if len(clips) == options.limit:
                break
            clips[each.id] = each
        elif new := tuple(caption for caption in each.captions if caption not in known.captions):
            clips[each.id] = replace(known, captions=known.captions + new)
        else:
            rejected.append(Rejection(each.id, "named twice", "the same part of the file is listed before"))
    items = []
    for clip in clips.values():
        items.append(clip)
        items.extend(replace(clip, id=f"{clip.id}~{copy}", copy=copy) for copy in range(1, options.copies))
    nothing = f"{source} has no clips, expected {', '.join(sorted(options.suffixes))} or .tar files"
    require(bool(items or rejected), nothing)
    return Listing(items, rejected)


def other_splits(items: Iterable[Item]) -> str:
    """Splits of clips that are not trained on, for a message; empty if all are in the split train."""
    counts = Counter(item.split for item in items if item.split not in ("train", None) and not item.copy)
    told = ", ".join(f"{count} of the split {split}" for split, count in counts.items())
    hint = "where the source names none, it is drawn from the file's name: --validation 0"
    return f"{told}; {hint}" if told else ""


def _find(source: str, options: SourceOptions) -> Found:
    if source.startswith("world:"):
        return _world(source)
    path = existing(Path(os.path.abspath(source)))  # for workers in other directories
    require(os.path.lexists(path), f"there is no {source}, expected a folder, a table, a tar or world:COUNT")
    can_be_read = path.is_dir() or is_openable(path)
    require(can_be_read, f"{source} is a pipe or a device, expected a folder, a file or world:COUNT")
    if path.is_dir():
        manifest = find_manifest(path)
        return _folder(path, options) if manifest is None else _table(manifest, path, options)
    if tables.is_table(path) or path.name == LISTS[0]:
        return _table(path, path.parent, options)
    if _is_tar(path):
        return _tar(path, path.parent, options)
    kinds = f"a folder, a table ({', '.join(tables.TABLE_SUFFIXES)}), a .tar or world:COUNT"
    raise InputError(f"{source} cannot be a source by itself, expected {kinds}")


def _world(source: str) -> Found:
    bounds = source.split(":")[1:]
    domain = bounds.pop(0) if bounds[0] in world.DOMAINS else "full"
    try:
        first, end = (0, *map(int, bounds))[-2:]
    except ValueError:
        first, end = 0, 0
    forms = "world:COUNT or world:FIRST:END with numbers, such as world:100000 or world:simple:20000"
    require(len(bounds) <= 2 and 0 <= first < end, f"got {source!r}, expected {forms}")
    folder = "world" if domain == "full" else f"world-{domain}"
    for scene in (world.scene(index, domain) for index in range(first, end)):
        captions, attributes = world.captions(scene), world.attributes(scene)
        yield Item(f"{folder}/{scene.index:06}", scene, captions, attributes, split=world.split(scene))


def _item(name: str, media: Media, captions: tuple[str, ...], values: dict[str, Any], options: SourceOptions) -> Item:
    """An item from its file's path below the source and its other values."""
    name = plain(name)
    start, end = tables.span_of(values)
    part = f"#{_number(start)}-{'' if end is None else _number(end)}" if start or end is not None else ""
    split = values.get("split")
    split = "" if tables.is_missing(split) else str(split or "").strip().lower()
    if not split:  # chosen by a hash of the file's name
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        split = "validation" if key < options.validation * 2**64 else "train"
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", split):
        raise RowError("bad split", f"got {split!r:.40}, expected a word such as train or validation")
    known = frozenset((options.file_column, *options.caption_columns, *OPTIONAL_COLUMNS))
    attributes = tables.attributes_of(values, known)
    return Item(name + part, media, captions, attributes, start, end, _SPLITS.get(split, split))


def _number(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def _table(path: Path, root: Path, options: SourceOptions) -> Found:
    """The rows of a table; ids are paths below `root`."""
    columns = tables.read_columns(path)
    options = _with_columns(columns, options, path)
    flags = dict.fromkeys(options.caption_columns, "--caption-columns") | {options.file_column: "--file-column"}
    for column, flag in flags.items():
        known = FILE_COLUMNS if column == options.file_column else CAPTION_COLUMNS
        hints = tables.hints(columns, (column, *known))
        there = "; ".join([f"it has {', '.join(columns)}: choose with {flag}", *hints])
        if len(columns) == 1 and path.suffix.lower() == ".csv":
            there = f"its first line is {columns[0]!r:.80}: separate columns with commas"
        require(column in columns, f"{path} has no column {column!r}, {there}")
    for hint in tables.hints(columns, OPTIONAL_COLUMNS):
        print(f"{path}: {hint}", file=sys.stderr)
    is_empty, place = True, os.path.relpath(path, root)
    for record in tables.read_records(path):
        is_empty = False
        yield _row(record, place, str(root), options)
    require(not is_empty, f"{path} is empty, expected rows below its column names")


def _with_columns(columns: Collection[str], options: SourceOptions, table: Path | None = None) -> SourceOptions:
    """Options with a table's own column names; `videos.txt` always has ours."""
    asked = SourceOptions() if table is not None and table.name == LISTS[0] else options
    (file,) = tables.meant(columns, (asked.file_column,), FILE_COLUMNS)
    captions = tables.meant(columns, asked.caption_columns, CAPTION_COLUMNS)
    return replace(options, file_column=file, caption_columns=captions)


def _row(record: Record, table: str, root: str, options: SourceOptions) -> Item | Rejection:
    """The item of a row; the table is a path below `root`."""
    file = record.values.get(options.file_column)
    where = f"{table}, {record.place}"
    if not isinstance(file, str) or not file.strip():
        return Rejection(where, "missing file name", f"got {file!r:.60}")
    try:
        path = os.path.normpath(os.path.join(root, os.path.dirname(table), file.strip()))
        if not path.isascii():
            path = str(existing(Path(path)))
        name = os.path.relpath(path, root) if not path.startswith(root + os.sep) else path[len(root) + 1 :]
        if record.surplus:
            detail = f'{record.surplus} cells too many: put captions with commas in "..."'
            raise RowError("more cells than columns", detail)
        captions = tables.captions_of(record.values, options.caption_columns) if options.caption_columns else ()
        item = _item(name, Path(path), captions, record.values, options)
        if not os.path.isfile(path):
            raise RowError("file is missing", f"{path} is a folder" if os.path.isdir(path) else f"there is no {path}")
        return item
    except RowError as error:
        return Rejection(name, error.reason, f"{where}: {error.detail}" if error.detail else where)
    except UnicodeEncodeError:
        return Rejection(where, "file name is not text", f"got {file!r:.60}")


def _folder(folder: Path, options: SourceOptions) -> Found:
    names, named = walk(folder), set()
    for name in names:
        if is_manifest(folder / name):
            for each in _nested(name, folder, options):
                yield each
                if isinstance(each, Item):
                    named.add(each.media)
    for name in names:
        path = folder / name
        if path.suffix.lower() in options.suffixes and path not in named:
            yield _noted(name, path, partial(read_beside, path), options)
        elif _is_tar(path):
            try:  # one bad tar in a thousand must not stop a run
                yield from _tar(path, folder, options)
            except InputError as error:
                yield Rejection(name, "tar cannot be read", str(error))


def _nested(name: str, root: Path, options: SourceOptions) -> Found:
    """Rows of a table in a folder below a source, if it has the columns; the folder's name may be a split."""
    table = root / name
    try:
        columns = tables.read_columns(table)
        known = _with_columns(columns, options, table)
        if not {known.file_column, *known.caption_columns} <= set(columns):
            return
        split = table.parent.name.lower()
        is_split = split in SPLITS and "split" not in columns
        for each in _table(table, root, options):
            yield replace(each, split=_SPLITS.get(split, split)) if is_split and isinstance(each, Item) else each
    except InputError as error:
        yield Rejection(name, "table cannot be read", str(error))


def _noted(name: str, media: Media, beside: Callable[[str], bytes | None], options: SourceOptions) -> Item | Rejection:
    """An item with captions from its `.txt`, or else its `.json`; `beside` reads the file with a suffix."""
    if not options.caption_columns:
        return _item(name, media, (), {}, options)
    try:
        text, table = beside(".txt"), beside(".json")
        if text is None and table is None:
            raise RowError("missing caption", "expected a .txt or .json of the same name next to it")
        values = {} if table is None else _json(table)
        if not text:
            options = _with_columns(values, options)
        if text is None:
            captions = tables.captions_of(values, options.caption_columns)
        else:
            captions = tables.clean(tables.lines_of(_decoded(text)))
        return _item(name, media, captions, values, options)
    except RowError as error:
        return Rejection(name, error.reason, error.detail)


def _json(content: bytes) -> dict[str, Any]:
    text = _decoded(content)
    try:
        return tables.parse_json(text, "the .json next to it")
    except InputError as error:
        raise RowError("caption cannot be read", str(error)) from error


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("caption is not text", f"byte {error.start} of its file is not UTF-8") from error


def _is_tar(path: Path) -> bool:
    is_packed = path.suffix in _COMPRESSIONS and path.with_suffix("").suffix == ".tar"
    return path.suffix.lower() in _TARS or is_packed


def _tar(path: Path, folder: Path, options: SourceOptions) -> Found:
    index = read_index(path)
    name = path.relative_to(folder).as_posix()
    notes = {entry.name: entry for entry in index.entries if entry.suffix in (".txt", ".json")}
    notes = {normalize("NFC", each): entry for each, entry in notes.items()} | notes

    def beside(entry: Member, suffix: str) -> bytes | None:
        names = entry.beside(suffix)
        others = (normalize("NFC", each) for each in names)  # as others encode its accents
        note = next((notes[each] for each in (*names, *others) if each in notes), None)
        with tables.reading(path):
            return None if note is None else note.read()

    for entry in sorted(index.entries, key=lambda each: each.name):
        if entry.suffix in options.suffixes:
            yield _noted(f"{name}/{entry.name}", entry, partial(beside, entry), options)
    for entry in index.cut:
        yield Rejection(f"{name}/{entry.name}", "cut off", f"{path} ends inside it")
    if index.damage:
        yield Rejection(name, "tar is damaged", f"{index.damage}; complete files before it are used")
