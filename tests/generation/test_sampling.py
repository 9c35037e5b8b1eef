"""Samplers checked against loops and simulation, and noise that belongs to one sample, frame, and slot."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvideo.config import SamplingConfig
from cogvideo.generation.sampling import (
    Clusters,
    GumbelNoise,
    _add,
    _add_exactly,
    log_probabilities,
    spawn,
)
from reference import cluster_probabilities, draw_by_clusters, top_k, top_p

NUM_CODES = 30


def random_logits(*rows: int, seed: int = 0, spread: float = 2.0, num_codes: int = NUM_CODES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*rows, num_codes, generator=generator, dtype=torch.float64)


def probabilities(logits: Tensor, sampling: SamplingConfig, clusters: Clusters | None = None) -> Tensor:
    """The sampler's distribution, checked to sum to one."""
    result = log_probabilities(logits, sampling, clusters).exp()
    torch.testing.assert_close(result.sum(-1), torch.ones_like(result[..., 0]))
    return result


def grouped(*labels: int) -> Clusters:
    return Clusters.of(torch.tensor(labels), torch.device("cpu"))


def random_clusters(num_codes: int, num_clusters: int, seed: int = 0) -> Clusters:
    return grouped(*random_labels(num_codes, num_clusters, seed).tolist())


def random_labels(num_codes: int, num_clusters: int, seed: int = 0) -> Tensor:
    """Random labels that use every cluster."""
    random = np.random.default_rng(seed)
    rest = random.integers(num_clusters, size=num_codes - num_clusters)
    return torch.from_numpy(random.permutation(np.concatenate([np.arange(num_clusters), rest])))


# Distributions


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.05, 4.0])
def test_temperature(temperature: float) -> None:
    """Guards against a temperature that multiplies instead of dividing, or is applied twice."""
    logits = random_logits(5)
    for row, ours in zip(logits.tolist(), probabilities(logits, SamplingConfig(temperature=temperature)), strict=True):
        weights = [math.exp(each / temperature) for each in row]
        torch.testing.assert_close(ours, torch.tensor([each / sum(weights) for each in weights], dtype=torch.float64))


