"""Perceptual distances between frames: LPIPS if its weights are given, and pyramids and edges.

LPIPS (arXiv 1801.03924, version 0.1) compares features of VGG-16 or AlexNet with learned weights, which
cannot be redistributed: `cogvideo fetch lpips` gets them, or users provide torchvision's file and the LPIPS
heads for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from cogvideo.config import InputError, require

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Normalization of RGB in [-1, 1] by LPIPS."""
CLASSIFIER = "classifier."
"""Prefix of names in torchvision's files that LPIPS does not need."""

Network = Literal["vgg", "alexnet"]


def _vgg16() -> nn.Sequential:
    """`features` of torchvision's VGG-16 (arXiv 1409.1556, configuration D) without the last pooling."""
    layers: list[nn.Module] = []
    before = 3
    for level, widths in enumerate(((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)):
        if level > 0:
            layers.append(nn.MaxPool2d(2))
        for width in widths:
            layers += [nn.Conv2d(before, width, kernel_size=3, padding=1), nn.ReLU()]
            before = width
    return nn.Sequential(*layers)


def _alexnet() -> nn.Sequential:
    """`features` of torchvision's AlexNet (arXiv 1404.5997) without the last pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)]
    for before, after in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features LPIPS compares."""

    title: str
    """Name in messages."""
    build: Callable[[], nn.Sequential]
    """Constructor of the layers, numbered as in torchvision's `features`."""
    compared: tuple[int, ...]
    """Layers whose outputs are compared: the last ReLU of each level."""
    widths: tuple[int, ...]
    """Channels of these layers."""
    least_side: int
    """Side of the smallest frame whose last level is not empty."""


NETWORKS: dict[Network, FeatureNetwork] = {
    "vgg": FeatureNetwork("VGG-16", _vgg16, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
    "alexnet": FeatureNetwork("AlexNet", _alexnet, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31),
}


class Lpips(nn.Module):
    """Learned perceptual distance with fixed parameters; `load_lpips` loads them."""

    def __init__(self, network: Network = "vgg") -> None:
        super().__init__()
        self.network = NETWORKS[network]
        self.features = self.network.build()
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, kernel_size=1, bias=False) for width in self.network.widths)
        self.requires_grad_(False)

    def forward(
        self, frames: Float[Tensor, "batch 3 height width"], others: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        """Distance of each frame in [0, 1] from another; 0 for equal ones. Differentiable in both.

        Raises:
            ValueError: a side is shorter than the network's `least_side`.
        """
        side = min(frames.shape[2:])
        least = self.network.least_side
        require(side >= least, f"frames have a side of {side} pixels, expected at least {least} for LPIPS")
        x = _normalize(torch.cat([frames, others]))
        heads = dict(zip(self.network.compared, self.heads, strict=True))
        distance = x.new_zeros(len(frames))
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in heads:
                directions = F.normalize(x, dim=1, eps=1e-10)
                distance = distance + heads[index](torch.sub(*directions.chunk(2)).square()).mean((1, 2, 3))
        return distance


def load_lpips(*files: Path, network: Network = "vgg") -> Lpips:
    """Load LPIPS from files: `.safetensors`, or dictionaries of tensors from `torch.save`.

    Args:
        files: files that together hold torchvision's network, with or without its classifier, and the LPIPS
            heads for it, under the names used by torchvision and LPIPS.
        network: network that the weights are for.

    Raises:
        ValueError: a file cannot be read, or a tensor is missing, unexpected or of the wrong shape.
    """
    with torch.device("meta"):
        model = Lpips(network)
    read = (each for path in files for each in _read(path).items())
    tensors = {name: tensor for name, tensor in read if not name.startswith(CLASSIFIER)}
    expected = {file_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    where = " and ".join(map(str, files))
    check_shapes(f"{where} is not {model.network.title} with LPIPS's heads for it", tensors, expected)
    state = {name: tensors[file_name(name)].float() for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def file_name(name: str) -> str:
    """Name of an `Lpips` tensor in torchvision's and LPIPS's files."""
    part, _, rest = name.partition(".")
    return f"lin{rest.removesuffix('.weight')}.model.1.weight" if part == "heads" else name


def pyramid_distance(
    frames: Float[Tensor, "batch 3 height width"], others: Float[Tensor, "batch 3 height width"], num_levels: int
) -> Float[Tensor, ""]:
    """Mean absolute difference, averaged over the frames and `num_levels - 1` halvings of them (2 x 2 means).

    Coarser levels emphasize shapes and colors of areas over the noise of single pixels.
    """
    difference = frames - others  # pooling is linear
    distances = []
    for level in range(num_levels):
        difference = F.avg_pool2d(difference, 2) if level else difference
        distances.append(difference.abs().mean())
    return torch.stack(distances).mean()


def edge_distance(
    frames: Float[Tensor, "batch 3 height width"], others: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """Mean absolute difference of vertical and horizontal pixel gradients, which penalizes blurred edges."""
    difference = frames - others
    return (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()) / 2


def _normalize(frames: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    shift, scale = (frames.new_tensor(values).view(3, 1, 1) for values in (SHIFT, SCALE))
    return (2 * frames - 1 - shift) / scale


def check_shapes(prefix: str, tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that have other names or shapes than expected."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    require(not missing, f"{prefix}: tensors are missing ({len(missing)}), the first is {''.join(missing[:1])}")
    require(not extra, f"{prefix}: it has other tensors ({len(extra)}), the first is {''.join(extra[:1])}")
    for name, shape in expected.items():
        got = tuple(tensors[name].shape)
        require(got == shape, f"{prefix}: {name} has the shape {got}, expected {shape}")


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an untrusted file, without executing anything in it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # invalid bytes raise all kinds of errors
        raise InputError(f"cannot read {path}: it is not a file of tensors") from error
    tensors = isinstance(values, Mapping) and all(isinstance(each, Tensor) for each in values.values())
    require(tensors, f"cannot read {path}: it does not hold a table of tensors")
    return dict(values)
