"""What a stage draws while it learns: the same prompts with the same noise every time, so that sheets can be compared.

The live modules generate, in whatever precision they are trained, and are left as they were: without gradients, in the
mode they were in, and no global random generator moves. What a row of a sheet is, its label says.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from cogvideo.bundle.model import CogVideo
from cogvideo.config import require
from cogvideo.data.loader import ClipSample, hash_numbers
from cogvideo.generation.decode import Passes, decode
from cogvideo.generation.decoder import Condition
from cogvideo.generation.hierarchy import Guidance, Settings
from cogvideo.generation.sampling import GumbelNoise
from cogvideo.generation.upscale import slot_noise, superres_sampling, upscale
from cogvideo.layout import SequenceLayout
from cogvideo.media.video import write_video
from cogvideo.models.autoencoder import to_pixels
from cogvideo.models.transformer import Transformer
from cogvideo.models.upscaler import Upscaler
from cogvideo.text import PaddedText, fit, pad_left
from cogvideo.training.stages import StageName

PLAIN = Settings(guidance=Guidance(1.0, 1.0, 1.0, text_bonus=0.0), passes=Passes(parallel_frames=True))
"""The distribution that is learnt, without guidance: a young model's unconditional text says nothing yet."""
VARIANTS = 4
"""Images of one prompt."""
LEAST_SIDE = 96
"""Pixels of a side of a frame on a sheet, at least; smaller frames are shown enlarged."""
MOST_LETTERS = 110
"""Of a label."""
FPS = 2.0
"""Frames a second of the mp4: sequences of all rates are watched at one pace."""
ACROSS = 4
"""Clips side by side in the mp4."""


class Example(NamedTuple):
    """What is drawn from, the same at every step."""

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
    """What they are."""
    frames: UInt8[np.ndarray, "frames height width 3"]
    """Red, green and blue."""
    example: int
    """Place of the example that they are of."""
    is_clip: bool
    """Whether they follow each other in time."""


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
    """Prompts as examples, of clips of so many seconds."""
    return [Example(prompt, duration) for prompt in prompts]


def missing(stage: StageName, has: Collection[str], examples: Sequence[Example]) -> str:
    """Why nothing can be drawn, in a sentence to be shown once; empty if it can.

    Args:
        stage: what learns.
        has: names of the components that there are.
        examples: what would be drawn from.
    """
    base = "base" if f"{stage}_base" not in has else f"{stage}_base"
    needed = [base, *([stage] if stage != "image" else []), "text", "image_tokenizer"]
    lacks = [name for name in needed if name not in has]
    if lacks:
        return f"No samples are drawn while training: the model has no {', '.join(lacks)}."
    if not examples:
        return "No samples are drawn while training: there is neither a prompt nor a clip that was held out."
    starts_from = {"interpolation": "codes", "superres": "high_codes"}.get(stage)
    if starts_from is not None and any(getattr(each, starts_from) is None for each in examples):
        return f"No samples are drawn while training: {stage} starts from clips, and there are prompts alone."
    return ""


def draw(
    stage: StageName,
    system: CogVideo,
    examples: Sequence[Example],
    seed: int,
    *,
    settings: Settings = PLAIN,
    from_real: bool = False,
) -> list[Row]:
    """What the stage makes of the examples now, beside the truth.

    | stage | from | drawn |
    |---|---|---|
    | image | prompt | some images of it |
    | sequential | prompt, or with `from_real` the clip's first frame too | first frame by the base, then key frames |
    | interpolation | prompt, frames at even places of the clip | the frames between |
    | superres | prompt, low codes of the clip's first frame | its high codes |

    Args:
        stage: what learns.
        system: the live modules with both tokenizers, in any precision and on any device. Where the base is stored in
            bfloat16, it runs under autocast.
        examples: what is drawn from.
        seed: of all noise. An example's noise depends on this and on its place among the examples alone.
        settings: samplers and guidance; rounds and duration are not read.
        from_real: start the sequential stage from true first frames, where examples have them: for a base that draws
            nothing yet.

    Raises:
        ValueError: something is missing, see `missing`.
    """
    problem = missing(stage, system.components, examples)
    require(not problem, problem)
    model = _model(stage, system)
    with _borrowed([model, system.autoencoder]):
        drawing = _Drawing(system, list(examples), seed, settings)
        if isinstance(model, Upscaler):
            return _larger(drawing, model)
        if stage == "image":
            return _images(drawing, model)
        return _between(drawing, model) if stage == "interpolation" else _key_frames(drawing, model, from_real)


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
    """Where the contact sheet of a step is, or will be."""
    return folder / f"step-{step:08}.png"


