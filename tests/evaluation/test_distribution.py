"""Distribution metrics, checked against published implementations and known properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.evaluation.distribution import (
    frechet_distance,
    frechet_distance_float32,
    halves,
    inception_score,
    interval,
    limit,
    polynomial_mmd,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden/networks/metrics_golden.json").read_text())


def random(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed)  # as in the golden data


def features(case: str) -> tuple[Tensor, Tensor]:
    """Real and generated features, as in the golden data."""
    count, width = GOLDEN[case]["n"], GOLDEN[case]["d"]
    mix = random(99).standard_normal((width, width)) / np.sqrt(width)
    shift = 0.1 * random(98).standard_normal(width)
    real = (random(11).standard_normal((count, width)) @ mix * 2).astype(np.float32)
    fake = (random(12).standard_normal((count, width)) @ mix * 2 + shift).astype(np.float32) * np.float32(1.1)
    return torch.from_numpy(real), torch.from_numpy(fake)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_distances_are_the_published_ones(case: str) -> None:
    """Checks FVD and KVD in every variant: a different divisor, degree or constant changes the figure."""
    golden, (real, fake) = GOLDEN[case], features(case)
    exact = {"rel": 1e-6}
    for row, value in golden.items():
        if row.startswith("fvd") and "fp32" not in row:
            got = frechet_distance(real, fake, ddof=0 if "styleganv" in row else 1)
            assert got == pytest.approx(value, **exact), row
    # With 32 features, the smallest singular values are below float32 rounding: swapping the arguments shifts the
    # reference by 4e-3.
    rounded = pytest.approx(golden["fvd_tats fp32 svd (reference code)"], rel=5e-3 if case == "a" else 1e-3)
    assert frechet_distance_float32(real, fake) == rounded
    kvd = polynomial_mmd(real, fake)
    assert kvd == pytest.approx(golden["kvd_tats polynomial_mmd unbiased deg3 gamma1/d coef1 (fp64 inputs)"], **exact)
    assert kvd == pytest.approx(golden["kvd_tats fp32 inputs"], rel=1e-3)
    jedi = 100 * polynomial_mmd(real, fake, degree=2, constant=0, biased=True)
    assert jedi == pytest.approx(golden["jedi mmd_poly biased deg2 gamma1/d coef0 x100 (fp64)"], **exact)


def test_the_distance_of_equal_spreads_is_that_of_the_means() -> None:
    """Checks FVD in the simplest cases: without covariance, or with equal ones, only the means count."""
    real, fake = torch.zeros(4, 3), torch.tensor([1.0, 2.0, 2.0]).expand(4, 3)
    assert frechet_distance(real, fake) == pytest.approx(9)
    varied, _ = features("a")
    assert frechet_distance(varied, varied) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(varied, varied + 1) == pytest.approx(32, rel=1e-6)


def test_fewer_clips_than_features_are_measured() -> None:
    """Guards small samples, whose covariances are singular."""
    generator = torch.Generator().manual_seed(0)
    few, many = torch.randn(5, 40, generator=generator), torch.randn(50, 40, generator=generator)
    covariances = [np.cov(each.double().numpy(), rowvar=False) for each in (few, many)]
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0)
    means = (few.double().mean(0) - many.double().mean(0)).square().sum().item()
    expected = means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(few, many) == pytest.approx(expected, rel=1e-6)


def test_inception_scores_are_the_published_ones() -> None:
    """Checks splits, the shuffle and the constants, which change the score by 6%."""
    golden = GOLDEN["inception_score"]
    logits = random(5).standard_normal((golden["n"], golden["classes"])) * 3
    probabilities = torch.softmax(torch.from_numpy(logits), 1)
    assert inception_score(probabilities, eps=1e-20) == pytest.approx(golden["tgan2_splits1"], rel=1e-6)
    assert inception_score(probabilities, 10, 1e-20) == pytest.approx(golden["tgan2_splits10"], rel=1e-6)
    shuffled = golden["styleganv_shuffle42_splits10 (no eps)"]
    assert inception_score(probabilities, 10, seed=42) == pytest.approx(shuffled, rel=1e-6)
    assert inception_score(probabilities, eps=1e-7).mean == pytest.approx(golden["tgan1_eps1e-7_single"], rel=1e-6)


def test_the_inception_score_counts_classes() -> None:
    """Checks the extremes: one sure class per clip scores the number of classes, uniform predictions 1, never NaN."""
    assert inception_score(torch.eye(7)).mean == pytest.approx(7)
    assert inception_score(torch.full((5, 7), 1 / 7)).mean == pytest.approx(1)


def test_too_few_clips_are_refused() -> None:
    """Prevents NaN figures from a single clip, which has no covariance, and more splits than clips."""
    for metric in (frechet_distance, polynomial_mmd):
        with pytest.raises(ValueError, match="got 1 and 2 clips, expected at least two"):
            metric(torch.zeros(1, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="splits is 3, expected 1 to 2"):
        inception_score(torch.eye(2), 3)


def gaussians(count: int, seed: int, width: int = 16) -> list[Tensor]:
    """Two Gaussian samples whose true distance is 0.25 times the width."""
    generator = torch.Generator().manual_seed(seed)
    return [shift + torch.randn(count, width, generator=generator) for shift in (0.0, 0.5)]


def test_the_limit_has_no_bias_and_its_error_says_how_far_it_is_off() -> None:
    """Makes different N comparable: 64 clips give over 20% too much; the limit is unbiased, with a realistic error."""
    found = [(frechet_distance(*sets), limit(frechet_distance, sets)) for sets in (gaussians(64, n) for n in range(20))]
    values = np.array([value for value, _ in found])
    limits, errors = np.array([each for _, each in found]).T
    assert values.mean() > 4 * 1.2
    assert limits.mean() == pytest.approx(4, rel=0.08)
    assert errors.mean() == pytest.approx(limits.std(), rel=0.5)
    assert limit(frechet_distance, gaussians(19, 0)) is None
    assert limit(frechet_distance, gaussians(64, 0, width=32)) is None  # halves have no more clips than features


def test_the_interval_is_that_of_other_draws() -> None:
    """Checks the interval: it contains the figure, and is as wide as the spread over fresh samples."""
    values = [frechet_distance(*gaussians(200, seed)) for seed in range(60)]
    low, high = interval(frechet_distance, gaussians(200, 0))
    assert low < frechet_distance(*gaussians(200, 0)) < high
    assert high - low == pytest.approx(3.92 * np.std(values), rel=0.4)
    assert interval(frechet_distance, gaussians(200, 0)) == (low, high)


def test_halves_share_no_video() -> None:
    """Guards the floor: windows of the same video in both halves would make it too low."""
    names = ["a", "b", "a", "c", "c", "a", "d", "d"]
    one, other = halves(names, torch.arange(8.0)[:, None], 8)
    sides = [{names[int(number)] for number in each} for each in (one, other)]
    assert not sides[0] & sides[1]
    assert len(one) == len(other) == 3
    assert [len(each) for each in halves(names, torch.zeros(8, 1), 2)] == [2, 2]
