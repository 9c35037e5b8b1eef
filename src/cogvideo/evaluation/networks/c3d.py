"""C3D (arXiv 1412.0767) fine-tuned on UCF-101, the network of the Inception Score of videos, as TGAN-v2 uses it.

The score depends on details that ports get wrong: poolings round sizes up, and frames are resized corner to corner.
Weights and the mean clip are NumPy archives with the names of the authors' Chainer model; users provide them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from cogvideo.config import InputError, require

CONVOLUTIONS = {
    "conv1a": (3, 64),
    "conv2a": (64, 128),
    "conv3a": (128, 256),
    "conv3b": (256, 256),
    "conv4a": (256, 512),
    "conv4b": (512, 512),
    "conv5a": (512, 512),
    "conv5b": (512, 512),
}
"""Input and output channels."""
POOLED = ("conv1a", "conv2a", "conv3b", "conv4b", "conv5b")
"""Layers followed by a pooling. The first pools only within frames."""
DENSE = {"fc6": (8192, 4096), "fc7": (4096, 4096), "fc8": (4096, 101)}
FRAMES, SIDE = 16, 112
MEAN_SIDE = 128
"""Height and width of the mean clip; its center is used."""
MEAN = (3, FRAMES, MEAN_SIDE, MEAN_SIDE)
WHITE = 128
"""Value of 1 in the range that the network was trained on, before the mean is subtracted; -1 is its negative."""


class C3D(nn.Module):
    """Logits of the 101 classes of UCF-101. `load_c3d` fills the parameters."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleDict(
            {name: nn.Conv3d(before, after, kernel_size=3, padding=1) for name, (before, after) in CONVOLUTIONS.items()}
        )
        self.dense = nn.ModuleDict({name: nn.Linear(before, after) for name, (before, after) in DENSE.items()})
        self.register_buffer("mean", torch.zeros(MEAN))
        self.requires_grad_(False)

    def forward(self, clips: Float[Tensor, "batch 3 frames height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of clips of 16 frames of any size, RGB in [-1, 1]."""
        require(clips.shape[2] == FRAMES, f"clips have {clips.shape[2]} frames, expected {FRAMES} for C3D")
        x = self.prepare(clips)
        for name, convolution in self.convolutions.items():
            x = convolution(x).relu_()
            if name in POOLED:
                x = F.max_pool3d(x, (1, 2, 2) if name == "conv1a" else 2, ceil_mode=True)
        x = x.flatten(1)
        for name, dense in self.dense.items():
            x = dense(x)
            x = x if name == "fc8" else x.relu_()
        return x

    def prepare(
        self, clips: Float[Tensor, "batch 3 frames height width"]
    ) -> Float[Tensor, "batch 3 frames rows columns"]:
        """Clips as the network was trained on them: BGR, resized, minus the mean clip."""
        bgr = clips.flip(1) * WHITE
        resized = F.interpolate(bgr, (FRAMES, SIDE, SIDE), mode="trilinear", align_corners=True)  # same length
        first, last = (MEAN_SIDE - SIDE) // 2, (MEAN_SIDE + SIDE) // 2
        return resized + WHITE - self.mean[..., first:last, first:last]


def load_c3d(weights: Path, mean: Path) -> C3D:
    """C3D with weights from `.npz` files: arrays `conv1a/W`, `conv1a/b` to `fc8/b` in one, the mean clip in the other.

    All names may begin with `c3d/`.
    """
    arrays = {name.removeprefix("c3d/"): array for name, array in _read(weights).items()}
    means = [array for array in _read(mean).values() if array.size == np.prod(MEAN)]
    require(len(means) == 1, f"{mean} has {len(means)} arrays of {MEAN}, expected the mean clip alone")
    return build_c3d(arrays, means[0], weights)


def build_c3d(arrays: dict[str, NDArray[np.float32]], mean: NDArray[np.float32], where: object) -> C3D:
    """C3D with arrays named as in the Chainer model; messages call them `where`."""
    with torch.device("meta"):
        model = C3D()
    state = {"mean": torch.tensor(mean.reshape(MEAN))}
    for name, tensor in model.state_dict().items():
        if name != "mean":
            _, layer, kind = name.split(".")
            theirs = f"{layer}/{'W' if kind == 'weight' else 'b'}"
            require(theirs in arrays, f"{where} is not C3D: {theirs} is missing")
            got, expected = arrays[theirs].shape, tuple(tensor.shape)
            require(got == expected, f"{where} is not C3D: {theirs} has the shape {got}, expected {expected}")
            state[name] = torch.tensor(arrays[theirs])
    model.load_state_dict(state, assign=True)
    return model.float().eval().requires_grad_(False)


def _read(path: Path) -> dict[str, NDArray[np.float32]]:
    """The arrays of an untrusted archive: nothing in it is executed."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {path}: expected an archive of NumPy arrays (.npz)") from error
