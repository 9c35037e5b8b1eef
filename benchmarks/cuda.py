"""Benchmark of a GPU in eight minutes: `python -m benchmarks.cuda [SECTION ...]` writes to benchmarks/results/.

Uses random bfloat16 weights of the `cogvideo` preset for decoding and a whole clip, and of `pocket` for training. If a
section fails, it reports why, and the next one starts. Every figure is saved as soon as it is measured. `--device cpu`
is a dry run at toy sizes. Needs only PyTorch, numpy, einops, safetensors, jaxtyping, msgspec, and sentencepiece.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.decode import step_bytes, text
from benchmarks.machine import RESULTS, write
from cogvideo.config import CogVideoConfig, SamplingConfig, TransformerConfig, preset
from cogvideo.devices import usable
from cogvideo.generation.decode import Passes, decode
from cogvideo.generation.decoder import Condition, GraphedDecoder, MaskedDecoder
from cogvideo.generation.sampling import GumbelNoise
from cogvideo.generation.upscale import slot_noise, upscale
from cogvideo.layout import SequenceLayout, UpscaleLayout
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.transformer import Base, TemporalChannel, Transformer, inherit, initialize
from cogvideo.models.upscaler import UpscaleChannel, Upscaler, inherit_upscaler
from cogvideo.text import PaddedText, TextTokenizer
from cogvideo.training.objectives.image import ImageBatch, ImageTask
from cogvideo.training.objectives.superres import SuperresBatch, SuperresTask
from cogvideo.training.objectives.task import Objective
from cogvideo.training.objectives.video import VideoBatch, VideoTask
from cogvideo.training.optim import StageOptimization
from cogvideo.training.parallel import ALONE, ParallelSettings
from cogvideo.training.step import Execution, Trainer

Result = tuple[str, dict[str, Any]]
"""A name, and the values measured under it."""

MAX_SECONDS = 420
"""Time after which no section starts; the longest one takes less than the remaining minute."""
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
STAGES = ("image", "sequential", "interpolation", "superres")


@dataclass(frozen=True)
class Bench:
    """Device to measure, and the model sizes for it."""

    device: torch.device

    @property
    def is_gpu(self) -> bool:
        """True unless this is a dry run."""
        return self.device.type == "cuda"

    @property
    def released(self) -> CogVideoConfig:
        """Sizes for decoding and for a clip."""
        return preset("cogvideo") if self.is_gpu else preset("tiny")

    @property
    def trained(self) -> CogVideoConfig:
        """Sizes for training."""
        return preset("pocket") if self.is_gpu else preset("tiny")

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, call: Callable[[], object], rounds: int = 20) -> float:
        """Median time of a call, after a warm-up call."""
        times = []
        for _ in range(1 + (rounds if self.is_gpu else 1)):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append((time.perf_counter() - start) * 1e3)
        return sorted(times[1:])[len(times[1:]) // 2]

    def peak_gib(self) -> float:
        """Peak memory of tensors since the last call, in GiB."""
        if not self.is_gpu:
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def bandwidth(self) -> float:
        """Bytes per second of a large copy, counting both reads and writes."""
        size = (4 << 30) if self.is_gpu else (1 << 24)
        source, target = (torch.ones(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * size / self.milliseconds(lambda: target.copy_(source)) * 1e3


# Sections


def machine(bench: Bench) -> Iterator[Result]:
    """Bandwidth and matrix rate."""
    yield "copy", {"GB/s": bench.bandwidth() / 1e9}
    side = 8192 if bench.is_gpu else 256
    for dtype in (torch.bfloat16, torch.float32):
        one, other = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        yield f"matrix product, {dtype}", {"TFLOP/s": 2 * side**3 / bench.milliseconds(lambda: one @ other) / 1e9}  # noqa: B023


def parity(bench: Bench) -> Iterator[Result]:
    """Released-system test cases on this device, in float64; the image tokenizer in float32."""
    from tests.parity import cases, check

    torch.backends.cudnn.allow_tf32 = False
    for path in cases(GOLDEN) if bench.is_gpu else cases(GOLDEN)[:1]:
        outcome = check(path, device=bench.device)
        yield outcome.name, {"passed": outcome.passed, "worst error": outcome.error, "codes": outcome.equal}
    torch.backends.cudnn.allow_tf32 = True


ATTENTION = {
    "image, small": (8, 12, 320, 320),
    "temporal, pocket": (32, 4, 320, 368),
    "temporal, cogvideo": (2, 48, 2000, 2064),
    "draft of 8, cogvideo": (2, 48, 8, 2064),
    "step, cogvideo": (2, 48, 1, 469),
}
"""Batch, heads, rows and keys."""


def attention(bench: Bench) -> Iterator[Result]:
    """Masked attention in bfloat16 compared with float64, values and gradients, with and without cuDNN."""
    for name, (batch, heads, rows, keys) in ATTENTION.items():
        size = (batch, heads) if bench.is_gpu else (1, 1)
        rows, keys = (rows, keys) if bench.is_gpu else (min(rows, 40), min(keys, 80))
        generator = torch.Generator(bench.device).manual_seed(0)
        q, k, v = (
            torch.randn(*size, slots, 64, generator=generator, device=bench.device, dtype=torch.bfloat16)
            for slots in (rows, keys, keys)
        )
        seen = torch.ones(rows, keys, dtype=torch.bool, device=bench.device).tril(keys - rows)
        truth = _attended([each.double() for each in (q, k, v)], seen)
        for way, enabled in (("default", False), ("cuDNN", True)) if bench.is_gpu else (("default", False),):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            found = _attended([q, k, v], seen)
            errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
            milliseconds = bench.milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=seen))  # noqa: B023
            yield f"{name}, {way}", {"ms forward": milliseconds, "worst error": max(errors)}
        usable(bench.device)


def _attended(operands: list[Tensor], seen: Tensor) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in operands]
    out = F.scaled_dot_product_attention(*leaves, attn_mask=seen)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def decoding(bench: Bench) -> Iterator[Result]:
    """Guided passes of the sequential stage, batch 1, compared with the bandwidth floor, eager and as CUDA graphs."""
    config = bench.released
    bandwidth = bench.bandwidth()
    model = _stages(config, bench.device, ("sequential",))["sequential"]
    layout = SequenceLayout.sequential(config.layout)
    codes = config.transformer.num_codes
    slots = layout.text_slots
    condition = Condition(text(min(20, slots), slots, codes), text(min(6, slots), slots, codes), 3.0)
    kinds = {"eager": MaskedDecoder} | ({"graphs": GraphedDecoder} if bench.is_gpu else {})
    for name, kind in kinds.items():
        run = kind(model, layout, condition)
        run.prefill(torch.zeros(1, 1, layout.frame_slots, dtype=torch.int64))
        for width in (1, 8):
            for rank in (1, layout.num_frames - 1):
                at = torch.arange(width, device=bench.device)[None]
                tokens = torch.zeros(1, width, dtype=torch.int64, device=bench.device)
                milliseconds = bench.milliseconds(lambda: run.rectangle(rank, at, tokens))  # noqa: B023
                floor = step_bytes(run, rank, 0) / bandwidth * 1e3
                values = {"ms": milliseconds, "floor ms": floor, "share of floor's speed": floor / milliseconds}
                yield f"{name}, {width} slots, frame {rank}", values
    yield "memory", {"peak GiB": bench.peak_gib()}


def clip(bench: Bench) -> Iterator[Result]:
    """A whole clip, stage by stage, without text encoding; with CUDA graphs on a GPU."""
    config = bench.released
    models = _stages(config, bench.device, STAGES)
    passes = Passes(draft=8, graphs=bench.is_gpu)
    frames = torch.empty(1, 0, config.layout.grid**2, dtype=torch.int64)
    start = time.perf_counter()

    def figures() -> dict[str, float]:
        bench.wait()
        return {"seconds so far": time.perf_counter() - start, "peak GiB": bench.peak_gib()}

    for stage in ("image", "sequential"):
        drawn = _draw(models[stage], _layout(config, stage), frames, passes, 3.0 if stage == "sequential" else 1.0)
        frames = torch.cat([frames, drawn], 1)
        yield f"{stage} stage", figures()
    for number in range(3 if bench.is_gpu else 1):
        triples = frames[0].unfold(0, 3, 2).transpose(1, 2)
        between = _draw(models["interpolation"], _layout(config, "interpolation"), triples, passes, 1.0).flatten(0, 1)
        wider = frames.new_zeros(1, 2 * frames.shape[1] - 1, frames.shape[2])
        wider[:, ::2], wider[0, 1::2], frames = frames, between, wider
        yield f"interpolation round {number + 1}", figures()
    low = frames[0]
    layout = models["superres"].channel.layout
    codes = config.transformer.num_codes
    noise = [slot_noise(torch.Generator(), layout.high_slots, codes, bench.device) for _ in low]
    words = text(min(20, layout.text_slots), layout.text_slots, codes, len(low))
    sampling = SamplingConfig(clusters=6, cluster_temperature=0.6)
    high = upscale(models["superres"], words, low, noise, sampling, torch.arange(codes) % 500, frames_per_pass=4)
    yield "super-resolution", figures()
    autoencoder = Autoencoder(config.autoencoder).to(bench.device, torch.bfloat16)
    with torch.inference_mode():
        autoencoder.decode(high.view(-1, layout.high_grid, layout.high_grid).to(bench.device), chunk=4)
    yield "pixels", figures()


def _draw(model: Transformer, layout: SequenceLayout, given: Tensor, passes: Passes, scale: float) -> Tensor:
    codes = model.base.config.num_codes
    words = text(min(20, layout.text_slots), layout.text_slots, codes, len(given))
    generators = [torch.Generator().manual_seed(number) for number in range(len(given))]
    noise = GumbelNoise(generators, layout.num_frames, layout.frame_slots, codes)
    condition = Condition(words, words if scale != 1 else None, scale)
    sampling = SamplingConfig(1.05, clusters=12)
    drawn = decode(model, layout, condition, given, noise, sampling, torch.arange(codes) % 500, passes)
    return torch.stack([frame.codes.cpu() for frame in drawn], 1)


def training(bench: Bench) -> Iterator[Result]:
    """Training steps of every stage in bfloat16, with the batch already loaded."""
    for batch in (32, 256) if bench.is_gpu else (2,):
        for stage in STAGES:
            trainer, data = trainer_of(stage, bench.trained, batch, bench.device)
            bench.peak_gib()
            milliseconds = bench.milliseconds(lambda: trainer.step(0, data), 30)  # noqa: B023
            values = {"ms": milliseconds, "samples per second": batch / milliseconds * 1e3}
            yield f"{stage}, batch {batch}", values | {"loss": trainer.figures(1).loss, "peak GiB": bench.peak_gib()}


SECTIONS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "machine": machine,
    "parity": parity,
    "attention": attention,
    "training": training,
    "decoding": decoding,
    "clip": clip,
}


# Models and batches


def _layout(config: CogVideoConfig, stage: str) -> SequenceLayout:
    make = {"image": SequenceLayout.text_to_image, "sequential": SequenceLayout.sequential}
    return make.get(stage, SequenceLayout.interpolation)(config.layout)


def _channel(config: CogVideoConfig, stage: str, base: Base) -> nn.Module:
    """Channel that a stage adds to the base, initialized as in training, with the base's device and dtype."""
    like = base.words.weight
    with like.device:
        if stage == "superres":
            channel: Any = UpscaleChannel(config.transformer, config.layout, config.upscaler).to(like.dtype)
            inherit_upscaler(channel, base)
        else:
            channel = TemporalChannel(config.transformer, config.layout, getattr(config, stage)).to(like.dtype)
            inherit(channel, base, torch.Generator(like.device).manual_seed(1))
    return channel


