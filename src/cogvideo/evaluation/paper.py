"""The paper's evaluations on UCF-101 and Kinetics-600: official lists, clips by its protocols, published figures.

UCF-101 has `classInd.txt`, `trainlist01.txt` and `testlist01.txt` (to 03), and videos `CLASS/v_CLASS_g01_c01.avi`.
Kinetics-600 has a CSV with `label,youtube_id,time_start,time_end,split`, and videos `LABEL/ID_000010_000020.mp4`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from cogvideo.config import InputError, require
from cogvideo.data.sources import Item
from cogvideo.evaluation.footage import Reading, draw
from cogvideo.evaluation.making import ClipOptions
from cogvideo.evaluation.protocols import Protocol
from cogvideo.evaluation.subjects import Prompt
from cogvideo.files import write_text
from cogvideo.generation.request import Request
from cogvideo.media.colors import Pixels
from cogvideo.media.video import read_video
from cogvideo.pipeline import CogVideoPipeline, Frame, collect

Split = Literal["train", "test", "all"]
Language = Literal["english", "chinese"]
COLUMNS = ("label", "youtube_id", "time_start", "time_end")
"""Columns of Kinetics that are read."""
SUFFIXES = (".mp4", ".webm", ".mkv", ".avi")
"""Suffixes of Kinetics' videos, which depend on who downloaded them."""
CHINESE = Path(__file__).with_name("ucf101_chinese.tsv")
"""Names of UCF-101's classes in Chinese."""
GIVEN = 5
"""Number of leading frames given to prediction."""
ROUNDS = 2
"""Rounds of interpolation: 17 frames; the first 16 are used."""
TABLE_1 = "CogVideo (arXiv 2205.15868), table 1"
NOTE = (
    "* computed with another network than that of FVD, as CogVideo's first author states "
    "(github.com/zai-org/CogVideo, issue 25): no target to reach. ** real clips replaced by reconstructions by the "
    "tokenizer. Published rows differ in frame rate, windows and number of clips."
)


# Lists


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


# Clips


def of_classes(texts: Sequence[str], count: int, seed: int) -> list[Prompt]:
    """Prompts from classes, each about equally often; clip n has the seed `seed + n`."""
    return [Prompt.of("class", number, texts[number % len(texts)], seed) for number in range(count)]


def of_videos(items: Sequence[Item], seed: int) -> list[Prompt]:
    """Prompts that continue real clips; clip n has the seed `seed + n`."""
    return [Prompt(Path(str(item.media)).stem, item.captions[0], seed + n) for n, item in enumerate(items)]


def write_table(path: Path, listed: Iterable[ListedVideo]) -> None:
    """Write a table of whole videos."""
    _write_rows(path, [{"file": str(each.file.resolve()), "caption": each.text} for each in listed])


def write_windows(path: Path, videos: Path, reading: Reading, seed: int) -> None:
    """Write a table of the parts of real videos to continue: a random one of each; short videos are left out."""
    span = reading.protocol.span
    rows = []
    for excerpt in draw(str(videos), reading, "random", reading.protocol.clips, seed).excerpts:
        item, fps = excerpt.footage.media, excerpt.footage.fps
        assert isinstance(item, Item)
        start, end = excerpt.first / fps, (excerpt.first + span) / fps
        rows.append({"file": str(item.media), "caption": item.captions[0], "start": start, "end": end})
    _write_rows(path, rows)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class ProtocolMaker:
    """A model that generates clips of a protocol."""

    def __init__(self, pipeline: CogVideoPipeline, making: ClipOptions, protocol: Protocol, fps: float) -> None:
        settings = replace(making.settings(pipeline.model.config), rounds=ROUNDS)
        got, expected = pipeline.num_frames(settings), protocol.frames
        require(got >= expected, f"the model generates {got} frames in {ROUNDS} rounds, expected {expected} or more")
        self._pipeline, self._protocol, self._fps = pipeline, protocol, fps
        self._settings = replace(settings, duration=(got - 1) / fps)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that cannot be used."""
        for prompt in {each.text: each for each in prompts}.values():
            self._frames([prompt])

    def generate(self, prompts: Sequence[Prompt], given: Int64[Tensor, "given slots"] | None = None) -> list[Pixels]:
        """The first frames of some prompts' clips, generated as one batch."""
        return [*collect(self._frames(prompts, given), self._fps).frames[:, : self._protocol.frames]]

    def _frames(self, prompts: Sequence[Prompt], given: Int64[Tensor, "given slots"] | None = None) -> Iterator[Frame]:
        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        return self._pipeline.frames(Request([prompt.text for prompt in prompts], generators, self._settings, given))

    def predict(self, prompt: Prompt, real: Item) -> Pixels:
        """The first frames of a real clip and their continuation, at the protocol's size."""
        protocol = self._protocol
        assert isinstance(real.media, Path)
        first = read_video(real.media, self._fps, start=real.start, end=real.end, max_frames=GIVEN).frames
        (clip,) = self.generate([prompt], self._pipeline.encode(first))
        return np.concatenate([protocol.reduced(each, protocol.size) for each in (first, clip[GIVEN:])])


# Published figures


class Published(NamedTuple):
    """A row of a table."""

    method: str
    fvd: float | None
    inception_score: float | None = None
    source: str = TABLE_1


UCF101 = (
    Published("VideoGPT", None, 24.69),
    Published("DVD-GAN", None, 27.38),
    Published("TGANv2, train split", 1209, 28.87),
    Published("MoCoGAN-HD", 838, 32.36),
    Published("DIGAN, train split", 655, 29.71),
    Published("DIGAN", 577, 32.70),
    Published("TATS-base", 332, 79.28),
    Published("CogVideo *", 626, 50.46),
    Published("CogVideo * **", 545),
    Published("CogVideo, later", 305, 51.11, "Papers with Code; probably the corrected figure"),
)
KINETICS600 = (
    Published("Latent Video Transformer", 224.73),
    Published("Video Transformer", 170),
    Published("DVD-GAN-FP", 69.15),
    Published("TriVD-GAN-FP", 25.74),
    Published("CogVideo *", 109.23),
    Published("CogVideo * **", 59.55),
    Published("Video Diffusion Models", 16.2, source="Video Diffusion Models (arXiv 2204.03458)"),
    Published("MAGVIT-L", 9.9, source="MAGVIT (arXiv 2212.05199)"),
)
