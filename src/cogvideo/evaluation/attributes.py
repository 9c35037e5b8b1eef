"""Attributes that are read off clips of the World, against true ones; and the clips that are kept for such questions.

Models learn from the split `train` alone. The reader learns from all splits, but from no clip numbered below
`READER_LEARNS`: what it is tested on, and what models are judged by, lies below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cogvideo import world
from cogvideo.config import require
from cogvideo.evaluation.reader import ATTRIBUTES
from cogvideo.world.scenes import Split

ALL = "all right"
"""Name of the share of clips of which every attribute is right."""
PROMPTED, READER_TEST, READER_LEARNS = 500_000, 900_000, 1_000_000
"""First numbers of the clips whose captions are prompts, that the reader is tested on, and that it learns from."""
SEARCHED = 30_000
"""Numbers that are searched for unseen scenes; the simple World shows 570 different ones of `validation` there."""


def unseen_scenes(number: int, start: int, domain: str = "full") -> list[world.Scene]:
    """Scenes that no model learns from, numbered from `start`: half with held-out pairs, half of `validation`."""
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
    """Which attributes of a clip are those of its scene; the last is whether all are."""
    each = {name: reading[name] == getattr(scene, name) for name in ATTRIBUTES}
    return each | {ALL: all(each.values())}


def accuracies(readings: Sequence[Mapping[str, str]], scenes: Sequence[world.Scene]) -> dict[str, dict[str, float]]:
    """Share of the readings that is right, by group of scenes and attribute; groups without a clip are left out."""
    results = [right(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
    return {
        group: {name: sum(results[place][name] for place in places) / len(places) for name in (*ATTRIBUTES, ALL)}
        for group, places in groups(scenes).items()
    }


def groups(scenes: Sequence[world.Scene]) -> dict[str, list[int]]:
    """Places of the scenes of each group that has any."""
    held_out = {place for place, scene in enumerate(scenes) if world.is_held_out(scene)}
    every = range(len(scenes))
    others = [place for place in every if place not in held_out]
    places = {"all clips": [*every], "held-out pairs": sorted(held_out), "other clips": others}
    return {name: group for name, group in places.items() if group}
