"""`cogvideo plan`: memory and time of training on a number of GPUs, without having one of them.

A rank holds its part of every weight, gradient and state of the optimizer; a pass adds what FSDP2 gathers and the
activations. Not counted are drawing samples and the host's memory. Super-resolution is left out: `costs` does not know
its activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from json import dumps
from math import prod
from typing import Literal, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cogvideo.bundle.format import Manifest
from cogvideo.config import CogVideoConfig, require
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.planning.costs import NARROW, STAGES, WIDE, Stage, layout_of, modules
from cogvideo.planning.training import activations, training_states
from cogvideo.planning.work import flops_a_position

Sharding = Literal["replicated", "sharded"]
GIB = 2**30
BY_ROWS, BY_COLUMNS = ("qkv", "mlp_in"), ("out", "mlp_out")
"""Layers of a block whose weights tensor-parallel ranks share, as in training/parallel.py."""


class Schedule(NamedTuple):
    """Length of a stage's training."""

    batch: int
    """Samples of a step."""
    steps: int | None
    """None where nobody says."""


PAPER: dict[Stage, Schedule] = {
    "image": Schedule(416, None),
    "sequential": Schedule(416, 76_000),
    "interpolation": Schedule(160, 15_000),
}
"""Paper section 4. It trains no image model: that is planned with the batch of key frames."""


@dataclass(frozen=True)
class Machines:
    """Machines to train on."""

    gpus: int
    """Number of GPUs, over all machines."""
    gpu_memory: float
    """Memory of each GPU, in GiB."""
    gpus_per_machine: int = 8
    """Most GPUs that share a machine."""
    tensor_parallel: int = 1
    """GPUs that share each matrix product, as in `cogvideo train`."""
    reserve: float = 0.1
    """Share of the memory that is kept free, for CUDA's context, NCCL's buffers and fragmentation."""
    tflops: float = 989.0
    """Peak of a GPU in TFLOP/s. An assumption: NVIDIA's data sheet for the H100 SXM, bfloat16 without sparsity."""
    utilisation: float = 0.4
    """Share of the peak that training reaches. An assumption: the goal of this package."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "gpus_per_machine", "tensor_parallel", "tflops"):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"{name} is {value}, expected a positive number")
        require(0 <= self.reserve < 1, f"reserve is {self.reserve}, expected a share in [0, 1)")
        require(0 < self.utilisation <= 1, f"utilisation is {self.utilisation}, expected a share in (0, 1]")
        divides = self.gpus % self.tensor_parallel == 0
        require(divides, f"tensor_parallel is {self.tensor_parallel} for {self.gpus} GPUs, expected a divisor")

    @property
    def groups(self) -> int:
        """Groups of GPUs that see different samples."""
        return self.gpus // self.tensor_parallel

    @property
    def budget(self) -> int:
        """Bytes of a GPU that may be used."""
        return int(self.gpu_memory * GIB * (1 - self.reserve))

    @property
    def shardings(self) -> tuple[Sharding, ...]:
        """Those that `cogvideo train` accepts, and that differ."""
        if self.groups == 1:
            return ("replicated",)
        return ("replicated", "sharded") if self.tensor_parallel == 1 else ("sharded",)


# Memory of a rank


class Held(NamedTuple):
    """Bytes of the first rank, which has the largest part."""

    weights: int
    """Frozen and trained weights."""
    gradients: int
    """Gradients of a step in one pass."""
    optimizer: int
    """Adam's moments, and the running average if there is one."""
    gathered: int
    """Weights in bfloat16 during a pass: sharded, those whole for a moment; replicated, a copy of the trained ones."""
    accumulated: int
    """Gradients of a step in several passes: FSDP2 keeps them whole until the last one."""
    start: int
    """All weights, which a rank has before it cuts them."""


class Part(NamedTuple):
    """A rank's part of one parameter."""

    values: int
    num_bytes: int
    is_trained: bool
    is_in_block: bool


