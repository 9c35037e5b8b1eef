"""Samples of a stage while it learns: the same prompts with the same noise every time, so that sheets compare.

The live modules generate, in whatever precision they are trained, and are left as they were: without gradients, in the
mode they were in, and no global random generator moves. What a row of a sheet is, its label says.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from cogvideo.bundle.model import CogVideo
from cogvideo.config import CogVideoConfig, require
from cogvideo.data.loader import ClipSample, hash_numbers
from cogvideo.generation.decode import Passes
from cogvideo.generation.hierarchy import between, collect, first_frames, generate
from cogvideo.generation.request import Request, Settings
from cogvideo.generation.upscale import enlarge
from cogvideo.layout import SequenceLayout
from cogvideo.media.video import write_video
from cogvideo.training.stages import STAGES, StageName

PLAIN = Settings(
    rounds=0,
    later=CogVideoConfig.later_sampling | {"guidance": 1.0},
    text_bonus=0.0,
    passes=Passes(parallel_frames=True),
    truncate=True,
)
"""The distribution that is learnt, without guidance: a young model's unconditional text says nothing yet."""
VARIANTS = 4
"""Images of one prompt."""
LEAST_SIDE = 96
"""Pixels of a side of a frame on a sheet, at least; smaller frames are shown enlarged."""
MOST_LETTERS = 110
"""Letters of a label."""
FPS = 2.0
"""Frames a second of the mp4: sequences of all rates are watched at one pace."""
ACROSS = 4
"""Clips side by side in the mp4."""


class Example(NamedTuple):
    """A prompt or a clip to start from, the same at every step."""

    prompt: str
    """Its text."""
    duration: float = 4.0
    """Seconds from the first frame to the last."""
    codes: Int64[Tensor, "frames slots"] | None = None
    """The true frames, where it is a clip."""
    high_codes: Int64[Tensor, "frames high_slots"] | None = None
    """Those of super-resolution."""


class Row(NamedTuple):
    """Frames side by side."""

    label: str
    """Description of the frames."""
    frames: UInt8[np.ndarray, "frames height width 3"]
    """Red, green and blue."""
    example: int
    """Place of the example that they are of."""
    is_clip: bool
    """True if they follow each other in time."""


class Written(NamedTuple):
    """Files of one step."""

    sheet: Path
    """The contact sheet, a PNG."""
    video: Path | None
    """An mp4 of the same, for the stages that draw clips."""


def from_clips(samples: Sequence[ClipSample]) -> list[Example]:
    """Clips as examples; those whose caption was dropped are left out."""
    return [
        Example(each.caption, each.duration, _flat(each.codes), None if high is None else _flat(high))
        for each in samples
        if each.caption is not None
        for high in [each.high_codes]
    ]


def from_prompts(prompts: Sequence[str], duration: float = 4.0) -> list[Example]:
    """Prompts as examples, of clips of `duration` seconds."""
    return [Example(prompt, duration) for prompt in prompts]


def missing(stage: StageName, has: Collection[str], examples: Sequence[Example]) -> str:
    """Why nothing can be drawn, in a sentence to be shown once; empty if it can.

    Args:
        stage: what learns.
        has: names of the components that there are.
        examples: what would be drawn from.
    """
    base = "base" if f"{stage}_base" not in has else f"{stage}_base"
    needed = dict.fromkeys((base, STAGES[stage].trains, "text", "image_tokenizer"))
    lacks = [name for name in needed if name not in has]
    if lacks:
        return f"No samples are drawn while training: the model has no {', '.join(lacks)}."
    if not examples:
        return "No samples are drawn while training: there is neither a prompt nor a clip that was held out."
    starts_from = {"interpolation": "codes", "superres": "high_codes"}.get(stage)
    if starts_from is not None and any(getattr(each, starts_from) is None for each in examples):
        return f"No samples are drawn while training: {stage} starts from clips, and there are prompts alone."
    return ""


def draw(stage: StageName, system: CogVideo, examples: Sequence[Example], seed: int) -> list[Row]:
    """Samples of the stage as it is now, next to the truth.

    | stage | from | sampled |
    |---|---|---|
    | image | prompt | some images of it |
    | sequential | prompt | first frame by the base, then key frames |
    | interpolation | prompt, frames at even places of the clip | the frames between |
    | superres | prompt, low codes of the clip's first frame | its high codes |

    Args:
        stage: the one that learns.
        system: the live modules with both tokenizers, in any precision and on any device. Where the base is stored in
            bfloat16, it runs under autocast.
        examples: prompts and clips to start from.
        seed: of all noise. An example's noise depends on this and on its place among the examples alone.

    Raises:
        ValueError: something is missing, see `missing`.
    """
    problem = missing(stage, system.components, examples)
    require(not problem, problem)
    if "base" not in system.components:
        parts = {name: system.component(name) for name in system.components}
        system = CogVideo(system.config, **parts, base=parts[f"{stage}_base"])
    drawers = {"image": _images, "sequential": _key_frames, "interpolation": _between, "superres": _larger}
    model = getattr(system, {"image": "image_model", "superres": "upscaler"}.get(stage, stage))
    with _borrowed([model, system.autoencoder]):
        return drawers[stage](system, examples, seed)


