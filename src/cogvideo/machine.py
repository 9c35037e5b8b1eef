"""What this machine has: memory and devices, whether a clip fits, and which types are slow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cogvideo.bundle import CogVideo
from cogvideo.config import CogVideoConfig, require
from cogvideo.costs import Phase, clip, resident
from cogvideo.generation.hierarchy import Settings

SURELY_ENOUGH = 20
"""A model whose files are so many times smaller than the memory is not computed to the last byte, which takes
seconds."""


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still get there, also inside of a container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return min([int(psutil.virtual_memory().available), *cgroup_memory()])


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that each control group of this process which has a limit still leaves it.

    Args:
        root: where control groups are mounted, version 2 or 1.
        groups: the file that names those of the process.
    """
    folders = _cgroups(root, groups.read_text()) if groups.exists() else ()
    return [left for folder in folders for left in [_left(folder)] if left is not None]


def _cgroups(root: Path, groups: str) -> Iterator[Path]:
    """Folders of the groups and of all above them: each may limit. A container sees its own one as the root."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = root / "memory" if controllers else root
        yield folder
        for part in Path(path).parts[1:]:
            folder /= part
            yield folder


def _left(folder: Path) -> int | None:
    """Limit less usage, in which files that the system may drop count as free; None without a limit."""
    for limit, usage, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            free = int((folder / limit).read_text()) - int((folder / usage).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # another version, or the limit is "max"
            continue
        return max(0, free + int(statistics.get(droppable, 0)))
    return None


def needed_memory(
    config: CogVideoConfig,
    phases: Sequence[Phase],
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
    offload: bool = False,
) -> int:
    """Bytes of device memory that clips need.

    Args:
        config: of the model.
        phases: of one clip, see `costs.clip`.
        dtype: of the weights.
        device: where they are.
        batch: clips at once; weights count once, all else so many times.
        offload: only the weights of the stage at work are there.
    """
    kind = "cpu_float32" if dtype.itemsize > 2 else "cpu_bfloat16" if device.type == "cpu" else "gpu_bfloat16"
    memory = [phase.memory[kind] for phase in phases]
    if offload:
        return max(each.parts["weights"] + batch * (each.device - each.parts["weights"]) for each in memory)
    return resident(config, phases)[kind] + (batch - 1) * max(each.device - each.parts["weights"] for each in memory)


def require_memory(
    model: CogVideo,
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    offload: bool,
    held: int = 0,
) -> None:
    """Refuse clips that do not fit, beside the bytes of weights that are held already.

    Raises:
        ValueError: too little memory is free; the message says what is needed and what helps.
    """
    free = free_memory(device)
    if model.num_bytes * batch * SURELY_ENOUGH < free:
        return
    need = max(0, needed_memory(model.config, clip(model.config, settings), dtype, device, batch, offload) - held)
    helps = [f"a batch of {batch // 2}"] if batch > 1 else []
    helps += [] if offload else ["offload"]
    helps += ["dtype bfloat16"] if dtype.itemsize > 2 else []
    helps += ["rounds 0", "device cpu" if device.type == "cuda" else "a smaller model"]
    got = f"this needs {need / 2**30:.1f} GiB of memory on {device}, where {free / 2**30:.1f} GiB are free"
    require(need <= free, f"{got}; what helps: {', '.join(helps)}")


def slowness(dtype: torch.dtype, device: torch.device) -> str | None:
    """What to say of a type that takes far longer than float32; None where it does not.

    PyTorch emulates 16 bit where an x86 processor has no AVX-512, as in most laptops: products take 7 to 70 times as
    long as in float32 (AMD EPYC with AVX2, PyTorch 2.13).
    """
    emulated = device.type == "cpu" and dtype.itemsize == 2 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    name = str(dtype).removeprefix("torch.")
    return f"{name} is emulated on this processor, which has no AVX-512: float32 is far faster" if emulated else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory; PyTorch's own are RuntimeErrors."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
