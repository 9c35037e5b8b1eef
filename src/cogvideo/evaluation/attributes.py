"""What is read off clips of the World, against what is true of them; and which clips are kept for such questions.

Models learn from the split `train` alone. The reader learns from all splits, but from no clip numbered below
`READER_LEARNS`: what it is tested on, and what models are judged by, lies below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from cogvideo import world
from cogvideo.evaluation.reader import ATTRIBUTES

ALL = "all right"
"""Name of the share of clips of which every attribute is right."""
PROMPTED, READER_TEST, READER_LEARNS = 500_000, 900_000, 1_000_000
"""First numbers of the clips whose captions are prompts, that the reader is tested on, and that it learns from."""


def unseen_scenes(number: int, start: int) -> list[world.Scene]:
    """Scenes that no model learns from, numbered from `start`: half with held-out pairs, half of `validation`."""
    held_out = islice(world.scenes("held_out", start), number // 2)
    return [*held_out, *islice(world.scenes("validation", start), number - number // 2)]


def right(reading: Mapping[str, str], scene: world.Scene) -> dict[str, bool]:
    """Which attributes of a clip are those of its scene; the last is whether all are."""
    each = {name: reading[name] == getattr(scene, name) for name in ATTRIBUTES}
    return each | {ALL: all(each.values())}


def accuracies(readings: Sequence[Mapping[str, str]], scenes: Sequence[world.Scene]) -> dict[str, dict[str, float]]:
    """Share of the clips that is right, by group of scenes and attribute; groups without a clip are left out.

    Args:
        readings: what was read off each clip, by attribute.
        scenes: what each clip should show.
    """
    results = [
        (world.is_held_out(scene), right(reading, scene)) for reading, scene in zip(readings, scenes, strict=True)
    ]
    groups = {
        "all clips": [each for _, each in results],
        "held-out pairs": [each for out, each in results if out],
        "other clips": [each for out, each in results if not out],
    }
    return {name: _shares(group) for name, group in groups.items() if group}


def _shares(results: Sequence[dict[str, bool]]) -> dict[str, float]:
    return {name: sum(each[name] for each in results) / len(results) for name in results[0]}