def _base(config: CogVideoConfig, device: torch.device, dtype: torch.dtype) -> Base:
    torch.set_default_dtype(dtype)
    with device:
        base = Base(config.transformer)
    torch.set_default_dtype(torch.float32)
    initialize(base, config.transformer.num_layers, torch.Generator(device).manual_seed(0))
    return base


def _stages(config: CogVideoConfig, device: torch.device, names: tuple[str, ...]) -> dict[str, Any]:
    """Models that share one base in bfloat16, for inference."""
    base = _base(config, device, torch.bfloat16)
    models = {}
    for name in names:
        channel = None if name == "image" else _channel(config, name, base)
        model = Upscaler(base, channel) if isinstance(channel, UpscaleChannel) else Transformer(base, channel)
        models[name] = model.requires_grad_(False)
    return models


def trainer_of(stage: str, config: CogVideoConfig, batch: int, device: torch.device) -> tuple[Trainer, Any]:
    """Trainer of a stage with random weights, and a batch of random codes."""
    base = _base(config, device, torch.float32)
    sizes = config.transformer
    text_rows = _words(config, batch)
    tokens = _Ids(sizes)
    random = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(sizes.num_codes, (batch, *shape), generator=random)

    channel = None if stage == "image" else _channel(config, stage, base)
    if stage != "image":
        for each in base.requires_grad_(False).parameters():
            each.data = each.data.to(torch.bfloat16 if each.ndim > 1 else torch.float32)
    if stage == "superres":
        layout = UpscaleLayout.of(config.layout, config.upscaler)
        model: nn.Module = Upscaler(base, channel)
        task: Any = SuperresTask(layout, tokens)
        data: Any = SuperresBatch(text_rows(layout.text_slots), codes(*layout.low_sides), codes(layout.high_slots))
    else:
        sequence = _layout(config, stage)
        model = Transformer(base, channel)
        task = ImageTask(sequence, tokens) if stage == "image" else VideoTask(sequence, tokens)
        data = _image_batch(sequence, codes, batch)
        if stage != "image":
            data = VideoBatch(text_rows(sequence.text_slots), codes(sequence.num_frames, *sequence.sides))
    settings = StageOptimization(batch=batch, precision="bfloat16", learning_rate=1e-5)
    ranks = ALONE._replace(device=device)
    return Trainer(Objective(model, task), settings, Execution(), ParallelSettings(), ranks), data


