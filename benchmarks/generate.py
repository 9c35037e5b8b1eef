"""Benchmark of a whole clip: `python -m benchmarks.generate [--model MODEL]` writes to benchmarks/results/.

The command is timed as users experience it: from its start to the first frame on disk, and to the finished mp4. The
decoding methods are timed in turn. Each part of a clip is compared with its floor: the operations it needs divided by
the machine's matrix rate, or the bytes it must read divided by the bandwidth, whichever takes longer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.decode import show
from benchmarks.machine import alternate, write
from cogvideo.bundle.model import POCKET
from cogvideo.cli import OPENMP_SPINS
from cogvideo.devices import matrix_rate
from cogvideo.generation.decode import Passes
from cogvideo.generation.hierarchy import generate
from cogvideo.generation.request import GenerationSettings
from cogvideo.generation.upscale import enlarge
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.pipeline import CogVideoPipeline
from cogvideo.planning.costs import Phase, clip

Figures = dict[str, Any]

PROMPT = "a large red ball bounces in from the left, bounces twice and leaves on the right, on a beach, slowly"
DEFAULT_SPINS = 300_000
"""Default spin count of GNU OpenMP with at most one thread per core."""
GOALS = {"first frame": 3.0, "finished mp4": 12.0}
WAYS = {
    "one by one": Passes(),
    "parallel frames": Passes(parallel_frames=True),
    **{f"draft {width}": Passes(draft=width) for width in (4, 8, 16, 32)},
}


def command(model: str, rounds: int = 5) -> Figures:
    """Seconds a user waits for the command."""
    found: dict[str, list[float]] = {name: [] for name in GOALS}
    for _ in range(rounds):
        with TemporaryDirectory() as folder:
            first, whole = wait(model, Path(folder))
        found["first frame"].append(first)
        found["finished mp4"].append(whole)
    start_up = {
        "python and PyTorch": ["-c", "import torch"],
        "pipeline ready": ["-c", "import cogvideo.pipeline"],
        "cogvideo --help": ["-m", "cogvideo", "--help"],
    }
    calls = {
        name: lambda each=each: subprocess.run([sys.executable, *each], check=True, capture_output=True)
        for name, each in start_up.items()
    }
    figures: Figures = {
        name: {"seconds": statistics.median(each), "best": min(each), "goal": GOALS[name]}
        for name, each in found.items()
    }
    timed = alternate(calls, rounds, 1).items()
    return figures | {name: {"seconds": each["median"] / 1e3, "best": each["best"] / 1e3} for name, each in timed}


def wait(model: str, folder: Path) -> tuple[float, float]:
    """Seconds until the first frame, and until the command ends."""
    arguments = ["generate", PROMPT, "--model", model, "--output", str(folder), "--seed", "1", "--preview"]
    start = time.perf_counter()
    first = 0.0
    process = subprocess.Popen([sys.executable, "-m", "cogvideo", *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if not first and any(folder.glob("*-frames/[0-9]*.png")):
            first = time.perf_counter() - start
        time.sleep(0.005)
    if process.returncode:
        raise RuntimeError(f"`cogvideo {' '.join(arguments)}` ended with status {process.returncode}")
    return first, time.perf_counter() - start


def waiting(model: str, rounds: int = 3) -> Figures:
    """Seconds for a small clip, alone and next to a program that keeps one core busy: with idle threads that soon
    sleep, as `cogvideo` sets it, and with OpenMP's default."""
    arguments = ["generate", PROMPT, "--model", model, "--seed", "1", "--rounds", "1", "--no-superres", "--output"]

    def draw(spins: int) -> None:
        with TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "cogvideo", *arguments, f"{folder}/x.mp4"]
            environment = os.environ | {"GOMP_SPINCOUNT": str(spins)}
            subprocess.run(command, check=True, capture_output=True, env=environment)

    calls = {"soon asleep": partial(draw, OPENMP_SPINS), "OpenMP's own": partial(draw, DEFAULT_SPINS)}
    found = {"alone": alternate(calls, rounds, 0)}
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) as busy:
        try:
            found["next to a busy program"] = alternate(calls, rounds, 0)
        finally:
            busy.kill()
    return {
        f"{name}, {how}": {"seconds": each["median"] / 1e3, "best": each["best"] / 1e3}
        for name, timed in found.items()
        for how, each in timed.items()
    }


