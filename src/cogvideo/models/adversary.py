"""The adversary of the image tokenizer: a patch discriminator, its hinge loss, and its adaptive weight.

Method: taming-transformers (arXiv 2012.09841, section 3.1). Network: PatchGAN (arXiv 1611.07004).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cogvideo.config import require

SLOPE = 0.2
"""Negative slope of LeakyReLU."""
MAX_WIDTH_FACTOR = 8
"""Largest width of a layer, as a multiple of the first; widths double up to it."""
MAX_WEIGHT = 1e4
"""Limit of the adaptive weight when the adversary's gradient vanishes."""


class PatchDiscriminator(nn.Module):
    """Discriminator of overlapping patches: positive scores for real frames, negative for reconstructions.

    It has 4 x 4 convolutions: `num_layers` that halve the side and two that keep it (minus one), with batch
    norm between the first and the last, and LeakyReLU after all but the last. There are no running
    statistics, since it is only used in training. Weights start as N(0, 0.02), norm weights as N(1, 0.02),
    biases as zero.
    """

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        """Create a discriminator whose first layer has `width` channels."""
        super().__init__()
        for name, value in {"width": width, "num_layers": num_layers}.items():
            require(value > 0, f"{name} is {value}, expected a positive number")
        widths = [width * min(2**layer, MAX_WIDTH_FACTOR) for layer in range(num_layers + 1)]
        strides = [2] * (num_layers - 1) + [1]
        self.first = nn.Sequential(_convolution(3, widths[0], 2), nn.LeakyReLU(SLOPE))
        layers = zip(pairwise(widths), strides, strict=True)
        self.middle = nn.Sequential(*(_judged(before, after, stride) for (before, after), stride in layers))
        self.last = _convolution(widths[-1], 1, 1)
        self.apply(_start)

    def forward(self, frames: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1 rows columns"]:
        """Score the patches of frames in [0, 1], whose sides are at least `least_side`."""
        least, side = self.least_side, min(frames.shape[2:])
        require(side >= least, f"frames have a side of {side} pixels, expected at least {least} for the adversary")
        return self.last(self.middle(self.first(2 * frames - 1)))

    @property
    def least_side(self) -> int:
        """Side of the smallest frame that has a score: the two layers that keep the side use up one cell each."""
        return 3 * 2 ** len(self.middle)


def discriminator_loss(
    real: Float[Tensor, "batch 1 rows columns"], fake: Float[Tensor, "batch 1 rows columns"]
) -> Float[Tensor, ""]:
    """Hinge loss of the scores of real frames and reconstructions: 0 beyond 1 and -1, respectively."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_loss(fake: Float[Tensor, "batch 1 rows columns"]) -> Float[Tensor, ""]:
    """Negative mean score of reconstructions, which the autoencoder minimizes."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Float[Tensor, ""], adversary: Float[Tensor, ""], last_layer: Tensor
) -> Float[Tensor, ""]:
    """Ratio of gradient norms at the decoder's last layer, which balances the two losses.

    `|d reconstruction / d last_layer| / (|d adversary / d last_layer| + 1e-4)`, at most `MAX_WEIGHT`,
    detached (arXiv 2012.09841, equation 7). Both losses keep their graphs.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversary)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, MAX_WEIGHT).detach()


def _judged(before: int, after: int, stride: int) -> nn.Sequential:
    norm = nn.BatchNorm2d(after, track_running_stats=False)
    return nn.Sequential(_convolution(before, after, stride, bias=False), norm, nn.LeakyReLU(SLOPE))


def _convolution(before: int, after: int, stride: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel_size=4, stride=stride, padding=1, bias=bias)


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
