"""Captioned animations with alpha, such as animated emoji: is a clip nearest to the one that its caption is about?

Each is on a background on which training never showed it. Twelve colors take turns as copies of a clip are made
(`background_of`), so data prepared with `--background random --copies 11` or fewer never shows copy number 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cogvideo.config import require
from cogvideo.data.frames import BACKGROUNDS, FrameSettings, background_of, on_background, read_item
from cogvideo.data.sources import Item, SourceOptions, list_source
from cogvideo.evaluation import retrieval
from cogvideo.evaluation.reader import FPS as SLOW_FPS
from cogvideo.evaluation.reader import SIZE as KEPT_SIZE
from cogvideo.evaluation.reader import resized
from cogvideo.evaluation.subject import FPS, NUM_FRAMES, Clip, Prompt, Verdict
from cogvideo.media.images import evenly

TEMPLATE = "{caption}, on {article} {background} background"
"""The prompt, as `--background-template` words captions."""
BACKGROUND_RIGHT = "background"
SECONDS = NUM_FRAMES / FPS
"""Clips are cut there, and shorter ones start again."""


class EmojiSubject:
    """The first caption of every clip of a source, on the one background on which training never shows it.

    Args:
        source: a folder with captions.csv or a table, as `cogvideo data prepare` takes it.
        limit: most prompts, evenly spread over the clips; all of these are compared with. None for all.
        seed: of clips; clip n has this plus n.
        data_seed: `--seed` of `cogvideo data prepare`, which decides the backgrounds.

    Raises:
        ValueError: the source cannot be used, or a clip has no alpha.
    """

    name = "emoji"

    def __init__(self, source: Path, limit: int | None, seed: int, data_seed: int) -> None:
        self._source, self._data_seed = str(source), data_seed
        self._items = list_source(str(source), SourceOptions()).items
        require(len(self._items) > 0, f"no clip of {source} can be used")
        self._places = evenly(len(self._items), limit or len(self._items)).tolist()
        self._backgrounds = [unseen_background(self._items[place], data_seed) for place in self._places]
        self.prompts = [
            Prompt.of(self.name, place, on_background(self._items[place].captions[0], background, TEMPLATE), seed)
            for place, background in zip(self._places, self._backgrounds, strict=True)
        ]
        self._gallery = read_gallery(self._items)  # now: what has no alpha is refused before a clip is made

    def real(self, number: int, size: int) -> UInt8[np.ndarray, "33 {size} {size} 3"]:
        """The animation on its background."""
        return read(self._items[self._places[number]], self._backgrounds[number], size)

    def judge(self, clips: Sequence[Clip]) -> Verdict:
        """Ranks of the right animations among all, and whether the border has the color that is named."""
        distances = retrieval.distances(np.stack([_small(clip) for clip in clips]), self._gallery)
        ranks = retrieval.ranks(distances, self._places).tolist()
        nearest = [self._items[each].captions[0] for each in distances.argmin(1).tolist()]
        borders = [retrieval.nearest_name(retrieval.border_color(clip), BACKGROUNDS) for clip in clips]
        named = [border == background for border, background in zip(borders, self._backgrounds, strict=True)]
        shares = {
            "rank 1": float(np.mean([rank == 1 for rank in ranks])),
            "rank 5": float(np.mean([rank <= 5 for rank in ranks])),
            BACKGROUND_RIGHT: float(np.mean(named)),
        }
        found = list(zip(ranks, nearest, borders, strict=True))
        return Verdict(
            {"all clips": shares},
            {"all clips": len(clips)},
            [{"rank": rank, "nearest": caption, "background": border} for rank, caption, border in found],
            [rank == 1 and each for rank, each in zip(ranks, named, strict=True)],
            [f"rank {rank}, background {border}; nearest: {caption}" for rank, caption, border in found],
        )

    def record(self) -> dict[str, Any]:
        """Which clips, and how they are compared."""
        return {
            "source": self._source,
            "prompts": len(self.prompts),
            "gallery": len(self._items),
            "chance": 1 / len(self._items),
            "data_seed": self._data_seed,
            "template": TEMPLATE,
            "distance_weight": retrieval.WEIGHT,
        }


def unseen_background(item: Item, data_seed: int) -> str:
    """The color that comes last as copies of a clip are made: that of copy 11, counted from 0."""
    last = len(BACKGROUNDS) - 1
    settings = FrameSettings(background="random", seed=data_seed)
    return background_of(replace(item, id=f"{item.id}~{last}", copy=last), settings)


def read(item: Item, background: str, size: int) -> UInt8[np.ndarray, "33 {size} {size} 3"]:
    """Four seconds of an animation on a background.

    Raises:
        ValueError: it cannot be read, or has no alpha.
    """
    settings = FrameSettings(
        fps=FPS, size=size, max_seconds=SECONDS, min_frames=NUM_FRAMES, loop_to=SECONDS, background=background
    )
    pictures = read_item(item, settings)
    require("background" in pictures.attributes, f"{item.id} has no alpha, expected animations on a transparent ground")
    return pictures.frames


def read_gallery(items: Sequence[Item]) -> retrieval.Gallery:
    """All animations as clips are compared with them."""
    looks = [np.stack([_small(read(item, ground, KEPT_SIZE)) for item in items]) for ground in ("black", "white")]
    return retrieval.gallery(*looks)


def _small(clip: Clip) -> UInt8[np.ndarray, "17 32 32 3"]:
    """A clip as it is compared."""
    return resized(clip[:: round(FPS / SLOW_FPS)], retrieval.SIZE)
