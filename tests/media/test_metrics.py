"""Frame quality and code usage, each checked against a slow oracle."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from cogvideo.media.metrics import code_usage, count_codes, perplexity, psnr, ssim


def frames(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def slow_ssim(x, y, peak):
    """SSIM of one color channel: the formula of Wang et al. at every window position, in loops."""
    weights = np.array([[math.exp(-(a * a + b * b) / (2 * 1.5**2)) for b in range(-5, 6)] for a in range(-5, 6)])
    weights /= weights.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = (each[row : row + 11, column : column + 11] for each in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            quotient = (2 * mean_a * mean_b + c1) * (2 * both + c2)
            values.append(quotient / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return np.mean(values)


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_ssim_is_the_formula(peak):
    """Catches a wrong window, constant, border, or mean over colors, which no other program would reproduce."""
    x, y = frames(2, 3, 13, 15) * peak, frames(2, 3, 13, 15, seed=1) * peak
    y = 0.7 * x + 0.3 * y
    oracle = []
    for frame in range(len(x)):
        colours = [slow_ssim(x[frame, colour].numpy(), y[frame, colour].numpy(), peak) for colour in range(3)]
        oracle.append(np.mean(colours))
    np.testing.assert_allclose(ssim(x.double(), y.double(), peak).numpy(), oracle, rtol=1e-6)
    np.testing.assert_allclose(ssim(x, y, peak).numpy(), oracle, rtol=1e-3)


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_psnr_is_the_formula(peak):
    """Catches a mean over the batch instead of the frame, or a wrong peak, which would shift all values."""
    x, y = frames(3, 3, 4, 5) * peak, frames(3, 3, 4, 5, seed=1) * peak
    for frame in range(3):
        errors = [(a - b) ** 2 for a, b in zip(x[frame].flatten().tolist(), y[frame].flatten().tolist(), strict=True)]
        expected = 10 * math.log10(peak**2 * len(errors) / sum(errors))
        assert psnr(x, y, peak)[frame].item() == pytest.approx(expected, rel=1e-5)


def test_equal_frames_are_perfect():
    """Catches rounding that hides a lossless result."""
    x = frames(2, 3, 16, 16)
    assert psnr(x, x).tolist() == [math.inf] * 2
    torch.testing.assert_close(ssim(x, x), torch.ones(2))


def test_half_precision_is_measured_in_float32():
    """Prevents differences from being computed in bfloat16, which is too coarse for hundredths of a decibel."""
    x, y = frames(1, 3, 16, 16).bfloat16(), frames(1, 3, 16, 16, seed=1).bfloat16()
    for metric in (psnr, ssim):
        assert torch.equal(metric(x, y), metric(x.float(), y.float()))


def test_small_frames_are_refused():
    """Rejects frames smaller than the window, for which the mean would be over nothing."""
    with pytest.raises(ValueError, match="10 x 16 pixels, expected at least 11"):
        ssim(frames(1, 3, 10, 16), frames(1, 3, 10, 16))


def test_usage_and_perplexity_are_those_of_the_counts():
    """Catches wrong counts of unused codes, and an entropy with the wrong logarithm base."""
    codes = torch.tensor([[0, 0, 3], [5, 3, 0]])
    counts = count_codes(codes, 8)
    found = Counter(codes.flatten().tolist())
    assert counts.tolist() == [found[code] for code in range(8)]
    entropy = -sum(n / 6 * math.log2(n / 6) for n in found.values())
    assert code_usage(counts) == 3 / 8
    assert perplexity(counts) == pytest.approx(2**entropy)


@pytest.mark.parametrize(("counts", "expected"), [([7, 0, 0], 1), ([4, 4, 4, 4], 4), ([1, 1, 0, 0], 2)])
def test_perplexity_counts_even_codes(counts, expected):
    """Checks that perplexity is an effective number of codes, from one to all of them."""
    assert perplexity(torch.tensor(counts)) == pytest.approx(expected)
