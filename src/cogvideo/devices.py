"""Devices: setup, memory, speed, and slow dtypes."""

from __future__ import annotations

import os
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch

from cogvideo.config import InputError, require

CUDNN_ATTENTION = "COGVIDEO_CUDNN_ATTENTION"
"""Environment variable: 1 lets PyTorch choose cuDNN's attention."""

MEASURED_SECONDS = 0.3
"""Approximate time to measure the matrix rate."""
MIN_SIDE, MAX_SIDE, MIN_SECONDS = 256, 8192, 0.01
"""Matrices grow until one product takes this long, up to the largest side."""


def usable(device: str | torch.device) -> torch.device:
    """Return the device, refused if it cannot hold tensors; `auto` is a GPU if there is one, else the CPU.

    On a GPU, attention avoids cuDNN, which PyTorch tries first on Hopper, unless `CUDNN_ATTENTION` is 1. With
    a mask and keys % 128 == 64 its query gradients can be NaN (PyTorch 2.11, issue 196678), and it builds a
    plan for every shape, which takes longer than the few calls per shape that decoding makes.

    Raises:
        ValueError: PyTorch does not know the device, or this build or machine lacks it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        one = torch.ones((), device=device)
        one.item()  # fails on devices without values, such as meta
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        got = f"cannot use the device {str(device)!r} ({reason:.90})"
        raise InputError(f"{got}, expected auto, cpu, or a GPU that PyTorch can use, such as cuda:0") from error
    require(one.device.type != "cpu" or not torch.device(device).index, f"there is no device {device}, expected cpu")
    if one.device.type == "cuda" and os.environ.get(CUDNN_ATTENTION) != "1":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return one.device


def default_dtype(device: torch.device) -> torch.dtype:
    """Default type of weights."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def slowness(dtype: torch.dtype, device: torch.device) -> str | None:
    """Warning about a dtype that is far slower than float32; None for others.

    PyTorch emulates 16-bit types on x86 processors without AVX-512, as in most laptops: products take 7 to 70
    times as long as in float32 (AMD EPYC with AVX2, PyTorch 2.13).
    """
    emulated = device.type == "cpu" and dtype.itemsize == 2 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    name = str(dtype).removeprefix("torch.")
    return f"{name} is emulated on this processor, which has no AVX-512: float32 is far faster" if emulated else None


def is_out_of_memory(error: BaseException) -> bool:
    """True for an out-of-memory error; PyTorch's own are RuntimeErrors."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device, also inside a container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return min([int(psutil.virtual_memory().available), *cgroup_memory()])


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that this process may still allocate under each limit of its control groups and their ancestors.

    Args:
        root: folder where control groups are mounted, version 2 or 1. A container sees its own group as the
            root.
        groups: file that lists the control groups of the process.
    """
    left: list[int | None] = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = root / "memory" if controllers else root
        parts = Path(path).parts[1:]
        left += [_left(folder.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)]
    return [each for each in left if each is not None]


def _left(folder: Path) -> int | None:
    """Limit minus usage, with droppable cached files counted as free; None without a limit."""
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


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU's tensors, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # missing on some systems that train on a GPU

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@lru_cache(maxsize=8)
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the reference for utilization.

    Square random matrices grow until one product takes 10 ms (or they have 8,192 rows); then the fastest
    product within a third of a second counts. Measured once per device and dtype, with the current number of
    threads and the current precision of float32 products (TF32).
    """
    side = MIN_SIDE
    while side < MAX_SIDE and _product_seconds(side, device, dtype) < MIN_SECONDS:
        side *= 2
    return 2 * side**3 / _product_seconds(side, device, dtype, time.monotonic() + MEASURED_SECONDS)


@torch.no_grad()
def _product_seconds(side: int, device: torch.device, dtype: torch.dtype, end: float = 0.0) -> float:
    """Seconds of the fastest product of two matrices after a warm-up; measures until `end`, at least once."""
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's own random state alone
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.mm(left, right)
    times: list[float] = []
    while not times or time.monotonic() < end:
        _wait(device)
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
