"""I3D, the network of FVD: Inception inflated to three dimensions (arXiv 1705.07750), trained on Kinetics-400.

Tensors have the names and the layout of the official checkpoint `rgb_scratch`, which is what TF-Hub's
`i3d-kinetics-400/1` holds. `i3d_crc32c.json` lists their checksums, which verify any copy: FVD by another network is
not FVD.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn

from cogvideo.config import InputError, require
from cogvideo.models.perceptual import check_shapes

SCOPE = "RGB/inception_i3d/"
"""Prefix of all names in the checkpoint."""
EPS = 1e-3
"""Added to the variance by the official graph. TATS, VideoGPT and cd-fvd add 1e-5, which moves logits by up to 0.3."""
SIDE = 224
"""Height and width of frames."""
MIN_FRAMES = 9
"""Frames of the shortest clip: the last pooling takes two steps, each of eight frames."""
NUM_CLASSES = 400
CRC_MASK = 0xA282EAD8
"""Added to a rotated checksum, as TensorFlow does."""

Size = tuple[int, ...]

MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
"""Input channels of a module, and output channels of its six convolutions, branch by branch."""
POOLS: dict[str, tuple[Size, Size]] = {
    "Conv3d_1a_7x7": ((1, 3, 3), (1, 2, 2)),
    "Conv3d_2c_3x3": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3c": ((3, 3, 3), (2, 2, 2)),
    "Mixed_4f": ((2, 2, 2), (2, 2, 2)),
}
"""Window and stride of the pooling that follows a layer."""


class I3D(nn.Module):
    """Logits of the 400 classes of Kinetics, the features of FVD. `load_i3d` fills the parameters."""

    def __init__(self, eps: float = EPS) -> None:
        super().__init__()
        logits = nn.Sequential(OrderedDict(conv_3d=nn.Conv3d(1024, NUM_CLASSES, kernel_size=1)))
        self.layers = nn.ModuleDict(  # as the checkpoint calls them
            {
                "Conv3d_1a_7x7": _Unit(3, 64, eps, kernel=7, stride=2),
                "Conv3d_2b_1x1": _Unit(64, 64, eps),
                "Conv3d_2c_3x3": _Unit(64, 192, eps, kernel=3),
                **{name: _Mixed(name, before, widths, eps) for name, (before, widths) in MIXED.items()},
                "Logits": nn.Sequential(OrderedDict(pool=nn.AvgPool3d((2, 7, 7), stride=1), Conv3d_0c_1x1=logits)),
            }
        )
        self.requires_grad_(False)

    def forward(self, clips: Float[Tensor, "batch 3 frames height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of clips with pixels in [-1, 1], 224 x 224, at least nine frames, averaged over time."""
        frames, height, width = clips.shape[2:]
        require((height, width) == (SIDE, SIDE), f"frames are {height} x {width} pixels, expected {SIDE} x {SIDE}")
        require(frames >= MIN_FRAMES, f"clips have {frames} frames, expected at least {MIN_FRAMES} for I3D")
        x = clips
        for name, layer in self.layers.items():
            x = layer(x)
            if name in POOLS:
                x = _pool(x, *POOLS[name])
        return x.mean((2, 3, 4))


