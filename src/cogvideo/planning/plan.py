"""`cogvideo plan`: what training a stage needs of so many GPUs, and how long it takes, without having one of them.

The code that trains builds the stage, on the meta device, and cuts it among ranks that PyTorch's fake process group
pretends; what the first rank then holds is weighed. A pass adds what FSDP2 gathers and the activations. Not counted are
drawing samples and the host's memory. Super-resolution is left out: `costs` does not know its activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from json import dumps
from typing import Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from cogvideo.bundle.format import MODULES, Manifest
from cogvideo.bundle.model import CogVideo
from cogvideo.config import CogVideoConfig, require
from cogvideo.planning.costs import STAGES, Stage, layout_of, training
from cogvideo.planning.dry_run import META, WithoutValues
from cogvideo.planning.work import flops_a_position
from cogvideo.training.objectives.task import Objective, Task
from cogvideo.training.optim import Optimization, trained
from cogvideo.training.parallel import ParallelSettings, Ranks, local
from cogvideo.training.stages import Choice, StartChoice, build
from cogvideo.training.step import Execution, Trainer

Sharding = Literal["replicated", "sharded"]
GIB = 2**30
MOST_GPUS = 4096
"""That are planned: each tensor is cut among as many pretended ranks, which takes a minute for these."""
NARROW, WIDE = torch.bfloat16.itemsize, torch.float32.itemsize
STARTS: dict[Stage, StartChoice] = {"image": "random", "sequential": "inherit", "interpolation": "sequential"}


class Schedule(NamedTuple):
    """How long a stage is trained."""

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
    """What there is to train on."""

    gpus: int
    """How many, over all machines."""
    gpu_memory: float
    """GiB of each."""
    gpus_per_machine: int = 8
    """How many share a machine, at most."""
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
        require(self.gpus <= MOST_GPUS, f"gpus is {self.gpus}, expected {MOST_GPUS:,} at most: each one is pretended")
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
    """Frozen and trained ones."""
    gradients: int
    """Of a step in one pass."""
    optimizer: int
    """Adam's moments, and the running average if there is one."""
    gathered: int
    """In bfloat16 during a pass: sharded, what is whole for a moment; replicated, a copy of the trained weights."""
    accumulated: int
    """Gradients of a step in several passes: FSDP2 keeps them whole until the last one."""
    update: int
    """One more value of every trained weight, which AdamW's list kernels need while they work."""
    start: int
    """All weights, which a rank has before it cuts them."""


@lru_cache(maxsize=64)
def held(config: CogVideoConfig, stage: Stage, sharding: Sharding, groups: int, tensor: int, ema: float = 0.0) -> Held:
    """What the code that trains puts on the first of `groups x tensor` ranks.

    Args:
        config: sizes.
        stage: which one.
        sharding: how the groups share the weights.
        groups: of ranks that see different samples. What is replicated is the same for any number.
        tensor: ranks of a group.
        ema: of the running average.

    Raises:
        ValueError: a matrix cannot be cut into so many parts, or this process already is one of several.
    """
    groups, layers = groups if sharding == "sharded" else 1, config.transformer.num_layers
    settings = Optimization(batch=groups, precision="bfloat16", ema=ema)
    objective = Objective(_model(config, stage), cast(Task, None))  # no sample is seen
    start = _bytes(objective.parameters())
    with _fake_ranks(groups, tensor) as ranks:
        trainer = Trainer(objective, settings, Execution(), ParallelSettings(sharding, tensor), ranks)
        own = trained(objective)
        for parameter in own:
            parameter.grad = torch.zeros_like(parameter)
        (optimizer,) = trainer.optimizers
        optimizer.step()
        states = [each for state in optimizer.state.values() for each in state.values()]
        average = [] if trainer.average is None else trainer.average.state.values()
        wide = WIDE * _count(own)
        return Held(
            weights=_bytes(objective.parameters()),
            gradients=_bytes(each.grad for each in own if each.grad is not None),
            optimizer=_bytes([*states, *average]),
            gathered=_gathered(trainer.module, layers, groups) if sharding == "sharded" else NARROW * _count(own),
            accumulated=groups * wide if sharding == "sharded" else 0,
            update=wide,
            start=start,
        )


def _model(config: CogVideoConfig, stage: Stage) -> nn.Module:
    """The stage at its start, without memory."""
    with META, WithoutValues():
        source = CogVideo(config, base=MODULES["base"](config), sequential=MODULES["sequential"](config))
        return build(stage, Choice(STARTS[stage]), source, config, torch.bfloat16, seed=0)


@contextmanager
def _fake_ranks(groups: int, tensor: int) -> Iterator[Ranks]:
    """The first of so many ranks, none of which exists: what it sends goes nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend

    require(not dist.is_initialized(), "this process is one of several ranks, expected one alone, without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=groups * tensor)
    try:
        mesh = init_device_mesh("cpu", (groups, tensor), mesh_dim_names=("data", "tensor"))
        yield Ranks(0, groups * tensor, META, 0, groups, mesh)
    finally:
        dist.destroy_process_group()


def _gathered(module: nn.Module, num_layers: int, groups: int) -> int:
    """Bytes that FSDP2 has whole for a moment.

    The root is whole throughout a pass, and there twice while it arrives, before the backward pass. Of the blocks one
    layer computes while the next one arrives, and the gradients of the largest unit are on their way in float32.
    """
    blocks = nn.ModuleList(each for each in module.modules() if isinstance(each, FSDPModule) and each is not module)
    layer, learnt = (_count(each) // num_layers for each in (blocks.parameters(), trained(blocks)))
    root, root_learnt = _count(module.parameters()) - num_layers * layer, _count(trained(module)) - num_layers * learnt
    within = NARROW * (root + 2 * layer) + WIDE * max(root_learnt, learnt)
    return groups * max(within, 2 * NARROW * root)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(local(each).numel() for each in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """On the rank's device: Adam counts its steps on the CPU."""
    return sum(local(each).nbytes for each in tensors if each.is_meta)


