"""Benchmark of video reading compared with decoding alone, and memory of a process that reads thousands of files."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.machine import alternate
from cogvideo.media.video import read_video, write_video

WIDTH, HEIGHT, SECONDS = 640, 360, 5
FPS = 8


def measure_reading(rounds: int = 10, num_reads: int = 10_000) -> dict[str, Any]:
    """Speed of `read_video` in source frames per second, against PyAV's decoder alone, and memory over many reads."""
    with TemporaryDirectory() as folder:
        figures: dict[str, Any] = {f"{rate} fps": _rates(Path(folder), rate, rounds) for rate in (48, 60)}
        figures[f"{num_reads} small files"] = _memory(Path(folder), num_reads)
    return figures


def _rates(folder: Path, rate: int, rounds: int) -> dict[str, float]:
    """Rates for a file of `SECONDS` seconds at `rate` frames per second, of which 8 are kept: at most a sixth."""
    path = folder / f"{rate}.mp4"
    num_frames = rate * SECONDS
    write_video(path, moving_picture(num_frames, HEIGHT, WIDTH), rate)
    calls = {
        "raw PyAV": lambda: _decode(path),
        "size 64": lambda: read_video(path, FPS, 64),
        "size 160": lambda: read_video(path, FPS, 160),
    }
    times = {name: each["median"] / 1e3 for name, each in alternate(calls, rounds).items()}
    return {f"{name}, frames per second": num_frames / seconds for name, seconds in times.items()} | {
        f"{name} over raw": times["raw PyAV"] / times[name] for name in ("size 64", "size 160")
    }


def _decode(path: Path) -> None:
    """Decode all frames without conversion, on one thread like `read_video`."""
    import av  # other benchmarks use this module without PyAV

    with av.open(path) as container:
        container.streams.video[0].thread_count = 1
        for _ in container.decode(video=0):
            pass


def _memory(folder: Path, num_reads: int) -> dict[str, float]:
    """Resident memory of this process after a tenth of the reads and after all."""
    paths = [folder / f"small{suffix}" for suffix in (".mp4", ".gif", ".webp")]
    for path in paths:
        write_video(path, moving_picture(10, 48, 64), 10)
    warm_up = num_reads // 10
    marks = {}
    for number in range(1, num_reads + 1):
        read_video(paths[number % len(paths)], FPS, 64)
        if number in (warm_up, num_reads):
            marks[number] = resident_mebibytes()
    return {"MiB": marks[num_reads], "MiB more than after a tenth": marks[num_reads] - marks[warm_up]}


def moving_picture(num_frames: int, height: int, width: int) -> np.ndarray:
    """Camera pan over a detailed picture with a little noise, (frames, height, width, 3)."""
    random = np.random.default_rng(0)
    down, across = np.mgrid[:height, : width + 2 * num_frames].astype(np.float32)
    waves = [
        np.sin(across / (9 + each) + np.sin(down / (13 - each)) * 3) + np.sin(down / (5 + each)) for each in range(3)
    ]
    scene = 127 + 55 * np.stack(waves, -1)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for number in range(num_frames):
        noise = random.normal(0, 3, (height, width, 1)).astype(np.float32)
        frames[number] = np.clip(scene[:, 2 * number : 2 * number + width] + noise, 0, 255)
    return frames


def resident_mebibytes() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
