"""How far a reconstruction looks from its frame: LPIPS where its weights are given, else pyramids and edges.

LPIPS (arXiv 1801.03924) compares features of VGG-16 with learned weights. Neither network's weights may be bundled, so
users bring two files: torchvision's `vgg16-*.pth` and LPIPS's linear heads for it (`vgg.pth`, version 0.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from cogvideo.config import InputError, require

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Convolutions of each of VGG-16's levels (arXiv 1409.1556, configuration D); the side is halved between levels."""
LEAST_SIDE = 2 ** (len(WIDTHS) - 1)
"""Side of the smallest frame whose last level has a cell."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""How LPIPS normalises red, green and blue of [-1, 1]."""
CLASSIFIER = {"classifier.0": (4096, 25088), "classifier.3": (4096, 4096), "classifier.6": (1000, 4096)}
"""Layers of torchvision's file that LPIPS has no use for."""


class Lpips(nn.Module):
    """Learned perceptual distance; its parameters are fixed. `perceptual_distance` in `load_lpips`'s files' words."""

    def __init__(self) -> None:
        super().__init__()
        before = (3, *(level[-1] for level in WIDTHS))
        self.levels = nn.ModuleList(_level(*widths) for widths in zip(before, WIDTHS, strict=False))
        self.heads = nn.ModuleList(nn.Conv2d(level[-1], 1, kernel_size=1, bias=False) for level in WIDTHS)
        self.requires_grad_(False)

    def forward(
        self, frames: Float[Tensor, "batch 3 height width"], others: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        """Distance of each frame in [0, 1] from another: 0 for equal ones. Differentiable in both.

        Raises:
            ValueError: a side is shorter than `LEAST_SIDE`.
        """
        side = min(frames.shape[2:])
        require(side >= LEAST_SIDE, f"frames have a side of {side} pixels, expected at least {LEAST_SIDE} for LPIPS")
        x = _normalise(torch.cat([frames, others]))
        distance = x.new_zeros(len(frames))
        for index, (level, head) in enumerate(zip(self.levels, self.heads, strict=True)):
            x = level(F.max_pool2d(x, 2) if index else x)
            directions = F.normalize(x, dim=1, eps=1e-10)
            distance = distance + head(torch.sub(*directions.chunk(2)).square()).mean((1, 2, 3))
        return distance


def load_lpips(vgg: Path, heads: Path) -> Lpips:
    """LPIPS with the weights of two files, `.safetensors` or what `torch.save` wrote of a table of tensors.

    Args:
        vgg: torchvision's VGG-16, with or without its classifier.
        heads: LPIPS's linear heads for VGG.

    Raises:
        ValueError: a file cannot be read, or lacks a tensor, has another one, or one of another shape.
    """
    with torch.device("meta"):
        model = Lpips()
    of_vgg, of_heads = _names()
    state = _renamed(vgg, "torchvision's VGG-16", of_vgg, model, ignored=_classifier())
    state |= _renamed(heads, "LPIPS's heads for VGG", of_heads, model, ignored={})
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def pyramid_distance(
    frames: Float[Tensor, "batch 3 height width"], others: Float[Tensor, "batch 3 height width"], num_levels: int
) -> Float[Tensor, ""]:
    """Mean absolute difference, averaged over the frames and `num_levels - 1` halvings of them (means of 2 x 2).

    Coarser levels weigh shapes and colours of areas more than the noise of single pixels.
    """
    difference, distances = frames - others, []  # pooling is linear
    for level in range(num_levels):
        difference = F.avg_pool2d(difference, 2) if level else difference
        distances.append(difference.abs().mean())
    return torch.stack(distances).mean()


def edge_distance(
    frames: Float[Tensor, "batch 3 height width"], others: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """Mean absolute difference of the steps between neighbouring pixels, down and across: blurred edges cost."""
    difference = frames - others
    return (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()) / 2


def _level(before: int, widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in zip((before, *widths), widths, strict=False):
        layers += [nn.Conv2d(inner, outer, kernel_size=3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _normalise(frames: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    shift, scale = (frames.new_tensor(values).view(3, 1, 1) for values in (SHIFT, SCALE))
    return (2 * frames - 1 - shift) / scale


def _names() -> tuple[dict[str, str], dict[str, str]]:
    """Names in the files of our tensors: torchvision counts convolutions, ReLUs and poolings in one row."""
    vgg, layer = {}, 0
    for level, widths in enumerate(WIDTHS):
        for convolution in range(len(widths)):
            for kind in ("weight", "bias"):
                vgg[f"features.{layer}.{kind}"] = f"levels.{level}.{2 * convolution}.{kind}"
            layer += 2
        layer += 1
    heads = {f"lin{level}.model.1.weight": f"heads.{level}.weight" for level in range(len(WIDTHS))}
    return vgg, heads


def _classifier() -> dict[str, tuple[int, ...]]:
    weights = {f"{name}.weight": shape for name, shape in CLASSIFIER.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in CLASSIFIER.items()}


def _renamed(
    path: Path, what: str, names: Mapping[str, str], model: Lpips, ignored: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The file's tensors by our names; all of `ignored` or none of it may be there as well."""
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = _read(path)
    expected = {theirs: ours[name] for theirs, name in names.items()}
    expected |= {name: shape for name, shape in ignored.items() if name in tensors}
    prefix = f"{path} does not hold {what}"
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    require(not missing, f"{prefix}: it lacks {len(missing)} tensors, the first is {missing[:1]}")
    require(not extra, f"{prefix}: it has {len(extra)} others, the first is {extra[:1]}")
    for name, shape in expected.items():
        got = tuple(tensors[name].shape)
        require(got == shape, f"{prefix}: {name} has shape {got}, expected {shape}")
    return {name: tensors[theirs].float() for theirs, name in names.items()}


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that may come from anywhere: nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # what is raised by bytes that mean nothing depends on the bytes
        raise InputError(f"cannot read {path}: it is no file of tensors") from error
    tensors = isinstance(values, Mapping) and all(isinstance(each, Tensor) for each in values.values())
    require(tensors, f"cannot read {path}: it holds no table of tensors")
    return dict(values)
