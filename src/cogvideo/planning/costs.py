"""What a model costs, from its configuration alone: parameters, memory, floating-point operations, bytes moved.

Nothing is loaded. The package's own modules, decoder and forward passes run dry, on the meta device, where tensors have
shapes and no values; a meter reads off what they allocate and compute. Not counted is what Python, PyTorch and a CUDA
context need for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cogvideo.config import CogVideoConfig, SamplingConfig
from cogvideo.generation.decoder import Condition, Decoder
from cogvideo.generation.request import Settings
from cogvideo.generation.upscale import SLOTS_PER_DRAW, upscale
from cogvideo.layout import SequenceLayout, UpscaleLayout
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.cache import Cache
from cogvideo.models.plans import full_pass, text_masks
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.models.upscaler import UpscaleChannel, Upscaler, neighbourhoods
from cogvideo.planning.dry_run import META, DryRun, WithoutValues, dry_run
from cogvideo.text import PaddedText

Stage = Literal["image", "sequential", "interpolation"]
STAGES: tuple[Stage, ...] = get_args(Stage)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision(NamedTuple):
    """Where a run takes place, and in which types."""

    device: str
    weights: torch.dtype
    cache: torch.dtype


PRECISIONS = {
    "gpu_bfloat16": Precision("gpu", torch.bfloat16, torch.bfloat16),  # float16 needs the same
    "cpu_float32": Precision("cpu", torch.float32, torch.float32),
    "cpu_bfloat16": Precision("cpu", torch.bfloat16, torch.float32),  # as generation/decode.py chooses
}
GPU = PRECISIONS["gpu_bfloat16"]


def _by_dtype(count: int) -> dict[str, int]:
    """Bytes of so many values."""
    return {name: count * dtype.itemsize for name, dtype in DTYPES.items()}


# Parameters


@dataclass(frozen=True)
class Component:
    """A part that has a file of its own in a bundle, or a sum of them."""

    name: str
    parameters: int
    bytes: dict[str, int]
    """By dtype."""

    @classmethod
    def of(cls, name: str, parameters: int) -> Component:
        """The component with so many parameters."""
        return cls(name, parameters, _by_dtype(parameters))


class _Modules(NamedTuple):
    base: Base
    sequential: TemporalChannel
    interpolation: TemporalChannel
    superres: UpscaleChannel
    image_tokenizer: Autoencoder


@lru_cache(maxsize=16)
def _modules(config: CogVideoConfig, dtype: torch.dtype = torch.float32) -> _Modules:
    transformer, layout = config.transformer, config.layout
    with META:
        return _Modules(
            Base(transformer).to(dtype),
            TemporalChannel(transformer, layout, config.sequential).to(dtype),
            TemporalChannel(transformer, layout, config.interpolation).to(dtype),
            UpscaleChannel(transformer, layout, config.upscaler).to(dtype),
            Autoencoder(config.autoencoder).to(dtype),
        )


def components(config: CogVideoConfig) -> tuple[Component, ...]:
    """Every component with parameters."""
    return tuple(Component.of(name, _count(module)) for name, module in _modules(config)._asdict().items())


def sums(config: CogVideoConfig) -> tuple[Component, ...]:
    """The sums that papers and users speak of."""
    sizes = {each.name: each.parameters for each in components(config)}
    stage = sizes["base"] + sizes["sequential"]
    return (
        Component.of("base with one stage", stage),
        Component.of("base with both stages", stage + sizes["interpolation"]),
        Component.of("everything", sum(sizes.values())),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _by_layers(config: CogVideoConfig, run: Callable[[CogVideoConfig], DryRun]) -> DryRun:
    """The dry run of a deep model from two of shallow ones: every pair of blocks, one of each kind, adds the same."""
    pairs = config.transformer.num_layers / 2
    few, more = (run(_shallow(config, layers)) for layers in (2, 4))
    return DryRun(*(round(two + (pairs - 1) * (four - two)) for two, four in zip(few, more, strict=True)))


def _shallow(config: CogVideoConfig, num_layers: int) -> CogVideoConfig:
    return replace(config, transformer=replace(config.transformer, num_layers=num_layers))


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
    """One pass of a model. Of a stage: the mean of all passes that draw codes one by one, prefill not counted."""

    stage: str
    rows: int
    """Samples, twice as many with guidance."""
    flops: float
    bytes_moved: dict[str, float]
    """Weights and cache that are read, by precision."""


def layout_of(config: CogVideoConfig, stage: Stage) -> SequenceLayout:
    """The sequence of a stage."""
    if stage == "image":
        return SequenceLayout.text_to_image(config.layout)
    make = SequenceLayout.sequential if stage == "sequential" else SequenceLayout.interpolation
    return make(config.layout)


def bytes_a_token(config: CogVideoConfig) -> dict[str, int]:
    """Keys and values of one slot in all layers, a channel and row, by dtype."""
    return _by_dtype(2 * config.transformer.num_layers * config.transformer.hidden)


def cache_size(config: CogVideoConfig, stage: Stage, guided: bool = False) -> CacheSize:
    """What the decoder allocates for one sample, frame by frame (frames in parallel have a spatial cache each)."""
    spatial, *temporal = _decoder(config, stage, 1, guided, PRECISIONS["cpu_float32"]).caches
    return CacheSize(stage, guided, _cache_bytes([spatial]), _cache_bytes(temporal))


def _cache_bytes(caches: list[Cache]) -> dict[str, int]:
    return _by_dtype(sum(each.num_bytes for each in caches) // torch.float32.itemsize)


def work(config: CogVideoConfig, stage: Stage, samples: int = 1, guided: bool = False) -> Work:
    """The mean pass of a stage: all rows share one reading of the weights, each reads the keys that it sees."""
    decoder, sizes, rows = _decoder(config, stage, samples, guided, GPU), config.transformer, samples * (1 + guided)
    base, channel = decoder.model.base, decoder.model.channel
    linear = [layer for blocks in _blocks(base, channel) for layer in blocks.modules() if isinstance(layer, nn.Linear)]
    products = sum(layer.weight.numel() for layer in linear) + sizes.num_codes * sizes.hidden
    keys = sum(_keys_read(cache, decoder.layout, sizes.num_layers) for cache in decoder.caches)
    cached = 2 * sizes.hidden * keys
    moved = {
        name: _weights_read(base, channel) * kind.weights.itemsize + rows * cached * kind.cache.itemsize
        for name, kind in PRECISIONS.items()
    }
    return Work(stage, rows, rows * 2 * (products + cached), moved)


def _blocks(base: Base, channel: TemporalChannel | UpscaleChannel | None) -> list[nn.Module]:
    return [base.blocks] if channel is None else [base.blocks, channel.blocks]


def _weights_read(base: Base, channel: TemporalChannel | UpscaleChannel | None) -> int:
    """Weights of all blocks, the final norm and the codes' rows of the word embedding."""
    head = base.config.num_codes * base.config.hidden
    return sum(_count(blocks) for blocks in _blocks(base, channel)) + _count(base.norm) + head


