"""The loss on clips that are never trained on, by frame rate: what a run is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cogvideo.data.clips import ClipSampling
from cogvideo.data.dataset import read_card
from cogvideo.data.loader import ClipSample, ClipStream
from cogvideo.training.parallel import mean_over_ranks
from cogvideo.training.task import Measured
from cogvideo.training.trainer import Trainer, part_means, part_sums

ALL = "all"
"""Name of the figures of stages that have no frame rate."""


@dataclass(frozen=True)
class HeldOut:
    """Samples of one kind."""

    name: str
    """The frame rate, such as "2 fps", or `ALL`."""
    stream: ClipStream
    """Where they come from."""
    number: int
    """How many: the first ones of the stream."""


def held_out(
    folders: Sequence[Path],
    split: str,
    sampling: ClipSampling,
    limit: int,
    tokenizer_sha256: str | None,
    grid: int,
) -> list[HeldOut]:
    """What a stage is measured on: one entry a frame rate that it is trained at and some held-out clip fills.

    Nothing is left to chance: clips start at their first frame and keep their captions.

    Args:
        folders: of the datasets.
        split: that is held out.
        sampling: of the training.
        limit: samples an entry at most.
        tokenizer_sha256: of the image tokenizer.
        grid: side of a frame in codes.

    Returns:
        the entries, of the datasets that have the split; none where it has only clips that are too short.
    """
    plain = replace(sampling, random_offset=False, caption_dropout=0.0)
    there = [folder for folder in folders if split in read_card(folder).splits]
    entries = []
    for name, each in _kinds(plain):
        try:
            stream = ClipStream(there, split, each, tokenizer_sha256, grid)
        except ValueError:  # the training split was accepted, so all that can be wrong is that nothing fits
            continue
        entries.append(HeldOut(name, stream, min(limit, len(stream))))
    return entries


def _kinds(sampling: ClipSampling) -> list[tuple[str, ClipSampling]]:
    if sampling.mode == "image":
        return [(ALL, sampling)]
    rates = sampling.rates.rates if sampling.fixed_rate is None else (sampling.fixed_rate,)
    if sampling.mode == "interpolation" and sampling.fixed_rate is None:
        rates = rates[1:]
    return [(f"{rate:g} fps", replace(sampling, fixed_rate=rate)) for rate in rates]


@torch.no_grad()
def measure(trainer: Trainer, entries: Sequence[HeldOut], batch: int) -> dict[str, dict[str, float]]:
    """Mean loss and parts of each entry, over all ranks, with the weights that would be exported.

    Args:
        trainer: what is measured.
        entries: on what.
        batch: samples of a pass.
    """
    trainer.module.eval()
    with trainer.averaged():
        rows = {entry.name: _row(trainer, entry, batch) for entry in entries}
    trainer.module.train()
    return rows


def _row(trainer: Trainer, entry: HeldOut, batch: int) -> dict[str, float]:
    """Ranks keep step: each takes equally many samples, and those past the end count for nothing."""
    ranks, task = trainer.ranks, trainer.objective.task
    passes = -(-entry.number // (batch * ranks.data_size))
    sums = torch.zeros(2 + 2 * len(task.parts), dtype=torch.float64)
    for number in range(passes):
        first = number * batch * ranks.data_size + ranks.data_rank
        positions = range(first, first + batch * ranks.data_size, ranks.data_size)
        samples: list[ClipSample] = entry.stream.__getitems__(list(positions))
        measured = trainer.measure(task.collate(samples))
        counted = sum(position < entry.number for position in positions)
        sums += _sums(Measured(measured.loss[:counted], measured.parts[:counted])).cpu()
    loss, count, *parts = mean_over_ranks(sums).tolist()
    return {"loss": loss / count, **part_means(task.parts, parts)}


def _sums(measured: Measured) -> torch.Tensor:
    loss = measured.loss.double()
    return torch.cat([torch.stack([loss.sum(), torch.full_like(loss, 1).sum()]), part_sums([measured.parts]).double()])
