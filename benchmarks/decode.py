"""Benchmark of decoding: `python -m benchmarks.decode [SECTION ...]` writes to benchmarks/results/.

Every figure with a goal is a ratio of measurements that alternate in the same run: against the floor (bytes that a step
must read, divided by the machine's bandwidth), or against the plain decoder of benchmarks/plain.py.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import alternate, write
from benchmarks.plain import PlainContext, plain_step
from benchmarks.toy import toy_stages
from cogvideo.config import LayoutConfig, SamplingConfig, StageConfig, TransformerConfig, preset
from cogvideo.generation.decode import Passes, decode
from cogvideo.generation.decoder import Condition, Decoder
from cogvideo.generation.sampling import GumbelNoise
from cogvideo.layout import SequenceLayout
from cogvideo.models.plans import full_pass
from cogvideo.models.transformer import Base, TemporalChannel, Transformer, inherit, initialize
from cogvideo.models.upscaler import UpscaleChannel, Upscaler
from cogvideo.packing import pack
from cogvideo.text import PaddedText

Figures = dict[str, Any]

LAYOUT = LayoutConfig(grid=20, num_frames=5, text_slots=64, image_text_slots=64, frame_position=512)
NUM_CODES = 20_000
TEXT_TOKENS, GUIDE_TOKENS, SCALE = 20, 6, 3.0


def build(
    hidden: int,
    layers: int,
    heads: int,
    window: int,
    dtype: torch.dtype,
    layout: LayoutConfig = LAYOUT,
    codes: int = NUM_CODES,
) -> Transformer:
    """A video stage with random weights."""
    config = TransformerConfig(layers, hidden, heads, codes + 200, codes, codes + 1, codes, 1024)
    base = Base(config)
    channel = TemporalChannel(config, layout, StageConfig(window))
    generator = torch.Generator().manual_seed(0)
    initialize(base, layers, generator)
    inherit(channel, base, generator)
    return Transformer(base, channel).to(dtype).requires_grad_(False)


def packed(model: Transformer) -> Transformer:
    """The same model with weights packed for inference on this CPU."""
    for part in (model.base, model.channel):
        if part is not None:
            pack(part)
    return model


def text(tokens: int, slots: int, codes: int = NUM_CODES, batch: int = 1) -> PaddedText:
    """Text with this number of real tokens, right-aligned."""
    return PaddedText(torch.full((batch, slots), codes + 2), (torch.arange(slots) >= slots - tokens).expand(batch, -1))


def decoder(model: Transformer, layout: SequenceLayout, batch: int = 1, guided: bool = True) -> Decoder:
    """Decoder after a prefill of its given frames."""
    codes = model.base.config.num_codes
    slots = layout.text_slots
    texts = [text(min(each, slots), slots, codes, batch) for each in (TEXT_TOKENS, GUIDE_TOKENS)]
    run = Decoder(model, layout, Condition(*texts, SCALE) if guided else Condition(texts[0]))
    run.prefill(torch.randint(0, codes, (batch, max(1, layout.num_bidirectional), layout.frame_slots)))
    return run


def stepper(run: Decoder, rank: int, slot: int) -> Callable[[], object]:
    """Call that runs one step at a position."""
    tokens = torch.zeros(len(run.condition.text.tokens), 1, dtype=torch.int64)
    return lambda: run.step([rank * run.layout.frame_slots + slot], tokens)


def step_bytes(run: Decoder, rank: int, slot: int) -> int:
    """Bytes that a step must read: weights of the layers and the head, and the visible part of the caches."""
    model = run.model
    config = run.model.base.config
    assert model.channel is not None
    width = model.base.words.weight.element_size()
    weights = (12 + 4) * config.hidden**2 * config.num_layers + config.num_codes * config.hidden
    at = rank * run.layout.frame_slots + slot
    temporal = sum(
        len(cache.layers)
        * (TEXT_TOKENS + GUIDE_TOKENS + 2 * (cache.places[at] + 1 - cache.first_keys[at] - cache.map.text_slots))
        for cache in run.temporal
    )
    spatial = config.num_layers * (TEXT_TOKENS + GUIDE_TOKENS + 2 * (slot + 1))
    return weights * width + 2 * (temporal + spatial) * config.hidden * run.spatial.layers[0].element_size()


def guided_steps(rounds: int = 15) -> Figures:
    """Guided decoding, hidden 1024, 12 layers, 16 heads, grid 20, batch 1, compared with floor and plain decoder."""
    figures: Figures = {}
    for window in (0, 10):
        for position in (400, 1600):
            for name, values in _guided_steps(window, position, rounds).items():
                figures[f"{name}{', windowed' if window else ''} at {position}"] = values
    return figures


def _guided_steps(window: int, position: int, rounds: int) -> Figures:
    rank, slot = divmod(position, LAYOUT.grid**2)
    plain = build(1024, 12, 16, window, torch.float32)
    runs = {
        "float32": decoder(packed(copy.deepcopy(plain)), SequenceLayout.sequential(LAYOUT)),
        "bfloat16": decoder(packed(copy.deepcopy(plain).bfloat16()), SequenceLayout.sequential(LAYOUT)),
    }
    plains = {"plain float32": plain, "plain bfloat16": copy.deepcopy(plain).bfloat16()}
    calls = {name: stepper(run, rank, slot) for name, run in runs.items()}
    calls |= {name: _plain_call(model, position) for name, model in plains.items()}
    read = torch.ones(1 << 28)  # zeros would share one page
    calls["read"] = read.sum
    with torch.inference_mode():
        times = alternate(calls, rounds)
    read_bytes = read.numel() * read.element_size()
    figures: Figures = {name: times[name] for name in plains}
    figures["read"] = {f"GB/s ({kind})": read_bytes / each / 1e6 for kind, each in times["read"].items()}
    for name, run in runs.items():
        share = step_bytes(run, rank, slot) / read_bytes
        figures[name] = times[name] | {
            "floor": share * times["read"]["median"],
            "share of floor's speed": share * times["read"]["median"] / times[name]["median"],
            "share (best)": share * times["read"]["best"] / times[name]["best"],
            "times plain float32": times["plain float32"]["median"] / times[name]["median"],
            "times plain bfloat16": times["plain bfloat16"]["median"] / times[name]["median"],
        }
    return figures


def _plain_call(model: Transformer, position: int) -> Callable[[], object]:
    slots = LAYOUT.grid**2
    dtype = model.base.words.weight.dtype
    token = torch.zeros(1, 1, dtype=torch.int64)
    contexts = [PlainContext(model, each, position, dtype) for each in (TEXT_TOKENS, GUIDE_TOKENS)]
    start = position // slots * slots
    return lambda: plain_step(model, contexts, token, LAYOUT.frame_position + position, start, SCALE)


def host_overhead(rounds: int = 100) -> Figures:
    """Step of a deep, narrow model on a tiny grid, which is almost all overhead."""
    layout = LayoutConfig(grid=4, num_frames=5, text_slots=16, image_text_slots=16, frame_position=16)
    run = decoder(packed(build(32, 48, 2, 0, torch.float32, layout, 512)), SequenceLayout.sequential(layout))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = alternate({"milliseconds": stepper(run, 1, 5)}, rounds, 20)["milliseconds"]
    torch.set_num_threads(threads)
    return {"48 layers, hidden 32, 1 thread": times}


def batches(rounds: int = 6) -> Figures:
    """Guided steps at position 400 by batch size."""
    model = packed(build(1024, 12, 16, 0, torch.float32))
    sequential = SequenceLayout.sequential(LAYOUT)
    calls = {f"batch {batch}": stepper(decoder(model, sequential, batch), 1, 0) for batch in (1, 2, 4, 8)}
    times = alternate(calls, rounds)
    return {
        name: {"milliseconds": each["median"], "a sample": each["median"] / int(name.split()[1])}
        for name, each in times.items()
    }


def drafts(rounds: int = 15) -> Figures:
    """Drafting passes against single steps for the same number of samples, `pocket` sizes, middle of the last frame."""
    figures: Figures = {}
    for grid in (8, 12, 16):
        layout = LayoutConfig(grid, num_frames=5, text_slots=48, image_text_slots=48, frame_position=64)
        key_frames, between = (packed(build(256, 8, 4, each, torch.float32, layout, 1024)) for each in (0, 4))
        runs = {"key frames, guided": decoder(key_frames, SequenceLayout.sequential(layout))}
        for batch in (2, 8):
            run = decoder(between, SequenceLayout.interpolation(layout), batch, guided=False)
            runs[f"interpolation, batch {batch}"] = run
        for name, run in runs.items():
            calls = {"step": stepper(run, 4, grid * grid // 2)}
            calls |= {f"{width} a sample": _drafting(run, width) for width in (1, 2, 4, 8)}
            times = alternate(calls, rounds)
            best = {call: each["best"] / times["step"]["best"] for call, each in times.items()}
            figures[f"{grid} x {grid}, {name}"] = {"step, ms": times["step"]["best"]} | best
    return figures


def _drafting(run: Decoder, width: int) -> Callable[[], object]:
    """A drafting pass in which each sample is two slots ahead of the next."""
    slots = run.layout.frame_slots
    batch = len(run.condition.text.tokens)
    fed = torch.zeros(batch, slots + 1, dtype=torch.int64)
    starts = [slots // 2 - 2 * sample for sample in range(batch)]
    return lambda: run.draft(4, [range(start, start + width) for start in starts], fed)


def frames() -> Figures:
    """Time and memory of a whole sequential pass, windowed or not, by number of frames, each in a fresh process."""
    figures = {}
    for window in (10, 0):
        for count in (5, 9, 17, 33):
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                seconds, mebibytes = pool.submit(_whole_pass, window, count).result()
            figures[f"window {window}, {count} frames"] = {"seconds": seconds, "MiB above the weights": mebibytes}
    return figures


def _whole_pass(window: int, count: int) -> tuple[float, float]:
    layout = LayoutConfig(grid=20, num_frames=count, text_slots=64, image_text_slots=64, frame_position=512)
    model = build(256, 4, 4, window, torch.float32, layout, 512)
    sequence = SequenceLayout.sequential(layout)
    _reset_peak()
    before = _peak_mebibytes()
    start = time.perf_counter()
    with torch.inference_mode():
        words = text(TEXT_TOKENS, 64, 512)
        plan = full_pass(sequence, window, words.mask, torch.float32, count)
        tokens = torch.cat([words.tokens, torch.zeros(1, count * 400, dtype=torch.int64)], 1)
        positions = torch.cat([sequence.text_positions(words.mask)[0], sequence.frame_positions(range(count))])
        model(tokens, positions[None], plan)
    return time.perf_counter() - start, _peak_mebibytes() - before


def _reset_peak() -> None:
    """Reset the peak memory after building the model."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mebibytes() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def superres() -> Figures:
    """A frame of 60 x 60, or a quarter of it, through one block of the released size, each in a fresh process."""
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        for grid in (10, 20):
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                seconds, mebibytes = pool.submit(_upscale, grid, dtype).result()
            name = f"{str(dtype).removeprefix('torch.')}, {3 * grid} x {3 * grid}"
            figures[name] = {
                "seconds a block": seconds,
                "seconds for 48": 48 * seconds,
                "MiB above the weights": mebibytes,
            }
    return figures