def test_greedy_takes_the_most_likely_code() -> None:
    """Guards against filters or temperatures that change which logit is largest."""
    logits = random_logits(50)
    scores = log_probabilities(
        logits, SamplingConfig(temperature=0, top_k=3, clusters=2), random_clusters(NUM_CODES, 5)
    )
    assert torch.equal(scores.argmax(-1), logits.argmax(-1))
    assert SamplingConfig(temperature=0).is_greedy
    assert not SamplingConfig().is_greedy


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, NUM_CODES + 5), temperature=st.sampled_from([0.5, 1.0, 1.3]))
def test_top_k_equals_sorting(seed: int, k: int, temperature: float) -> None:
    """Guards against keeping one code too many or too few, and against probabilities that are not renormalized."""
    logits = random_logits(seed=seed)
    expected = top_k((logits / temperature).tolist(), k)
    ours = probabilities(logits, SamplingConfig(temperature=temperature, top_k=k))
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.floats(0.01, 0.999), temperature=st.sampled_from([0.5, 1.0, 1.3]))
def test_top_p_equals_sorting(seed: int, p: float, temperature: float) -> None:
    """Guards against a nucleus that drops the code that reaches p, or keeps one more."""
    logits = random_logits(seed=seed)
    shares = torch.softmax(logits / temperature, -1).sort(descending=True).values.cumsum(-1)
    assume((shares - p).abs().min() > 1e-9)
    ours = probabilities(logits, SamplingConfig(temperature=temperature, top_p=p))
    expected = top_p((logits / temperature).tolist(), p)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_top_p_keeps_the_likeliest_code() -> None:
    """Guards against an empty nucleus when a single code has more than p."""
    logits = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.float64)
    assert probabilities(logits, SamplingConfig(top_p=0.1))[0].tolist() == [1.0, 0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_clusters=st.integers(1, 12),
    k=st.integers(1, 14),
    temperature=st.sampled_from([0.7, 1.0, 1.05]),
    inside=st.sampled_from([0.6, 0.89, 1.0]),
)
def test_clusters_equal_the_two_steps(seed: int, num_clusters: int, k: int, temperature: float, inside: float) -> None:
    """Checks the closed form: the cluster's share times the softmax inside it, each at its own temperature."""
    logits, labels = random_logits(seed=seed), random_labels(NUM_CODES, num_clusters, seed)
    expected = cluster_probabilities(logits.tolist(), labels.tolist(), k, temperature, inside)
    sampling = SamplingConfig(temperature=temperature, clusters=k, cluster_temperature=inside)
    ours = probabilities(logits, sampling, grouped(*labels.tolist()))
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_clusters_equal_simulation(seed: int) -> None:
    """Checks the closed form against the paper's procedure: sample a cluster, then a code, 20,000 times."""
    logits, labels, draws = random_logits(seed=seed), random_labels(NUM_CODES, 8, seed), 20_000
    random = np.random.default_rng(seed)
    counts = draw_by_clusters(logits.tolist(), labels.tolist(), 4, 1.05, 0.89, draws, random)
    sampling = SamplingConfig(temperature=1.05, clusters=4, cluster_temperature=0.89)
    expected = probabilities(logits, sampling, grouped(*labels.tolist())).numpy() * draws
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_clusters_need_not_be_balanced_or_likely() -> None:
    """Guards against NaN for clusters of one code and for logits that underflow inside a cluster."""
    logits = torch.tensor([[0.0, -2000.0, -2001.0, 1.0]])
    ours = probabilities(logits, SamplingConfig(clusters=2, cluster_temperature=1), grouped(0, 1, 1, 2))
    assert not ours.isnan().any()
    torch.testing.assert_close(ours[0], torch.tensor([0.0, -torch.inf, -torch.inf, 1.0]).softmax(-1))
    every = log_probabilities(logits, SamplingConfig(clusters=3, cluster_temperature=1), grouped(0, 1, 1, 2))
    assert every[0, 1] - every[0, 2] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_filters_before_clusters(kept: int) -> None:
    """Guards against NaN where filters leave a cluster without codes, and against filtered codes that come back."""
    logits, clusters = random_logits(40), random_clusters(NUM_CODES, 8)
    ours = probabilities(logits, SamplingConfig(top_k=5, top_p=0.8, clusters=kept), clusters)
    alone = probabilities(logits, SamplingConfig(top_k=5, top_p=0.8))
    assert not ours.isnan().any()
    assert not ours[alone == 0].any()
    assert (ours > 0).sum(-1).max() <= 5


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(top_k=5),
        SamplingConfig(top_p=0.7),
        SamplingConfig(clusters=3),
        SamplingConfig(temperature=0),
    ],
)
def test_rows_are_independent(sampling: SamplingConfig) -> None:
    """Guards against thresholds computed over the batch or over drafted rows."""
    logits, clusters = random_logits(3, 4), random_clusters(NUM_CODES, 8)
    whole = log_probabilities(logits, sampling, clusters)
    assert whole.shape == logits.shape
    for sample in range(3):
        for row in range(4):
            assert torch.equal(whole[sample, row], log_probabilities(logits[sample, row], sampling, clusters))


def test_half_precision_is_widened() -> None:
    """Guards against probabilities in bfloat16, whose ties and rounding would decide which code is sampled."""
    logits = random_logits(4)
    assert log_probabilities(logits, SamplingConfig()).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ours = log_probabilities(logits.to(dtype), SamplingConfig(temperature=1.05))
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, log_probabilities(logits.to(dtype).float(), SamplingConfig(temperature=1.05)))
        assert log_probabilities(logits.to(dtype), SamplingConfig(temperature=0)).dtype == torch.float32


