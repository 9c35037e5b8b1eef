"""The device that a program asks for: found, tried, and set up."""

from __future__ import annotations

import os

import torch

from cogvideo.config import InputError, require

CUDNN_ATTENTION = "COGVIDEO_CUDNN_ATTENTION"
"""Variable of the environment: 1 lets PyTorch choose cuDNN's attention."""


def usable(device: str | torch.device) -> torch.device:
    """The device, refused if tensors cannot be put there; `auto` is a GPU if there is one, else the CPU.

    On a GPU, attention of cuDNN is switched off, see `set_up`.

    Raises:
        ValueError: PyTorch does not know it, or this build or machine has none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        one = torch.ones((), device=device)
        one.item()  # which those without values, such as meta, cannot give
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        got = f"cannot use the device {str(device)!r} ({reason:.90})"
        raise InputError(f"{got}, expected auto, cpu, or a GPU that PyTorch can use, such as cuda:0") from error
    require(one.device.type != "cpu" or not torch.device(device).index, f"there is no device {device}, expected cpu")
    set_up(one.device)
    return one.device


def set_up(device: torch.device) -> None:
    """Keep attention on CUDA away from cuDNN, which PyTorch tries first on Hopper, unless `CUDNN_ATTENTION` is 1.

    With a mask and keys % 128 == 64 its gradient of the queries can be NaN (PyTorch 2.11, issue 196678), and it makes a
    plan of its own for every shape, which takes longer than the few calls that decoding makes of each.
    """
    if device.type == "cuda" and os.environ.get(CUDNN_ATTENTION) != "1":
        torch.backends.cuda.enable_cudnn_sdp(False)
