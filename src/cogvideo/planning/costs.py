"""Memory and compute of a model, from its configuration alone: parameters, values in memory, operations.

Parameters are counted in the package's modules on the meta device, where tensors have shapes but no values. Everything
else follows from formulas, which tests compare with real passes. The overhead of Python, PyTorch and a CUDA context is
not counted.

Letters: h hidden width, C image codes, T text slots, S slots of a frame, F frames, N = F S frame rows, R = T + N rows,
A slots of a cell (a window of the temporal channel, or a frame).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cogvideo.bundle.format import MODULES
from cogvideo.config import CogVideoConfig, TransformerConfig
from cogvideo.generation.request import GenerationSettings
from cogvideo.generation.upscale import SLOTS_PER_DRAW
from cogvideo.layout import Cells, SequenceLayout, UpscaleLayout, cells, kinds
from cogvideo.models.attention import MaskPlan
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.plans import full_pass
from cogvideo.models.upscaler import low_sequence, neighborhoods

Stage = Literal["image", "sequential", "interpolation"]
STAGES: tuple[Stage, ...] = get_args(Stage)
NARROW, WIDE = torch.bfloat16.itemsize, torch.float32.itemsize
"""Bytes of a value."""
GPU = "gpu_bfloat16"
PRECISIONS = {
    GPU: (NARROW, NARROW),  # float16 needs the same
    "cpu_float32": (WIDE, WIDE),
    "cpu_bfloat16": (NARROW, WIDE),  # as generation/decoder.py chooses
}
"""Bytes of a weight, and of a value in the cache."""


@lru_cache(maxsize=16)
def modules(config: CogVideoConfig) -> dict[str, nn.Module]:
    """Every component with parameters, on the meta device."""
    with torch.device("meta"):
        return {name: make(config) for name, make in MODULES.items() if not name.endswith("_base")}


def count(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def components(config: CogVideoConfig) -> dict[str, int]:
    """Number of parameters of every component."""
    return {name: count(module) for name, module in modules(config).items()}


def sums(config: CogVideoConfig) -> dict[str, int]:
    """Parameter counts of the combinations that papers and users quote."""
    sizes = components(config)
    one = sizes["base"] + sizes["sequential"]
    both = one + sizes["interpolation"]
    return {"base with one stage": one, "base with both stages": both, "everything": sum(sizes.values())}


class Matrices(NamedTuple):
    """Number of weights in the matrices of all blocks and of the code head.

    A block of the base has 12 h^2 (attention 4, feed-forward layer 8); a stage adds attention, 4 h^2.
    """

    base: int
    added: int
    head: int

    @classmethod
    def of(cls, sizes: TransformerConfig, is_image: bool = False) -> Matrices:
        """Counts for the image model or a stage."""
        square = sizes.num_layers * sizes.hidden**2
        return cls(12 * square, 0 if is_image else 4 * square, sizes.num_codes * sizes.hidden)


def layout_of(config: CogVideoConfig, stage: Stage) -> SequenceLayout:
    """Layout of a stage's sequence."""
    name = "text_to_image" if stage == "image" else stage
    layout: SequenceLayout = getattr(SequenceLayout, name)(config.layout)
    return layout


def kinds_of(config: CogVideoConfig, stage: Stage) -> list[Cells]:
    """Cells of the temporal channel, by kind of block: with windows, two kinds alternate."""
    if stage == "image":
        return []
    window = getattr(config, stage).window
    return [cells(config.layout.sides, window, is_shifted) for is_shifted in kinds(window)]


def num_cells(kind: Cells) -> int:
    """Number of cells of a frame."""
    return sum(len(part) for part in kind)


def _over_layers(config: CogVideoConfig, values: Sequence[float]) -> float:
    """Sum over all layers of a value that differs by kind of block."""
    return sum(values[layer % len(values)] for layer in range(config.transformer.num_layers) if values)


def _pairs(config: CogVideoConfig, layout: SequenceLayout, window: int | None, frames: int) -> float:
    """Row-key pairs that a full pass over text and the first frames scores, in all layers and channels."""
    plan = full_pass(layout, window, torch.ones(1, layout.text_slots, dtype=torch.bool), torch.float32, frames)
    spatial = config.transformer.num_layers * _scored(plan.spatial)
    return spatial + _over_layers(config, [_scored(each) for each in plan.temporal])


def _scored(plan: MaskPlan) -> int:
    """Pairs that one layer scores, masked ones included."""
    total = 0
    for rows, keys, chunks in plan.groups:
        num_cells = 1 if rows is None else len(rows)
        total += num_cells * sum(_size(each.rows, rows) * _size(each.keys, keys) for each in chunks)
    return total


