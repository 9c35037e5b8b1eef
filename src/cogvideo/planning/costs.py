"""Memory and work of a model, from its configuration alone: parameters, bytes, floating-point operations.

Parameters are counted in the package's modules on the meta device, where tensors have shapes and no values. All else
follows from formulas, which tests compare with real passes. Not counted is what Python, PyTorch and a CUDA context need
for themselves.

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
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cogvideo.bundle.format import MODULES
from cogvideo.config import CogVideoConfig
from cogvideo.generation.request import Settings
from cogvideo.generation.upscale import SLOTS_PER_DRAW
from cogvideo.layout import Cells, SequenceLayout, UpscaleLayout, cells
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.plans import CAUSAL_ROWS
from cogvideo.models.upscaler import TILE

Stage = Literal["image", "sequential", "interpolation"]
STAGES: tuple[Stage, ...] = get_args(Stage)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NARROW, WIDE = torch.bfloat16.itemsize, torch.float32.itemsize


class Precision(NamedTuple):
    """Device and types of a run."""

    device: str
    weights: int
    """Bytes of a value."""
    cache: str
    """Name of its type."""


PRECISIONS = {
    "gpu_bfloat16": Precision("gpu", NARROW, "bfloat16"),  # float16 needs the same
    "cpu_float32": Precision("cpu", WIDE, "float32"),
    "cpu_bfloat16": Precision("cpu", NARROW, "float32"),  # as generation/decoder.py chooses
}


def _by_dtype(count: float) -> dict[str, int]:
    """Bytes of a number of values."""
    return {name: int(count) * dtype.itemsize for name, dtype in DTYPES.items()}


# Parameters


@dataclass(frozen=True)
class Component:
    """A part that has a file of its own in a bundle, or a sum of them."""

    name: str
    parameters: int
    bytes: dict[str, int]
    """By dtype."""


@lru_cache(maxsize=16)
def modules(config: CogVideoConfig) -> dict[str, nn.Module]:
    """Every component with parameters, without memory."""
    with torch.device("meta"):
        return {name: make(config) for name, make in MODULES.items() if not name.endswith("_base")}


def components(config: CogVideoConfig) -> tuple[Component, ...]:
    """Every component with parameters."""
    return tuple(_component(name, count(module)) for name, module in modules(config).items())


def sums(config: CogVideoConfig) -> tuple[Component, ...]:
    """The sums that papers and users speak of."""
    sizes = {name: count(module) for name, module in modules(config).items()}
    stage = sizes["base"] + sizes["sequential"]
    return (
        _component("base with one stage", stage),
        _component("base with both stages", stage + sizes["interpolation"]),
        _component("everything", sum(sizes.values())),
    )


def _component(name: str, parameters: int) -> Component:
    return Component(name, parameters, _by_dtype(parameters))


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def products(config: CogVideoConfig, stage: Stage) -> tuple[int, int]:
    """Weights of the matrices that a row goes through in all blocks: those of the base, and those that a stage adds.

    In each block of the base 12 h^2 (q, k and v 3, output 1, feed-forward layer 8), of a temporal channel 4 h^2.
    """
    square = config.transformer.num_layers * config.transformer.hidden**2
    return 12 * square, 0 if stage == "image" else 4 * square


# What rows see


def layout_of(config: CogVideoConfig, stage: Stage) -> SequenceLayout:
    """The sequence of a stage."""
    if stage == "image":
        return SequenceLayout.text_to_image(config.layout)
    make = SequenceLayout.sequential if stage == "sequential" else SequenceLayout.interpolation
    return make(config.layout)


def _num_given(layout: SequenceLayout) -> int:
    """Frames that a stage does not draw."""
    return layout.num_frames - len(layout.loss_places)


def kinds_of(config: CogVideoConfig, stage: Stage) -> list[Cells]:
    """Cells of the temporal channel, of each kind of block: with windows there are two, which take turns."""
    if stage == "image":
        return []
    window = getattr(config, stage).window
    return [cells(config.layout.grid, window, is_shifted) for is_shifted in ((False, True) if window else (False,))]


def num_cells(kind: Cells) -> int:
    """Cells of a frame."""
    return sum(len(part) for part in kind)


def _over_layers(config: CogVideoConfig, values: Sequence[float]) -> float:
    """Sum over all layers of a value that differs by kind of block."""
    return sum(values[layer % len(values)] for layer in range(config.transformer.num_layers) if values)


def _causal_pairs(rows: int) -> int:
    """Pairs that are scored among the rows of a causal frame or cell: `CAUSAL_ROWS` at once, with all rows so far."""
    whole, rest = divmod(rows, CAUSAL_ROWS)
    return CAUSAL_ROWS**2 * whole * (whole + 1) // 2 + rest * rows


def pairs(config: CogVideoConfig, stage: Stage, frames: int) -> float:
    """Pairs of a row and a key in a full pass of text and the first frames, in all layers and both channels.

    Spatial: T^2 + N T, and in each frame S^2, or fewer where it is causal. Temporal: N T, and in each cell the pairs of
    its frames with those before and with themselves.
    """
    layout = layout_of(config, stage)
    text, slots = layout.text_slots, layout.frame_slots
    both = min(layout.num_bidirectional, frames)
    before = both**2 + sum(range(both, frames))
    spatial = text**2 + frames * slots * text + both * slots**2 + (frames - both) * _causal_pairs(slots)
    temporal = []
    for kind in kinds_of(config, stage):
        sizes = [(len(part), part.shape[1]) for part in kind]
        inside = sum(num * (before * area**2 + (frames - both) * _causal_pairs(area)) for num, area in sizes)
        temporal.append(frames * slots * text + inside)
    return config.transformer.num_layers * spatial + _over_layers(config, temporal)


def _keys_read(config: CogVideoConfig, stage: Stage) -> float:
    """Keys that a row reads when codes are drawn one by one, in all layers together: the mean over the stage.

    In a cell with A slots, those of frame r read T + r A + (A + 1) / 2 on average. Spatial cells are one frame.
    """
    layout = layout_of(config, stage)
    text, slots = layout.text_slots, layout.frame_slots
    frames = (_num_given(layout) + layout.num_frames) / 2
    areas = [sum(len(part) * part.shape[1] ** 2 for part in kind) / slots for kind in kinds_of(config, stage)]
    temporal = [text + frames * area + 0.5 for area in areas]
    return config.transformer.num_layers * (text + slots / 2 + 0.5) + _over_layers(config, temporal)


# Decoding


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the keys and values of one sample, by dtype."""

    stage: str
    guided: bool
    spatial: dict[str, int]
    """Text and one frame."""
    temporal: dict[str, int]
    """All frames, and in every window the text."""


