"""Parallelism over ranks, applied to a finished module from outside, in this order. Models know nothing of it.

1. tensor parallelism: matrix products of a block are split; attention itself runs on every rank
2. activation checkpointing of each block
3. torch.compile of each block
4. FSDP2 of each block and of the rest, frozen weights included; or DDP

All of it is PyTorch's own. A single rank takes the same path, on which none of it applies.
"""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cogvideo.config import Limited, Positive, require
from cogvideo.models.transformer import Transformer
from cogvideo.models.upscaler import Upscaler

T = TypeVar("T")

SHARED_PRODUCTS = {
    "mlp_in": ColwiseParallel(),
    "mlp_out": RowwiseParallel(),
    "qkv": ColwiseParallel(output_layouts=Replicate()),
    "out": RowwiseParallel(input_layouts=Replicate()),
}
"""Tensor-parallel styles of the layers of a block."""


@dataclass(frozen=True)
class ParallelSettings(Limited):
    """Ranks, as started by torchrun."""

    sharding: Literal["replicated", "sharded"] = "replicated"
    """Placement of the model: whole on each rank (replicated, DDP), or a part of every block (sharded, FSDP2)."""
    tensor_parallel: Positive[int] = 1
    """Number of neighboring ranks that share each matrix product and see the same samples."""


class Ranks(NamedTuple):
    """The place of this process among the ranks, and among the groups of ranks that see different samples."""

    rank: int
    world_size: int
    device: torch.device
    data_rank: int
    """Index of this rank's group among those that see different samples."""
    data_size: int
    mesh: DeviceMesh | None = None
    """`data` x `tensor` ranks; None for a process alone."""


ALONE = Ranks(0, 1, torch.device("cpu"), 0, 1)
"""One process on the CPU."""


@contextmanager
def process_group(device: torch.device, settings: ParallelSettings) -> Iterator[Ranks]:
    """The ranks that torchrun started, each with the GPU of its local rank, or this process alone."""
    world_size, tensor = int(os.environ.get("WORLD_SIZE", "1")), settings.tensor_parallel
    divides = world_size % tensor == 0
    require(divides, f"tensor_parallel is {tensor} for {world_size} ranks, expected a divisor: torchrun starts ranks")
    replicated = tensor > 1 and world_size > tensor and settings.sharding == "replicated"
    require(not replicated, "several groups of tensor-parallel ranks need --sharding sharded")
    if "RANK" not in os.environ:
        yield ALONE._replace(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(device.type, (world_size // tensor, tensor), mesh_dim_names=("data", "tensor"))
        rank = dist.get_rank()
        yield Ranks(rank, world_size, device, rank // tensor, world_size // tensor, mesh)
        gc.collect()  # gloo's threads still release Python objects: a rank that exits at once might abort
        for group in (None, *mesh.get_all_groups()):
            dist.barrier(group)
    finally:
        dist.destroy_process_group()


def distribute(
    objective: nn.Module,
    settings: ParallelSettings,
    ranks: Ranks,
    *,
    precision: Literal["float32", "bfloat16"] = "float32",
    checkpointing: bool = False,
    compile: bool = False,
) -> nn.Module:
    """Distribute an objective that is on the rank's device: it is changed in place, and perhaps wrapped.

    With bfloat16, GPUs gather trained weights in bfloat16; gradients are summed in float32.
    """
    if settings.tensor_parallel > 1:
        _share_products(objective, settings.tensor_parallel, ranks)
    for block in _blocks(objective) if checkpointing or compile else ():
        if checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if compile:
            block.compile()
    if ranks.mesh is None:
        return objective
    if settings.sharding == "sharded":
        return _sharded(objective, ranks.mesh["data"], ranks.device, precision)
    if ranks.data_size == 1:
        return objective
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    unused = bool(objective.has_unused_parameters)
    return DistributedDataParallel(
        objective, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=unused
    )


def _blocks(objective: nn.Module) -> Iterator[nn.Module]:
    """Modules that are called once per layer, and call everything else in it."""
    model = objective.model
    assert isinstance(model, Transformer | Upscaler)
    yield from model.channel.blocks if isinstance(model, Upscaler) else model.base.blocks


def _share_products(objective: nn.Module, tensor: int, ranks: Ranks) -> None:
    assert ranks.mesh is not None
    for owner in objective.modules():
        layers = {name: style for name, style in SHARED_PRODUCTS.items() if hasattr(owner, name)}
        for name in layers:
            width = getattr(owner, name).weight.shape[1 if name in ("out", "mlp_out") else 0]
            expected = f"expected a divisor of the width {width} of {name}"
            require(width % tensor == 0, f"tensor_parallel is {tensor}, {expected}")
        if layers:
            parallelize_module(owner, ranks.mesh["tensor"], layers)


def _sharded(objective: nn.Module, mesh: DeviceMesh, device: torch.device, precision: str) -> nn.Module:
    """Shard by block. Super-resolution calls a base block's parts one by one, so there the base belongs to the root.

    The root is also resharded after every forward pass: one without a backward pass, which evaluates the running
    average, would leave its gathered weights to the next step."""
    narrow = torch.bfloat16 if precision == "bfloat16" and device.type == "cuda" else None
    shard = partial(
        fully_shard,
        mesh=mesh,
        reshard_after_forward=True,
        mp_policy=MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False),
    )
    model = objective.model
    assert isinstance(model, Transformer | Upscaler)
    owners = [model.channel] if isinstance(model, Upscaler) else [model.base, model.channel]
    for owner in owners:
        for block in [] if owner is None else owner.blocks:
            shard(block)
    shard(objective)
    return objective


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Context of a micro-batch: ranks exchange gradients only after the last one of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
    """Clip the gradient to norm `max_norm`; returns its norm before clipping, over all ranks."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            groups[(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None].append(grad)
    totals = [nn.utils.get_total_norm(grads) for grads in groups.values()]
    norms = [each.full_tensor() if isinstance(each, DTensor) else each for each in totals]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    shorter = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grads in groups.values():
        torch._foreach_mul_([local(grad) for grad in grads], shorter)
    return norm


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def any_rank(flag: bool) -> bool:
    """True if `flag` is true on some rank."""
    return bool(largest(int(flag)))


def raised_by_all(work: Callable[[int, int], T]) -> T:
    """Call `work` with this rank and the number of ranks; an error on one rank is raised on all."""
    if not dist.is_initialized():
        return work(0, 1)
    result: T | None = None
    error: Exception | None = None
    try:
        result = work(dist.get_rank(), dist.get_world_size())
    except Exception as raised:
        error = raised
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for each in errors:
        if each is not None:
            raise each
    return cast(T, result)


def largest(value: int) -> int:
    """Maximum of a value over all ranks."""
    if not dist.is_initialized():
        return value
    seen = torch.tensor(value)
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return int(seen)


def gathered(tensor: Tensor) -> Tensor:
    """The rows of all ranks, in rank order; each rank has the same number."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def mean_over_ranks(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Mean over all ranks."""
    if not dist.is_initialized():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def is_first() -> bool:
    """True on the rank that prints and writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Barrier: wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Trained tensors by their names in the objective: unsharded, on the CPU of the first rank; empty on others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    # cloned, since in one process these are the weights themselves
    state = get_model_state_dict(module, options=options)
    return {name: each.clone() for name, each in state.items() if isinstance(each, Tensor)}