def _model(stage: StageName, system: CogVideo) -> Transformer | Upscaler:
    if stage == "image":
        return system.image_model
    if stage == "superres":
        return system.upscaler
    return system.sequential if stage == "sequential" else system.interpolation


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


@dataclass(frozen=True)
class _Drawing:
    """What the stages need to draw."""

    system: CogVideo
    examples: list[Example]
    seed: int
    settings: Settings

    def generators(self, each: int = 1) -> list[torch.Generator]:
        """So many for each example, fresh ones."""
        numbers = range(len(self.examples) * each)
        seeds = [int(hash_numbers(self.seed, number // each, number % each)[0] >> np.uint64(1)) for number in numbers]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def pad(self, rows: list[list[int]], slots: int) -> PaddedText:
        """Texts that are too long lose their end."""
        text = self.system.text
        return pad_left([fit(row, slots, truncate=True) for row in rows], slots, text.pad)

    def decode(
        self,
        model: Transformer,
        layout: SequenceLayout,
        given: Int64[Tensor, "batch frames slots"],
        generators: list[torch.Generator],
        scale: float,
    ) -> Int64[Tensor, "batch drawn slots"]:
        """The frames that follow the given ones, in the order in which they are drawn, guided by `scale`."""
        image = model.channel is None
        noise = GumbelNoise(generators, layout.num_frames, layout.frame_slots, model.base.config.num_codes)
        condition = self._condition(layout.text_slots, image, len(generators) // len(self.examples), scale)
        sampling = self.settings.first if image else self.settings.later
        labels = self.system.cluster_labels
        frames = decode(model, layout, condition, given, noise, sampling, labels, self.settings.passes)
        return torch.stack([frame.codes.cpu() for frame in frames], 1)

    def _condition(self, slots: int, image: bool, each: int, scale: float) -> Condition:
        """Texts of the examples, each so many times."""
        text = self.system.text
        examples = [example for example in self.examples for _ in range(each)]
        if image:
            rows = [text.encode_image_caption(example.prompt) for example in examples]
            others = [text.encode_unconditional_image()] * len(rows)
        else:
            rows = [text.encode_caption(example.prompt, example.duration) for example in examples]
            others = [text.encode_unconditional(example.duration) for example in examples]
        if scale == 1:
            return Condition(self.pad(rows, slots), text_bonus=self.settings.guidance.text_bonus)
        return Condition(self.pad(rows, slots), self.pad(others, slots), scale)

    def pixels(self, codes: Int64[Tensor, "frames slots"]) -> UInt8[np.ndarray, "frames height width 3"]:
        """Frames of codes, one at a time through the decoder."""
        autoencoder, side = self.system.autoencoder, round(codes.shape[1] ** 0.5)
        device = next(autoencoder.parameters()).device
        squares = codes.view(-1, side, side).to(device)
        with torch.autocast(device.type, enabled=False):
            return to_pixels(autoencoder.decode(squares, chunk=1))


def _first_frames(drawing: _Drawing, model: Transformer, each: int = 1) -> Int64[Tensor, "batch 1 slots"]:
    layout = SequenceLayout.text_to_image(drawing.system.config.layout)
    generators = drawing.generators(each)
    nothing = torch.empty(len(generators), 0, layout.frame_slots, dtype=torch.int64)
    return drawing.decode(model, layout, nothing, generators, drawing.settings.guidance.image)


def _images(drawing: _Drawing, model: Transformer) -> list[Row]:
    drawn = torch.split(_first_frames(drawing, model, VARIANTS)[:, 0], VARIANTS)
    rows = []
    for place, (example, codes) in enumerate(zip(drawing.examples, drawn, strict=True)):
        truth = codes[:0] if example.codes is None else example.codes[:1]
        label = "drawn" if example.codes is None else "truth, then drawn"
        rows.append(Row(f"{label}: {example.prompt}", drawing.pixels(torch.cat([truth, codes])), place, False))
    return rows


def _key_frames(drawing: _Drawing, model: Transformer, from_real: bool) -> list[Row]:
    examples, has_base = drawing.examples, "base" in drawing.system.components
    real = [example.codes for example in examples if example.codes is not None]
    if from_real and len(real) == len(examples):
        first, label = torch.stack(real)[:, :1], "from the true first frame"
    else:
        base = drawing.system.image_model if has_base else Transformer(model.base)
        first, label = _first_frames(drawing, base), "drawn"
    layout = SequenceLayout.sequential(drawing.system.config.layout)
    later = drawing.decode(model, layout, first, drawing.generators(), drawing.settings.guidance.sequential)
    return _beside_truth(drawing, torch.cat([first, later], 1), label)


def _between(drawing: _Drawing, model: Transformer) -> list[Row]:
    layout = SequenceLayout.interpolation(drawing.system.config.layout)
    real = torch.stack([example.codes for example in drawing.examples if example.codes is not None])
    given = real[:, list(layout.order[: layout.num_bidirectional])]
    codes, drawn = real.clone(), list(layout.loss_places)
    scale = drawing.settings.guidance.interpolation
    codes[:, drawn] = drawing.decode(model, layout, given, drawing.generators(), scale)
    return _beside_truth(drawing, codes, f"frames {' and '.join(map(str, drawn))} drawn")


def _beside_truth(drawing: _Drawing, codes: Int64[Tensor, "batch frames slots"], label: str) -> list[Row]:
    rows = []
    for place, (example, each) in enumerate(zip(drawing.examples, codes, strict=True)):
        told = f"{label}, {example.duration:g} s: {example.prompt}"
        rows.append(Row(told, drawing.pixels(each), place, True))
        if example.codes is not None:
            rows.append(Row("truth", drawing.pixels(example.codes), place, True))
    return rows


def _larger(drawing: _Drawing, model: Upscaler) -> list[Row]:
    low = torch.stack([example.codes[0] for example in drawing.examples if example.codes is not None])
    layout, text = model.channel.layout, drawing.system.text
    captions = drawing.pad([text.encode_image_caption(each.prompt) for each in drawing.examples], layout.text_slots)
    device, num_codes = model.base.words.weight.device, model.base.config.num_codes
    noise = [slot_noise(each, layout.high_slots, num_codes, device) for each in drawing.generators()]
    sampling, labels = superres_sampling(drawing.system.config.drawing), drawing.system.cluster_labels
    high = upscale(model, captions, low, noise, sampling, labels).cpu()
    rows = []
    for place, (example, few, many) in enumerate(zip(drawing.examples, low, high, strict=True)):
        assert example.high_codes is not None
        large = drawing.pixels(torch.stack([many, example.high_codes[0]]))
        small = _repeated(drawing.pixels(few[None]), layout.ratio)
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
    by_example: dict[int, list[np.ndarray]] = {}
    for row, frames in zip(rows, shown, strict=True):
        by_example.setdefault(row.example, []).append(frames)
    blocks = [np.concatenate(clips, axis=1) for clips in by_example.values()]
    height, across = max(block.shape[1] for block in blocks), min(ACROSS, len(blocks))
    blocks += [blocks[0][:, :0]] * (-len(blocks) % across)
    full = [_padded(block, height, shown[0].shape[2]) for block in blocks]
    lines = [np.concatenate(full[start : start + across], axis=2) for start in range(0, len(full), across)]
    return np.concatenate(lines, axis=1)


def _padded(block: UInt8[np.ndarray, "frames _ _ 3"], height: int, width: int) -> UInt8[np.ndarray, "frames _ _ 3"]:
    canvas = np.full((len(block), height, width, 3), 255, np.uint8)
    canvas[:, : block.shape[1]] = block
    return canvas
