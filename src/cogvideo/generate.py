"""`cogvideo generate`: prompts to video files."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import cogvideo
from cogvideo.bundle import usable
from cogvideo.config import require
from cogvideo.files import write_text
from cogvideo.generation.hierarchy import Guidance, Settings
from cogvideo.generation.sampling import Sampling
from cogvideo.pipeline import CogVideoPipeline, Frame, Upscaling
from cogvideo.video import VIDEO_SUFFIXES, fastest, write_video

Type = Literal["float32", "bfloat16", "float16"]
FORMATS = (".mp4", ".gif", ".webp")
"""Of the files that are written."""
LONGEST_NAME = 120
"""Bytes of a file name that is made from a prompt: twice as many are the most that file systems take."""


def generate(
    prompts: tuple[str, ...] = (),
    /,
    *,
    model: str,
    output: Path = Path("out"),
    seed: int | None = None,
    rounds: int = 3,
    guidance: float = 3.0,
    temperature: float = 1.05,
    clusters: int = 12,
    superres: bool = True,
    device: str = "auto",
    dtype: Type = "float32",
) -> None:
    """Make a clip of each prompt. A JSON file of the same name beside it says how; files that are there are replaced.

    Args:
        prompts: one or several.
        model: folder of a bundle, or its id on the Hugging Face Hub.
        output: a file (.mp4, .gif, .webp) for a single prompt, else a folder.
        seed: of the first clip; the next has the next number. Random, and recorded, unless given.
        rounds: of interpolation: 0 to 3 give 5, 9, 17, 33 frames.
        guidance: how strongly key frames follow the prompt; 1 is not at all, and twice as fast.
        temperature: of later frames; lower is calmer.
        clusters: of codes that later frames are drawn from; fewer is calmer, 0 is all codes.
        superres: enlarge the frames, where the model can.
        device: cpu, cuda, cuda:0, or auto.
        dtype: of the weights.

    Raises:
        ValueError: a prompt, the model or a setting cannot be used.
        OSError: something cannot be written.
    """
    require(len(prompts) > 0, "there is no prompt, expected one or several texts")
    require(seed is None or 0 <= seed < 2**63, f"seed is {seed}, expected a number in [0, 2**63)")
    files = list(_files(prompts, output))
    settings = Settings(
        rounds=rounds, later=Sampling(temperature, clusters=clusters), guidance=Guidance(sequential=guidance)
    )
    on = usable(device)
    pipeline = CogVideoPipeline.from_pretrained(model, getattr(torch, dtype), on)
    for file in files:
        _check_rounds(file, settings, pipeline.model.config.layout.num_frames)
    first = secrets.randbelow(2**31) if seed is None else seed
    seeds = range(first, first + len(prompts))
    upscaling = Upscaling(superres)
    streams = [  # all of them now, so that what cannot be used is refused before the first clip is made
        pipeline.stream([prompt], [torch.Generator().manual_seed(each)], settings, upscaling)
        for prompt, each in zip(prompts, seeds, strict=True)
    ]
    for folder in {file.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
        require(os.access(folder, os.W_OK), f"cannot write into {folder}, expected a folder for the clips")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for prompt, each, file, stream in zip(prompts, seeds, files, streams, strict=True):
        frames = _clip(stream, console)
        record = {
            "prompt": prompt,
            "seed": each,
            "model": model,
            "rounds": rounds,
            "guidance": guidance,
            "temperature": temperature,
            "clusters": clusters,
            "superres": superres,
            "device": str(on),
            "dtype": dtype,
            "cogvideo": cogvideo.__version__,
        }
        _write(file, frames, (len(frames) - 1) / settings.duration, record)
        print(file)


def _files(prompts: tuple[str, ...], output: Path) -> Iterator[Path]:
    """The file of each prompt; names never lead out of the folder, and differ also where case does not count."""
    suffix = output.suffix.lower()
    if suffix in FORMATS or (suffix in VIDEO_SUFFIXES and not output.is_dir()):
        kinds = f"expected a folder, or a file that ends in {', '.join(FORMATS)}"
        require(suffix in FORMATS, f"cannot write {output}: {kinds}")
        require(not output.is_dir(), f"{output} is a folder, {kinds}")
        require(len(prompts) == 1, f"output is the file {output} for {len(prompts)} prompts, expected a folder")
        yield output
        return
    require(output.is_dir() or not output.exists(), f"{output} is a file, expected a folder or a name with .mp4")
    taken: set[str] = set()
    for prompt in prompts:
        words = re.sub(r"[^\w]+", "-", prompt).strip("-").encode()[:LONGEST_NAME].decode(errors="ignore")
        stem = words.strip("-") or "clip"
        names = (stem, *(f"{stem}-{number}" for number in range(2, len(prompts) + 2)))
        name = next(each for each in names if each.casefold() not in taken)
        taken.add(name.casefold())
        yield output / f"{name}.mp4"


def _check_rounds(file: Path, settings: Settings, num_key_frames: int) -> None:
    """Refuse more frames a second than the file can have: each round doubles those of the key frames."""
    doublings = int(fastest(file) * settings.duration / (num_key_frames - 1))
    most, limit = doublings.bit_length() - 1, f"a {file.suffix} has at most {fastest(file)} frames a second"
    require(settings.rounds <= most, f"rounds is {settings.rounds}, expected 0 to {most}: {limit}")


def _clip(stream: Iterator[Frame], console: Console) -> UInt8[np.ndarray, "frames height width 3"]:
    """The frames of a clip in order of time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: dict[int, np.ndarray] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        for frame in stream:
            found[frame.place] = frame.pixels[0]
            bar.update(task, description=frame.stage, total=frame.num_frames, completed=len(found))
    return np.stack([found[place] for place in sorted(found)])


def _write(file: Path, frames: UInt8[np.ndarray, "frames height width 3"], fps: float, record: dict[str, Any]) -> None:
    """The clip, then its settings: whatever interrupts it, no settings stand beside a clip that has others."""
    sidecar = file.with_suffix(".json")
    sidecar.unlink(missing_ok=True)
    told = {"comment": json.dumps(record, ensure_ascii=False)} if file.suffix.lower() == ".mp4" else None
    write_video(file, frames, fps, told)
    write_text(sidecar, json.dumps(record, ensure_ascii=False, indent=2) + "\n")
