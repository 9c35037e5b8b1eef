"""Samples of a stage during training: the same prompts with the same noise every time, so sheets can be compared.

They are generated with the weights that would be exported. A row's label says what it shows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cogvideo.bundle.format import Component, module_of
from cogvideo.bundle.model import CogVideo
from cogvideo.config import CogVideoConfig, require
from cogvideo.data.loader import ClipSample, ClipStream, hash_numbers
from cogvideo.generation.decode import Passes
from cogvideo.generation.hierarchy import between, collect, first_frames, generate
from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.generation.upscale import enlarge
from cogvideo.layout import SequenceLayout, UpscaleLayout
from cogvideo.media.colors import Pixels
from cogvideo.media.video import write_video
from cogvideo.models.transformer import Base
from cogvideo.training.export import fused, modules
from cogvideo.training.parallel import any_rank, full_state
from cogvideo.training.stages import STAGES, StageName, Target
from cogvideo.training.step import Trainer

PLAIN = GenerationSettings(
    rounds=0,
    later=CogVideoConfig.later_sampling | {"guidance": 1.0},
    text_bonus=0.0,
    passes=Passes(parallel_frames=True),
    truncate=True,
)
"""The learned distribution, without guidance: early in training, unconditional text means nothing yet."""
NUM_SHOWN = 4
"""Clips of a contact sheet."""
NUM_VARIANTS = 4
"""Images per prompt."""
MIN_SIDE = 96
"""Minimum side of a frame on a sheet, in pixels; smaller frames are shown enlarged."""
MAX_CHARACTERS = 110
"""Maximum number of characters of a label."""
FPS = 2.0
"""Frames per second of the mp4: sequences of all rates play at the same pace."""
NUM_ACROSS = 4
"""Clips side by side in the mp4."""


class Example(NamedTuple):
    """A prompt or a clip with its true codes to start from, the same at every step."""

    prompt: str
    duration: float = 4.0
    """Seconds from the first frame to the last."""
    codes: Int64[Tensor, "frames slots"] | None = None
    high_codes: Int64[Tensor, "frames high_slots"] | None = None


class SampleRow(NamedTuple):
    """Frames side by side, and the index of their example."""

    label: str
    frames: Pixels
    example: int
    is_clip: bool
    """True if the frames follow each other in time."""


class Preview:
    """Generates samples for the same clips at any step, into a folder. All ranks call it.

    The clips are the first of a stream, or prompts if a stage needs no more than a prompt.
    """

    def __init__(
        self,
        target: Target,
        trainer: Trainer,
        stream: ClipStream,
        prompts: Sequence[str],
        folder: Path,
        seed: int,
    ) -> None:
        self.target = target
        self.trainer = trainer
        self.folder = folder
        self.seed = seed
        samples = [stream[place] for place in range(min(NUM_SHOWN, len(stream)))]
        shape = target.config.layout.sides
        self.examples = from_clips([each for each in samples if each.codes.shape[1:] == shape])
        if prompts and target.row.is_prompted:
            self.examples = [Example(prompt) for prompt in prompts]
            for prompt in prompts:
                target.source.text.encode_image_caption(prompt)  # refuses bad prompts now, not at the first sheet
        has = {name for name in ("base", "text", "image_tokenizer") if name in target.source.components}
        self.problem = missing(target.stage, has.union(target.own), self.examples)
        """Reason why no samples can be generated, in a sentence; empty if they can."""

    def __call__(self, step: int) -> Path | None:
        """Write the contact sheet of a step; returns its path on the first rank, None if there is no sheet."""
        if self.problem:
            return None
        with self.trainer.averaged():
            weights = full_state(self.trainer.module)
        if self.trainer.ranks.rank > 0:
            return None
        rows = draw(self.target.stage, self._system(weights), self.examples, self.seed)
        return write_samples(self.folder, step, rows)

    def lacks(self, step: int) -> bool:
        """True if the contact sheet of a step can be made but is missing."""
        is_absent = self.trainer.ranks.rank == 0 and not _sheet(self.folder, step).exists()
        return not self.problem and any_rank(is_absent)

    def _system(self, weights: dict[str, Tensor]) -> CogVideo:
        """The stage with these weights, and everything else needed to generate samples."""
        target, source = self.target, self.target.source
        names = ("base", "text", "image_tokenizer", "cluster_labels")
        parts: dict[str, Component] = {name: source.component(name) for name in names if name in source.components}
        if name := target.frozen_base:
            live = self.trainer.objective.model.base
            assert isinstance(live, Base)
            is_whole = not any(isinstance(each, DTensor) for each in live.parameters())
            parts["base" if name == "base" else f"{target.stage}_base"] = live if is_whole else source.component(name)
        parts |= modules(target, weights) if target.choice.lora is None else fused(target, weights)
        return CogVideo(target.config, **{name: self._placed(name, part) for name, part in parts.items()})

    def _placed(self, name: str, part: Component) -> Component:
        """The component on the training device; one on another device is copied, and not changed."""
        if not isinstance(part, nn.Module):
            return part
        device = self.trainer.ranks.device
        placed = {key: each.to(device) for key, each in part.state_dict().items()}
        return module_of(name, placed, self.target.config)


def from_clips(samples: Sequence[ClipSample]) -> list[Example]:
    """Clips as examples; those whose caption was dropped are left out."""

    def flat(codes: np.ndarray) -> Int64[Tensor, "frames slots"]:
        return torch.from_numpy(codes.astype(np.int64)).flatten(1)

    examples = []
    for each in samples:
        if each.caption is not None:
            high = None if each.high_codes is None else flat(each.high_codes)
            examples.append(Example(each.caption, each.duration, flat(each.codes), high))
    return examples


def missing(stage: StageName, has: Collection[str], examples: Sequence[Example]) -> str:
    """Reason why these components cannot generate samples, in a sentence; empty if they can."""
    base = "base" if f"{stage}_base" not in has else f"{stage}_base"
    needed = dict.fromkeys((base, STAGES[stage].trains, "text", "image_tokenizer"))
    lacks = [name for name in needed if name not in has]
    starts_from = {"interpolation": "codes", "superres": "high_codes"}.get(stage)
    if lacks:
        reason = f"the model has no {', '.join(lacks)}"
    elif not examples:
        reason = "there is neither a prompt nor a held-out clip"
    elif starts_from is not None and any(getattr(each, starts_from) is None for each in examples):
        reason = f"{stage} starts from clips, and there are only prompts"
    else:
        return ""
    return f"No samples are generated during training: {reason}."


def draw(stage: StageName, system: CogVideo, examples: Sequence[Example], seed: int) -> list[SampleRow]:
    """Samples of the stage in its current state, next to the ground truth.

    | stage | from | sampled |
    |---|---|---|
    | image | prompt | some images of it |
    | sequential | prompt | first frame by the base, then key frames |
    | interpolation | prompt, frames at even places of the clip | the frames between them |
    | superres | prompt, low codes of the clip's first frame | its high codes |

    An example's noise depends only on the seed and on its index. A base stored in bfloat16 runs under autocast.
    """
    problem = missing(stage, system.components, examples)
    require(not problem, problem)
    if "base" not in system.components:
        parts = {name: system.component(name) for name in system.components}
        system = CogVideo(system.config, **parts, base=parts[f"{stage}_base"])
    model: nn.Module = getattr(system, {"image": "image_model", "superres": "upscaler"}.get(stage, stage))
    types = {each.dtype for each in model.parameters()}
    device = next(model.parameters()).device
    drawer = {"image": _images, "superres": _larger}.get(stage, _clips)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=torch.bfloat16 in types):
        return drawer(stage, system, examples, seed)


def _request(examples: Sequence[Example], seed: int, variants: int = 1) -> Request:
    """Request for clips of each example, each with its own noise."""
    each = [(place, variant) for place in range(len(examples)) for variant in range(variants)]
    seeds = [int(hash_numbers(seed, place, variant)[0] >> np.uint64(1)) for place, variant in each]
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    prompts = [examples[place].prompt for place, _ in each]
    return Request(prompts, generators, PLAIN, durations=[examples[place].duration for place, _ in each])


def _images(stage: StageName, system: CogVideo, examples: Sequence[Example], seed: int) -> list[SampleRow]:
    drawn = torch.split(first_frames(system, _request(examples, seed, NUM_VARIANTS)), NUM_VARIANTS)
    rows = []
    for place, (example, codes) in enumerate(zip(examples, drawn, strict=True)):
        truth = codes[:0] if example.codes is None else example.codes[:1]
        label = "drawn" if example.codes is None else "truth, then drawn"
        pixels = system.autoencoder.decode_pixels(torch.cat([truth, codes]), sides=system.config.layout.sides)
        rows.append(SampleRow(f"{label}: {example.prompt}", pixels, place, False))
    return rows


def _clips(stage: StageName, system: CogVideo, examples: Sequence[Example], seed: int) -> list[SampleRow]:
    request, label = _request(examples, seed), "drawn"
    if stage == "sequential":
        drawn = collect(generate(system, request))
    else:
        layout = SequenceLayout.interpolation(system.config.layout)
        real = torch.stack([example.codes for example in examples if example.codes is not None])
        drawn = between(system, request, real[:, sorted(layout.order[: layout.num_bidirectional])])
        label = f"frames {' and '.join(map(str, layout.loss_places))} drawn"
    rows, pixels = [], partial(system.autoencoder.decode_pixels, sides=system.config.layout.sides)
    for place, (example, codes) in enumerate(zip(examples, drawn, strict=True)):
        words = f"{label}, {example.duration:g} s: {example.prompt}"
        rows.append(SampleRow(words, pixels(codes), place, True))
        if example.codes is not None:
            rows.append(SampleRow("truth", pixels(example.codes), place, True))
    return rows


def _larger(stage: StageName, system: CogVideo, examples: Sequence[Example], seed: int) -> list[SampleRow]:
    low = torch.stack([example.codes[0] for example in examples if example.codes is not None])
    request, layout = _request(examples, seed), UpscaleLayout.of(system.config.layout, system.config.upscaler)
    pixels = system.autoencoder.decode_pixels
    text = system.text.batch(request.prompts, None, layout.text_slots, truncate=True)
    high = enlarge(system, text, low, request.generators, system.config.superres_sampling).cpu()
    rows = []
    for place, (example, few, many) in enumerate(zip(examples, low, high, strict=True)):
        assert example.high_codes is not None
        large = pixels(torch.stack([many, example.high_codes[0]]), sides=layout.high_sides)
        small = _repeated(pixels(few[None], sides=layout.low_sides), layout.ratio)
        rows.append(SampleRow(f"low, drawn, truth: {example.prompt}", np.concatenate([small, large]), place, False))
    return rows


def _sheet(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}.png"


def write_samples(folder: Path, step: int, rows: Sequence[SampleRow]) -> Path:
    """Write and return `step-00000500.png`, and an mp4 if the rows are clips of one length and PyAV is installed."""
    from cogvideo.media.images import contact_sheet, write_image  # only files need Pillow

    folder.mkdir(parents=True, exist_ok=True)
    sheet = _sheet(folder, step)
    shown = [_repeated(row.frames, max(1, -(-MIN_SIDE // row.frames.shape[1]))) for row in rows]
    labels = [" ".join(row.label.split()) for row in rows]
    short = [each if len(each) <= MAX_CHARACTERS else f"{each[: MAX_CHARACTERS - 3]}..." for each in labels]
    if all(row.is_clip for row in rows):
        with suppress(ModuleNotFoundError):  # a GPU machine still trains without PyAV
            write_video(sheet.with_suffix(".mp4"), _side_by_side(rows, shown), FPS)
    write_image(sheet, contact_sheet(shown, max(map(len, shown)), labels=short))  # last, to mark that both are complete
    return sheet


def _repeated(frames: UInt8[np.ndarray, "frames _ _ 3"], times: int) -> UInt8[np.ndarray, "frames _ _ 3"]:
    return frames.repeat(times, 1).repeat(times, 2)


def _side_by_side(rows: Sequence[SampleRow], shown: Sequence[UInt8[np.ndarray, "frames _ _ 3"]]) -> Pixels:
    """Tile clips into one: those of an example below each other, the examples side by side, empty cells white."""
    from cogvideo.media.images import contact_sheet

    kinds = sum(row.example == rows[0].example for row in rows)
    across = min(NUM_ACROSS, len(rows) // kinds)
    lines = []
    for start in range(0, len(rows), across * kinds):
        for kind in range(kinds):
            lines.append(np.stack(shown[start + kind : start + across * kinds : kinds]))
    return np.stack([contact_sheet([line[:, time] for line in lines], across, gap=0) for time in range(len(shown[0]))])