def _keys_read(cache: Cache, layout: SequenceLayout, num_layers: int) -> float:
    """Keys that a row reads, in all layers together: the mean over all slots that are drawn."""
    means = []
    for where in cache.maps:
        drawn = where.frame_places[_num_given(layout) if where.frames > 1 else 0 :]
        first = torch.tensor(where.starts)[where.cell_of_slot]
        means.append((drawn - first + 1).double().mean().item())
    return sum(means[layer % len(means)] for layer in range(num_layers))


def _num_given(layout: SequenceLayout) -> int:
    """Frames that a stage does not draw."""
    return layout.num_frames - len(layout.loss_places)


def _decoder(config: CogVideoConfig, stage: Stage, samples: int, guided: bool, precision: Precision) -> Decoder:
    """The real one, without memory."""
    layout, modules = layout_of(config, stage), _modules(config, precision.weights)
    model = Transformer(modules.base, None if stage == "image" else getattr(modules, stage))
    text = _text(samples, layout.text_slots)
    with WithoutValues():
        return Decoder(model, layout, Condition(text, text if guided else None), cache_dtype=precision.cache)


def _text(rows: int, slots: int) -> PaddedText:
    return PaddedText(torch.zeros(rows, slots, dtype=torch.int64), torch.ones(rows, slots, dtype=torch.bool))


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
    """Of one pass."""
    prefill_flops: int
    """Of text and given frames, before the first pass."""
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
        name: parameters * kind.weights.itemsize
        + max(phase.memory[name].device - phase.memory[name].parts["weights"] for phase in phases)
        for name, kind in PRECISIONS.items()
    }


