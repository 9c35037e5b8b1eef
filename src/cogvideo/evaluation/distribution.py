"""Distances between features of generated and real clips, and Inception Score: pure functions.

Published figures differ in the covariance's divisor, in precision and in constants; arguments select them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cogvideo.config import require

TATS_EPS = 1e-10
"""TATS, VideoGPT and TF-GAN use singular values below this instead of their roots."""


RESAMPLES, SHUFFLES, GROUPS = 100, 4, 10
"""Bootstrap draws of an interval, random halvings of an extrapolation, and jackknife groups of its error."""

Sets = Sequence[Float[Tensor, "_ features"]]
"""Features of one or more sets with the same number of clips."""
Metric = Callable[..., float]
"""A function that computes a figure from one or more sets."""


class InceptionScore(NamedTuple):
    """Inception Score over splits."""

    mean: float
    """Mean of the splits' scores."""
    std: float
    """Their standard deviation; 0 for one split."""


def frechet_distance(
    real: Float[Tensor, "num_real features"], generated: Float[Tensor, "num_generated features"], ddof: int = 1
) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets of features, in float64.

    `|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)`. With centered features `X = QR`, the covariance is `R'R`, and
    the last trace is the sum of the singular values of `R1 R2'`: neither a covariance nor a root of one is formed.

    Args:
        real: features of real clips; FVD takes I3D's logits.
        generated: features of generated clips.
        ddof: 1 divides covariances by one less than the number of clips (TF-GAN, TATS), 0 by the number (StyleGAN-V).
    """
    require(min(len(real), len(generated)) > 1, f"got {len(real)} and {len(generated)} clips, expected at least two")
    factors = [_factor(each.double(), ddof) for each in (real, generated)]
    shift = (real.double().mean(0) - generated.double().mean(0)).square().sum()
    spread = factors[0].square().sum() + factors[1].square().sum()
    common = torch.linalg.svdvals(factors[0] @ factors[1].mT).sum()
    return (shift + spread - 2 * common).item()


def frechet_distance_float32(
    real: Float[Tensor, "num_real features"], generated: Float[Tensor, "num_generated features"]
) -> float:
    """The same as TATS and VideoGPT compute it, with their rounding: at 2,048 clips, the fourth digit is noise."""
    covariances = [each.float().mT.cov() for each in (real, generated)]
    root = _root(covariances[1])
    common = _root(root @ (covariances[0] @ root)).trace()
    shift = (real.float().mean(0) - generated.float().mean(0)).square().sum()
    return (shift + (covariances[0] + covariances[1]).trace() - 2 * common).item()


def polynomial_mmd(
    real: Float[Tensor, "num_real features"],
    generated: Float[Tensor, "num_generated features"],
    degree: int = 3,
    constant: float = 1.0,
    biased: bool = False,
) -> float:
    """Squared maximum mean discrepancy with the kernel `(x y / features + constant)^degree`, in float64.

    The defaults are KVD (TATS, DIGAN). JEDi uses degree 2, constant 0 and biased means, and reports a hundred times the
    result.

    Args:
        real: features of real clips.
        generated: features of generated clips.
        degree: degree of the polynomial.
        constant: added to the products.
        biased: whether the kernel of a clip with itself counts.
    """
    require(min(len(real), len(generated)) > 1, f"got {len(real)} and {len(generated)} clips, expected at least two")
    x, y = real.double(), generated.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / a.shape[1] + constant) ** degree

    def within(a: Tensor) -> Tensor:
        table, count = kernel(a, a), len(a)
        return table.mean() if biased else (table.sum() - table.trace()) / (count * (count - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def inception_score(
    probabilities: Float[Tensor, "clips classes"], splits: int = 1, eps: float = 0.0, seed: int | None = None
) -> InceptionScore:
    """`exp(mean KL(p(class | clip) || p(class)))`, in float64.

    Args:
        probabilities: class probabilities of each clip, the softmax of C3D's logits.
        splits: number of parts to score separately: 1 in TGAN and TGAN-v2, 10 in StyleGAN-V. More parts score lower.
        eps: added to probabilities inside the logarithm: 1e-7 in TGAN, 1e-20 in TGAN-v2, none in StyleGAN-V.
        seed: shuffles the clips before they are split, as NumPy's old generator does; 42 in StyleGAN-V.
    """
    count = len(probabilities)
    require(0 < splits <= count, f"splits is {splits}, expected 1 to {count}, the number of clips")
    order = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
    scores = []
    for part in np.array_split(order, splits):
        given = probabilities[torch.from_numpy(part)].double()
        overall = given.mean(0)
        divergence = torch.special.xlogy(given, given + eps) - torch.special.xlogy(given, overall + eps)
        scores.append(divergence.sum(1).mean().exp().item())
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


class Extrapolation(NamedTuple):
    """A figure extrapolated to infinitely many clips."""

    value: float
    error: float


def mean(values: Float[Tensor, "clips 1"]) -> float:
    """Mean over clips, in float64."""
    return values.double().mean().item()


def interval(metric: Metric, sets: Sets, seed: int = 0) -> tuple[float, float]:
    """The 95% confidence interval of a figure, by bootstrap over clips.

    Repeated clips bias most figures upwards, so the spread of the resampled figures is centered on the figure itself.
    """
    random = np.random.default_rng(seed)

    def resampled(features: Tensor) -> Tensor:
        return features[torch.from_numpy(random.integers(len(features), size=len(features)))]

    values = [metric(*map(resampled, sets)) for _ in range(RESAMPLES)]
    low, high = metric(*sets) + np.quantile(values, (0.025, 0.975)) - np.mean(values)
    return float(low), float(high)


def limit(metric: Metric, sets: Sets, seed: int = 0) -> Extrapolation | None:
    """A figure extrapolated to infinitely many clips: this removes the bias of FVD and others, which falls as 1/N.

    A line in 1/N through the figures of all clips and of halves of them (arXiv 1911.07023) is extended to 0; the error
    is from a jackknife over tenths of the clips. The bias falls as 1/N only if halves, with a tenth left out, have more
    clips than features: None for fewer.
    """
    if 0.9 * min(map(len, sets)) <= 2 * max(GROUPS, sets[0].shape[1]):
        return None
    random = np.random.default_rng(seed)
    value = _extrapolated(metric, sets, random)
    groups = torch.from_numpy(random.permutation(len(sets[0])) % GROUPS)
    without = [_extrapolated(metric, [each[groups != group] for each in sets], random) for group in range(GROUPS)]
    return Extrapolation(value, float(np.std(without) * np.sqrt(GROUPS - 1)))


def _extrapolated(metric: Metric, sets: Sets, random: np.random.Generator) -> float:
    values = []
    for _ in range(SHUFFLES):
        shuffled = [each[torch.from_numpy(random.permutation(len(each)))] for each in sets]
        values += [metric(*(each[start::2] for each in shuffled)) for start in (0, 1)]
    return 2 * metric(*sets) - float(np.mean(values))


def halves(names: Sequence[str], features: Float[Tensor, "clips features"], max_clips: int) -> Sets:
    """Two sets of the same size, at most `max_clips`, that share no video; `names` are the videos of the clips."""
    sides: tuple[list[int], list[int]] = ([], [])
    for name in dict.fromkeys(names):
        smaller = min(sides, key=len)
        smaller.extend(number for number, each in enumerate(names) if each == name)
    count = min(len(sides[0]), len(sides[1]), max_clips)
    return [features[side[:count]] for side in sides]


def _factor(features: Float[Tensor, "clips features"], ddof: int) -> Float[Tensor, "rows features"]:
    """R with the covariance R'R."""
    centered = (features - features.mean(0)) / (len(features) - ddof) ** 0.5
    return torch.linalg.qr(centered, mode="r").R


def _root(matrix: Float[Tensor, "features features"]) -> Float[Tensor, "features features"]:
    """A symmetric square root by singular values."""
    left, values, right = torch.linalg.svd(matrix)
    return (left * torch.where(values < TATS_EPS, values, values.sqrt())) @ right
