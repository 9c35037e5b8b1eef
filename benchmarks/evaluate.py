"""Benchmark of features for FVD: `python -m benchmarks.evaluate` prints a table and writes to benchmarks/results/.

The whole extraction (files to features) is compared with I3D's convolutions alone, each run on its own input, and with
the rate of a large matrix product. Weights are random, since their values do not affect the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import write
from cogvideo.evaluation.features import Encode, Extractor, FeatureInput, Judge
from cogvideo.evaluation.footage import Reading, draw
from cogvideo.evaluation.networks.i3d import I3D
from cogvideo.evaluation.protocols import PROTOCOLS
from cogvideo.media.video import write_video

CLIPS, SIZE, ROUNDS = 4, 128, 3
SIDE = 2048
"""Side of the square matrix."""


def seconds(call: Callable[[], object]) -> float:
    """Best processor time of several calls after a warm-up; wall time would include other programs on the machine."""
    times = []
    for _ in range(1 + ROUNDS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times[1:])


def network() -> I3D:
    """I3D with random weights."""
    torch.manual_seed(0)
    return I3D().eval()


def convolutions(model: I3D, clip: Tensor) -> tuple[float, float]:
    """Seconds and operations of all convolutions of a pass, run one after the other and nothing else."""
    inputs: list[tuple[Tensor, Tensor, Any]] = []
    plain = F.conv3d

    def recorded(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        inputs.append((x, weight, others))
        return plain(x, weight, *others)

    F.conv3d = recorded
    model(clip)
    F.conv3d = plain
    operations = sum(2 * plain(x, weight, *others).numel() * weight[0].numel() for x, weight, others in inputs)
    return seconds(lambda: [plain(x, weight, *others) for x, weight, others in inputs]), operations


def matrix_rate() -> float:
    """Operations per second of a large matrix product."""
    matrix = torch.randn(SIDE, SIDE)
    return 2 * SIDE**3 / seconds(lambda: matrix @ matrix)


def extraction(folder: Path) -> dict[str, Any]:
    """Clips per second from files, and the figures they are compared with."""
    random = np.random.default_rng(0)
    for number in range(CLIPS):
        frames = random.integers(0, 256, (16, SIZE // 8, SIZE // 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        write_video(folder / f"{number}.mp4", frames, 25)
    protocol, model = PROTOCOLS["tats"], network()
    reading = Reading(protocol)
    excerpts = draw(str(folder), reading, "start", CLIPS, 0).excerpts
    clip = protocol.to_i3d(reading.read(excerpts[0], None))[None]

    def load(device: str) -> Encode:
        return lambda clips: model(torch.stack([protocol.to_i3d(frames, device) for (frames,) in clips]))

    extractor = Extractor(Judge(("random",), load), reading)
    samples = [FeatureInput((each,), folder / f"{number}.npy") for number, each in enumerate(excerpts)]
    alone, operations = convolutions(model, clip)
    all_of_it = seconds(lambda: extractor.make(samples)) / CLIPS
    passes = seconds(lambda: model(clip))
    rate = matrix_rate()
    return {
        "clips a second": 1 / all_of_it,
        "a pass alone": 1 / passes,
        "convolutions alone": 1 / alone,
        "share of the convolutions' speed": alone / all_of_it,
        "share of the matrix rate": operations / all_of_it / rate,
        "GFLOP a clip": operations / 1e9,
    }


def main() -> None:
    """Measure on one thread."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, torch.inference_mode():
        figures = extraction(Path(folder))
    for name, value in figures.items():
        print(f"  {name:34} {value:.3g}")
    print("written to", write("evaluate", {"16 frames, 128 x 128, one thread": figures}))


if __name__ == "__main__":
    main()
