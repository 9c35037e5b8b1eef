"""Similarity of frames, and code usage: pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cogvideo.config import require

WINDOW, SIGMA = 11, 1.5
"""Side and standard deviation of SSIM's Gaussian window, in pixels (Wang et al. 2004, section III.C)."""
K1, K2 = 0.01, 0.03
"""Constants of SSIM that keep its quotients stable (same source)."""


def psnr(
    frames: Float[Tensor, "batch 3 height width"], others: Float[Tensor, "batch 3 height width"], peak: float = 1.0
) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each frame in dB: `10 log10(peak^2 / mean squared error)`.

    The mean is over the frame's pixels and colors; identical frames give infinity. `peak` is the difference between
    white and black. Values are used as they are: clamp reconstructions first, as a viewer would.
    """
    errors = (_wide(frames) - _wide(others)).square().mean((1, 2, 3))
    return 10 * torch.log10(peak**2 / errors)


def ssim(
    frames: Float[Tensor, "batch 3 height width"], others: Float[Tensor, "batch 3 height width"], peak: float = 1.0
) -> Float[Tensor, " batch"]:
    """Structural similarity of each frame in [-1, 1], 1 for equal ones (Wang et al. 2004).

    Means, variances and covariance are weighted by a Gaussian window of 11 x 11 pixels with a standard deviation of
    1.5. The mean is over the colors and all positions of the window inside the frame.

    Raises:
        ValueError: the frames are smaller than the window.
    """
    height, width = frames.shape[2:]
    require(min(height, width) >= WINDOW, f"frames are {height} x {width} pixels, expected at least {WINDOW} a side")
    x, y = _wide(frames), _wide(others)
    mean_x, mean_y = _blur(x), _blur(y)
    variances = _blur(x * x) - mean_x**2 + _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).mean((1, 2, 3))


def count_codes(codes: Int64[Tensor, "*positions"], num_codes: int) -> Int64[Tensor, " codes"]:
    """Occurrences of each code."""
    return codes.flatten().bincount(minlength=num_codes)


def code_usage(counts: Int64[Tensor, " codes"]) -> float:
    """Share of the codes that occur at all, in [0, 1]."""
    return (counts > 0).double().mean().item()


def perplexity(counts: Int64[Tensor, " codes"]) -> float:
    """Number of codes that would have the same entropy if all were equally frequent: `exp(entropy)`, at least 1."""
    shares = counts.double() / counts.sum()
    return torch.special.entr(shares).sum().exp().item()


def _wide(frames: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """The frames in at least float32: half precision is too coarse for differences."""
    return frames.to(torch.promote_types(frames.dtype, torch.float32))


def _blur(x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 rows columns"]:
    """Means under the window, which is separable."""
    places = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.softmax(-places.square() / (2 * SIGMA**2), 0).expand(3, 1, 1, WINDOW)
    return F.conv2d(F.conv2d(x, weights, groups=3), weights.mT, groups=3)
