"""Memory of clips: whether they fit into a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cogvideo.bundle.model import CogVideo
from cogvideo.config import CogVideoConfig, require
from cogvideo.devices import free_memory
from cogvideo.generation.request import GenerationSettings
from cogvideo.planning.costs import GPU, Phase, clip, resident

AMPLE_RATIO = 20
"""Ratio of free memory to the size of a model's files above which the exact need is not computed."""


def needed_memory(
    config: CogVideoConfig,
    phases: Sequence[Phase],
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
    offload: bool = False,
) -> int:
    """Bytes of device memory that clips need, given the phases of one (see `costs.clip`).

    Weights count once, everything else once per clip of the batch. With `offload`, only the weights of the current
    stage are in memory.
    """
    kind = "cpu_float32" if dtype.itemsize > 2 else "cpu_bfloat16" if device.type == "cpu" else GPU
    others = [(batch - 1) * each.memory(kind, with_weights=False) for each in phases]
    if offload:
        return max(each.memory(kind) + more for each, more in zip(phases, others, strict=True))
    return resident(config, phases, kind) + max(others)


def require_memory(
    model: CogVideo,
    settings: GenerationSettings,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    offload: bool,
    held: int = 0,
) -> None:
    """Refuse clips that do not fit, and say what helps; `held` bytes of weights are already loaded."""
    free = free_memory(device)
    if model.num_bytes * batch * AMPLE_RATIO < free:
        return
    need = max(0, needed_memory(model.config, clip(model.config, settings), dtype, device, batch, offload) - held)
    helps = [f"a batch of {batch // 2}"] if batch > 1 else []
    helps += [] if offload else ["offload"]
    helps += ["dtype bfloat16"] if dtype.itemsize > 2 else []
    helps += ["rounds 0", "device cpu" if device.type == "cuda" else "a smaller model"]
    got = f"this needs {need / 2**30:.1f} GiB of memory on {device}, where {free / 2**30:.1f} GiB are free"
    require(need <= free, f"{got}; what helps: {', '.join(helps)}")