def test_sums_of_a_gpu_do_not_depend_on_their_order() -> None:
    """Guards against codes that change between runs, since a GPU adds in any order (simulated by shuffling)."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(5, 4000, generator=generator) ** 8
    index = torch.randint(7, (4000,), generator=generator).expand(5, -1)
    expected = _add(shares.double(), index, 7)
    torch.testing.assert_close(_add_exactly(shares, index, 7).double(), expected, rtol=1e-6, atol=0)
    for _ in range(5):
        order = torch.randperm(4000, generator=generator)
        assert torch.equal(_add_exactly(shares[:, order], index[:, order], 7), _add_exactly(shares, index, 7))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1, expected 0 to 100"),
        ({"top_k": -1}, r"top_k is -1, expected 0 to 1000000"),
        ({"top_p": 0.0}, r"top_p is 0\.0, expected above 0, at most 1"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"clusters": -2}, r"clusters is -2, expected 0 to 1000000"),
        ({"cluster_temperature": 0.0}, r"cluster_temperature is 0\.0, expected above 0, at most 100"),
    ],
)
def test_refused_settings(values: dict, message: str) -> None:
    """Guards against samplers that divide by zero or keep no codes."""
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**values)


def test_clusters_without_labels() -> None:
    """Guards against cluster sampling that silently falls back to plain sampling."""
    with pytest.raises(ValueError, match="no cluster labels"):
        log_probabilities(random_logits(), SamplingConfig(clusters=3))


# Noise


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_adding_noise_draws_from_the_distribution() -> None:
    """Guards against noise of the wrong sign or spread: codes must be sampled as often as their probability says."""
    logits, clusters, draws = random_logits(num_codes=12), random_clusters(12, 4), 20_000
    for sampling in (SamplingConfig(temperature=1.3), SamplingConfig(top_k=4), SamplingConfig(clusters=2)):
        scores = log_probabilities(logits, sampling, clusters)
        noise = GumbelNoise([seeded(5)], 1, draws, 12)(0)[0]
        counts = torch.bincount((scores + noise).argmax(-1), minlength=12) / draws
        assert (counts - scores.exp()).abs().sum() / 2 < 0.015


def test_noise_is_gumbel_and_finite() -> None:
    """Checks mean and variance, and guards against infinities where the exponential draw is 0."""
    noise = GumbelNoise([seeded(0)], 1, 1000, 200)(0)
    assert noise.isfinite().all()
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_noise_belongs_to_sample_frame_and_slot() -> None:
    """Guards against noise shared by frames, slots, or samples, and against noise that depends on the batch."""
    together = GumbelNoise([seeded(1), seeded(2), seeded(3)], 4, 5, 6)
    noise = torch.stack([together(rank) for rank in range(4)], 1)
    assert len(noise.flatten().unique()) == noise.numel()
    alone = GumbelNoise([seeded(2)], 4, 5, 6)
    assert torch.equal(torch.stack([alone(rank) for rank in range(4)], 1)[0], noise[1])
    backwards = GumbelNoise([seeded(3), seeded(1)], 4, 5, 6)
    for rank in (3, 0, 2, 1):
        assert torch.equal(backwards(rank), noise[[2, 0], rank])


def test_noise_leaves_the_global_generator_alone() -> None:
    """Guards against clips that depend on what ran before them."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    first = GumbelNoise([seeded(1)], 2, 3, 4)(1)
    torch.manual_seed(1)
    assert torch.equal(GumbelNoise([seeded(1)], 2, 3, 4)(1), first)
    torch.set_rng_state(state)


def test_spawned_generators_are_independent_and_reproducible() -> None:
    """Guards against stages or frames that get the same numbers, and against a parent that does not advance."""
    generator = seeded(7)
    first, second = spawn(generator, 3), spawn(generator, 3)
    seeds = [each.initial_seed() for each in first + second]
    assert len(set(seeds)) == 6
    again = seeded(7)
    assert [each.initial_seed() for each in spawn(again, 3) + spawn(again, 3)] == seeds
    assert [each.initial_seed() for each in spawn(seeded(7), 2)] == seeds[:2]


def test_noise_does_not_depend_on_the_default_type() -> None:
    """Guards against clips that change with `torch.set_default_dtype`."""
    expected = GumbelNoise([seeded(1)], 1, 3, 4)(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(GumbelNoise([seeded(1)], 1, 3, 4)(0), expected)
    finally:
        torch.set_default_dtype(before)
