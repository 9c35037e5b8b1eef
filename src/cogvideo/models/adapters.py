"""Adapters: low-rank additions to the attention and feed-forward matrices of a base or a channel (LoRA, Hu et al.
2021). In training they are layers next to frozen ones; for generation they are fused into the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cogvideo.config import require

MATRICES = ("qkv", "out", "mlp_in", "mlp_out")
"""Layers of a block that adapters change, if the component has them."""
DOWN, UP = "lora_A.weight", "lora_B.weight"
"""PEFT's names of the two matrices; their product `UP @ DOWN` is added to the weight."""


class LowRank(nn.Linear):
    """A frozen linear layer with a trained low-rank adapter, which is zero at the start."""

    def __init__(self, frozen: nn.Linear, rank: int, generator: torch.Generator | None = None) -> None:
        with torch.device("meta"):
            super().__init__(frozen.in_features, frozen.out_features, frozen.bias is not None)
        self.weight, self.bias = frozen.weight, frozen.bias
        self.lora_A = nn.Linear(frozen.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, frozen.out_features, bias=False)
        bound = frozen.in_features**-0.5
        nn.init.uniform_(self.lora_A.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Float[Tensor, "batch rows in"]) -> Float[Tensor, "batch rows out"]:
        """`x @ (weight + up @ down).T + bias`, without forming the sum of the matrices."""
        return super().forward(x) + self.lora_B(self.lora_A(x))


class Delta(NamedTuple):
    """An adapter of one component."""

    tensors: Mapping[str, Tensor]
    """Both matrices of each layer, by their names in the component."""
    scale: float = 1.0
    """Factor of the product that is added."""


def adapt(module: nn.Module, rank: int, generator: torch.Generator | None = None) -> None:
    """Add adapters of this rank to a base or a channel, in place, and freeze its own weights.

    Raises:
        ValueError: the rank is not in `[1, smallest side of the matrices]`.
    """
    layers = [(owner, name) for owner in module.modules() for name in MATRICES if hasattr(owner, name)]
    most = min(min(getattr(owner, name).weight.shape) for owner, name in layers)
    require(0 < rank <= most, f"lora is {rank}, expected a rank of 1 to {most}")
    module.requires_grad_(False)
    for owner, name in layers:
        setattr(owner, name, LowRank(getattr(owner, name), rank, generator))


@torch.no_grad()
def fuse(module: nn.Module, deltas: Sequence[Delta]) -> None:
    """Add adapters to the weights of a component, in place. The sum is computed in float32, and rounded once."""
    for name in sorted({each.rpartition(".lora_")[0] for delta in deltas for each in delta.tensors}):
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        total = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32), copy=True)
        for tensors, scale in deltas:
            if (key := f"{name}.{DOWN}") in tensors:
                down, up = tensors[key].to(total), tensors[f"{name}.{UP}"].to(total)
                total.addmm_(up, down, alpha=scale)
        layer.weight = nn.Parameter(total.to(layer.weight.dtype), requires_grad=False)
