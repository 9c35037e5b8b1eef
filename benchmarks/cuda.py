"""The released size on a CUDA GPU: `python -m benchmarks.cuda` prints a table and writes benchmarks/results/.

Random bfloat16 weights of the `cogvideo` preset. Codes a second against the floor (bytes that a step must read over the
bandwidth of a large copy, measured in the same run), and one whole clip of 33 frames of 480 x 480, stage by stage.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.decode import Figures, show, step_bytes, text
from benchmarks.machine import write
from cogvideo.config import preset
from cogvideo.generation.decode import Passes, decode
from cogvideo.generation.decoder import Condition
from cogvideo.generation.graphs import GraphedDecoder
from cogvideo.generation.sampling import GumbelNoise, Sampling
from cogvideo.generation.upscale import slot_noise, upscale
from cogvideo.layout import SequenceLayout
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.transformer import Base, TemporalChannel, Transformer, inherit, initialize
from cogvideo.models.upscaler import UpscaleChannel, Upscaler, inherit_upscaler

CONFIG = preset("cogvideo")
PASSES = Passes(graphs=True)
DEVICE = torch.device("cuda")


def copy_bandwidth(num_bytes: int = 4 << 30, rounds: int = 10) -> float:
    """Bytes a second of a device-to-device copy, read and written ones together."""
    source, target = (torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE).random_() for _ in range(2))
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * num_bytes / sorted(times)[len(times) // 2]


def models() -> tuple[Transformer, Transformer, Transformer, Upscaler]:
    """Image model, both video stages and super-resolution around one base, built on the device."""
    transformer, layers = CONFIG.transformer, CONFIG.transformer.num_layers
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        base = Base(transformer)
        channels = [
            TemporalChannel(transformer, CONFIG.layout, stage) for stage in (CONFIG.sequential, CONFIG.interpolation)
        ]
        added = UpscaleChannel(transformer, CONFIG.layout, CONFIG.upscaler)
    torch.set_default_dtype(torch.float32)
    initialize(base, layers)
    for channel in channels:
        inherit(channel, base)
    inherit_upscaler(added, base)
    stages = [Transformer(base), *(Transformer(base, channel) for channel in channels)]
    for stage in stages:
        stage.requires_grad_(False)
    return stages[0], stages[1], stages[2], Upscaler(base, added).requires_grad_(False)


def steps(model: Transformer, bandwidth: float, rounds: int = 100) -> Figures:
    """Guided codes a second of the sequential stage, batch 1."""
    layout, figures = SequenceLayout.sequential(CONFIG.layout), {}
    codes = CONFIG.transformer.num_codes
    texts = [text(each, layout.text_slots, codes) for each in (20, 6)]
    run = GraphedDecoder(model, layout, Condition(*texts, 3.0))
    run.prefill(torch.zeros(1, 1, layout.frame_slots, dtype=torch.int64))
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    for rank, slot in ((1, 0), (4, 0)):
        slots = torch.full((1, 1), slot, device=DEVICE)
        run.rectangle(rank, slots, tokens)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            run.rectangle(rank, slots, tokens)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / rounds
        floor = step_bytes(run, rank, slot) / bandwidth
        figures[f"position {rank * layout.frame_slots + slot}"] = {
            "milliseconds": seconds * 1e3,
            "guided codes a second": 1 / seconds,
            "share of floor's speed": floor / seconds,
        }
    return figures


@contextmanager
def timed(figures: Figures, name: str) -> Iterator[None]:
    """Seconds of a stage, and the peak of memory up to its end."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    figures[name] = {"seconds": time.perf_counter() - start, "peak GiB so far": peak}


def clip(image: Transformer, sequential: Transformer, interpolation: Transformer, upscaler: Upscaler) -> Figures:
    """One clip: 33 frames of 480 x 480 over 4 seconds; the shapes of generation, without its texts."""
    figures: Figures = {}
    codes = CONFIG.transformer.num_codes
    labels = torch.arange(codes) % 500

    def draw(
        model: Transformer, layout: SequenceLayout, given: torch.Tensor, scale: float, clusters: int
    ) -> torch.Tensor:
        words = text(20, layout.text_slots, codes, len(given))
        condition = Condition(words, words if scale != 1 else None, scale)
        noise = GumbelNoise([torch.Generator()] * len(given), layout.num_frames, layout.frame_slots, codes)
        drawn = decode(model, layout, condition, given, noise, Sampling(1.05, clusters=clusters), labels, PASSES)
        return torch.stack([frame.codes.cpu() for frame in drawn], 1)

    with timed(figures, "first frame"):
        frames = draw(
            image, SequenceLayout.text_to_image(CONFIG.layout), torch.empty(1, 0, 400, dtype=torch.int64), 1.0, 16
        )
    with timed(figures, "key frames"):
        frames = torch.cat([frames, draw(sequential, SequenceLayout.sequential(CONFIG.layout), frames, 3.0, 12)], 1)
    for number in range(3):
        with timed(figures, f"interpolation round {number + 1}"):
            triples = frames[0].unfold(0, 3, 2).transpose(1, 2)
            between = draw(interpolation, SequenceLayout.interpolation(CONFIG.layout), triples, 1.0, 12).flatten(0, 1)
            wider = frames.new_zeros(1, 2 * frames.shape[1] - 1, frames.shape[2])
            wider[:, ::2], wider[0, 1::2], frames = frames, between, wider
    with timed(figures, "super-resolution"):
        low, layout = frames[0], upscaler.channel.layout
        noise = [slot_noise(torch.Generator(), layout.high_slots, codes, DEVICE) for _ in low]
        words, sampling = text(20, layout.text_slots, codes, len(low)), Sampling(clusters=6, cluster_temperature=0.6)
        high = upscale(upscaler, words, low, noise, sampling, labels, frames_per_pass=4)
    with timed(figures, "pixels"):
        autoencoder = Autoencoder(CONFIG.autoencoder).to(DEVICE, torch.bfloat16)
        autoencoder.decode(high.view(-1, layout.high_grid, layout.high_grid).to(DEVICE), chunk=4)
    figures["whole clip"] = {"seconds": sum(stage["seconds"] for stage in figures.values())}
    return figures


def main() -> None:
    """Measure and write."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.cuda: no CUDA device here; benchmarks.decode measures the CPU")
    bandwidth = copy_bandwidth()
    image, sequential, interpolation, upscaler = models()
    figures: Figures = {"copy": {"bandwidth": {"GB/s": bandwidth / 1e9}}}
    with torch.inference_mode():
        figures["steps"] = steps(sequential, bandwidth)
        show(figures["steps"])
        torch.cuda.reset_peak_memory_stats()
        clip(image, sequential, interpolation, upscaler)  # graphs and libraries set themselves up
        figures["clip"] = clip(image, sequential, interpolation, upscaler)
        show(figures["clip"])
    print("written to", write("cuda", figures))


if __name__ == "__main__":
    main()