@dataclass(frozen=True)
class Work:
    """One pass of a model. For a stage: the mean of all passes that draw codes one by one, prefill not counted."""

    stage: str
    rows: int
    """Samples, twice as many with guidance."""
    flops: float
    bytes_moved: dict[str, float]
    """Weights and cache that are read, by precision."""


def bytes_a_token(config: CogVideoConfig) -> dict[str, int]:
    """Keys and values of one slot in all layers, a channel and row, by dtype: 2 h values a layer."""
    return _by_dtype(2 * config.transformer.num_layers * config.transformer.hidden)


def cache_size(config: CogVideoConfig, stage: Stage, guided: bool = False) -> CacheSize:
    """Cache of one sample, frame by frame: T + S keys a layer; in the temporal channel T for each cell, and N."""
    layout = layout_of(config, stage)
    values = 2 * config.transformer.hidden * (1 + guided)
    spatial = config.transformer.num_layers * (layout.text_slots + layout.frame_slots)
    frame_keys = layout.num_frames * layout.frame_slots
    temporal = [num_cells(kind) * layout.text_slots + frame_keys for kind in kinds_of(config, stage)]
    return CacheSize(stage, guided, _by_dtype(values * spatial), _by_dtype(values * _over_layers(config, temporal)))


def work(config: CogVideoConfig, stage: Stage, samples: int = 1, guided: bool = False) -> Work:
    """The mean pass of a stage: all rows share one reading of the weights, each reads the keys that it sees.

    A row takes two operations for each weight of a matrix, the C h of the code head among them, and 4 h for each key.
    """
    rows, head = samples * (1 + guided), config.transformer.num_codes * config.transformer.hidden
    cached = 2 * config.transformer.hidden * _keys_read(config, stage)
    names = ["base"] if stage == "image" else ["base", stage]
    weights = _weights_read(config, names)
    moved = {
        name: weights * kind.weights + rows * cached * DTYPES[kind.cache].itemsize for name, kind in PRECISIONS.items()
    }
    return Work(stage, rows, rows * 2 * (sum(products(config, stage)) + head + cached), moved)