def held(config: CogVideoConfig, stage: Stage, sharding: Sharding, groups: int, tensor: int, ema: float = 0.0) -> Held:
    """Memory of the first of `groups x tensor` ranks.

    Trained weights have four bytes, and as many for the gradient, for each of two moments and for an average; frozen
    matrices have two.

    Args:
        config: sizes.
        stage: which one.
        sharding: how the groups share the weights.
        groups: groups of ranks that see different samples. What is replicated is the same for any number.
        tensor: ranks of a group.
        ema: Share of the running average.

    Raises:
        ValueError: a matrix cannot be cut into as many parts.
    """
    groups = groups if sharding == "sharded" else 1
    parts = list(_parts(config, stage, groups, tensor))
    trained = WIDE * sum(each.values for each in parts if each.is_trained)
    states = training_states(config, stage)
    return Held(
        weights=sum(each.num_bytes for each in parts),
        gradients=trained,
        optimizer=(3 if ema > 0 else 2) * trained,
        gathered=groups * _gathered(parts, config) if sharding == "sharded" else trained * NARROW // WIDE,
        accumulated=groups * trained if sharding == "sharded" else 0,
        start=states["frozen weights"] + states["master weights"],
    )


def _parts(config: CogVideoConfig, stage: Stage, groups: int, tensor: int) -> Iterator[Part]:
    """Every parameter: tensor-parallel ranks cut matrices of blocks, then groups cut the rows of all that is left."""
    own = "base" if stage == "image" else stage
    for component in dict.fromkeys(("base", own)):
        for name, parameter in modules(config)[component].named_parameters():
            layer, kind = name.split(".")[-2:]
            rows, *others = parameter.shape
            if layer in BY_ROWS:
                rows = _cut(rows, tensor, layer)
            elif layer in BY_COLUMNS and kind == "weight":
                others = [_cut(others[0], tensor, layer)]
            values = -(-rows // groups) * prod(others)
            is_trained = component == own
            width = WIDE if is_trained or parameter.ndim == 1 else NARROW
            yield Part(values, values * width, is_trained, "blocks" in name)


def _cut(width: int, tensor: int, layer: str) -> int:
    require(width % tensor == 0, f"tensor_parallel is {tensor}, expected a divisor of the width {width} of {layer}")
    return width // tensor


def _gathered(parts: list[Part], config: CogVideoConfig) -> int:
    """A rank's share of what FSDP2 has whole for a moment.

    The root is whole throughout a pass, and there twice while it arrives, before the backward pass. Of the blocks one
    layer computes while the next one arrives, and the gradients of the largest unit are on their way in float32.
    """

    def values(is_in_block: bool, trained_only: bool) -> int:
        chosen = (each for each in parts if each.is_in_block == is_in_block and (each.is_trained or not trained_only))
        return sum(each.values for each in chosen)

    layers, root = config.transformer.num_layers, values(False, False)
    layer, layer_trained = values(True, False) // layers, values(True, True) // layers
    within = NARROW * (root + 2 * layer) + WIDE * max(values(False, True), layer_trained)
    return max(within, 2 * NARROW * root)


# Ways to run


@dataclass(frozen=True)
class Way:
    """One way to run a stage, with as many samples a pass as fit; where none fit, with those that need least."""

    sharding: Sharding
    checkpointing: bool
    micro_batch: int
    """Samples of a pass."""
    passes: int
    """Passes of a step."""
    memory: dict[str, int]
    """Bytes of a rank during a pass, by what they are for."""
    peaks: dict[str, int]
    """Bytes of a rank at a moment: during a pass, during the update, at the start."""
    needs: int
    """The largest of these."""
    fits: bool
    """Whether that is there."""


@dataclass(frozen=True)
class StagePlan:
    """A stage."""

    stage: Stage
    positions: int
    """Positions of a sample."""
    batch: int
    """Samples of a step: what the groups can share that is nearest to the paper's."""
    steps: int | None
    """As many as see the paper's number of samples."""
    ways: tuple[Way, ...]
    best: Way | None
    """The way that fits and sends least, then computes least."""
    flops_a_position: float
    """Forward and backward, by the convention of utilisation: what is computed again counts nothing."""
    tokens_per_second: float | None
    """Positions, over all GPUs, at the utilisation that is assumed; None where nothing fits."""
    days: float | None
    """For the paper's schedule, if it says how long and something fits."""
    command: str | None
    """Command that runs the best way."""


def stage_plan(config: CogVideoConfig, stage: Stage, machines: Machines, ema: float = 0.0) -> StagePlan:
    """Memory and time of a stage."""
    paper, groups, positions = PAPER[stage], machines.groups, layout_of(config, stage).length
    batch = groups * max(1, round(paper.batch / groups))
    steps = None if paper.steps is None else -(-paper.steps * paper.batch // batch)
    ways = tuple(_ways(config, stage, machines, batch // groups, ema))
    best = min((each for each in ways if each.fits), key=_effort, default=None)
    flops = flops_a_position(_model(config, stage))
    speed = machines.gpus * machines.tflops * 1e12 * machines.utilisation / flops
    days = None if paper.steps is None else paper.steps * paper.batch * positions / speed / 86_400
    command = None if best is None else _command(stage, machines, batch, steps, best, ema)
    fits = best is not None
    return StagePlan(
        stage, positions, batch, steps, ways, best, flops, speed if fits else None, days if fits else None, command
    )


def _model(config: CogVideoConfig, stage: Stage) -> Transformer:
    """The stage without memory, its base frozen unless it is what is trained."""
    with torch.device("meta"):
        base = Base(config.transformer).requires_grad_(stage == "image")
        channel = None
        if stage != "image":
            channel = TemporalChannel(config.transformer, config.layout, getattr(config, stage))
    return Transformer(base, channel)


def _effort(way: Way) -> tuple[int, bool]:
    """Sharded, every pass gathers all weights; replicated, none does."""
    return way.passes if way.sharding == "sharded" else 0, way.checkpointing


def _ways(config: CogVideoConfig, stage: Stage, machines: Machines, share: int, ema: float) -> Iterator[Way]:
    needed = [activations(config, stage, samples, autocast=True) for samples in range(1, share + 1)]
    for sharding in machines.shardings:
        rank = held(config, stage, sharding, machines.groups, machines.tensor_parallel, ema)
        for checkpointing in (False, True):
            ways = [
                _way(rank, sharding, checkpointing, share, samples, needed[samples - 1][checkpointing], machines)
                for samples in range(share, 0, -1)
            ]
            yield next((each for each in ways if each.fits), min(ways, key=lambda each: each.needs))


def _way(
    rank: Held, sharding: Sharding, checkpointing: bool, share: int, samples: int, activations: int, machines: Machines
) -> Way:
    passes = -(-share // samples)
    memory = {
        "weights": rank.weights,
        "gradients": rank.gradients + (rank.accumulated if passes > 1 else 0),
        "optimizer": rank.optimizer,
        "gathered": rank.gathered,
        "activations": activations,
    }
    update = rank.weights + 2 * rank.gradients + rank.optimizer  # AdamW's list kernels need one more value of each
    peaks = {"in a pass": sum(memory.values()), "in the update": update, "at the start": rank.start}
    needs = max(peaks.values())
    return Way(sharding, checkpointing, samples, passes, memory, peaks, needs, needs <= machines.budget)


def _command(stage: Stage, machines: Machines, batch: int, steps: int | None, way: Way, ema: float) -> str:
    """Words to type; DATA, MODEL and HOST are for the user to fill in."""
    options = [f"--batch {batch}", f"--micro-batch {way.micro_batch}", "--precision bfloat16"]
    options += [f"--steps {steps}"] * (steps is not None) + ["--checkpointing"] * way.checkpointing
    options += [f"--sharding {way.sharding}"] * (way.sharding == "sharded") + [f"--ema {ema}"] * (ema > 0)
    options += [f"--tensor-parallel {machines.tensor_parallel}"] * (machines.tensor_parallel > 1)
    return " ".join([_launcher(machines), f"train {stage} --data DATA --out MODEL", *options])


def _launcher(machines: Machines) -> str:
    """Every machine runs as many ranks as the others."""
    if machines.gpus == 1:
        return "cogvideo"
    each = max(n for n in range(1, machines.gpus_per_machine + 1) if machines.gpus % n == 0)
    several = f"--nnodes {machines.gpus // each} --rdzv-backend c10d --rdzv-endpoint HOST:29400 "
    return f"torchrun {several if machines.gpus > each else ''}--nproc-per-node {each} -m -- cogvideo"


# The command


def plan(target: str = "cogvideo", /, *, machines: Machines, json: bool = False, ema: float = 0.0) -> None:
    """Memory and time of training on a number of GPUs, computed without one of them.

    The plan covers the image model, key frames (sequential) and interpolation, not super-resolution. Precision is
    bfloat16, with float32 for what is trained. Memory is in GiB (2**30 bytes).

    Args:
        target: A preset, or the folder of a bundle.
        machines: machines to train on.
        json: Print everything as JSON.
        ema: Share of a running average of the weights, as in `cogvideo train`; 0 for none.

    Raises:
        ValueError: `target` is neither, or the GPUs cannot share its matrices.
    """
    config = Manifest.of(target).config
    plans = [stage_plan(config, stage, machines, ema) for stage in STAGES]
    if json:
        stages = [asdict(each) for each in plans]
        report = {"name": target, "machines": asdict(machines), "ema": ema, "stages": stages}
        print(dumps(report, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for part in _printed(target, machines, plans):
        console.print(part, soft_wrap=isinstance(part, str))


def _printed(target: str, machines: Machines, plans: list[StagePlan]) -> Iterator[Table | str]:
    yield _header(target, machines)
    for each in plans:
        shape = f"a step is {each.batch:,} samples of {each.positions:,} positions"
        yield f"\n[bold]{each.stage}[/bold], GiB a rank; {shape}"
        yield _table(each)
        if each.tokens_per_second is not None:
            yield f"{each.tokens_per_second:,.0f} tokens/s{_duration(each)}"
        if (wanted := PAPER[each.stage].batch) != each.batch:
            yield f"{wanted} samples cannot be shared by {machines.groups:,}, so it is {each.batch:,}"
        yield each.command or _too_little(each.ways, machines)
    yield "\nSuper-resolution is not planned."


def _header(name: str, machines: Machines) -> str:
    some = f"{machines.gpus:,} GPU{'s' * (machines.gpus > 1)} of {machines.gpu_memory:g} GiB"
    free = f"{machines.reserve:.0%} stay free for CUDA, NCCL, fragmentation: {_gib(machines.budget)}"
    peak = f"{machines.tflops:g} TFLOP/s a GPU at its peak"
    return (
        f"[bold]{name}[/bold] on {some}; {free}\nAssumed: {peak}, of which training reaches {machines.utilisation:.0%}"
    )


def _table(plan: StagePlan) -> Table:
    """A column a way."""
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for way in plan.ways:
        table.add_column(f"{way.sharding},\ncheckpointing" if way.checkpointing else way.sharding, justify="right")
    table.add_row("samples a pass", *(str(way.micro_batch) for way in plan.ways))
    for name in plan.ways[0].memory:
        table.add_row(name, *(_gib(way.memory[name]) for way in plan.ways))
    for name in plan.ways[0].peaks:
        table.add_row(f"all {name}", *(_gib(way.peaks[name]) for way in plan.ways))
    table.add_row("fits", *("chosen" if way == plan.best else "yes" if way.fits else "no" for way in plan.ways))
    return table


def _duration(each: StagePlan) -> str:
    steps, batch = PAPER[each.stage].steps, PAPER[each.stage].batch
    return "" if steps is None else f"; the paper's {steps:,} steps of {batch} samples take {each.days:.3g} days"


def _too_little(ways: tuple[Way, ...], machines: Machines) -> str:
    """Name the least that is needed, and what would help."""
    least = min(ways, key=lambda way: way.needs)
    how = f"{least.sharding}{' with --checkpointing' if least.checkpointing else ''}"
    at_start = least.needs == least.peaks["at the start"]
    helps = "larger GPUs, since a rank has the whole model before it cuts it" if at_start else "more or larger GPUs"
    return f"Nothing fits: {how} takes least, {_gib(least.needs)} of {_gib(machines.budget)} GiB. What helps: {helps}"


def _gib(num_bytes: int) -> str:
    """Three figures."""
    gib = num_bytes / GIB
    return f"{gib:,.0f}" if gib >= 1000 else f"{gib:#.3g}".rstrip(".")