def _upscale(grid: int, dtype: torch.dtype) -> tuple[float, float]:
    small = {"num_layers": 1, "vocab_size": 1000, "num_codes": 900, "pad": 900, "start_of_image": 901}
    config = replace(preset("cogvideo").transformer, **small)
    layout = LayoutConfig(grid, 5, 64, 64, 512)
    base = Base(config)
    channel = UpscaleChannel(config, layout, preset("cogvideo").upscaler)
    model = Upscaler(base, channel).to(dtype).requires_grad_(False)
    words = text(TEXT_TOKENS, channel.layout.text_slots, 900)
    codes = torch.zeros(1, grid * grid, dtype=torch.int64)
    _reset_peak()
    before = _peak_mebibytes()
    with torch.inference_mode():
        model(*words, codes)
        start = time.perf_counter()
        model(*words, codes)
    return time.perf_counter() - start, _peak_mebibytes() - before


def passes() -> Figures:
    """Passes per code by decoding method, on a small model trained for a minute so that its codes are meaningful."""
    figures: Figures = {}
    for stage, (model, layout, condition, given) in toy_stages().items():
        codes = {}
        for name, way in {
            "one by one": Passes(),
            "parallel frames": Passes(parallel_frames=True),
            **{f"draft {width}": Passes(draft=width) for width in (4, 8, 16, 32)},
        }.items():
            noise = GumbelNoise(
                [torch.Generator().manual_seed(seed) for seed in range(len(given))],
                layout.num_frames,
                layout.frame_slots,
                model.base.config.num_codes,
            )
            start = time.perf_counter()
            drawn = list(decode(model, layout, condition, given, noise, SamplingConfig(), passes=way))
            seconds = time.perf_counter() - start
            codes[name] = torch.stack([frame.codes for frame in drawn])
            drawn_slots = len(drawn) * layout.frame_slots
            figures[f"{stage}, {name}"] = {
                "passes": drawn[-1].passes,
                "passes a code": drawn[-1].passes / drawn_slots,
                "seconds": seconds,
                "codes equal to one by one": float((codes[name] == codes["one by one"]).double().mean()),
            }
    return figures