class _Unit(nn.Module):
    """Convolution, normalization by moving statistics with a shift and no scale, ReLU."""

    def __init__(self, before: int, width: int, eps: float, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.eps = eps
        self.conv_3d = nn.Conv3d(before, width, kernel, stride, bias=False)
        zeros, ones = torch.zeros(width), torch.ones(width)
        self.batch_norm = nn.ParameterDict({"beta": zeros, "moving_mean": zeros.clone(), "moving_variance": ones})

    def forward(self, x: Tensor) -> Tensor:
        stride, norm = self.conv_3d.stride, self.batch_norm
        x, before = _padded(x, self.conv_3d.kernel_size, stride)
        x = F.conv3d(x, self.conv_3d.weight, None, stride, before)
        return F.batch_norm(x, norm["moving_mean"], norm["moving_variance"], None, norm["beta"], eps=self.eps).relu_()


class _Mixed(nn.ModuleDict):
    """Four parallel branches."""

    def __init__(self, name: str, before: int, widths: Sequence[int], eps: float) -> None:
        super().__init__()
        plain, one_before, one, two_before, two, pooled = widths
        second = "Conv3d_0a_3x3" if name == "Mixed_5b" else "Conv3d_0b_3x3"  # a quirk of the checkpoint
        one_units = {"Conv3d_0a_1x1": _Unit(before, one_before, eps), "Conv3d_0b_3x3": _Unit(one_before, one, eps, 3)}
        two_units = {"Conv3d_0a_1x1": _Unit(before, two_before, eps), second: _Unit(two_before, two, eps, 3)}
        self["Branch_0"] = nn.Sequential(OrderedDict(Conv3d_0a_1x1=_Unit(before, plain, eps)))
        self["Branch_1"] = nn.Sequential(OrderedDict(one_units))
        self["Branch_2"] = nn.Sequential(OrderedDict(two_units))
        self["Branch_3"] = nn.Sequential(OrderedDict(Conv3d_0b_1x1=_Unit(before, pooled, eps)))

    def forward(self, x: Tensor) -> Tensor:
        pooled = _pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([branch(pooled if name == "Branch_3" else x) for name, branch in self.items()], dim=1)


def load_i3d(path: Path, eps: float = EPS, proven: bool = True) -> I3D:
    """I3D with the weights of a safetensors file that has the names of the official checkpoint.

    If `proven`, each tensor must have the checksum of the official one. `eps` is that of the normalization.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    (check_i3d if proven else _check_names)(tensors, path)
    return build_i3d(tensors, eps)


def build_i3d(tensors: Mapping[str, NDArray[np.float32]], eps: float = EPS) -> I3D:
    """I3D with tensors that have the names and the layout of the official checkpoint, whatever their values."""
    with torch.device("meta"):
        model = I3D(eps)
    state = {name: torch.from_numpy(_to_torch(tensors[checkpoint_name(name)])) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def checkpoint_name(name: str) -> str:
    """Name in the official checkpoint of a tensor of `I3D`."""
    path = name.removeprefix("layers.").replace(".", "/")
    return SCOPE + path.replace("conv_3d/weight", "conv_3d/w").replace("conv_3d/bias", "conv_3d/b")


def check_i3d(tensors: Mapping[str, NDArray[np.float32]], where: object) -> None:
    """Refuse tensors that are not bit-identical to those of the official checkpoint."""
    _check_names(tensors, where)
    expected = _checksums()
    changed = [name for name, checksum in expected.items() if masked_crc32c(tensors[name]) != checksum]
    differ = f"{len(changed)} of {len(expected)} tensors differ, the first is {''.join(changed[:1])}"
    require(not changed, f"{where} is not the I3D of FVD: {differ}")


def _check_names(tensors: Mapping[str, NDArray[np.float32]], where: object) -> None:
    """Refuse tensors that have other names or shapes than those of the official checkpoint."""
    with torch.device("meta"):
        state = I3D().state_dict().items()
    official = {name: each.permute(2, 3, 4, 1, 0) if each.ndim == 5 else each for name, each in state}
    shapes = {checkpoint_name(name): tuple(tensor.shape) for name, tensor in official.items()}
    check_shapes(f"{where} is not the I3D of FVD", tensors, shapes)


def masked_crc32c(tensor: NDArray[np.float32]) -> int:
    """Checksum of a tensor's bytes as TensorFlow writes it into the index of a checkpoint."""
    import google_crc32c  # from the extra `eval`

    checksum = google_crc32c.value(np.ascontiguousarray(tensor, "<f4").tobytes())
    return ((checksum >> 15 | checksum << 17) + CRC_MASK) & 0xFFFFFFFF


def _checksums() -> dict[str, int]:
    """Masked CRC32C of each tensor of the official checkpoint, by its name."""
    return json.loads((files(__package__) / "i3d_crc32c.json").read_text())


def _to_torch(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """Kernels are (frames, height, width, inputs, outputs) in TensorFlow."""
    return np.ascontiguousarray(tensor.transpose(4, 3, 0, 1, 2)) if tensor.ndim == 5 else tensor.copy()


def _pool(x: Tensor, kernel: Size, stride: Size) -> Tensor:
    """Max pooling, one dimension after the other: on a CPU, a fifth of the time of `max_pool3d`.

    It follows a ReLU, so zero padding hides no value.
    """
    x, (frames, rows, columns) = _padded(x, kernel, stride)
    x = F.pad(x, (columns, columns, rows, rows, frames, frames))
    for dim, window, step in zip((2, 3, 4), kernel, stride, strict=True):
        x = reduce(torch.maximum, x.unfold(dim, window, step).unbind(-1))
    return x


def _padded(x: Tensor, kernel: Size, stride: Size) -> tuple[Tensor, Size]:
    """TensorFlow's padding SAME: the clip, padded where its end needs one more, and the padding left for both sides."""
    both, ends = [], []
    for size, window, step in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((math.ceil(size / step) - 1) * step + window - size, 0)
        both.append(total // 2)
        ends.append(total % 2)
    if any(ends):
        x = F.pad(x, [each for end in reversed(ends) for each in (0, end)])
    return x, tuple(both)
