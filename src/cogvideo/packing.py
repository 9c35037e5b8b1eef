"""Weights packed for the CPU: oneDNN's own layout reads three times faster than `F.linear` at a few rows.

The operators are private to PyTorch, but what its own compiler emits when it freezes weights (2.11 to 2.13). Where they
do not exist or do not apply, `pack` leaves a layer as it is. A packed layer computes every row in the same way whatever
the number of rows, so that a sample does not depend on its batch to the last bit.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cogvideo.models.transformer import Base, Words

M = TypeVar("M", bound=nn.Module)

WORTH_PACKING = 1 << 16
"""Elements of a weight from which reading it takes longer than starting oneDNN's operator (measured)."""

FASTEST_ROWS = 6
"""Rows at which oneDNN reads packed weights fastest, by a third faster than at one or two (measured), as many as a step
of decoding has. So one to three rows are repeated up to it."""

ALIKE_ROWS = 32
"""Rows up to which oneDNN adds up every row in the same order in bfloat16 with AMX, wherever it stands; with more, the
order depends on how many there are (measured for 256 to 12,288 inputs). So more are computed in pieces."""


class PackedLinear(nn.Module):
    """A linear layer for inference alone: it has no parameters to train or to save."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Float[Tensor, "batch rows in"]) -> Float[Tensor, "batch rows out"]:
        """`x @ weight.T + bias`."""
        rows = x.flatten(0, 1)
        together = len(rows) if x.dtype != torch.bfloat16 else ALIKE_ROWS
        pieces = [self._few(rows[start : start + together]) for start in range(0, len(rows), together)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(*x.shape[:2], -1)

    def _few(self, rows: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """As many as go into the operator at once, or more copies of them."""
        copies = FASTEST_ROWS // len(rows)
        return self._product(rows) if copies < 2 else self._product(torch.cat([rows] * copies))[: len(rows)]

    def _product(self, rows: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")


class PackedWords(Words):
    """A word embedding for inference, with a packed copy of its code rows."""

    def __init__(self, base: Base) -> None:
        with torch.device("meta"):
            super().__init__(base.config)
        self.weight = base.words.weight
        self.codes = PackedLinear(self.weight[: self.num_codes], None)

    def code_logits(self, x: Float[Tensor, "batch rows hidden"]) -> Float[Tensor, "batch rows codes"]:
        """The product with the rows of image codes."""
        return self.codes(x)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN packs weights of this device and dtype here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.numel() < WORTH_PACKING:
        return False
    bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bool(bfloat16)


def sharing(module: M) -> M:
    """A copy that has the same parameters in memory: what is then replaced in it stays as it is in `module`."""
    tensors = [*module.parameters(), *module.buffers()]
    return deepcopy(module, {id(each): each for each in tensors})


def num_bytes(module: nn.Module) -> int:
    """Memory of its weights, packed ones too."""
    packed = [each.packed for each in module.modules() if isinstance(each, PackedLinear)]
    return sum(each.numel() * each.dtype.itemsize for each in [*module.parameters(), *module.buffers(), *packed])


def pack(module: nn.Module) -> None:
    """Replace the linear layers of a base or a channel by packed ones, in place, each layer's weights freed at once.

    The module can then neither be trained nor saved: pack one of your own, or a copy (`sharing`). Packing twice does
    nothing.
    """
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear) and can_pack(child.weight):
                setattr(owner, name, PackedLinear(child.weight, child.bias))
    if isinstance(module, Base) and not isinstance(module.words, PackedWords) and can_pack(module.words.weight):
        module.words = PackedWords(module)
