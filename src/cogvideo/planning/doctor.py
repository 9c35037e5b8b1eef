"""`cogvideo doctor`: what this machine can run, and whether the model in the box is whole."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.markup import escape

import cogvideo
from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import POCKET, locate
from cogvideo.config import PRESETS, InputError, preset
from cogvideo.devices import free_memory, slowness
from cogvideo.planning.costs import clip
from cogvideo.planning.info import table
from cogvideo.planning.memory import needed_memory

GIB = 2**30


def doctor(model: str = POCKET, /) -> int:
    """Say in plain words what this machine can run, and check a model's files against their hashes.

    Exit status 1 says that a file is not what was saved.

    Args:
        model: Folder of a bundle, its id on the Hugging Face Hub, or pocket, the one in the box.

    Raises:
        ValueError: there is no such model.
    """
    folder = locate(model)
    manifest = Manifest.read(folder)
    console = Console(highlight=False, soft_wrap=True)
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.platform(terse=True)}"
    console.print(f"cogvideo {cogvideo.__version__}, {versions}\n")
    devices = list(_devices())
    for device, words in devices:
        console.print(f"{device}: {words}")
    if len(devices) == 1:
        console.print("no GPU that PyTorch can use: everything runs on the CPU, the model in the box in seconds a clip")
    if slow := slowness(torch.bfloat16, devices[0][0]):
        console.print(slow)
    console.print()
    console.print(table("One clip of 33 frames", ["", *(str(device) for device, _ in devices)], _rows(devices)))
    wrong = list(_wrong(folder, manifest))
    for each in wrong:
        console.print(f"[red]wrong[/red] {escape(each)}")
    if not wrong:
        console.print(f"{escape(str(model))}: all files are what was saved")
    return int(len(wrong) > 0)


def _devices() -> Iterator[tuple[torch.device, str]]:
    memory = psutil.virtual_memory()
    cores = f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    yield torch.device("cpu"), f"{cores}, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", number)
        free, total = torch.cuda.mem_get_info(device)
        yield device, f"{torch.cuda.get_device_name(device)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _rows(devices: list[tuple[torch.device, str]]) -> Iterator[list[str]]:
    """Each preset, and how it fits."""
    for name in PRESETS:
        config, phases = preset(name), clip(preset(name))
        row = [name]
        for device, _ in devices:
            free, answer = free_memory(device), ""
            for dtype, offload, option in (
                (torch.float32, False, ""),
                (torch.bfloat16, False, " with --dtype bfloat16"),
                (torch.bfloat16, True, " with --dtype bfloat16 --offload"),
            ):
                need = needed_memory(config, phases, dtype, device, offload=offload)
                if need <= free:
                    answer = f"fits{option}: {need / GIB:.2f} GiB"
                    break
                answer = f"too large: {need / GIB:.1f} GiB"
            row.append(answer)
        yield row


def _wrong(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Faults of the files of a bundle, in words."""
    for entry in manifest.components.values():
        try:
            entry.check(folder / entry.file)
            entry.verify(folder / entry.file)
        except InputError as error:
            yield str(error)
