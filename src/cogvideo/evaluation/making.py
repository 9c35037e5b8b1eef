"""Clips to be judged: made by a model from prompts, and kept in a folder so that a killed evaluation goes on.

All clips are kept as 33 frames, 8 a second, of 64 x 64 pixels, whatever the model's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch

from cogvideo.config import CogVideoConfig, InputError, require
from cogvideo.devices import slowness, usable
from cogvideo.evaluation.reader import SIZE, resized
from cogvideo.evaluation.subjects import FPS, NUM_FRAMES, Clip, Prompt
from cogvideo.files import replacing
from cogvideo.generation.request import ADDED, GenerationSettings, SamplingOptions
from cogvideo.pipeline import CogVideoPipeline, Frame, collect

T = TypeVar("T")


@dataclass(frozen=True)
class ClipOptions(SamplingOptions):
    """Generated clips. Sampling options default to the model's own values."""

    superres: bool = False
    """Enlarge the frames by super-resolution before they are reduced again."""
    truncate: bool = False
    """Cut prompts that are longer than the model's text slots, instead of refusing them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights."""
    seed: int = 0
    """Seed of clip 0; clip n has this seed plus n."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**62, f"seed is {self.seed}, expected a number in [0, 2**62)")

    def settings(self, own: CogVideoConfig) -> GenerationSettings:
        """Settings of clips by a model."""
        return replace(super().settings(own), truncate=self.truncate, should_enlarge=self.superres)

    def pipeline(self, model: str, device: str) -> CogVideoPipeline:
        """The pipeline of a model; says so where its data type is slow."""
        dtype = getattr(torch, self.dtype)
        if slow := slowness(dtype, usable(device)):
            print(slow)
        return CogVideoPipeline.from_pretrained(model, dtype, usable(device))

    def record(self, own: CogVideoConfig) -> dict[str, Any]:
        """All values that decide clips of a model, but for options that came later and are at rest."""
        found = asdict(self) | self.settings(own).sampling_options
        return {name: value for name, value in found.items() if name not in ADDED or value != ADDED[name]}


def start(pipeline: CogVideoPipeline, prompts: Sequence[Prompt], making: ClipOptions) -> Iterator[Frame]:
    """The frames of some prompts' clips, as one batch; what cannot be made is refused before anything heavy."""
    settings = making.settings(pipeline.model.config)
    num_frames = pipeline.num_frames(settings)
    require(num_frames == NUM_FRAMES, f"the model makes clips of {num_frames} frames, expected {NUM_FRAMES}")
    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    return pipeline.stream([prompt.text for prompt in prompts], generators, settings)


def generate(pipeline: CogVideoPipeline, prompts: Sequence[Prompt], making: ClipOptions) -> list[Clip]:
    """The clips of some prompts, made as one batch."""
    return [resized(clip, SIZE) for clip in collect(start(pipeline, prompts, making), FPS).frames]


def fill(
    files: Sequence[Path],
    make: Callable[[list[int]], list[T]],
    write: Callable[[Path, T], None],
    batch: int,
    on_clips: Callable[[int], None],
) -> None:
    """Make the files that are missing.

    Batches are those of all files, whatever is missing, so that an interrupted call and a later one write the same bits
    as one call, on any device.

    Args:
        files: one for each clip.
        make: clips of some numbers of files.
        write: writes a file that is whole or not there.
        batch: clips made at once.
        on_clips: called with the number of files that were added.
    """
    for start in range(0, len(files), batch):
        numbers = list(range(start, min(start + batch, len(files))))
        missing = [number for number in numbers if not files[number].exists()]
        if missing:
            clips = dict(zip(numbers, make(numbers), strict=True))
            for number in missing:
                write(files[number], clips[number])
            on_clips(len(missing))


def _write(path: Path, clip: Clip) -> None:
    with replacing(path) as file:
        np.savez_compressed(file, clip=clip)


class ClipFolder:
    """A folder of clips by the names of their prompts, made if it is not there; each file is whole or not there."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        self._files = [folder / f"{prompt.name}.npz" for prompt in prompts]
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def missing(self) -> list[int]:
        """Numbers of the prompts without a clip."""
        return [number for number, file in enumerate(self._files) if not file.exists()]

    def fill(self, make: Callable[[list[int]], list[Clip]], batch: int, on_clips: Callable[[int], None]) -> None:
        """Make the clips that are missing; see `fill`."""
        fill(self._files, make, _write, batch, on_clips)

    def __iter__(self) -> Iterator[Clip]:
        """The clips in the order of the prompts."""
        for file in self._files:
            try:
                with np.load(file) as arrays:
                    clip = arrays["clip"]
            except (ValueError, KeyError, EOFError, BadZipFile) as error:
                raise InputError(f"{file} is damaged ({error}): remove it, and it is made again") from error
            yield clip
