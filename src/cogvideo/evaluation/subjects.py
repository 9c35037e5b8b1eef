"""Subjects of an evaluation: prompts, the real clips that they caption, and a judge of generated clips."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cogvideo import world
from cogvideo.bundle.format import Entry
from cogvideo.config import require
from cogvideo.data.frames import BACKGROUNDS, FrameSettings, background_of, on_background, read_item
from cogvideo.data.sources import Item, SourceOptions, list_source
from cogvideo.evaluation import reader as readers
from cogvideo.evaluation import retrieval
from cogvideo.evaluation.reader import (
    ALL,
    ATTRIBUTES,
    FIRST_PROMPT,
    Reader,
    accuracies,
    groups,
    readable,
    resized,
    right,
    unseen_scenes,
)
from cogvideo.media.images import evenly

NUM_FRAMES, FPS = 33, 8.0
"""Number of frames of all clips, and their rate."""
SECONDS = NUM_FRAMES / FPS
"""Length to which animations are cut, and to which shorter ones are repeated."""
GROUNDS = ("black", "white")
TEMPLATE = "{caption}, on {article} {background} background"
"""The prompt of an animation, in the form of `--background-template`."""
Clip = UInt8[np.ndarray, "33 64 64 3"]
"""A clip in the form that is judged, whatever the model's own size: red, green and blue."""


class Prompt(NamedTuple):
    """A caption to make a clip from."""

    name: str
    """Name of the clip's file; different texts have different names."""
    text: str
    seed: int

    @classmethod
    def of(cls, kind: str, number: int, text: str, seed: int) -> Prompt:
        """The prompt with a number; the seed of its clip is `seed` plus that number."""
        return cls(f"{kind}-{number:07}-{hashlib.sha256(text.encode()).hexdigest()[:8]}", text, seed + number)


class SubjectResult(NamedTuple):
    """Findings about clips of all prompts of a subject."""

    shares: dict[str, dict[str, float]]
    """Share of the clips by group and measure, each in [0, 1]."""
    counts: dict[str, int]
    findings: list[dict[str, Any]]
    """Findings about each clip, for the record."""
    right: list[bool]
    """True for each clip that shows its prompt."""
    words: list[str]
    """The findings about each clip in words."""


class WorldSubject:
    """Clips of the World, judged by the reader: prompts are first captions of scenes that no model or reader was
    trained on.

    Half of the scenes have held-out pairs. The clip of a scene has the seed plus the scene's number.
    """

    def __init__(self, number: int, domain: str, seed: int, reader: Path) -> None:
        self.name = "world" if domain == "full" else f"world-{domain}"
        self._scenes = unseen_scenes(number, FIRST_PROMPT, domain)
        self._reader, self._sha256 = Reader.load(reader), Entry.of(reader).sha256
        self.prompts = [Prompt.of(self.name, each.index, world.captions(each)[0], seed) for each in self._scenes]

    def real(self, number: int, size: int) -> UInt8[np.ndarray, "33 {size} {size} 3"]:
        """The rendered scene."""
        return world.render(self._scenes[number], size, FPS, NUM_FRAMES)

    def judge(self, clips: Sequence[Clip]) -> SubjectResult:
        """Attributes as the reader reads them; shares are by group of scenes and attribute."""
        readings = self._reader.read(np.stack([readable(clip, FPS) for clip in clips]))
        results = [right(reading, scene) for reading, scene in zip(readings, self._scenes, strict=True)]
        words = []
        for reading, result in zip(readings, results, strict=True):
            wrong = [f"{name} {reading[name]}" for name in ATTRIBUTES if not result[name]]
            words.append(f"read wrong: {', '.join(wrong)}" if wrong else "all read right")
        return SubjectResult(
            accuracies(readings, self._scenes),
            {name: len(places) for name, places in groups(self._scenes).items()},
            [{name: reading[name] for name in ATTRIBUTES} for reading in readings],
            [result[ALL] for result in results],
            words,
        )

    def record(self) -> dict[str, Any]:
        """Numbers of scenes, and the reader's hash."""
        held_out = sum(map(world.is_held_out, self._scenes))
        counts = {"prompts": len(self._scenes), "held_out": held_out, "validation": len(self._scenes) - held_out}
        return counts | {"first_number": FIRST_PROMPT, "caption": "the first", "reader_sha256": self._sha256}


