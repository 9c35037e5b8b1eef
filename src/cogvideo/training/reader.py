"""`cogvideo train reader`: the World reader, which judges clips. Killed and called again, it continues.

It is tested on clips that it never saw, with held-out pairs reported separately; models are judged by others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cogvideo import world
from cogvideo.config import require
from cogvideo.devices import usable
from cogvideo.evaluation.attributes import READER_TEST, accuracies, unseen_scenes
from cogvideo.evaluation.reader import ATTRIBUTES, BATCH, Reader, ReaderConfig, render
from cogvideo.runs import RunFolder
from cogvideo.training.loop import learn
from cogvideo.training.objectives.reader import ReaderObjective, ReaderSettings, batches
from cogvideo.training.parallel import ALONE
from cogvideo.training.session import Evaluation, LoggingConfig, Session, claimed
from cogvideo.training.step import Trainer

WATCHED = 256
"""Clips of a test while it learns."""


def train_reader(
    *,
    out: Path,
    settings: ReaderSettings = ReaderSettings(),  # noqa: B008  # frozen
    config: ReaderConfig = ReaderConfig(),  # noqa: B008
    test_clips: int = 2000,
    logging: LoggingConfig = LoggingConfig(checkpoint_every=200),  # noqa: B008
    device: str = "auto",
    recipe: Path | None = None,  # read by the command line
) -> None:
    """Train the World reader, which judges clips. Killed and called again, it continues.

    It learns from all splits of the World, and is tested on clips by numbers that it never saw: half of them with
    attribute pairs that models never see in training, half of the split `validation`.

    Args:
        out: File of the reader, .safetensors; the folder of the run is next to it.
        settings: Recipe.
        config: Sizes.
        test_clips: Number of clips of the test at the end.
        logging: Reports and checkpoints.
        device: Device: cpu, cuda, cuda:0, or auto.
        recipe: TOML file with a table for this command: options as they stand here. Those given here win.

    Raises:
        ValueError: a setting cannot be used, the folder holds another run or one at work, or training diverged.
        OSError: something cannot be written.
    """
    require(out.suffix == ".safetensors", f"out is {out}, expected a name that ends in .safetensors")
    require(test_clips > 0, f"test_clips is {test_clips}, expected a positive number")
    ranks = ALONE._replace(device=usable(device))
    folder = RunFolder(out.parent / f".{out.stem}-run")
    identity = {"settings": asdict(settings), "config": asdict(config)}
    with claimed(folder, identity):
        objective = ReaderObjective(config, settings, ranks.device)
        watched = unseen_scenes(WATCHED, READER_TEST)

        def judge(step: int) -> Evaluation:
            right = tested(objective.model.eval(), watched)
            objective.model.train()
            words = ", ".join(f"{name} {each:.1%}" for name, each in right["all clips"].items())
            return Evaluation({"accuracy": right}, words)

        trainer = Trainer(objective, settings.optimization, ranks=ranks)
        learn(Session(folder, trainer, partial(batches, settings), logging, judge, identity))
        objective.model.save(out)
        reader = Reader.load(out).to(ranks.device)
        scenes = unseen_scenes(test_clips, READER_TEST)
        right = tested(reader, scenes)
        folder.finish({"steps": settings.steps, "accuracy": right})
    Console(highlight=False).print(_table(right, len(scenes)))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB after {settings.steps:,} steps")


def tested(reader: Reader, scenes: Sequence[world.Scene]) -> dict[str, dict[str, float]]:
    """Accuracies on real renders of some scenes."""
    readings: list[dict[str, str]] = []
    for start in range(0, len(scenes), BATCH):
        clips = [render(scene) for scene in scenes[start : start + BATCH]]
        readings += reader.read(np.stack(clips))
    return accuracies(readings, scenes)


def _table(right: dict[str, dict[str, float]], number: int) -> Table:
    table = Table(title=f"Read right, of {number:,} clips that were never learnt from")
    for name in ("", *ATTRIBUTES, "all"):
        table.add_column(name, justify="left" if name == "" else "right")
    for group, shares in right.items():
        table.add_row(group, *(f"{each:.1%}" for each in shares.values()))
    return table
