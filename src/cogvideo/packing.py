"""Weights packed for the CPU: with few rows, oneDNN's own layout is three times faster than `F.linear`.

The operators are private to PyTorch, but its compiler emits them when it freezes weights (2.11 to 2.13).
`pack` skips layers if the operators are missing or do not apply. A packed layer computes each row the same
way for any number of rows, so a sample does not depend on its batch, to the last bit.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from cogvideo.models.transformer import Base, WordEmbedding

M = TypeVar("M", bound=nn.Module)

MIN_WEIGHTS = 1 << 16
"""Number of weights from which reading them takes longer than starting oneDNN's operator (measured)."""

FASTEST_ROWS = 6
"""Number of rows at which oneDNN reads packed weights fastest: a third faster than at one or two, the rows of
a decoding step (measured). So one to three rows are repeated up to this number."""

MAX_EQUAL_ROWS: dict[torch.dtype, int] = {torch.bfloat16: 32}
"""Number of rows up to which oneDNN sums every row in the same order; beyond it, the order depends on their
number (measured for 64 to 12,288 inputs; bfloat16 with AMX). So more rows are computed in pieces."""
if TorchVersion(torch.__version__) < "2.13":
    MAX_EQUAL_ROWS[torch.float32] = 15


class PackedLinear(nn.Module):
    """Linear layer for inference only, without parameters to train or save."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Float[Tensor, "batch rows in"]) -> Float[Tensor, "batch rows out"]:
        """`x @ weight.T + bias`."""
        rows = x.flatten(0, 1)
        together = MAX_EQUAL_ROWS.get(x.dtype, len(rows))
        pieces = [self._few(rows[start : start + together]) for start in range(0, len(rows), together)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(*x.shape[:2], -1)

    def _few(self, rows: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Product of rows, repeated up to `FASTEST_ROWS` if they are few."""
        copies = FASTEST_ROWS // len(rows)
        repeated = torch.cat([rows] * copies) if copies > 1 else rows
        product = torch.ops.mkldnn._linear_pointwise(repeated, self.packed, self.bias, "none", [], "")
        return product[: len(rows)]


class PackedWords(WordEmbedding):
    """Word embedding for inference, with a packed copy of its code rows."""

    def __init__(self, base: Base) -> None:
        with torch.device("meta"):
            super().__init__(base.config)
        self.weight = base.words.weight
        self.codes = PackedLinear(self.weight[: self.num_codes], None)

    def code_logits(self, x: Float[Tensor, "batch rows hidden"]) -> Float[Tensor, "batch rows codes"]:
        """Logits of image codes."""
        return self.codes(x)


def can_pack(weight: Tensor) -> bool:
    """Return True if oneDNN can pack weights of this device and dtype on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.numel() < MIN_WEIGHTS:
        return False
    bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bool(bfloat16)


def sharing(module: M) -> M:
    """Copy a module that shares its parameters; replacing layers of the copy does not change `module`."""
    tensors = [*module.parameters(), *module.buffers()]
    return deepcopy(module, {id(each): each for each in tensors})


def num_bytes(module: nn.Module) -> int:
    """Memory of a module's weights in bytes, including packed ones."""
    packed = [each.packed for each in module.modules() if isinstance(each, PackedLinear)]
    return sum(each.numel() * each.dtype.itemsize for each in [*module.parameters(), *module.buffers(), *packed])


def pack(module: nn.Module) -> None:
    """Replace the linear layers of a base or a channel by packed ones, in place, freeing weights as it goes.

    The module can then be neither trained nor saved: pack your own, or a copy (`sharing`). Packing again does
    nothing.
    """
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear) and can_pack(child.weight):
                setattr(owner, name, PackedLinear(child.weight, child.bias))
    if isinstance(module, Base) and not isinstance(module.words, PackedWords) and can_pack(module.words.weight):
        module.words = PackedWords(module)