def _weights_read(config: CogVideoConfig, names: Iterable[str]) -> int:
    """Weights of all blocks, the final norm and the codes' rows of the word embedding."""
    blocks = sum(count(modules(config)[name].get_submodule("blocks")) for name in names)
    return blocks + (2 + config.transformer.num_codes) * config.transformer.hidden


# Generation


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs at its peak."""

    parts: dict[str, int]
    """By what they are for."""
    device: int
    """All parts together."""
    host: int
    """The same on a CPU; with a GPU, noise while it is drawn and the largest tensor on its way (files are mapped)."""


@dataclass(frozen=True)
class Phase:
    """A part of the generation of one clip."""

    name: str
    passes: int
    work: Work
    """Work of one pass."""
    prefill_flops: int
    """Work for text and given frames, before the first pass."""
    memory: dict[str, Memory]
    """By precision, with the weights of this phase alone."""


def clip(config: CogVideoConfig, settings: Settings | None = None) -> tuple[Phase, ...]:
    """The phases of a clip, from a prompt to pixels; made as the model does by itself, unless settings are given.

    Passes are counted as if codes were drawn one by one, which is the most: drafts need fewer, with more rows each.
    """
    settings = settings or Settings.of(config)
    frames = config.layout.num_frames
    gaps = SequenceLayout.interpolation(config.layout).num_bidirectional - 1
    phases = [
        decoding(config, "first frame", "image", 1, settings.first.guidance != 1),
        decoding(config, "key frames", "sequential", 1, settings.later.guidance != 1),
    ]
    for _ in range(settings.rounds):
        sequences, frames = -(-(frames - 1) // gaps), 2 * frames - 1
        guided = settings.interpolation_guidance != 1
        phases.append(decoding(config, f"to {frames} frames", "interpolation", sequences, guided))
    return *phases, upscaling(config, frames), rendering(config, frames)


def resident(config: CogVideoConfig, phases: Iterable[Phase]) -> dict[str, int]:
    """Device memory of a clip for which all weights stay loaded, by precision."""
    parameters = sum(each.parameters for each in components(config))
    return {
        name: parameters * kind.weights
        + max(phase.memory[name].device - phase.memory[name].parts["weights"] for phase in phases)
        for name, kind in PRECISIONS.items()
    }


def decoding(config: CogVideoConfig, name: str, stage: Stage, samples: int, guided: bool) -> Phase:
    """The frames of some sequences, drawn at once by a stage.

    Prefill feeds R rows, those of text and given frames, and is busiest inside a feed-forward layer: what came in and
    its norm, q, k and v (3), attention, the sum and its norm, 4 h before and 4 h after GELU make 16 R h values. With
    small windows it is busier while keys and values are copied for the cache: 9 R h and 2 h for each of its keys.
    """
    layout, cache, mean = (
        layout_of(config, stage),
        cache_size(config, stage, guided),
        work(config, stage, samples, guided),
    )
    hidden, given = config.transformer.hidden, _num_given(layout)
    frame_rows = given * layout.frame_slots
    rows = layout.text_slots + frame_rows
    base, added = products(config, stage)
    linear = rows * base + (3 * rows + frame_rows) * added // 4  # text has no temporal output
    flops = 2 * linear + round(4 * hidden * pairs(config, stage, given))
    written = [num_cells(kind) * layout.text_slots + frame_rows for kind in kinds_of(config, stage)]
    fed = hidden * max(16 * rows, 9 * rows + 2 * max(written, default=0))
    noise = samples * layout.frame_slots * config.transformer.num_codes * WIDE
    keys = {kind: samples * (cache.spatial[kind] + cache.temporal[kind]) for kind in DTYPES}
    used = ["base"] if stage == "image" else ["base", stage]
    memory = _memories(config, used, noise, mean.rows * fed, keys)
    return Phase(name, len(layout.loss_places) * layout.frame_slots, mean, mean.rows * flops, memory)


def upscaling(config: CogVideoConfig, frames: int) -> Phase:
    """Super-resolution, one frame a pass: T + S low rows through the base, H high ones through 12 h^2 of their own.

    It is busiest inside the feed-forward layer of the high slots: 17 H h values (see `decoding`; keys and values are
    there twice), and 5 (T + S) h of the low rows.
    """
    layout, hidden = UpscaleLayout.of(config.layout, config.upscaler), config.transformer.hidden
    text, low, high = layout.text_slots, layout.low_slots, layout.high_slots
    pairs = text * (text + low) + low * (text + low) - text * low + _neighbours(config)
    head = config.transformer.num_codes * hidden
    layers = config.transformer.num_layers
    flops = 2 * products(config, "image")[0] * (text + low + high) + 2 * high * head + 4 * hidden * pairs * layers
    noise = min(SLOTS_PER_DRAW, high) * config.transformer.num_codes * WIDE
    activations = (17 * high + 5 * text + 7 * low) * hidden
    used = ["base", "superres"]
    read = _weights_read(config, used)
    return _frame_by_frame(config, "super-resolution", frames, flops, read, used, activations, noise)


def _neighbours(config: CogVideoConfig) -> int:
    """Pairs that high slots score: those of a tile with every key that any of them sees.

    Both neighbourhoods are rectangles, so the sum over tiles is a product of sums over bands of rows and of columns.
    """
    sizes, layout = config.upscaler, UpscaleLayout.of(config.layout, config.upscaler)
    bands = [(start, min(start + TILE, layout.low_grid)) for start in range(0, layout.low_grid, TILE)]

    def seen(reach: int, scale: int) -> int:
        grid = layout.low_grid * scale
        keys = [min(stop * scale + reach, grid) - max(start * scale - reach, 0) for start, stop in bands]
        return sum((stop - start) * layout.ratio * each for (start, stop), each in zip(bands, keys, strict=True))

    high = seen(sizes.high_rows // 2, layout.ratio) * seen(sizes.high_columns // 2, layout.ratio)
    return high + seen(sizes.low_side // 2, 1) ** 2


def rendering(config: CogVideoConfig, frames: int) -> Phase:
    """Codes to pixels, one frame a pass; PyTorch counts the operations of a pass without values."""
    side, rate = UpscaleLayout.of(config.layout, config.upscaler).high_grid, config.autoencoder.rate
    model = modules(config)["image_tokenizer"]
    assert isinstance(model, Autoencoder)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.render(torch.empty(1, config.autoencoder.embedding_dim, side, side, device="meta"), rate)
    number = config.autoencoder.rates.index(rate)
    read, activations = count(model.decoders[number]), _decoder_activations(config, number, side)
    used = ["image_tokenizer"]
    return _frame_by_frame(config, "pixels", frames, counter.get_total_flops(), read, used, activations)


def _decoder_activations(config: CogVideoConfig, number: int, side: int) -> int:
    """Values at the peak of a decoder, over its levels.

    The first level's input stays throughout. A residual block holds its input, a norm and an activation of it, or in
    its second half its input, what the first half left, a norm and an activation of that; an upsampling its input, the
    enlarged one and its output.
    """
    multipliers = config.autoencoder.decoder_multipliers[number]
    widths = [config.autoencoder.channels * each for each in (multipliers[-1], *reversed(multipliers))]
    peak = 0
    for level, (before, after) in enumerate(pairwise(widths)):
        area = (side * 2**level) ** 2
        peak = max(peak, 3 * before * area, (before + 3 * after) * area)
        if level < len(multipliers) - 1:
            peak = max(peak, 9 * after * area)
    return widths[0] * side**2 + peak


def _frame_by_frame(
    config: CogVideoConfig, name: str, frames: int, flops: int, read: int, used: list[str], values: int, noise: int = 0
) -> Phase:
    """A phase without a cache; `read` are the weights that a pass reads, `values` those at its peak."""
    moved = {kind: float(read * precision.weights) for kind, precision in PRECISIONS.items()}
    memory = _memories(config, used, noise, values, _by_dtype(0))
    return Phase(name, frames, Work(used[-1], 1, float(flops), moved), 0, memory)


def _memories(
    config: CogVideoConfig, used: Iterable[str], noise: int, activations: int, cache: dict[str, int]
) -> dict[str, Memory]:
    """By precision; activations are numbers of values."""
    sizes = [parameter.numel() for name in used for parameter in modules(config)[name].parameters()]
    memories = {}
    for name, kind in PRECISIONS.items():
        parts = {"weights": sum(sizes) * kind.weights, "cache": cache[kind.cache], "noise": noise}
        parts["activations"] = activations * kind.weights
        device = sum(parts.values())
        host = 2 * noise + max(sizes) * kind.weights if kind.device == "gpu" else device
        memories[name] = Memory(parts, device, host)
    return memories
