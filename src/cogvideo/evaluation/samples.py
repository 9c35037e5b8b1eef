"""Clips by the paper's protocols: from the names of classes, or as continuations of real clips."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from cogvideo.config import require
from cogvideo.data.sources import Item
from cogvideo.evaluation.footage import Reading, draw
from cogvideo.evaluation.lists import ListedVideo
from cogvideo.evaluation.making import ClipOptions
from cogvideo.evaluation.protocols import Pixels, Protocol
from cogvideo.evaluation.subjects import Prompt
from cogvideo.files import write_text
from cogvideo.generation.request import Request
from cogvideo.media.video import read_video
from cogvideo.pipeline import CogVideoPipeline, Frame, collect

GIVEN = 5
"""Number of leading frames given to prediction."""
ROUNDS = 2
"""Rounds of interpolation: 17 frames; the first 16 are used."""


def of_classes(texts: Sequence[str], count: int, seed: int) -> list[Prompt]:
    """Prompts from classes, each about equally often; clip n has the seed `seed + n`."""
    return [Prompt.of("class", number, texts[number % len(texts)], seed) for number in range(count)]


def of_videos(items: Sequence[Item], seed: int) -> list[Prompt]:
    """Prompts that continue real clips; clip n has the seed `seed + n`."""
    return [Prompt(Path(str(item.media)).stem, item.captions[0], seed + n) for n, item in enumerate(items)]


def write_table(path: Path, listed: Iterable[ListedVideo]) -> None:
    """Write a table of whole videos."""
    _write_rows(path, [{"file": str(each.file.resolve()), "caption": each.text} for each in listed])


def write_windows(path: Path, videos: Path, reading: Reading, seed: int) -> None:
    """Write a table of the parts of real videos to continue: a random one of each; short videos are left out."""
    span = reading.protocol.span
    rows = []
    for excerpt in draw(str(videos), reading, "random", reading.protocol.clips, seed).excerpts:
        item, fps = excerpt.footage.media, excerpt.footage.fps
        assert isinstance(item, Item)
        start, end = excerpt.first / fps, (excerpt.first + span) / fps
        rows.append({"file": str(item.media), "caption": item.captions[0], "start": start, "end": end})
    _write_rows(path, rows)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class ProtocolMaker:
    """A model that generates clips of a protocol."""

    def __init__(self, pipeline: CogVideoPipeline, making: ClipOptions, protocol: Protocol, fps: float) -> None:
        settings = replace(making.settings(pipeline.model.config), rounds=ROUNDS)
        got, expected = pipeline.num_frames(settings), protocol.frames
        require(got >= expected, f"the model generates {got} frames in {ROUNDS} rounds, expected {expected} or more")
        self._pipeline, self._protocol, self._fps = pipeline, protocol, fps
        self._settings = replace(settings, duration=(got - 1) / fps)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that cannot be used."""
        for prompt in {each.text: each for each in prompts}.values():
            self._frames([prompt])

    def generate(self, prompts: Sequence[Prompt], given: Int64[Tensor, "given slots"] | None = None) -> list[Pixels]:
        """The first frames of some prompts' clips, generated as one batch."""
        return [*collect(self._frames(prompts, given), self._fps).frames[:, : self._protocol.frames]]

    def _frames(self, prompts: Sequence[Prompt], given: Int64[Tensor, "given slots"] | None = None) -> Iterator[Frame]:
        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        return self._pipeline.frames(Request([prompt.text for prompt in prompts], generators, self._settings, given))

    def predict(self, prompt: Prompt, real: Item) -> Pixels:
        """The first frames of a real clip and their continuation, at the protocol's size."""
        protocol = self._protocol
        assert isinstance(real.media, Path)
        first = read_video(real.media, self._fps, start=real.start, end=real.end, max_frames=GIVEN).frames
        (clip,) = self.generate([prompt], self._pipeline.encode(first))
        return np.concatenate([protocol.reduced(each, protocol.size) for each in (first, clip[GIVEN:])])
