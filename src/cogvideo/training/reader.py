"""Training of the World reader, which judges clips.

It is tested on clips that it never saw, with held-out pairs reported separately; models are evaluated on other clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from cogvideo import world
from cogvideo.config import require
from cogvideo.devices import usable
from cogvideo.evaluation.reader import BATCH, FIRST_TEST, Reader, ReaderConfig, accuracies, render, unseen_scenes
from cogvideo.runs import RunFolder
from cogvideo.training.loop import learn
from cogvideo.training.objectives.reader import ReaderObjective, ReaderSettings, batches
from cogvideo.training.parallel import ALONE
from cogvideo.training.session import Evaluation, LoggingConfig, Session, claimed
from cogvideo.training.step import Trainer

NUM_TEST_CLIPS = 256
"""Number of clips of a test during training."""


def train_reader(
    out: Path, settings: ReaderSettings, config: ReaderConfig, test_clips: int, logging: LoggingConfig, device: str
) -> dict[str, dict[str, float]]:
    """Train the World reader, or resume its training; returns its accuracies on clips that it never saw."""
    require(out.suffix == ".safetensors", f"out is {out}, expected a name that ends in .safetensors")
    require(test_clips > 0, f"test_clips is {test_clips}, expected a positive number")
    ranks = ALONE._replace(device=usable(device))
    folder = RunFolder(out.parent / f".{out.stem}-run")
    identity = {"settings": asdict(settings), "config": asdict(config)}
    with claimed(folder, identity):
        objective = ReaderObjective(config, settings, ranks.device)
        watched = unseen_scenes(NUM_TEST_CLIPS, FIRST_TEST)

        def judge(step: int) -> Evaluation:
            right = tested(objective.model.eval(), watched)
            objective.model.train()
            words = ", ".join(f"{name} {each:.1%}" for name, each in right["all clips"].items())
            return Evaluation({"accuracy": right}, words)

        trainer = Trainer(objective, settings, ranks=ranks)
        learn(Session(folder, trainer, partial(batches, settings), logging, judge, identity))
        objective.model.save(out)
        reader = Reader.load(out).to(ranks.device)
        scenes = unseen_scenes(test_clips, FIRST_TEST)
        right = tested(reader, scenes)
        folder.finish({"steps": settings.steps, "accuracy": right})
    return right


def tested(reader: Reader, scenes: Sequence[world.Scene]) -> dict[str, dict[str, float]]:
    """Accuracies on real renders of some scenes."""
    readings: list[dict[str, str]] = []
    for start in range(0, len(scenes), BATCH):
        clips = [render(scene) for scene in scenes[start : start + BATCH]]
        readings += reader.read(np.stack(clips))
    return accuracies(readings, scenes)