# Ways to run


@dataclass(frozen=True)
class Way:
    """One way to run a stage, with as many samples a pass as fit; where none fit, with those that need least."""

    sharding: Sharding
    checkpointing: bool
    micro_batch: int
    """Samples of a pass."""
    passes: int
    """Of a step."""
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
    """Of a sample."""
    batch: int
    """Samples of a step: what the groups can share that is nearest to the paper's."""
    steps: int | None
    """As many as see the paper's number of samples."""
    ways: tuple[Way, ...]
    best: Way | None
    """Of those that fit: what sends least, then what computes least."""
    flops_a_position: float
    """Forward and backward, by the convention of utilisation: what is computed again counts nothing."""
    tokens_per_second: float | None
    """Positions, over all GPUs, at the utilisation that is assumed; None where nothing fits."""
    days: float | None
    """For the paper's schedule, if it says how long and something fits."""
    command: str | None
    """That runs the best way."""


@dataclass(frozen=True)
class Report:
    """All stages of a model."""

    name: str
    machines: Machines
    ema: float
    stages: tuple[StagePlan, ...]


def report(name: str, config: CogVideoConfig, machines: Machines, ema: float = 0.0) -> Report:
    """The plan for a configuration."""
    return Report(name, machines, ema, tuple(stage_plan(config, stage, machines, ema) for stage in STAGES))


def stage_plan(config: CogVideoConfig, stage: Stage, machines: Machines, ema: float = 0.0) -> StagePlan:
    """What a stage needs, and how long it takes."""
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


def _effort(way: Way) -> tuple[int, bool]:
    """Sharded, every pass gathers all weights; replicated, none does."""
    return way.passes if way.sharding == "sharded" else 0, way.checkpointing


def _ways(config: CogVideoConfig, stage: Stage, machines: Machines, share: int, ema: float) -> Iterator[Way]:
    activations = _activations(config, stage, share)
    for sharding in machines.shardings:
        rank = held(config, stage, sharding, machines.groups, machines.tensor_parallel, ema)
        for checkpointing in (False, True):
            ways = [
                _way(rank, sharding, checkpointing, share, samples, activations[checkpointing][samples - 1], machines)
                for samples in range(share, 0, -1)
            ]
            yield next((each for each in ways if each.fits), min(ways, key=lambda each: each.needs))


def _activations(config: CogVideoConfig, stage: Stage, share: int) -> tuple[list[int], list[int]]:
    """Bytes for 1 to `share` samples a pass, without and with checkpointing, on a line between both ends.

    A peak is the largest of several moments, each of which grows evenly with the samples, so it lies below the line.
    """
    least, most = (training(config, stage, samples, autocast=True) for samples in (1, share))

    def line(first: int, last: int) -> list[int]:
        return [first + (last - first) * step // max(share - 1, 1) for step in range(share)]

    kept = line(least.activations, most.activations)
    return kept, line(least.activations_checkpointed, most.activations_checkpointed)


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
    update = rank.weights + rank.gradients + rank.optimizer + rank.update
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
    """What training needs of so many GPUs, and how long it takes, computed without one of them.

    Planned are the image model, key frames (sequential) and interpolation; super-resolution is not. Precision is
    bfloat16, with float32 for what is trained. Memory is in GiB (2**30 bytes).

    Args:
        target: a preset, or the folder of a bundle.
        machines: what there is to train on.
        json: print everything as JSON.
        ema: share of a running average of the weights, as in `cogvideo train`; 0 for none.

    Raises:
        ValueError: `target` is neither, or the GPUs cannot share its matrices.
    """
    found = report(target, Manifest.of(target).config, machines, ema)
    if json:
        print(dumps(asdict(found), indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for part in _parts(found):
        console.print(part, soft_wrap=isinstance(part, str))


def _parts(found: Report) -> Iterator[Table | str]:
    yield _header(found.name, found.machines)
    for each in found.stages:
        shape = f"a step is {each.batch:,} samples of {each.positions:,} positions"
        yield f"\n[bold]{each.stage}[/bold], GiB a rank; {shape}"
        yield _table(each)
        if each.tokens_per_second is not None:
            yield f"{each.tokens_per_second:,.0f} tokens/s{_duration(each)}"
        if (wanted := PAPER[each.stage].batch) != each.batch:
            yield f"{wanted} samples cannot be shared by {found.machines.groups:,}, so it is {each.batch:,}"
        yield each.command or _too_little(each.ways, found.machines)
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
    """What the least is, and what would help."""
    least = min(ways, key=lambda way: way.needs)
    how = f"{least.sharding}{' with --checkpointing' if least.checkpointing else ''}"
    at_start = least.needs == least.peaks["at the start"]
    helps = "larger GPUs, since a rank has the whole model before it cuts it" if at_start else "more or larger GPUs"
    return f"Nothing fits: {how} takes least, {_gib(least.needs)} of {_gib(machines.budget)} GiB. What helps: {helps}"


def _gib(num_bytes: int) -> str:
    """Three figures."""
    gib = num_bytes / GIB
    return f"{gib:,.0f}" if gib >= 1000 else f"{gib:#.3g}".rstrip(".")
