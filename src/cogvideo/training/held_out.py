"""The loss on clips that are never trained on, by frame rate, by which a run is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from cogvideo.config import InputError, Sides, both
from cogvideo.data.loader import ClipSample, ClipStream
from cogvideo.training.parallel import mean_over_ranks
from cogvideo.training.session import Evaluation
from cogvideo.training.step import Trainer, check_finite, part_means, part_sums

ALL = "all"
"""Name of the entry of stages without a frame rate."""


@dataclass(frozen=True)
class HeldOut:
    """Samples of one kind from a stream."""

    name: str
    """Frame rate, such as "2 fps", or `ALL`; with the shape of the frames if there are several."""
    stream: ClipStream
    number: int
    """Number of samples, from the start of the stream."""


def held_out(trained: ClipStream, split: str, limit: int) -> list[HeldOut]:
    """Entries of at most `limit` samples: one for each shape, and each training rate that some held-out clip fills.

    Nothing is random: clips start at their first frame and keep their captions. The training clips determine the
    rates: key frames of long clips only have the lowest one.
    """
    plain = replace(trained.sampling, random_offset=False, caption_dropout=0.0)
    kinds = {ALL: plain}
    if plain.mode != "image":
        kinds = {f"{rate:g} fps": replace(plain, fixed_rate=rate) for rate in trained.rates}
    shapes: dict[Sides, list[Path]] = {}
    for each in trained.datasets:
        if split in each.card.splits:
            shapes.setdefault(each.card.grid, []).append(each.folder)
    entries = []
    for (shape, folders), (name, sampling) in product(shapes.items(), kinds.items()):
        with suppress(InputError):  # the training split was accepted, so the only possible error is that nothing fits
            stream = ClipStream(folders, split, sampling)
            words = name if len(shapes) == 1 else "{}, {} x {}".format(name, *both(shape))
            entries.append(HeldOut(words, stream, min(limit, len(stream))))
    return entries


def judged(trainer: Trainer, entries: Sequence[HeldOut]) -> Callable[[int], Evaluation]:
    """A function that measures the trainer after a step, and refuses a loss that is not finite."""

    def judge(step: int) -> Evaluation:
        held = measure(trainer, entries, trainer.micro_batch)
        for name, row in held.items():
            check_finite(row["loss"], f"the held-out loss ({name})", f"after step {step:,}")
        losses = [f"{row['loss']:.4f}" if name == ALL else f"{name} {row['loss']:.4f}" for name, row in held.items()]
        return Evaluation({"held_out": held}, f"held out {', '.join(losses)}" if losses else "", mean_loss(held))

    return judge


def mean_loss(held: Mapping[str, Mapping[str, float]]) -> float | None:
    """Mean loss over the entries, which selects the best checkpoint; None if nothing is held out."""
    return sum(row["loss"] for row in held.values()) / len(held) if held else None


@torch.no_grad()
def measure(trainer: Trainer, entries: Sequence[HeldOut], batch: int) -> dict[str, dict[str, float]]:
    """Mean loss and parts of each entry, over all ranks, with the weights that would be exported.

    `batch` is the number of samples per pass and rank.
    """
    trainer.module.eval()
    with trainer.averaged():
        rows = {entry.name: _row(trainer, entry, batch) for entry in entries}
    trainer.module.train()
    return rows


def _row(trainer: Trainer, entry: HeldOut, batch: int) -> dict[str, float]:
    """Mean loss of one entry. Ranks stay in step: each takes equally many samples; those past the end do not count."""
    ranks, task = trainer.ranks, trainer.objective.task
    at_once = batch * ranks.data_size
    sums = torch.zeros(2 + 2 * len(task.parts), dtype=torch.float64)
    for start in range(0, entry.number, at_once):
        positions = range(start + ranks.data_rank, start + ranks.data_rank + at_once, ranks.data_size)
        samples: list[ClipSample] = entry.stream.__getitems__(list(positions))
        measured = trainer.measure(task.collate(samples))
        counted = sum(position < entry.number for position in positions)
        loss = measured.loss[:counted].double()
        sums[0] += loss.sum().cpu()
        sums[1] += counted
        sums[2:] += part_sums([measured.parts[:counted]]).double().cpu()
    total, count, *parts = mean_over_ranks(sums).tolist()
    return {"loss": total / count, **part_means(task.parts, parts)}
