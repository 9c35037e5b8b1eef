"""Running a program on the meta device, where tensors have shapes and no values, to see what it would cost."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")


class DryRun(NamedTuple):
    """What a program would have done."""

    peak: int
    """Most bytes that it held at once, of those that it allocated."""
    flops: int
    """Of matrix products, attention and convolutions; a multiplication and an addition are two."""


def dry_run(program: Callable[[], Any]) -> DryRun:
    """Run a program whose tensors are on the meta device."""
    with _Meter() as meter, WithoutValues():  # type: ignore[no-untyped-call]
        program()
    return DryRun(meter.peak, meter.flops)


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and the bytes that they allocate: those held now, and the most there ever were."""

    held = peak = flops = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = operation(*args, **kwargs)
        if operation.overloadpacket in _FLOPS:
            self.flops += _FLOPS[operation.overloadpacket](*args, **kwargs, out_val=made)
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in {each._cdata: each for each in _storages(made)}.values():
            if storage._cdata not in known:
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, num_bytes: int) -> None:
        self.held += num_bytes
        self.peak = max(self.peak, self.held)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [each.untyped_storage() for each in tree_leaves(tree) if isinstance(each, Tensor)]


class WithoutValues(TorchFunctionMode):
    """What the meta device does not do by itself.

    Attention there would make a table of all scores, which the kernels of real devices do not: the CPU's stands in.
    A question about values is answered with no; the only one is whether a text mask is free of pads.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if function is Tensor.__bool__ and args[0].is_meta:
            return False
        return function(*args, **(kwargs or {}))


_ATEN = torch.ops.aten
_KERNEL, _BACKWARD = (
    _ATEN._scaled_dot_product_flash_attention_for_cpu,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
)
_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    _ATEN.linear: lambda x, weight, *_, **__: 2 * x.numel() * len(weight),  # whole in inference mode, else a product
    _KERNEL: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _BACKWARD: flop_registry[_ATEN._scaled_dot_product_flash_attention_backward],
}


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    return _KERNEL(q, k, v, attn_mask=attn_mask)[0]