def _size(part: range | None, cells: Tensor | None) -> int:
    if part is not None:
        return len(part)
    assert cells is not None
    return cells.shape[1]


def _keys_read(config: CogVideoConfig, stage: Stage) -> float:
    """Mean number of keys that a row of a stage reads in all layers together when codes are sampled one by one.

    In a cell with A slots, those of frame r read T + r A + (A + 1) / 2 on average. A spatial cell is one frame.
    """
    layout = layout_of(config, stage)
    text, slots = layout.text_slots, layout.frame_slots
    frames = layout.num_frames - len(layout.loss_places) / 2
    areas = [sum(len(part) * part.shape[1] ** 2 for part in kind) / slots for kind in kinds_of(config, stage)]
    temporal = [text + frames * area + 0.5 for area in areas]
    return config.transformer.num_layers * (text + slots / 2 + 0.5) + _over_layers(config, temporal)


def cache_size(config: CogVideoConfig, stage: Stage, guided: bool = False) -> tuple[int, int]:
    """Number of values in the spatial and in the temporal KV cache of one sample, decoded frame by frame.

    The spatial cache has T + S keys per layer, the temporal one T per cell plus N.
    """
    layout = layout_of(config, stage)
    values = 2 * config.transformer.hidden * (1 + guided)
    spatial = config.transformer.num_layers * (layout.text_slots + layout.frame_slots)
    frame_keys = layout.num_frames * layout.frame_slots
    temporal = [num_cells(kind) * layout.text_slots + frame_keys for kind in kinds_of(config, stage)]
    return values * spatial, int(values * _over_layers(config, temporal))


@dataclass(frozen=True)
class Phase:
    """A part of generating a clip: passes through some components. Sizes are numbers of values."""

    name: str
    stage: str
    """Stage, or the component that does the work."""
    passes: int
    weights: int
    weights_read: int
    flops: float
    """Operations of the average pass."""
    activations: int
    """Values at the peak of the phase."""
    noise: int = 0
    """Random numbers in memory at once, in float32."""
    rows: int = 1
    """Samples per pass, doubled by guidance."""
    prefill_flops: int = 0
    """Operations for text and given frames, before the first pass."""
    cache: int = 0
    cache_read: float = 0.0
    """Cached values that the average pass reads."""

    def bytes_moved(self, precision: str) -> float:
        """Bytes of weights and cache that the average pass reads."""
        weight, key = PRECISIONS[precision]
        return self.weights_read * weight + self.cache_read * key

    def memory(self, precision: str, with_weights: bool = True) -> int:
        """Peak memory in bytes, on the device that computes."""
        weight, key = PRECISIONS[precision]
        weights = self.weights if with_weights else 0
        return (weights + self.activations) * weight + self.cache * key + self.noise * WIDE


