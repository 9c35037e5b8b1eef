"""Sampling of codes from logits by the Gumbel-max trick, with noise that is fixed in advance.

The argmax of log-probability plus Gumbel noise is a sample of the distribution. The noise of every slot of
every frame depends only on the sample's generator, so neither the batch, nor its order, nor the number of
slots drafted at once can change a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from cogvideo.config import SamplingConfig, require

FIXED_POINT = 2.0**40
"""Fixed-point representation of 1: sums of up to 8 million exponentials fit into 64 bits."""


@dataclass(frozen=True)
class Clusters:
    """Clusters of the codebook."""

    labels: Int64[Tensor, " codes"]
    """Cluster of each code."""
    count: int
    """Number of clusters, counted once to avoid a GPU synchronization in every pass."""

    @classmethod
    def of(cls, labels: Int64[Tensor, " codes"], device: torch.device) -> Clusters:
        """Clusters of these labels, on a device."""
        return cls(labels.to(device), int(labels.max()) + 1)


def check_clusters(sampling: SamplingConfig, labels: Int64[Tensor, " codes"] | None, num_codes: int) -> None:
    """Refuse cluster sampling without a label for every code."""
    found = "no cluster labels" if labels is None else f"{len(labels)} cluster labels"
    got = f"sampling keeps {sampling.clusters} clusters, but there are {found}, expected {num_codes}"
    advice = "pass labels (models.quantizer.cluster_codes makes them), or SamplingConfig(clusters=0)"
    require(not sampling.clusters or (labels is not None and len(labels) == num_codes), f"{got}: {advice}")


def log_probabilities(
    logits: Float[Tensor, "*rows codes"], sampling: SamplingConfig, clusters: Clusters | None = None
) -> Float[Tensor, "*rows codes"]:
    """Log-probabilities of the sampler's distribution; -inf for codes that cannot be drawn.

    Args:
        logits: of any float type; all but float64 are converted to float32.
        sampling: the sampler.
        clusters: clusters of the codebook, needed if `sampling.clusters` is set.

    Raises:
        ValueError: the sampler needs clusters and there are none.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.is_greedy:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if not sampling.clusters:
        return logits.log_softmax(-1)
    check_clusters(sampling, None if clusters is None else clusters.labels, logits.shape[-1])
    assert clusters is not None
    return cluster_log_probabilities(logits, clusters, sampling.clusters, sampling.cluster_temperature)


def keep_top_k(logits: Float[Tensor, "*rows codes"], k: int) -> Float[Tensor, "*rows codes"]:
    """Set all but the k largest logits to -inf."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Float[Tensor, "*rows codes"], p: float) -> Float[Tensor, "*rows codes"]:
    """Keep the smallest set of most likely codes whose probabilities add up to p; set other logits to -inf."""
    ordered, index = logits.softmax(-1).sort(-1, descending=True)
    dropped = ordered.cumsum(-1) - ordered >= p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), -torch.inf)


def cluster_log_probabilities(
    logits: Float[Tensor, "*rows codes"], clusters: Clusters, k: int, temperature: float
) -> Float[Tensor, "*rows codes"]:
    """Cluster sampling in closed form (spec section 3).

    The distribution of drawing one of the k most likely clusters by probability, then a code in it:
    `P(code) = P(cluster of code | best k) * softmax within the cluster(logits / temperature)`.

    Args:
        logits: already divided by the temperature of the first draw.
        clusters: clusters of the codes, none of them empty.
        k: number of clusters to keep.
        temperature: temperature of the second draw.
    """
    labels = clusters.labels
    least = torch.finfo(logits.dtype).min
    kept = keep_top_k(_log_sum_by(logits, clusters), k).log_softmax(-1)
    inside = logits / temperature
    return kept[..., labels] + inside - _log_sum_by(inside, clusters)[..., labels].clamp(min=least)


def _log_sum_by(logits: Float[Tensor, "*rows codes"], clusters: Clusters) -> Float[Tensor, "*rows clusters"]:
    """Log-sum-exp over each cluster."""
    index = clusters.labels.expand(logits.shape)
    most = logits.new_full((*logits.shape[:-1], clusters.count), -torch.inf).scatter_reduce(-1, index, logits, "amax")
    shift = most.clamp(min=torch.finfo(logits.dtype).min)  # a cluster without kept codes stays at -inf
    shares = (logits - shift[..., clusters.labels]).exp()
    add = _add_exactly if shares.is_cuda else _add
    return add(shares, index, clusters.count).log() + shift


def _add(
    shares: Num[Tensor, "*rows codes"], index: Int64[Tensor, "*rows codes"], count: int
) -> Num[Tensor, "*rows clusters"]:
    """Sum of the shares of each cluster; on a CPU, in the order of the codes."""
    return shares.new_zeros(*shares.shape[:-1], count).scatter_add(-1, index, shares)


def _add_exactly(
    shares: Float[Tensor, "*rows codes"], index: Int64[Tensor, "*rows codes"], count: int
) -> Float[Tensor, "*rows clusters"]:
    """Sum as integers, so the result does not depend on the order of addition, which varies on a GPU."""
    fixed = (shares * FIXED_POINT).to(torch.int64)
    return _add(fixed, index, count).to(shares.dtype) / FIXED_POINT


def spawn(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Derive independent generators from one, for the stages, frames and gaps of a sample."""
    seeds = torch.randint(0, 2**63 - 1, (count,), generator=generator).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def gumbel(num_slots: int, num_codes: int, generator: torch.Generator) -> Float[Tensor, "slots codes"]:
    """Gumbel noise, drawn on the generator's device."""
    draws = torch.empty(num_slots, num_codes, dtype=torch.float32, device=generator.device)
    return draws.exponential_(generator=generator).clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_()


class GumbelNoise:
    """Noise of every slot of every frame, fixed by one CPU generator per sample; each is advanced once, here."""

    def __init__(self, generators: Sequence[torch.Generator], num_frames: int, num_slots: int, num_codes: int) -> None:
        self._generators = [spawn(generator, num_frames) for generator in generators]
        self._shape = (num_slots, num_codes)

    def __call__(self, rank: int) -> Float[Tensor, "batch slots codes"]:
        """Noise of the frame with this rank; call once per rank."""
        return torch.stack([gumbel(*self._shape, each[rank]) for each in self._generators])
