"""Benchmark of training: `python -m benchmarks.train [SECTION ...]` writes to benchmarks/results/.

Every figure with a goal is a ratio of measurements that alternate in the same run: against the plain step of
benchmarks/plain_training.py, which has the same weights and loss, or against the machine's matrix rate.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.decode import LAYOUT, TEXT_TOKENS, Figures, show, text
from benchmarks.machine import alternate, write
from benchmarks.plain_training import DenseMasks, dense_masks, plain_attention, plain_loss
from benchmarks.reading import resident_mebibytes
from cogvideo.config import LayoutConfig, StageConfig, TransformerConfig, preset
from cogvideo.devices import matrix_rate
from cogvideo.layout import SequenceLayout
from cogvideo.models.attention import attend, split_heads
from cogvideo.models.plans import full_pass
from cogvideo.models.transformer import Base, TemporalChannel, Transformer, inherit, initialize
from cogvideo.planning.training import flops_per_position, training
from cogvideo.training.objectives.task import Objective
from cogvideo.training.objectives.video import VideoBatch, VideoTask
from cogvideo.training.optim import StageOptimization, trained
from cogvideo.training.parallel import ALONE, ParallelSettings, clip_gradients
from cogvideo.training.step import Execution, Trainer

Stage = Literal["sequential", "interpolation"]
Precision = Literal["float32", "bfloat16"]
PRECISIONS: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = replace(preset("cogvideo").transformer, num_layers=8, hidden=512, num_heads=8)
"""Model sizes of the steps, with the released vocabulary, for which the plain step computes all logits."""
WINDOW = 10
CASES: dict[str, tuple[Stage, int]] = {
    "sequential": ("sequential", 0),
    "sequential, windowed": ("sequential", WINDOW),
    "interpolation, windowed": ("interpolation", WINDOW),
}
"""Stage and window."""
RELEASED = ("sequential", "interpolation, windowed")
"""Cases of the released model whose memory is measured. Key frames need the same memory with windows."""
CLOSE = {"float32": 1e-4, "bfloat16": 1e-3}
"""Allowed difference between the two losses, which are near ten."""
ATTENTION_GOALS = {0: 2.5, WINDOW: 6.0}
STEP_GOAL, MEMORY_GOAL, UTILIZATION_GOAL = 2.0, 0.5, 0.4
CPU = torch.device("cpu")


# A stage in training


class Case(NamedTuple):
    """A stage in training, with everything the plain step needs."""

    trainer: Trainer
    model: Transformer
    layout: SequenceLayout
    batch: VideoBatch

    @property
    def positions(self) -> int:
        """Positions per step."""
        return len(self.batch.codes) * self.layout.length

    def step(self) -> None:
        """Training step of this package."""
        self.trainer.step(0, self.batch)

    def masks(self) -> DenseMasks:
        """Masks of the plain step, built once and not timed."""
        dtype = self.trainer.settings.dtype
        return dense_masks(self.layout, self.model.window, self.batch.text.mask, dtype)

    def plain_loss(self, masks: DenseMasks) -> Tensor:
        """Loss of the plain step."""
        with self.trainer.precision():
            return plain_loss(self.model, self.layout, masks, self.batch)

    def plain_step(self, masks: DenseMasks) -> None:
        """Plain training step with the same optimizer."""
        self.plain_loss(masks).backward()
        clip_gradients(trained(self.model), self.trainer.settings.clip)
        for optimizer in self.trainer.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def make(
    stage: Stage,
    window: int,
    precision: Precision,
    sizes: TransformerConfig = SIZES,
    layout: LayoutConfig = LAYOUT,
    batch: int = 1,
    compile: bool = False,
    device: torch.device = CPU,
) -> Case:
    """Create a stage with random weights on a frozen base, in the dtypes of training, and a random batch."""
    settings = StageOptimization(batch=batch, precision=precision, learning_rate=1e-6)
    with device:
        base = Base(sizes)
        channel = TemporalChannel(sizes, layout, StageConfig(window))
    generator = torch.Generator(device).manual_seed(0)
    initialize(base, sizes.num_layers, generator)
    inherit(channel, base, generator)
    for each in base.requires_grad_(False).parameters():
        each.data = each.data.to(settings.dtype if each.ndim > 1 else torch.float32)
    model = Transformer(base, channel)
    sequence = getattr(SequenceLayout, stage)(layout)
    task = VideoTask(sequence, SimpleNamespace(start_of_image=sizes.start_of_image))
    ranks = ALONE._replace(device=device)
    trainer = Trainer(Objective(model, task), settings, Execution(compile=compile), ParallelSettings(), ranks)
    codes = torch.randint(0, sizes.num_codes, (batch, sequence.num_frames, *sequence.sides))
    words = text(TEXT_TOKENS, sequence.text_slots, sizes.num_codes, batch)
    return Case(trainer, model, sequence, VideoBatch(words, codes))


def times_faster(ours: dict[str, float], plain: dict[str, float], goal: float) -> dict[str, float]:
    """Our time and the plain one in milliseconds, their ratio, and its goal."""
    return {
        "ms": ours["median"],
        "plain ms": plain["median"],
        "times faster": plain["median"] / ours["median"],
        "times faster (best)": plain["best"] / ours["best"],
        "goal": goal,
    }


# Attention alone


def attention(rounds: int = 7) -> Figures:
    """Attention of a block, forward and backward, from fused projections: 64 text + 5 x 400 slots, 4 heads of 64.

    Measures the temporal channel alone, and both channels of a block; with windows, the mean over both kinds of blocks.
    Uses one thread, since other load slows many short parallel loops far more than a few long ones.
    """
    figures: Figures = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for precision, dtype in PRECISIONS.items():
        for window, goal in ATTENTION_GOALS.items():
            calls = _attention_calls(window, dtype)
            times = alternate(calls, rounds, 1)
            kinds = 2 if window else 1
            for channels in ("temporal channel", "both channels"):
                ours, plain = (
                    {key: value / kinds for key, value in times[name].items()}
                    for name in (channels, f"plain, {channels}")
                )
                name = f"{precision}, {'windowed' if window else 'dense'}, {channels}"
                figures[name] = times_faster(ours, plain, goal)
    torch.set_num_threads(threads)
    return figures


def _attention_calls(window: int, dtype: torch.dtype, heads: int = 4) -> dict[str, Callable[[], object]]:
    """Calls for one block of each kind, after checking that outputs and gradients agree."""
    layout = SequenceLayout.sequential(LAYOUT)
    words = text(TEXT_TOKENS, LAYOUT.text_slots)
    masks = dense_masks(layout, window, words.mask, dtype)
    plan = full_pass(layout, window, words.mask, dtype, layout.num_frames)
    fused = [torch.randn(1, layout.length, 3 * heads * 64, dtype=dtype).requires_grad_() for _ in range(2)]

    def ours(kind: int, both: bool) -> list[Tensor]:
        (q, kv), spatial = split_heads(fused[0], heads), split_heads(fused[1], heads)
        temporal = attend(q[:, :, layout.text_slots :], kv, plan.temporal[kind])
        return [temporal, attend(*spatial, plan.spatial)] if both else [temporal]

    def plain(kind: int, both: bool) -> list[Tensor]:
        temporal = plain_attention(fused[0], masks.temporal[kind], heads)[:, layout.text_slots :]
        return [temporal, plain_attention(fused[1], masks.spatial, heads)] if both else [temporal]

    def run(way: Callable[[int, bool], list[Tensor]], both: bool) -> list[Tensor]:
        results: list[Tensor] = []
        for kind in range(len(plan.temporal)):
            outs = way(kind, both)
            results += [*outs, *torch.autograd.grad(outs, fused[: len(outs)], [torch.ones_like(out) for out in outs])]
        return results

    for one, other in zip(run(ours, True), run(plain, True), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=1e-4 if dtype == torch.float32 else 0.1)
    return {
        f"{'' if way is ours else 'plain, '}{name}": partial(run, way, both)
        for name, both in (("temporal channel", False), ("both channels", True))
        for way in (ours, plain)
    }


# Whole steps


def steps(rounds: int = 3) -> Figures:
    """Training step at hidden 512, 8 layers, grid 20, batch 1, frozen base, with the same AdamW and clipping in both.

    Utilization is 6 operations per trained and 4 per frozen matrix parameter (including the code head at every
    position), times positions per second, divided by the matrix rate of the same run.
    """
    figures: Figures = {}
    for precision in PRECISIONS:
        figures |= _steps(precision, rounds)
    return figures


def _steps(precision: Precision, rounds: int) -> Figures:
    """Time the plain step once per stage, since windows only change the values of its masks."""
    cases = {name: make(*case, precision) for name, case in CASES.items()}
    calls: dict[str, Callable[[], object]] = {}
    rates: list[float] = []
    for name, case in cases.items():
        masks = case.masks()
        _check_losses(case, masks)
        calls[name] = case.step
        calls.setdefault(f"plain {CASES[name][0]}", partial(case.plain_step, masks))
    calls["rate"] = lambda: rates.append(matrix_rate.__wrapped__(CPU, PRECISIONS[precision]))
    times = alternate(calls, rounds, 0)
    rate = max(rates)
    return {
        f"{precision}, {name}": times_faster(times[name], times[f"plain {CASES[name][0]}"], STEP_GOAL)
        | _speed(case, times[name]["median"] / 1e3, rate)
        | _frozen(case)
        for name, case in cases.items()
    }


def _check_losses(case: Case, masks: DenseMasks) -> None:
    with torch.no_grad():
        ours = float(case.trainer.measure(case.batch).loss.mean())
        plain = float(case.plain_loss(masks))
    limit = CLOSE[case.trainer.settings.precision]
    assert abs(ours - plain) < limit, f"the losses are {ours} and {plain}, expected the same within {limit}"


def _speed(case: Case, seconds: float, rate: float) -> dict[str, float]:
    tokens = case.positions / seconds
    work = flops_per_position(case.model)
    return {"tokens per second": tokens, "utilization": tokens * work / rate, "matrix GFLOP/s": rate / 1e9}


def _frozen(case: Case) -> dict[str, float]:
    """Bytes that the frozen base takes beyond its weights after a step and another backward pass: none."""
    case.trainer.measure(case.batch).loss.mean().backward()
    parameters = [each for each in case.model.parameters() if not each.requires_grad]
    (used,) = case.trainer.optimizers
    states = [value for each in parameters for value in used.state.get(each, {}).values()]
    gradients = sum(each.grad.nbytes for each in parameters if each.grad is not None)
    optimizer = sum(each.nbytes for each in states)
    assert parameters, "the base is not frozen"
    assert gradients == optimizer == 0, f"frozen parameters have {gradients} and {optimizer} bytes, expected none"
    return {"frozen gradient bytes": gradients, "frozen optimizer bytes": optimizer}


# Memory


def memory() -> Figures:
    """Peak memory of the first step above the weights, in a fresh process, in MiB.

    It includes gradients and optimizer moments, which are the same in both, and the masks of the plain step.
    """
    figures: Figures = {}
    for precision in PRECISIONS:
        for name in RELEASED:
            ours, plain = (_in_fresh_process(*CASES[name], precision, plainly) for plainly in (False, True))
            theirs = {f"plain {key}": value for key, value in plain.items()}
            shares = {f"share of plain {key}": ours[key] / plain[key] for key in ours}
            figures[f"{precision}, {name}"] = ours | theirs | shares | {"goal": MEMORY_GOAL}
    return figures


def _in_fresh_process(stage: Stage, window: int, precision: Precision, plainly: bool) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peaks, stage, window, precision, plainly).result()


def _peaks(stage: Stage, window: int, precision: Precision, plainly: bool) -> dict[str, float]:
    case = make(stage, window, precision)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak memory after building the model
    before = resident_mebibytes()
    if plainly:
        case.plain_step(case.masks())
    else:
        case.step()
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return {"process": peak - before}


# GPUs


def cuda(rounds: int = 10) -> Figures:
    """Steps of the sequential stage on a CUDA GPU, bfloat16: `small`, and `cogvideo` with as many layers as fit."""
    if not torch.cuda.is_available():
        return {"did not run: there is no CUDA GPU here": {}}
    device = torch.device("cuda")
    batch = 2
    wide = replace(preset("cogvideo").transformer, num_layers=_layers_that_fit(batch, device))
    sizes = {
        "small": (preset("small").transformer, preset("small").layout, 32),
        f"cogvideo, {wide.num_layers} layers": (wide, preset("cogvideo").layout, batch),
    }
    return {
        f"{name}{', compiled' if compile else ''}": gpu_step(*size, compile, device, rounds)
        for compile in (False, True)
        for name, size in sizes.items()
    }


def _layers_that_fit(batch: int, device: torch.device) -> int:
    """Number of layers of the `cogvideo` preset that fit by the estimated memory of a step, with a tenth to spare."""
    whole = preset("cogvideo")
    free = 0.9 * torch.cuda.mem_get_info(device)[0]
    for layers in range(whole.transformer.num_layers, 2, -2):
        config = replace(whole, transformer=replace(whole.transformer, num_layers=layers))
        if training(config, "sequential", batch, autocast=True).total < free:
            return layers
    return 2


def gpu_step(
    sizes: TransformerConfig, layout: LayoutConfig, batch: int, compile: bool, device: torch.device, rounds: int
) -> dict[str, float]:
    """Speed of consecutive steps, synchronized with the device at both ends."""
    gc.collect()  # frees the previous model
    torch.compiler.reset()  # otherwise sizes are treated as dynamic
    case = make("sequential", 0, "bfloat16", sizes, layout, batch, compile, device)

    def run() -> None:
        for _ in range(rounds):
            case.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = alternate({"steps": run}, 1, 1)["steps"]["median"] / 1e3 / rounds
    speed = _speed(case, seconds, matrix_rate(device, torch.bfloat16))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return {"ms": seconds * 1e3, **speed, "goal": UTILIZATION_GOAL, "peak GiB so far": peak}


SECTIONS: dict[str, Callable[[], Figures]] = {
    "attention": attention,
    "steps": steps,
    "memory": memory,
    "cuda": cuda,
}


def main() -> None:
    """Run the sections named on the command line; all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", nargs="*", default=list(SECTIONS), help=f"any of {', '.join(SECTIONS)}")
    chosen: list[str] = parser.parse_args().section
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}, expected any of {', '.join(SECTIONS)}")
    for name in chosen:
        print(f"{name}: {SECTIONS[name].__doc__}", flush=True)
        figures: dict[str, Any] = SECTIONS[name]()
        show(figures)
        print("written to", write("train", {name: figures}), flush=True)


if __name__ == "__main__":
    main()