def clip(config: CogVideoConfig, settings: GenerationSettings | None = None) -> tuple[Phase, ...]:
    """Phases of a clip, from prompt to pixels; by default with the model's own settings.

    Passes are counted as if codes were sampled one by one, the maximum: drafting needs fewer, with more rows each.
    """
    settings = settings or GenerationSettings.of(config)
    frames = config.layout.num_frames
    gaps = layout_of(config, "interpolation").num_bidirectional - 1
    phases = [
        decoding(config, "first frame", "image", 1, settings.first.guidance != 1),
        decoding(config, "key frames", "sequential", 1, settings.later.guidance != 1),
    ]
    for _ in range(settings.rounds):
        sequences, frames = -(-(frames - 1) // gaps), 2 * frames - 1
        guided = settings.interpolation_guidance != 1
        phases.append(decoding(config, f"to {frames} frames", "interpolation", sequences, guided))
    return *phases, upscaling(config, frames), rendering(config, frames)


def resident(config: CogVideoConfig, phases: Iterable[Phase], precision: str) -> int:
    """Bytes of device memory for a clip if all weights stay loaded."""
    weights = sum(components(config).values()) * PRECISIONS[precision][0]
    return weights + max(phase.memory(precision, with_weights=False) for phase in phases)


def decoding(config: CogVideoConfig, name: str, stage: Stage, samples: int, guided: bool) -> Phase:
    """Decoding of the frames of some sequences as one batch by a stage.

    All rows share one read of the weights. A row takes two operations per matrix weight, including the C h of the code
    head, and 4 h for each key that it sees.

    Prefill feeds R rows, text and given frames, and peaks inside a feed-forward layer: its input and norm, q, k and v
    (3), attention, the sum and its norm, 4 h before and 4 h after GELU make 16 R h values. With small windows, the peak
    is where keys and values are copied to the cache: 9 R h, plus 2 h for each of its keys.
    """
    layout, sizes = layout_of(config, stage), config.transformer
    num_drawn = len(layout.loss_places)
    given_rows = (layout.num_frames - num_drawn) * layout.frame_slots
    fed = layout.text_slots + given_rows
    rows = samples * (1 + guided)
    base, added, head = Matrices.of(sizes, stage == "image")
    linear = fed * base + (3 * fed + given_rows) * added // 4  # text has no temporal output
    window = None if stage == "image" else getattr(config, stage).window
    attended = round(4 * sizes.hidden * _pairs(config, layout, window, layout.num_frames - num_drawn))
    written = [num_cells(kind) * layout.text_slots + given_rows for kind in kinds_of(config, stage)]
    cached = 2 * sizes.hidden * _keys_read(config, stage)
    return Phase(
        name,
        stage,
        **_weights(config, stage),
        passes=num_drawn * layout.frame_slots,
        rows=rows,
        flops=rows * 2 * (base + added + head + cached),
        prefill_flops=rows * (2 * linear + attended),
        cache=samples * sum(cache_size(config, stage, guided)),
        cache_read=rows * cached,
        noise=samples * layout.frame_slots * sizes.num_codes,
        activations=rows * sizes.hidden * max(16 * fed, 9 * fed + 2 * max(written, default=0)),
    )


def upscaling(config: CogVideoConfig, frames: int) -> Phase:
    """Super-resolution, one frame per pass: T + S low rows through the base, H high rows through 12 h^2 of their own.

    The peak is inside the feed-forward layer of the high slots: 17 H h values (see `decoding`; keys and values are held
    twice), and 5 (T + S) h for the low rows.
    """
    layout, sizes = UpscaleLayout.of(config.layout, config.upscaler), config.transformer
    text, low, high = layout.text_slots, layout.low_slots, layout.high_slots
    base, _, head = Matrices.of(sizes)
    pairs = _pairs(config, low_sequence(layout), None, 1)
    pairs += sizes.num_layers * _scored(neighborhoods(layout, config.upscaler, torch.device("cpu")))
    return Phase(
        "super-resolution",
        "superres",
        **_weights(config, "superres"),
        passes=frames,
        flops=2 * (base * (text + low + high) + head * high) + 4 * sizes.hidden * pairs,
        noise=min(SLOTS_PER_DRAW, high) * sizes.num_codes,
        activations=(17 * high + 5 * text + 7 * low) * sizes.hidden,
    )


def rendering(config: CogVideoConfig, frames: int) -> Phase:
    """Codes to pixels, one frame per pass; PyTorch counts the operations of a pass on the meta device.

    The first level's input stays in memory throughout. A residual block holds its input with its norm and activation
    or, in its second half, its input and the first half's output with its norm and activation; an upsampling holds its
    input, the enlarged input and its output.
    """
    sizes, (rows, columns) = config.autoencoder, UpscaleLayout.of(config.layout, config.upscaler).high_sides
    model, number = modules(config)["image_tokenizer"], sizes.rates.index(sizes.rate)
    assert isinstance(model, Autoencoder)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.render(torch.empty(1, sizes.embedding_dim, rows, columns, device="meta"), sizes.rate)
    multipliers = sizes.decoder_multipliers[number]
    widths = [sizes.channels * each for each in (multipliers[-1], *reversed(multipliers))]
    peaks = []
    for level, (before, after) in enumerate(pairwise(widths)):
        upsampled = 9 * after if level < len(multipliers) - 1 else 0
        peaks.append(max(3 * before, before + 3 * after, upsampled) * rows * columns * 4**level)
    return Phase(
        "pixels",
        "image_tokenizer",
        weights=count(model),
        weights_read=count(model.decoders[number]),
        passes=frames,
        flops=float(counter.get_total_flops()),
        activations=widths[0] * rows * columns + max(peaks),
    )


def _weights(config: CogVideoConfig, stage: str) -> dict[str, int]:
    """Weights of a phase. A pass reads all blocks, the final norm and the codes' rows of the word embedding."""
    used = [modules(config)[name] for name in dict.fromkeys(["base", stage]) if name != "image"]
    blocks = sum(count(each.get_submodule("blocks")) for each in used)
    read = blocks + (2 + config.transformer.num_codes) * config.transformer.hidden
    return {"weights": sum(map(count, used)), "weights_read": read}
