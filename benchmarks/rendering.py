"""Benchmark of rendering the World: 33-frame clips per second on one core."""

from __future__ import annotations

import statistics
import time
from typing import Any

from cogvideo import world

GOAL = 200.0
"""Goal at 64 x 64, in 33-frame clips per second."""


def rendering(clips: int = 300, rounds: int = 3) -> dict[str, Any]:
    """Rendering speed on one core, measured in CPU time so that other processes matter little.

    Args:
        clips: clips rendered at 64 x 64 per round, plus a tenth as many at 192 x 192.
        rounds: number of rounds; the median is reported.
    """
    scenes = [world.scene(index) for index in range(clips)]
    small = [_rate(lambda scene: world.render(scene, 64), scenes) for _ in range(rounds)]
    large = [_rate(lambda scene: world.render(scene, 192), scenes[: max(1, clips // 10)]) for _ in range(rounds)]
    words = [_rate(world.captions, scenes) for _ in range(rounds)]
    return {
        "clips": clips,
        "clips_a_second_64": statistics.median(small),
        "goal_64": GOAL,
        "clips_a_second_192": statistics.median(large),
        "scenes_captioned_a_second": statistics.median(words),
    }


def _rate(call: Any, scenes: list[world.Scene]) -> float:
    """Calls per second of CPU time, after the backgrounds have been rendered."""
    for name in {scene.background: scene for scene in scenes}.values():
        call(name)
    start = time.process_time()
    for scene in scenes:
        call(scene)
    return len(scenes) / (time.process_time() - start)


if __name__ == "__main__":
    for name, value in rendering().items():
        print(f"{name:28} {value:10.1f}")
