"""Attributes predicted from clips of the World, compared with the true ones; and the clips reserved for such tests.

Models train only on the split `train`. The reader trains on all splits, but on no clip numbered below `READER_LEARNS`:
its test clips and those that models are judged on have lower numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cogvideo import world
from cogvideo.config import require
from cogvideo.evaluation.reader import ATTRIBUTES
from cogvideo.world.scenes import Split

ALL = "all right"
"""Name of the share of clips with every attribute right."""
PROMPTED, READER_TEST, READER_LEARNS = 500_000, 900_000, 1_000_000
"""First numbers of the clips whose captions are prompts, of the reader's test clips, and of its training clips."""
SEARCHED = 30_000
"""Numbers searched for unseen scenes; in the simple World, these have 570 different scenes of `validation`."""


def unseen_scenes(number: int, start: int, domain: str = "full") -> list[world.Scene]:
    """Scenes that no model is trained on, numbered from `start`: half with held-out pairs, half of `validation`."""
    held_out = _different("held_out", number // 2, start, domain)
    return [*held_out, *_different("validation", number - number // 2, start, domain)]


def _different(split: Split, number: int, start: int, domain: str) -> list[world.Scene]:
    """The first scenes of a split that look different from each other."""
    found: dict[world.Scene, world.Scene] = {}
    for scene in world.scenes(split, start, domain):
        if len(found) == number or scene.index >= start + SEARCHED:
            break
        found.setdefault(replace(scene, index=0), scene)
    require(len(found) == number, f"the World has {len(found)} unseen {domain} scenes of {split}, expected {number}")
    return list(found.values())


def right(reading: Mapping[str, str], scene: world.Scene) -> dict[str, bool]:
    """Whether each attribute of a clip matches its scene, and last, whether all do."""
    each = {name: reading[name] == getattr(scene, name) for name in ATTRIBUTES}
    return each | {ALL: all(each.values())}


def accuracies(readings: Sequence[Mapping[str, str]], scenes: Sequence[world.Scene]) -> dict[str, dict[str, float]]:
    """Share of right readings, by group of scenes and attribute; groups without a clip are left out."""
    results = [right(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
    return {
        group: {name: sum(results[place][name] for place in places) / len(places) for name in (*ATTRIBUTES, ALL)}
        for group, places in groups(scenes).items()
    }


def groups(scenes: Sequence[world.Scene]) -> dict[str, list[int]]:
    """Indices of the scenes in each nonempty group."""
    held_out = {place for place, scene in enumerate(scenes) if world.is_held_out(scene)}
    every = range(len(scenes))
    others = [place for place in every if place not in held_out]
    places = {"all clips": [*every], "held-out pairs": sorted(held_out), "other clips": others}
    return {name: group for name, group in places.items() if group}