def imports(rounds: int = 7) -> Figures:
    """Time of whole processes from start to exit."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "import cogvideo": ["-c", "import cogvideo"],
        "cogvideo --help": ["-m", "cogvideo", "--help"],
        "import torch": ["-c", "import torch"],
        "model class ready": ["-c", "from cogvideo.models.transformer import Transformer"],
    }
    calls = {
        name: lambda each=each: subprocess.run([sys.executable, *each], check=True, capture_output=True)
        for name, each in commands.items()
    }
    return {
        name: {"seconds": each["median"] / 1e3, "best": each["best"] / 1e3}
        for name, each in alternate(calls, rounds, 1).items()
    }


SECTIONS: dict[str, Callable[[], Figures]] = {
    "guided_steps": guided_steps,
    "host_overhead": host_overhead,
    "batches": batches,
    "drafts": drafts,
    "frames": frames,
    "superres": superres,
    "passes": passes,
    "imports": imports,
}


def show(figures: Figures) -> None:
    """Print the figures of a section."""
    for name, values in figures.items():
        print(f"  {name:32}", "  ".join(f"{key} {value:.3g}" for key, value in values.items()), flush=True)


def main() -> None:
    """Run the sections named on the command line; all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", nargs="*", default=list(SECTIONS), help=f"any of {', '.join(SECTIONS)}")
    chosen = parser.parse_args().section
    figures = {}
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}, expected any of {', '.join(SECTIONS)}")
    for name in chosen:
        function = SECTIONS[name]
        print(f"{name}: {function.__doc__}", flush=True)
        figures[name] = function()
        show(figures[name])
    print("written to", write("decode", figures))


if __name__ == "__main__":
    main()
