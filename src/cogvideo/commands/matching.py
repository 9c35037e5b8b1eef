"""Clips of a study and their prompts: by a table, by the names that `cogvideo generate` gives, or by numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from cogvideo.commands.outputs import ClipNames
from cogvideo.commands.prompts import read_prompts
from cogvideo.config import InputError, require
from cogvideo.data.tables import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    RowError,
    captions_of,
    is_table,
    read_columns,
    read_records,
)
from cogvideo.media.video import VIDEO_SUFFIXES


def read_texts(path: Path) -> tuple[list[str], list[str] | None]:
    """Texts of the prompts, and the names of their clips if a table has them."""
    require(not path.is_dir(), f"{path} is a folder, expected a file with prompts")
    columns = read_columns(path) if path.is_file() and is_table(path) else ()
    file = next((each for each in FILE_COLUMNS if each in columns), None)
    text = next((each for each in CAPTION_COLUMNS if each in columns), None)
    if file is None or text is None:
        return [prompt.text for prompt in read_prompts(path)], None
    texts, stems = [], []
    for record in read_records(path):
        where = f"{path}, {record.place}"
        name = record.values.get(file)
        require(isinstance(name, str) and name != "", f"{where}: {file} is {name!r}, expected the name of a clip")
        stems.append(Path(str(name)).stem)
        try:
            texts.append(captions_of(record.values, (text,))[0])
        except RowError as error:
            raise InputError(f"{where}: {error}") from error
    twice = [stem for stem, number in Counter(stems).items() if number > 1]
    require(not twice, f"{path} has {' and '.join(map(repr, twice[:2]))} twice in {file}, expected each clip once")
    return texts, stems


def find_clips(folder: Path, texts: Sequence[str], stems: Sequence[str] | None) -> list[Path]:
    """The clip of each prompt in a folder."""
    require(folder.is_dir(), f"{folder} is not a folder, expected one with clips")
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in VIDEO_SUFFIXES]
    require(len(files) > 0, f"{folder} has no clips, expected files such as .mp4, .gif or .webp")
    clips = {path.stem: path for path in files}
    twice = [stem for stem, number in Counter(path.stem for path in files).items() if number > 1]
    require(not twice, f"{folder} has several clips {''.join(twice[:1])}, expected one for each prompt")
    names = ClipNames()
    wanted = stems if stems is not None else [names.add(text) for text in texts]  # as `cogvideo generate` does
    missing = [stem for stem in wanted if stem not in clips]
    if not missing:
        return [clips[stem] for stem in wanted]
    lacks = f"{folder} lacks {len(missing)} of {len(texts)} clips, the first is {missing[0]!r}"
    require(
        stems is None and all(map(_numbers, clips)), f"{lacks}; use these names, or pass a table with a column `file`"
    )
    require(len(clips) == len(texts), f"{folder} has {len(clips)} clips for {len(texts)} prompts, expected one of each")
    order = sorted(clips, key=_numbers)
    for one, other in pairwise(order):
        steps = [after - before for before, after in zip(_numbers(one), _numbers(other), strict=False)]
        change = next(filter(None, steps), 0)
        require(change != 0, f"{folder}: {one!r} and {other!r} have the same number, expected an order")
        gap = f"{folder} has no clip between {one!r} and {other!r}, expected consecutive numbers"
        require(change == 1, f"{gap}, or a table of prompts with a column `file`")
    return [clips[stem] for stem in order]


def _numbers(stem: str) -> list[int]:
    """Numbers in a name."""
    return [int(digits) for digits in re.findall(r"[0-9]{1,18}", stem)]
