"""Memory and time of training on a number of GPUs, computed without any.

A rank holds its shard of weights, gradients and optimizer state; a pass adds what FSDP2 gathers, and activations.
Generating samples and host memory are not counted. Super-resolution is left out: `costs` has no formula for its
activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Annotated, Literal, NamedTuple

from cogvideo.config import CogVideoConfig, Limit, Limited, Positive, require
from cogvideo.planning.costs import NARROW, WIDE, Matrices, Stage, layout_of, modules
from cogvideo.planning.training import activations, stage_flops, training_states

Sharding = Literal["replicated", "sharded"]
GIB = 2**30
BY_ROWS, BY_COLUMNS = ("qkv", "mlp_in"), ("out", "mlp_out")
"""Layers of a block whose weights are split among tensor-parallel ranks, as in training/parallel.py."""
PAPER: dict[Stage, tuple[int, int | None]] = {
    "image": (416, None),
    "sequential": (416, 76_000),
    "interpolation": (160, 15_000),
}
"""Samples per step and number of steps (paper section 4). The paper trains no image model; its plan uses the batch of
key frames."""


@dataclass(frozen=True)
class Cluster(Limited):
    """Machines."""

    gpus: Positive[int]
    """Total number of GPUs."""
    gpu_memory: Positive[float]
    """Memory of each GPU in GiB."""
    gpus_per_machine: Positive[int] = 8
    """Maximum number of GPUs in a machine."""
    tensor_parallel: Positive[int] = 1
    """GPUs that share each matrix product, as in `cogvideo train`."""
    reserve: Annotated[float, Limit(lambda share: 0 <= share < 1, "a share in [0, 1)")] = 0.1
    """Share of memory to keep free for CUDA's context, NCCL's buffers and fragmentation."""
    tflops: Positive[float] = 989.0
    """Peak TFLOP/s of a GPU; by default that of an H100 SXM in bfloat16 without sparsity (NVIDIA's data sheet)."""
    utilization: Annotated[float, Limit(lambda share: 0 < share <= 1, "a share in (0, 1]")] = 0.4
    """Share of the peak that training reaches; by default the goal of this package."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.gpus % self.tensor_parallel == 0
        require(divides, f"tensor_parallel is {self.tensor_parallel} for {self.gpus} GPUs, expected a divisor")

    @property
    def groups(self) -> int:
        """Number of groups of GPUs that see different samples."""
        return self.gpus // self.tensor_parallel

    @property
    def budget(self) -> int:
        """Usable bytes per GPU."""
        return int(self.gpu_memory * GIB * (1 - self.reserve))

    @property
    def shardings(self) -> tuple[Sharding, ...]:
        """Different shardings that `cogvideo train` accepts."""
        if self.groups == 1:
            return ("replicated",)
        return ("replicated", "sharded") if self.tensor_parallel == 1 else ("sharded",)


class RankMemory(NamedTuple):
    """Bytes on the first rank, which has the largest shard."""

    weights: int
    """Frozen and trained weights."""
    gradients: int
    """Gradients of a step in one pass."""
    optimizer: int
    """Adam's moments, and the running average if there is one."""
    gathered: int
    """Weights in bfloat16 during a pass: if sharded, those gathered; if replicated, a copy of the trained ones."""
    accumulated: int
    """Gradients of a step in several passes: FSDP2 keeps them unsharded until the last pass."""
    start: int
    """All weights, which a rank holds before sharding."""


def held(
    config: CogVideoConfig, stage: Stage, sharding: Sharding, groups: int, tensor: int, ema: float = 0.0
) -> RankMemory:
    """Memory of the first of `groups x tensor` ranks.

    A trained weight takes four bytes, and as many for its gradient, each of its two moments and its average; a weight
    of a frozen matrix takes two. Tensor-parallel ranks split the matrices of blocks, then groups shard the rows of
    everything. Groups see different samples; replicated weights take as much memory for any number of groups.
    """
    is_sharded = sharding == "sharded"
    cuts = groups if is_sharded else 1
    sizes = Counter[tuple[bool, bool]]()  # by whether they are in a block, and whether trained
    weights = 0
    for component in ("base",) if stage == "image" else ("base", stage):
        is_trained = stage in ("image", component)
        for name, parameter in modules(config)[component].named_parameters():
            rows, *others = _shape(name, list(parameter.shape), tensor)
            values = -(-rows // cuts) * prod(others)
            sizes["blocks" in name, is_trained] += values
            weights += values * (WIDE if is_trained or parameter.ndim == 1 else NARROW)
    trained = WIDE * (sizes[False, True] + sizes[True, True])
    states = training_states(config, stage)
    return RankMemory(
        weights=weights,
        gradients=trained,
        optimizer=(3 if ema > 0 else 2) * trained,
        gathered=cuts * _gathered(sizes, config) if is_sharded else trained * NARROW // WIDE,
        accumulated=cuts * trained if is_sharded else 0,
        start=states["frozen weights"] + states["master weights"],
    )


def _shape(name: str, shape: list[int], tensor: int) -> list[int]:
    """A parameter's shape on a tensor-parallel rank."""
    layer, kind = name.split(".")[-2:]
    if layer in BY_ROWS or (layer in BY_COLUMNS and kind == "weight"):
        side = int(layer in BY_COLUMNS)
        width = shape[side]
        require(width % tensor == 0, f"tensor_parallel is {tensor}, expected a divisor of the width {width} of {layer}")
        shape[side] = width // tensor
    return shape


def _gathered(sizes: Counter[tuple[bool, bool]], config: CogVideoConfig) -> int:
    """A rank's share of what FSDP2 holds unsharded for a short time.

    The root is gathered throughout a pass, and held twice while it is gathered before the backward pass. One block
    computes while the next is gathered, and the gradients of the largest unit are being reduced in float32.
    """
    layers, root = config.transformer.num_layers, sizes[False, False] + sizes[False, True]
    layer = (sizes[True, False] + sizes[True, True]) // layers
    within = NARROW * (root + 2 * layer) + WIDE * max(sizes[False, True], sizes[True, True] // layers)
    return max(within, 2 * NARROW * root)


@dataclass(frozen=True)
class Strategy:
    """A way to run a stage with as many samples per pass as fit; if none fit, with the least memory."""

    sharding: Sharding
    checkpointing: bool
    micro_batch: int
    """Samples per pass."""
    passes: int
    """Passes per step."""
    memory: dict[str, int]
    """Bytes on a rank during a pass, by use."""
    peaks: dict[str, int]
    """Bytes on a rank during a pass, during the update, and at the start."""
    needs: int
    """Largest of `peaks`."""
    fits: bool

    @property
    def gathers(self) -> int:
        """Number of times that a step gathers all weights: once per pass if sharded, else never."""
        return self.passes if self.sharding == "sharded" else 0


@dataclass(frozen=True)
class StagePlan:
    """Plan of a stage."""

    stage: Stage
    positions: int
    batch: int
    """Samples per step: the multiple of the number of groups nearest to the paper's batch."""
    steps: int | None
    """Number of steps that see as many samples as the paper's."""
    strategies: tuple[Strategy, ...]
    best: Strategy | None
    """The strategy that fits and communicates least, then computes least."""
    flops_per_position: float
    """Operations per position, forward and backward, as in `training.flops_per_position`."""
    tokens_per_second: float | None
    """Positions per second over all GPUs, at the assumed utilization; None if nothing fits."""
    days: float | None
    """Duration of the paper's schedule, if it has one and something fits."""
    command: str | None


def stage_plan(config: CogVideoConfig, stage: Stage, machines: Cluster, ema: float = 0.0) -> StagePlan:
    """Memory and time of a stage."""
    (samples, num_steps), groups, positions = PAPER[stage], machines.groups, layout_of(config, stage).length
    batch = groups * max(1, round(samples / groups))
    steps = None if num_steps is None else -(-num_steps * samples // batch)
    strategies = tuple(_strategies(config, stage, machines, batch // groups, ema))
    best = min(
        (each for each in strategies if each.fits),
        key=lambda strategy: (strategy.gathers, strategy.checkpointing),
        default=None,
    )
    flops = stage_flops(Matrices.of(config.transformer, stage == "image"), stage == "image")
    speed = None if best is None else machines.gpus * machines.tflops * 1e12 * machines.utilization / flops
    days = None if speed is None or num_steps is None else num_steps * samples * positions / speed / 86_400
    command = None if best is None else _command(stage, machines, batch, steps, best, ema)
    return StagePlan(stage, positions, batch, steps, strategies, best, flops, speed, days, command)


def _strategies(config: CogVideoConfig, stage: Stage, machines: Cluster, share: int, ema: float) -> Iterator[Strategy]:
    needed = [activations(config, stage, samples, autocast=True) for samples in range(1, share + 1)]
    for sharding, checkpointing in product(machines.shardings, (False, True)):
        rank = held(config, stage, sharding, machines.groups, machines.tensor_parallel, ema)
        strategies = []
        for samples in range(share, 0, -1):
            passes = -(-share // samples)
            memory = {
                "weights": rank.weights,
                "gradients": rank.gradients + (rank.accumulated if passes > 1 else 0),
                "optimizer": rank.optimizer,
                "gathered": rank.gathered,
                "activations": needed[samples - 1][checkpointing],
            }
            # AdamW's foreach kernels need one more value per trained weight
            update = rank.weights + 2 * rank.gradients + rank.optimizer
            peaks = {"in a pass": sum(memory.values()), "in the update": update, "at the start": rank.start}
            needs = max(peaks.values())
            strategies.append(
                Strategy(sharding, checkpointing, samples, passes, memory, peaks, needs, needs <= machines.budget)
            )
        yield next((each for each in strategies if each.fits), min(strategies, key=lambda each: each.needs))


def _command(stage: Stage, machines: Cluster, batch: int, steps: int | None, strategy: Strategy, ema: float) -> str:
    """Command to run; the user fills in DATA, MODEL and HOST."""
    each = max(n for n in range(1, machines.gpus_per_machine + 1) if machines.gpus % n == 0)
    several = f" --nnodes {machines.gpus // each} --rdzv-backend c10d --rdzv-endpoint HOST:29400"
    parts = {
        f"torchrun{several if machines.gpus > each else ''} --nproc-per-node {each} -m --": machines.gpus > 1,
        f"cogvideo train {stage} --data DATA --out MODEL": True,
        f"--batch {batch} --micro-batch {strategy.micro_batch} --precision bfloat16": True,
        f"--steps {steps}": steps is not None,
        "--checkpointing": strategy.checkpointing,
        "--sharding sharded": strategy.sharding == "sharded",
        f"--ema {ema}": ema > 0,
        f"--tensor-parallel {machines.tensor_parallel}": machines.tensor_parallel > 1,
    }
    return " ".join(part for part, is_needed in parts.items() if is_needed)