def ways(model: str, rounds: int = 3) -> Figures:
    """Seconds for all codes of a clip by decoding method, and a check that the codes are the same."""
    pipeline = CogVideoPipeline.from_pretrained(model)
    codes: dict[str, torch.Tensor] = {}

    def draw(name: str) -> None:
        frames = list(_stream(pipeline, replace(pipeline.settings, passes=WAYS[name], should_enlarge=False)))
        ordered = sorted(frames, key=lambda frame: frame.place)
        codes[name] = torch.stack([frame.codes for frame in ordered])

    times = alternate({name: lambda name=name: draw(name) for name in WAYS}, rounds, 1)
    return {
        name: {
            "seconds": each["median"] / 1e3,
            "best": each["best"] / 1e3,
            "codes equal to one by one": float((codes[name] == codes["one by one"]).double().mean()),
        }
        for name, each in times.items()
    }


def parts(model: str, rounds: int = 3) -> Figures:
    """Seconds for each part of a clip decoded one code at a time, compared with its floor."""
    pipeline = CogVideoPipeline.from_pretrained(model)
    config = pipeline.model.config
    settings = replace(pipeline.settings, passes=Passes())
    list(_stream(pipeline, replace(settings, should_enlarge=False)))
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, took in _timed(pipeline, settings).items():
            seconds.setdefault(name, []).append(took)
    floors = {phase.name: _floor(phase) for phase in clip(config, settings)}
    if "superres" not in pipeline.model.components:
        del floors["pixels"]  # the floor is computed for enlarged frames
    found: Figures = {}
    for name, each in seconds.items():
        best = min(each)
        found[name] = {"seconds": statistics.median(each), "best": best}
        if name in floors:
            found[name] |= {"floor": floors[name], "share of the floor's speed": floors[name] / best}
    return found


def _stream(pipeline: CogVideoPipeline, settings: GenerationSettings) -> Iterator[Any]:
    return pipeline.stream([PROMPT], [torch.Generator().manual_seed(1)], settings)


def _timed(pipeline: CogVideoPipeline, settings: GenerationSettings) -> dict[str, float]:
    """Time the parts of one clip. They alternate, so each call is timed separately."""
    found: dict[str, float] = {}

    def clocked(name: str, call: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        found[name] = found.get(name, 0.0) + time.perf_counter() - start
        return result

    phases = [phase.name for phase in clip(pipeline.model.config, settings)]
    pixels = Autoencoder.decode_pixels

    def generated(*arguments: Any) -> Iterator[Any]:
        frames = generate(*arguments)
        for place in count():
            frame = clocked(phases[_phase(place)], next, frames, None)
            if frame is None:
                return
            yield frame

    with (
        patch("cogvideo.pipeline.generate", generated),
        patch("cogvideo.pipeline.enlarge", partial(clocked, "super-resolution", enlarge)),
        patch.object(Autoencoder, "decode_pixels", lambda *each: clocked("pixels", pixels, *each)),
    ):
        list(_stream(pipeline, settings))
    return found


def _phase(place: int) -> int:
    """Phase of the n-th finished frame: 1 first frame, 4 key frames, then rounds of 4, 8, and 16."""
    return 0 if place == 0 else 1 if place < 5 else 2 if place < 9 else 3 if place < 17 else 4


def _floor(phase: Phase) -> float:
    """Minimum seconds for any program on this machine."""
    flops = phase.passes * phase.flops + phase.prefill_flops
    reads = phase.passes * phase.bytes_moved("cpu_float32")
    return max(flops / matrix_rate(torch.device("cpu"), torch.float32), reads / read_rate())


def read_rate(mebibytes: int = 512) -> float:
    """Bytes per second of a sum over memory larger than any cache; a model that fits in a cache is read faster."""
    values = torch.ones(mebibytes << 18)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - start)
    return values.nbytes / min(times)


def main() -> None:
    """Run all sections, print the figures, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=POCKET, help="folder, id on the Hub, or pocket")
    model = parser.parse_args().model
    for name, section in {"command": command, "waiting": waiting, "ways": ways, "parts": parts}.items():
        figures = section(model)
        print(f"\n{name}")
        show(figures)
        write("generate", {name: figures})


if __name__ == "__main__":
    main()