class EmojiSubject:
    """Captioned animations with alpha, such as animated emoji: is a clip nearest to the animation of its caption?

    Each is on a background that it never had in training. Copies of a clip go through twelve colors (`background_of`),
    so data prepared with `--background random --copies 11` or fewer never shows copy number 11.

    Args:
        source: a folder with captions.csv or a table, as for `cogvideo data prepare`.
        limit: maximum number of prompts, evenly spread; None for all. Clips are compared with all animations.
        seed: seed of clips; clip n has this plus n.
        data_seed: `--seed` of `cogvideo data prepare`, which determines the backgrounds.
    """

    def __init__(self, source: Path, limit: int | None, seed: int, data_seed: int) -> None:
        self.name = "emoji"
        self._source, self._data_seed = str(source), data_seed
        self._items = list_source(str(source), SourceOptions()).items
        require(len(self._items) > 0, f"no clip in {source} can be used")
        self._places = evenly(len(self._items), limit or len(self._items)).tolist()
        self._backgrounds = [unseen_background(self._items[place], data_seed) for place in self._places]
        self.prompts = [
            Prompt.of(self.name, place, on_background(self._items[place].captions[0], background, TEMPLATE), seed)
            for place, background in zip(self._places, self._backgrounds, strict=True)
        ]
        drawn = ([_small(read_animation(item, ground, readers.SIZE)) for item in self._items] for ground in GROUNDS)
        self._gallery = retrieval.gallery(*map(np.stack, drawn))  # now, so that clips without alpha are refused early

    def real(self, number: int, size: int) -> UInt8[np.ndarray, "33 {size} {size} 3"]:
        """The animation on its background."""
        return read_animation(self._items[self._places[number]], self._backgrounds[number], size)

    def judge(self, clips: Sequence[Clip]) -> SubjectResult:
        """Ranks of the right animations among all, and whether the border has the named color."""
        distances = retrieval.distances(np.stack([_small(clip) for clip in clips]), self._gallery)
        ranks = retrieval.ranks(distances, self._places).tolist()
        nearest = [self._items[each].captions[0] for each in distances.argmin(1).tolist()]
        borders = [retrieval.nearest_name(retrieval.border_color(clip), BACKGROUNDS) for clip in clips]
        named = [border == background for border, background in zip(borders, self._backgrounds, strict=True)]
        shares = {
            "rank 1": float(np.mean([rank == 1 for rank in ranks])),
            "rank 5": float(np.mean([rank <= 5 for rank in ranks])),
            "background": float(np.mean(named)),
        }
        found = list(zip(ranks, nearest, borders, strict=True))
        return SubjectResult(
            {"all clips": shares},
            {"all clips": len(clips)},
            [{"rank": rank, "nearest": caption, "background": border} for rank, caption, border in found],
            [rank == 1 and each for rank, each in zip(ranks, named, strict=True)],
            [f"rank {rank}, background {border}; nearest: {caption}" for rank, caption, border in found],
        )

    def record(self) -> dict[str, Any]:
        """The clips, and how they are compared."""
        return {
            "source": self._source,
            "prompts": len(self.prompts),
            "gallery": len(self._items),
            "chance": 1 / len(self._items),
            "data_seed": self._data_seed,
            "template": TEMPLATE,
            "distance_weight": retrieval.WEIGHT,
        }


Subject = WorldSubject | EmojiSubject
"""Prompts, their real clips, and a judge of generated clips."""


def unseen_background(item: Item, data_seed: int) -> str:
    """The color of the last of a clip's twelve copies: copy 11, counted from 0."""
    last = len(BACKGROUNDS) - 1
    settings = FrameSettings(background="random", seed=data_seed)
    return background_of(replace(item, id=f"{item.id}~{last}", copy=last), settings)


def read_animation(item: Item, background: str, size: int) -> UInt8[np.ndarray, "33 {size} {size} 3"]:
    """Four seconds of an animation on a background."""
    length: dict[str, Any] = {"max_seconds": SECONDS, "loop_to": SECONDS, "min_frames": NUM_FRAMES}
    pictures = read_item(item, FrameSettings(fps=FPS, size=size, background=background, **length))
    require("background" in pictures.attributes, f"{item.id} has no alpha, expected animations on a transparent ground")
    return pictures.frames


def _small(clip: Clip) -> UInt8[np.ndarray, "17 32 32 3"]:
    """A clip in the form that is compared."""
    return resized(clip[:: round(FPS / readers.FPS)], retrieval.SIZE)