class _Ids(TextTokenizer):
    """Special tokens of a text tokenizer, which are all that a loss needs."""

    def __init__(self, sizes: TransformerConfig) -> None:
        self.num_codes = sizes.num_codes
        self.pad = sizes.pad
        self.start_of_image = sizes.start_of_image


def _words(config: CogVideoConfig, batch: int) -> Callable[[int], PaddedText]:
    return lambda slots: text(min(20, slots), slots, config.transformer.num_codes, batch)


def _image_batch(layout: SequenceLayout, codes: Callable[..., Tensor], batch: int) -> ImageBatch:
    """Batch of the text-to-image task, the most common one."""
    targets = F.pad(codes(layout.frame_slots), (layout.text_slots, 0), value=-1)
    sees = torch.ones(layout.length, layout.length, dtype=torch.bool).tril().expand(batch, -1, -1)
    places = torch.arange(layout.length).expand(batch, -1)
    nothing = torch.empty(batch, 0, dtype=torch.int64)
    return ImageBatch(targets.clamp(min=0), places, sees, targets, torch.zeros_like(targets), nothing)


# The command


def measure(bench: Bench, names: list[str], folder: Path) -> dict[str, Any]:
    """Measure all figures, saving each one immediately."""
    figures: dict[str, Any] = {}
    begin = time.perf_counter()
    for name in names:
        print(f"{name}: {SECTIONS[name].__doc__}", flush=True)
        figures[name] = {}
        if time.perf_counter() - begin > MAX_SECONDS:
            figures[name]["did not run: the time was over"] = {}
        else:
            _run(bench, name, figures, folder)
        write("cuda", figures, folder)
    return figures


def _run(bench: Bench, name: str, figures: dict[str, Any], folder: Path) -> None:
    start = time.perf_counter()
    try:
        for entry, values in SECTIONS[name](bench):
            figures[name][entry] = values
            print(f"  {entry}: {', '.join(f'{key} {value:.4g}' for key, value in values.items())}", flush=True)
            write("cuda", figures, folder)
    except Exception:  # the other sections may still succeed
        figures[name]["failed"] = {"traceback": traceback.format_exc()}
        print(figures[name]["failed"]["traceback"], flush=True)
    figures[name]["section"] = {"seconds": time.perf_counter() - start}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and write its results; returns 1 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", nargs="*", help=f"any of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal at toy sizes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    if unknown := set(options.section) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}, expected any of {', '.join(SECTIONS)}")
    try:
        device = usable(options.device)
    except ValueError as error:
        parser.error(str(error))
    figures = measure(Bench(device), options.section or list(SECTIONS), options.out)
    return int(any("failed" in section for section in figures.values()))


if __name__ == "__main__":
    raise SystemExit(main())
