"""Official lists of the data sets that the paper evaluates on: real videos, and texts of their classes.

UCF-101 has `classInd.txt`, `trainlist01.txt` and `testlist01.txt` (to 03), and videos `CLASS/v_CLASS_g01_c01.avi`.
Kinetics-600 has a CSV with `label,youtube_id,time_start,time_end,split`, and videos `LABEL/ID_000010_000020.mp4`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from cogvideo.config import InputError, require

Split = Literal["train", "test", "all"]
Language = Literal["english", "chinese"]
COLUMNS = ("label", "youtube_id", "time_start", "time_end")
"""Columns of Kinetics that are read."""
SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")
"""Suffixes of Kinetics' videos, which depend on who downloaded them."""
CHINESE = Path(__file__).with_name("ucf101_chinese.tsv")
"""Names of UCF-101's classes in Chinese."""


class ListedVideo(NamedTuple):
    """A video of a list."""

    file: Path
    text: str
    """Text of its class."""


def read_ucf101(lists: Path, videos: Path, split: Split, division: int, language: Language) -> list[ListedVideo]:
    """Videos of UCF-101. All must exist, since they come in one archive."""
    classes = lists / "classInd.txt"
    require(classes.is_file(), f"there is no {classes}, expected the folder with the official lists, ucfTrainTestlist")
    texts = _texts(classes, language)
    found = []
    for part in ("train", "test") if split == "all" else (split,):
        path = lists / f"{part}list{division:02}.txt"
        for line in _lines(path):
            name = line.split()[0]
            category = name.partition("/")[0]
            require(category in texts, f"{path} has {name!r:.80}, expected CLASS/FILE.avi with a class of {classes}")
            found.append(ListedVideo(videos / name, texts[category]))
    missing = [str(each.file) for each in found if not each.file.is_file()]
    first = next(iter(missing), "")
    require(not missing, f"{videos} lacks {len(missing)} of {len(found)} listed videos, the first is {first}")
    return found


def _texts(classes: Path, language: Language) -> dict[str, str]:
    """Texts of classes by their official names, such as HorseRiding."""
    names = [line.split()[-1] for line in _lines(classes)]
    if language == "english":
        return {name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in names}
    chinese = dict(line.split("\t") for line in _lines(CHINESE))
    unknown = sorted(set(names) - chinese.keys())
    require(not unknown, f"{classes} has {', '.join(unknown)}, expected classes of UCF-101")
    return {name: chinese[name] for name in names}


def read_kinetics(table: Path, videos: Path) -> tuple[list[ListedVideo], int]:
    """Existing videos of Kinetics, and the number of missing ones: many have vanished from the web.

    Args:
        table: official CSV, such as that of the test split.
        videos: folder of the videos, or of a folder for each label.
    """
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        lacking = [each for each in COLUMNS if each not in (rows.fieldnames or ())]
        require(not lacking, f"{table} lacks {', '.join(lacking)}, expected the official CSV with {', '.join(COLUMNS)}")
        listed = [_kinetics(table, videos, rows.line_num, row) for row in rows]
    found = [each for each in listed if each.file.is_file()]
    first = f", the first is {listed[0].file}" if listed else ""
    require(len(found) > 0, f"{videos} has none of the {len(listed)} listed videos{first}")
    return found, len(listed) - len(found)


def _kinetics(table: Path, videos: Path, line: int, row: dict[str, str]) -> ListedVideo:
    try:
        start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
    except (ValueError, OverflowError, TypeError):
        got = f"time_start {row['time_start']!r:.20} and time_end {row['time_end']!r:.20}"
        raise InputError(f"{table}, line {line}: got {got}, expected seconds") from None
    stem = f"{row['youtube_id']}_{start:06}_{end:06}"
    places = [folder / f"{stem}{suffix}" for folder in (videos / row["label"], videos) for suffix in SUFFIXES]
    return ListedVideo(next((each for each in places if each.is_file()), places[0]), row["label"])


def _lines(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            yield line