def write_samples(folder: Path, step: int, rows: Sequence[Row]) -> Written:
    """`step-00000500.png`, and the same as `.mp4` where the rows are clips of one length and PyAV is there.

    Args:
        folder: where; it is made if it is not there.
        step: number of steps made.
        rows: what `draw` gave.

    Raises:
        OSError: they cannot be written.
    """
    from cogvideo.media.images import contact_sheet, write_image  # only files need Pillow

    folder.mkdir(parents=True, exist_ok=True)
    sheet = sheet_of(folder, step)
    video = sheet.with_suffix(".mp4") if all(row.is_clip for row in rows) else None
    shown = [_enlarged(row.frames) for row in rows]
    labels = [_short(row.label) for row in rows]
    if video is not None:
        try:
            write_video(video, _side_by_side(rows, shown), FPS)
        except ModuleNotFoundError:  # of PyAV, without which a GPU machine still trains
            video = None
    write_image(sheet, contact_sheet(shown, max(map(len, shown)), labels=labels))  # last: a sign that both are there
    return Written(sheet, video)


def sheet_of(folder: Path, step: int) -> Path:
    """Path of the contact sheet of a step."""
    return folder / f"step-{step:08}.png"


@contextmanager
def _borrowed(models: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the modules generate; afterwards they are as before."""
    modules = {module: module.training for model in models for module in model.modules()}
    device = next(models[0].parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if any(each.dtype == torch.bfloat16 for each in models[0].parameters()):
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if "torch._dynamo" in sys.modules:  # blocks may be compiled, and would be again for the shapes of decoding
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, training in modules.items():
                module.training = training


def _request(examples: Sequence[Example], seed: int, variants: int = 1) -> Request:
    """Clips of each example, with noise of their own."""
    each = [(place, variant) for place in range(len(examples)) for variant in range(variants)]
    seeds = [int(hash_numbers(seed, place, variant)[0] >> np.uint64(1)) for place, variant in each]
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    prompts = [examples[place].prompt for place, _ in each]
    return Request(prompts, generators, PLAIN, durations=[examples[place].duration for place, _ in each])


def _images(system: CogVideo, examples: Sequence[Example], seed: int) -> list[Row]:
    drawn = torch.split(first_frames(system, _request(examples, seed, VARIANTS)), VARIANTS)
    rows = []
    for place, (example, codes) in enumerate(zip(examples, drawn, strict=True)):
        truth = codes[:0] if example.codes is None else example.codes[:1]
        label = "drawn" if example.codes is None else "truth, then drawn"
        pixels = system.autoencoder.decode_pixels(torch.cat([truth, codes]))
        rows.append(Row(f"{label}: {example.prompt}", pixels, place, False))
    return rows


def _key_frames(system: CogVideo, examples: Sequence[Example], seed: int) -> list[Row]:
    return _beside_truth(system, examples, collect(generate(system, _request(examples, seed))), "drawn")


def _between(system: CogVideo, examples: Sequence[Example], seed: int) -> list[Row]:
    layout = SequenceLayout.interpolation(system.config.layout)
    real = torch.stack([example.codes for example in examples if example.codes is not None])
    codes = between(system, _request(examples, seed), real[:, sorted(layout.order[: layout.num_bidirectional])])
    label = f"frames {' and '.join(map(str, layout.loss_places))} drawn"
    return _beside_truth(system, examples, codes, label)


def _beside_truth(
    system: CogVideo, examples: Sequence[Example], codes: Int64[Tensor, "batch frames slots"], label: str
) -> list[Row]:
    rows, pixels = [], system.autoencoder.decode_pixels
    for place, (example, each) in enumerate(zip(examples, codes, strict=True)):
        words = f"{label}, {example.duration:g} s: {example.prompt}"
        rows.append(Row(words, pixels(each), place, True))
        if example.codes is not None:
            rows.append(Row("truth", pixels(example.codes), place, True))
    return rows


def _larger(system: CogVideo, examples: Sequence[Example], seed: int) -> list[Row]:
    low = torch.stack([example.codes[0] for example in examples if example.codes is not None])
    request, layout, pixels = _request(examples, seed), system.upscaler.channel.layout, system.autoencoder.decode_pixels
    text = system.text.batch(request.prompts, None, layout.text_slots, truncate=True)
    high = enlarge(system, text, low, request.generators, system.config.superres_sampling).cpu()
    rows = []
    for place, (example, few, many) in enumerate(zip(examples, low, high, strict=True)):
        assert example.high_codes is not None
        large = pixels(torch.stack([many, example.high_codes[0]]))
        small = _repeated(pixels(few[None]), layout.ratio)
        rows.append(Row(f"low, drawn, truth: {example.prompt}", np.concatenate([small, large]), place, False))
    return rows


def _flat(codes: np.ndarray) -> Int64[Tensor, "frames slots"]:
    return torch.from_numpy(codes.astype(np.int64)).flatten(1)


def _short(label: str) -> str:
    """One line that fits above five frames."""
    label = " ".join(label.split())
    return label if len(label) <= MOST_LETTERS else f"{label[: MOST_LETTERS - 3]}..."


def _repeated(frames: UInt8[np.ndarray, "frames _ _ 3"], times: int) -> UInt8[np.ndarray, "frames _ _ 3"]:
    return frames.repeat(times, 1).repeat(times, 2)


def _enlarged(frames: UInt8[np.ndarray, "frames _ _ 3"]) -> UInt8[np.ndarray, "frames _ _ 3"]:
    return _repeated(frames, max(1, -(-LEAST_SIDE // frames.shape[1])))


def _side_by_side(
    rows: Sequence[Row], shown: Sequence[UInt8[np.ndarray, "frames _ _ 3"]]
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Clips as one: those of an example below each other, the examples side by side, what is left over white."""
    from cogvideo.media.images import contact_sheet

    kinds = sum(row.example == rows[0].example for row in rows)
    across = min(ACROSS, len(rows) // kinds)
    lines = [
        np.stack(shown[start + kind : start + across * kinds : kinds])
        for start in range(0, len(rows), across * kinds)
        for kind in range(kinds)
    ]
    return np.stack([contact_sheet([line[:, time] for line in lines], across, gap=0) for time in range(len(shown[0]))])
