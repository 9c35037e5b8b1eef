"""`cogvideo doctor`: what this machine can run, and whether the model in the box is intact."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.markup import escape

import cogvideo
from cogvideo.bundle.format import Manifest, file_of
from cogvideo.bundle.model import POCKET, locate
from cogvideo.commands.terminal import table
from cogvideo.config import PRESETS, InputError, preset
from cogvideo.devices import free_memory, slowness
from cogvideo.planning.costs import clip
from cogvideo.planning.memory import needed_memory

GIB = 2**30
ATTEMPTS = (
    (torch.float32, False, ""),
    (torch.bfloat16, False, " with --dtype bfloat16"),
    (torch.bfloat16, True, " with --dtype bfloat16 --offload"),
)
"""Types and offloading to try, and their options."""


def doctor(model: str = POCKET, /) -> int:
    """Report what this machine can run, and check a model's files against their hashes.

    The exit status is 1 if a file does not match.

    Args:
        model: Model: pocket (the model in the box), a folder of a bundle, or an ID on the Hugging Face Hub.
    """
    folder = locate(model)
    manifest = Manifest.read(folder)
    console = Console(highlight=False, soft_wrap=True)
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.platform(terse=True)}"
    console.print(f"cogvideo {cogvideo.__version__}, {versions}\n")
    devices = _devices()
    for device, words in devices.items():
        console.print(f"{device}: {words}")
    if len(devices) == 1:
        console.print(
            "no GPU that PyTorch can use: everything runs on the CPU; the model in the box takes seconds per clip"
        )
    if slow := slowness(torch.bfloat16, torch.device("cpu")):
        console.print(slow)
    console.print()
    rows = ([name, *(_answer(name, device) for device in devices)] for name in PRESETS)
    console.print(table("One clip of 33 frames", ["", *map(str, devices)], rows))
    faults = list(_faults(folder, manifest))
    for each in faults:
        console.print(f"[red]wrong[/red] {escape(each)}")
    if not faults:
        console.print(f"{escape(str(model))}: all files match their hashes")
    return int(len(faults) > 0)


def _devices() -> dict[torch.device, str]:
    """Devices, and their descriptions."""
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    threads = torch.get_num_threads()
    used = f"{cores} cores, {threads} thread{'s' if threads > 1 else ''} in use"
    found = {torch.device("cpu"): f"{used}, {_free(memory.available, memory.total)}"}
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", number)
        found[device] = f"{torch.cuda.get_device_name(device)}, {_free(*torch.cuda.mem_get_info(device))}"
    return found


def _free(free: int, total: int) -> str:
    return f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _answer(name: str, device: torch.device) -> str:
    """Say whether a preset fits into the memory of a device."""
    config, phases = preset(name), clip(preset(name))
    free = free_memory(device)
    for dtype, offload, option in ATTEMPTS:
        need = needed_memory(config, phases, dtype, device, offload=offload)
        if need <= free:
            return f"fits{option}: {need / GIB:.2f} GiB"
    return f"too large: {need / GIB:.1f} GiB"


def _faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Defects of a bundle's files, in words."""
    for entry in manifest.components.values():
        try:
            entry.check(file_of(folder, entry))
            entry.verify(file_of(folder, entry))
        except InputError as error:
            yield str(error)
