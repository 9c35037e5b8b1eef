"""Clips of the World, judged by the reader: does a clip show what its caption says?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cogvideo import world
from cogvideo.bundle.format import Entry
from cogvideo.evaluation.attributes import ALL, PROMPTED, accuracies, groups, right, unseen_scenes
from cogvideo.evaluation.reader import ATTRIBUTES, Reader, readable
from cogvideo.evaluation.subject import FPS, NUM_FRAMES, Clip, Prompt, Verdict


class WorldSubject:
    """First captions of scenes that no model or reader was trained on; half of them have held-out pairs.

    Args:
        number: of prompts.
        domain: of the World, "full" or "simple".
        seed: of clips; the clip of a scene has this plus the scene's number.
        reader: file of the reader.

    Raises:
        ValueError: there are too many prompts, or the reader cannot be used.
    """

    def __init__(self, number: int, domain: str, seed: int, reader: Path) -> None:
        self.name = "world" if domain == "full" else f"world-{domain}"
        self._scenes = unseen_scenes(number, PROMPTED, domain)
        self._reader, self._sha256 = Reader.load(reader), Entry.of(reader).sha256
        self.prompts = [Prompt.of(self.name, each.index, world.captions(each)[0], seed) for each in self._scenes]

    def real(self, number: int, size: int) -> UInt8[np.ndarray, "33 {size} {size} 3"]:
        """The scene as it is drawn."""
        return world.render(self._scenes[number], size, FPS, NUM_FRAMES)

    def judge(self, clips: Sequence[Clip]) -> Verdict:
        """What the reader reads, and how much of it is right; shares are by group of scenes and attribute."""
        readings = self._reader.read(np.stack([readable(clip, FPS) for clip in clips]))
        results = [right(reading, scene) for reading, scene in zip(readings, self._scenes, strict=True)]
        return Verdict(
            accuracies(readings, self._scenes),
            {name: len(places) for name, places in groups(self._scenes).items()},
            [{name: reading[name] for name in ATTRIBUTES} for reading in readings],
            [result[ALL] for result in results],
            [_words(reading, result) for reading, result in zip(readings, results, strict=True)],
        )

    def record(self) -> dict[str, Any]:
        """Which scenes, and who reads."""
        held_out = sum(map(world.is_held_out, self._scenes))
        counts = {"prompts": len(self._scenes), "held_out": held_out, "validation": len(self._scenes) - held_out}
        return counts | {"first_number": PROMPTED, "caption": "the first", "reader_sha256": self._sha256}


def _words(reading: dict[str, str], result: dict[str, bool]) -> str:
    wrong = [f"{name} {reading[name]}" for name in ATTRIBUTES if not result[name]]
    return f"read wrong: {', '.join(wrong)}" if wrong else "all read right"
