"""`cogvideo plan`: memory and time of training on a number of GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from json import dumps

from rich.console import Console
from rich.table import Table

from cogvideo.bundle.format import Manifest
from cogvideo.commands.terminal import table
from cogvideo.planning.costs import STAGES
from cogvideo.planning.plan import GIB, PAPER, Cluster, StagePlan, stage_plan


def plan(target: str = "cogvideo", /, *, machines: Cluster, json: bool = False, ema: float = 0.0) -> None:
    """Estimate memory and time of training on a number of GPUs. No GPU is needed for this.

    The plan covers the image model, key frames (sequential) and interpolation, not super-resolution. Precision is
    bfloat16, with float32 for what is trained. Memory is in GiB (2**30 bytes).

    Args:
        target: Preset, or folder of a bundle.
        machines: Machines to train on.
        json: Print everything as JSON.
        ema: Decay of the running average of the weights, as in `cogvideo train`; 0 for none.
    """
    config = Manifest.of(target).config
    plans = [stage_plan(config, stage, machines, ema) for stage in STAGES]
    if json:
        stages = [asdict(each) for each in plans]
        report = {"name": target, "machines": asdict(machines), "ema": ema, "stages": stages}
        print(dumps(report, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    some = f"{machines.gpus:,} GPU{'s' * (machines.gpus > 1)} of {machines.gpu_memory:g} GiB"
    free = f"{machines.reserve:.0%} stay free for CUDA, NCCL, fragmentation: {_gib(machines.budget)}"
    peak = f"a peak of {machines.tflops:g} TFLOP/s per GPU"
    console.print(f"[bold]{target}[/bold] on {some}; {free}", soft_wrap=True)
    console.print(f"Assumed: {peak}, of which training reaches {machines.utilization:.0%}", soft_wrap=True)
    for each in plans:
        for part in _parts(each, machines):
            console.print(part, soft_wrap=isinstance(part, str))
    console.print("\nSuper-resolution is not planned.")


def _parts(plan: StagePlan, machines: Cluster) -> Iterator[Table | str]:
    samples, steps = PAPER[plan.stage]
    shape = f"a step is {plan.batch:,} samples of {plan.positions:,} positions"
    yield f"\n[bold]{plan.stage}[/bold], GiB per rank; {shape}"
    yield _table(plan)
    if plan.tokens_per_second is not None:
        takes = "" if steps is None else f"; the paper's {steps:,} steps of {samples} samples take {plan.days:.3g} days"
        yield f"{plan.tokens_per_second:,.0f} tokens/s{takes}"
    if samples != plan.batch:
        yield f"{samples} samples cannot be split evenly among {machines.groups:,}, so a step has {plan.batch:,}"
    yield plan.command or _too_little(plan, machines)


def _table(plan: StagePlan) -> Table:
    """A table with a column for each strategy."""
    strategies = plan.strategies
    heads = [f"{each.sharding},\ncheckpointing" if each.checkpointing else each.sharding for each in strategies]
    rows = [["samples per pass", *(str(each.micro_batch) for each in strategies)]]
    rows += [[name, *(_gib(each.memory[name]) for each in strategies)] for name in strategies[0].memory]
    rows += [[f"all {name}", *(_gib(each.peaks[name]) for each in strategies)] for name in strategies[0].peaks]
    rows.append(["fits", *("chosen" if each == plan.best else "yes" if each.fits else "no" for each in strategies)])
    return table("", ["", *heads], rows)


def _too_little(plan: StagePlan, machines: Cluster) -> str:
    """The minimum that is needed, and what would help."""
    least = min(plan.strategies, key=lambda strategy: strategy.needs)
    strategy = f"{least.sharding}{' with --checkpointing' if least.checkpointing else ''}"
    at_start = least.needs == least.peaks["at the start"]
    helps = (
        "larger GPUs, since each rank holds the whole model before sharding it" if at_start else "more or larger GPUs"
    )
    takes = f"{strategy} takes the least, {_gib(least.needs)} of {_gib(machines.budget)} GiB"
    return f"Nothing fits: {takes}. What helps: {helps}"


def _gib(num_bytes: int) -> str:
    """GiB with three significant digits."""
    gib = num_bytes / GIB
    return f"{gib:,.0f}" if gib >= 1000 else f"{gib:#.3g}".rstrip(".")