def decoding(config: CogVideoConfig, name: str, stage: Stage, samples: int, guided: bool) -> Phase:
    """A stage draws the frames of so many sequences at once."""
    layout, cache, modules = layout_of(config, stage), cache_size(config, stage, guided), _modules(config)
    used = [modules.base] if stage == "image" else [modules.base, getattr(modules, stage)]
    mean, fed = work(config, stage, samples, guided), _prefill(config, stage)
    noise = samples * layout.frame_slots * config.transformer.num_codes * torch.float32.itemsize
    keys = {kind: samples * (cache.spatial[kind] + cache.temporal[kind]) for kind in DTYPES}
    memory = _memories(used, noise, mean.rows * fed.peak, keys)
    return Phase(name, len(layout.loss_places) * layout.frame_slots, mean, mean.rows * fed.flops, memory)


def _prefill(config: CogVideoConfig, stage: Stage) -> DryRun:
    """Feeding text and given frames: one row in 16 bit; every further row adds the same."""
    layout = layout_of(config, stage)
    given = torch.zeros(1, _num_given(layout), layout.frame_slots, dtype=torch.int64)
    return _by_layers(config, lambda sizes: dry_run(partial(_decoder(sizes, stage, 1, False, GPU).prefill, given)))


def upscaling(config: CogVideoConfig, frames: int) -> Phase:
    """Super-resolution, one frame a pass."""
    layout, modules = UpscaleLayout.of(config.layout, config.upscaler), _modules(config)
    text, codes = _text(1, layout.text_slots), torch.zeros(1, layout.low_slots, dtype=torch.int64)
    neighbourhoods(layout, config.upscaler, META)  # kept from pass to pass: made in one, they would count as its own

    def run(sizes: CogVideoConfig) -> DryRun:
        shallow = _modules(sizes, torch.bfloat16)
        model = Upscaler(shallow.base, shallow.superres)
        return dry_run(lambda: upscale(model, text, codes, [iter(())], SamplingConfig(temperature=0)))

    noise = min(SLOTS_PER_DRAW, layout.high_slots) * config.transformer.num_codes * torch.float32.itemsize
    weights = _weights_read(modules.base, modules.superres)
    used = [modules.base, modules.superres]
    return _frame_by_frame("super-resolution", "superres", frames, _by_layers(config, run), weights, used, noise)


def rendering(config: CogVideoConfig, frames: int) -> Phase:
    """Codes to pixels, one frame a pass."""
    side, rate = UpscaleLayout.of(config.layout, config.upscaler).high_grid, config.autoencoder.rate
    model = _modules(config, torch.bfloat16).image_tokenizer
    vectors = torch.empty(1, config.autoencoder.embedding_dim, side, side, dtype=torch.bfloat16, device=META)
    with torch.no_grad():
        measured = dry_run(lambda: model.render(vectors, rate))
    weights = _count(model.decoders[config.autoencoder.rates.index(rate)])
    return _frame_by_frame("pixels", "image_tokenizer", frames, measured, weights, [model])


def _frame_by_frame(
    name: str, component: str, frames: int, measured: DryRun, read: int, used: list[nn.Module], noise: int = 0
) -> Phase:
    """A phase without a cache; `read` are the weights that a pass reads."""
    moved = {kind: float(read * precision.weights.itemsize) for kind, precision in PRECISIONS.items()}
    memory = _memories(used, noise, measured.peak, _by_dtype(0))
    return Phase(name, frames, Work(component, 1, float(measured.flops), moved), 0, memory)


def _memories(modules: Iterable[nn.Module], noise: int, activations: int, cache: dict[str, int]) -> dict[str, Memory]:
    """By precision; activations are those in 16 bit."""
    sizes = [parameter.numel() for module in modules for parameter in module.parameters()]
    memories = {}
    for name, kind in PRECISIONS.items():
        width = kind.weights.itemsize
        parts = {"weights": sum(sizes) * width, "cache": cache[str(kind.cache).removeprefix("torch.")], "noise": noise}
        parts["activations"] = activations * width // torch.bfloat16.itemsize
        device = sum(parts.values())
        memories[name] = Memory(parts, device, 2 * noise + max(sizes) * width if kind.device == "gpu" else device)
    return memories


