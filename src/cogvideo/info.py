"""What a model costs, from its configuration alone: parameters, memory, floating-point operations, bytes moved.

Nothing is loaded and hardly anything is derived here: the package's own modules, decoder and forward passes run dry, on
the meta device, where tensors have shapes and no values, and a meter reads off what they allocate and compute.
Memory is in GiB (2**30 bytes), traffic in GB (10**9). The runtime's own memory (Python, PyTorch, the CUDA context) is
not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from json import dumps
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cogvideo.bundle import MANIFEST, Manifest
from cogvideo.config import PRESETS, CogVideoConfig, preset, require
from cogvideo.generation.decode import Condition, Decoder
from cogvideo.generation.hierarchy import Settings
from cogvideo.generation.sampling import Sampling
from cogvideo.generation.upscale import upscale
from cogvideo.layout import SequenceLayout, UpscaleLayout
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.cache import Cache
from cogvideo.models.plans import full_pass, text_masks
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.models.upscaler import UpscaleChannel, Upscaler
from cogvideo.text import PaddedText

META = torch.device("meta")
StageName = Literal["image", "sequential", "interpolation"]
STAGES: tuple[StageName, ...] = get_args(StageName)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision(NamedTuple):
    """Types of weights and cache of a run."""

    weights: torch.dtype
    cache: torch.dtype


PRECISIONS = {
    "gpu_16_bit": Precision(torch.bfloat16, torch.bfloat16),
    "cpu_float32": Precision(torch.float32, torch.float32),
    "cpu_bfloat16": Precision(torch.bfloat16, torch.float32),  # see generation/decode.py
}


# Parameters


@dataclass(frozen=True)
class Component:
    """A part that has a file of its own in a bundle."""

    name: str
    parameters: int
    bytes: dict[str, int]
    """By dtype."""


def components(config: CogVideoConfig) -> tuple[Component, ...]:
    """Every component with parameters."""
    modules = _modules(config)._asdict()
    return tuple(component(name, sum(map(_numel, module.parameters()))) for name, module in modules.items())


def component(name: str, parameters: int) -> Component:
    """A component of so many parameters."""
    return Component(name, parameters, {kind: parameters * dtype.itemsize for kind, dtype in DTYPES.items()})


def totals(config: CogVideoConfig) -> tuple[Component, ...]:
    """Sums that papers and users speak of."""
    sizes = {each.name: each.parameters for each in components(config)}
    both = sizes["base"] + sizes["sequential"] + sizes["interpolation"]
    return (
        component("one stage with its base", sizes["base"] + sizes["sequential"]),
        component("one base with both stages", both),
        component("everything", sum(sizes.values())),
    )


class _Modules(NamedTuple):
    base: Base
    sequential: TemporalChannel
    interpolation: TemporalChannel
    superres: UpscaleChannel
    image_tokenizer: Autoencoder


@lru_cache(maxsize=16)
def _modules(config: CogVideoConfig) -> _Modules:
    """All modules without memory."""
    transformer, layout = config.transformer, config.layout
    with META:
        return _Modules(
            Base(transformer),
            TemporalChannel(transformer, layout, config.sequential),
            TemporalChannel(transformer, layout, config.interpolation),
            UpscaleChannel(transformer, layout, config.upscaler),
            Autoencoder(config.autoencoder),
        )


def _numel(tensor: Tensor) -> int:
    return tensor.numel()


# Dry runs


class _Meter(TorchDispatchMode):
    """Bytes that operations allocate: those alive now, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        known = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in known:
                self._allocate(each.untyped_storage())
                known.add(each.untyped_storage()._cdata)
        return made

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.alive -= num_bytes


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class _WithoutValues(TorchFunctionMode):
    """What the meta device cannot know by itself.

    Attention there would make a table of all scores, which no real kernel does; the CPU's kernel says what is kept.
    A question about values ("is there no pad?") is answered with no.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if function is Tensor.__bool__ and args[0].is_meta:
            return False
        return function(*args, **(kwargs or {}))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    return _ATTENTION(q, k, v, attn_mask=attn_mask)[0]


class DryRun(NamedTuple):
    """What a program would have done."""

    peak: int
    """Bytes that it allocated, at most at any time."""
    flops: int
    """Operations of matrix products, attention and convolutions; a multiplication and an addition are two."""


def dry_run(program: Callable[[], Any]) -> DryRun:
    """Run a program whose tensors are on the meta device."""
    counted = {_ATTENTION: _attention_flops, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter, _Meter() as meter, _WithoutValues():
        program()
    return DryRun(meter.peak, counter.get_total_flops())


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward_flops(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


def _by_layers(config: CogVideoConfig, run: Callable[[CogVideoConfig], DryRun]) -> DryRun:
    """The dry run of a deep model from those of two shallow ones: every pair of blocks, one of each kind, adds the same."""
    pairs = config.transformer.num_layers / 2
    few, more = (run(replace(config, transformer=replace(config.transformer, num_layers=each))) for each in (2, 4))
    peak, flops = (round(one + (pairs - 1) * (two - one)) for one, two in zip(few, more, strict=True))
    return DryRun(peak, flops)
