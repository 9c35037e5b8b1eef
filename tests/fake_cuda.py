"""A simulated GPU: CPU tensors are real, and CUDA tensors are fake, with shapes, dtypes and strides but no values.

Mixing devices raises wherever PyTorch raises on a real GPU. Host synchronizations and copies to the device are counted
by the file of the package that causes them. A backward pass computes nothing: every parameter that it would reach gets
a zero gradient.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import cogvideo

ATEN = torch.ops.aten
CUDA = torch.device("cuda:0")
PACKAGE = Path(cogvideo.__file__).parent
CUDA_TYPE, META_TYPE = 1, 14
"""Values of c10::DeviceType."""


def place() -> str:
    """Return the innermost file of the package on the call stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return f"{path.parent.name}/{path.name}"
        frame = frame.f_back
    return "elsewhere"


class FakeCuda(FakeTensorMode):
    """While it is active, CUDA is a device of this machine.

    Args:
        answer: value of a tensor that the host reads, given the file that reads it.
    """

    def __init__(self, answer: Callable[[str], float] = lambda file: 0) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.answer = answer
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._inside = False

    def forget(self) -> None:
        """Reset the counters."""
        self.waits.clear()
        self.copies.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return super().__torch_dispatch__(func, types, args, kwargs)
        composite = func.namespace == "aten" and torch.is_inference_mode_enabled() and func._can_decompose()
        if composite:  # otherwise autograd has already decomposed it
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        target = kwargs.get("device")
        to_cuda = target is not None and torch.device(target).type == "cuda"
        if not to_cuda and not any(isinstance(each, FakeTensor) for each in tensors):
            return func(*args, **kwargs)
        host = [each for each in tensors if not isinstance(each, FakeTensor)]
        return self._asked(func, args, kwargs, host, to_cuda)

    def _asked(self, func: Any, args: Any, kwargs: Any, host: list[Tensor], to_cuda: bool) -> Any:
        name, target = func.overloadpacket.__name__, kwargs.get("device")
        if name == "_local_scalar_dense":
            self.waits[place()] += 1
            return torch.tensor(self.answer(place())).to(args[0].dtype).item()
        if name == "_to_copy" and target is not None and torch.device(target).type == "cpu":
            self.waits[place()] += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            self.waits[place()] += 1
            return args[0]
        if name in ("nonzero", "masked_select", "bincount", "unique2", "repeat_interleave"):
            raise AssertionError(f"{place()} asks a GPU how large the result of {name} is")
        if host and (name == "copy_" or (name == "_to_copy" and to_cuda)):
            blocks = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            self.copies[place()] += 1
            if blocks:
                self.waits[place()] += 1
            return args[0] if name == "copy_" else self._fake(host[0], kwargs.get("dtype"))
        if name in ("index", "index_put", "index_put_") and any(each.ndim for each in host):
            raise AssertionError(f"{place()} indexes a tensor on CUDA by one on the CPU")
        self._inside = True
        try:
            return super().__torch_dispatch__(
                func, None, args, kwargs | {"generator": None} if "generator" in kwargs else kwargs
            )
        finally:
            self._inside = False

    def _fake(self, like: Tensor, dtype: torch.dtype | None) -> FakeTensor:
        with torch.utils._python_dispatch._disable_current_modes():
            there = torch.empty_strided(like.shape, like.stride(), dtype=dtype or like.dtype, device="meta")
            return FakeTensor(self, there, CUDA)


class RowsOfAttention(TorchFunctionMode):
    """Rejects attention operands in a layout for which a GPU would materialize all scores."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            assert all(each.stride(-1) == 1 for each in args[:3]), "attention with values that lie apart"
        return function(*args, **(kwargs or {}))


def _backward(loss: Tensor) -> None:
    assert loss.grad_fn is not None
    pending, seen = [loss.grad_fn], set()
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            function.variable.grad = torch.zeros_like(function.variable)
        pending += [each for each, _ in function.next_functions if each is not None]


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Create new parameters, since a fake tensor cannot replace the data of a real one."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    made = change(tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    table[name] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
    return module


class _Generator(torch.Generator):
    """A CPU generator that reports the device it was created for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._device


@contextmanager
def pretended(answer: Callable[[str], float] = lambda file: 0) -> Iterator[FakeCuda]:
    """Simulate a machine with a GPU."""
    with (
        _autograd_knows_cuda(),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda: True),
        patch.object(torch, "Generator", _Generator),
        patch.object(nn.Module, "_apply", _apply),
        patch.object(Tensor, "backward", _backward),
        patch.object(torch.autograd, "grad", lambda outputs, inputs, **options: [torch.zeros_like(inputs)]),
        FakeCuda(answer) as mode,
        RowsOfAttention(),
    ):
        yield mode


@contextmanager
def _autograd_knows_cuda() -> Iterator[None]:
    """Give CUDA the meta device's guard: in builds without CUDA, such a tensor in a graph ends the process."""
    library = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libc10.*"))))
    guards = (ctypes.c_void_p * (META_TYPE + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[CUDA_TYPE]
    guards[CUDA_TYPE] = before or guards[META_TYPE]
    try:
        yield
    finally:
        guards[CUDA_TYPE] = before