# Training


@dataclass(frozen=True)
class Training:
    """One optimizer step of a stage on one GPU, in bfloat16 with float32 master weights and Adam."""

    stage: str
    batch: int
    states: dict[str, int]
    """Bytes that stay from step to step, by what they are for."""
    activations: int
    """Bytes at the peak of a step, at most, if all are kept for the backward pass."""
    activations_checkpointed: int
    """The same if only the blocks' inputs are kept, and each block is computed again."""
    total: int
    """States and activations."""
    total_checkpointed: int
    """States and activations if only the blocks' inputs are kept."""
    saved: int
    """Bytes of master weights and moments, on disk and, while they are written, in the host's memory."""
    flops_a_position: float
    """Forward and backward, nothing computed again."""


@lru_cache(maxsize=64)
def training(config: CogVideoConfig, stage: Stage, batch: int = 1, autocast: bool = False) -> Training:
    """What a step of a stage needs. The image model trains its base; a video stage its channel, on a frozen base.

    Args:
        config: sizes.
        stage: which one.
        batch: sequences of a forward and backward pass.
        autocast: norms, and so what runs through the blocks, in float32, as torch.autocast has them on GPUs.
    """
    states, length, hidden = training_states(config, stage), layout_of(config, stage).length, config.transformer.hidden
    step = partial(_step, stage=stage, batch=batch, autocast=autocast)
    stream = (torch.float32 if autocast else GPU.weights).itemsize
    two, four = (step(_shallow(config, layers), backward=False).peak for layers in (2, 4))
    one, others = step(_shallow(config, 1)).peak, config.transformer.num_layers - 1
    kept = one + others * (four - two) // 2
    checkpointed = one + others * batch * length * hidden * stream
    resting, saved = sum(states.values()), states["master weights"] + states["moments"]
    flops = _by_layers(config, step).flops / (batch * length)
    return Training(stage, batch, states, kept, checkpointed, resting + kept, resting + checkpointed, saved, flops)


def training_states(config: CogVideoConfig, stage: Stage) -> dict[str, int]:
    """Bytes that training a stage keeps: frozen weights once, five values of every trained one."""
    modules = _modules(config)
    trained = _by_dtype(_count(modules.base if stage == "image" else getattr(modules, stage)))
    frozen = () if stage == "image" else modules.base.parameters()
    return {
        "frozen weights": sum(each.numel() * (2 if each.ndim > 1 else 4) for each in frozen),  # as start.py has them
        "working copy": trained["bfloat16"],
        "master weights": trained["float32"],
        "gradients": trained["float32"],
        "moments": 2 * trained["float32"],
    }


def _step(config: CogVideoConfig, stage: Stage, batch: int, autocast: bool = False, backward: bool = True) -> DryRun:
    """Forward and backward; gradients are dropped when they are complete, `training_states` counts them."""
    layout = layout_of(config, stage)
    with META:
        base = Base(config.transformer).bfloat16().requires_grad_(stage == "image")
        channel = None
        if stage != "image":
            channel = TemporalChannel(config.transformer, config.layout, getattr(config, stage)).bfloat16()
        tokens = torch.zeros(batch, layout.length, dtype=torch.int64)
        mask = torch.ones(batch, layout.text_slots, dtype=torch.bool)
    model = Transformer(base, channel)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]

    def run() -> None:
        texts = text_masks(mask, 0.0, torch.bfloat16)
        plan = full_pass(layout, model.window, texts, layout.num_frames, channel is not None, META)
        with _Autocast() if autocast else nullcontext():
            hidden = model(tokens, tokens, plan)[:, layout.text_slots :][:, layout.loss_slots().to(META)]
            logits = base.logits(hidden).float().flatten(0, 1)
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=META))
        if backward:
            torch.autograd.backward(loss)

    return dry_run(run)


class _Autocast(TorchFunctionMode):
    """What torch.autocast does on a GPU, since the meta device has none: products in bfloat16, norms in float32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = {F.linear: torch.bfloat16, F.layer_norm: torch.float32}.get(function)
        if kind is not None:
            args = [each.to(kind) if isinstance(each, Tensor) else each for each in args]
        return function(*args, **(kwargs or {}))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
