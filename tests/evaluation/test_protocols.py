"""Protocols as data: each reproduces the figures of the implementation it is named after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distribution import features, random

from cogvideo.evaluation.features import i3d
from cogvideo.evaluation.networks.cache import network_path
from cogvideo.evaluation.protocols import PROTOCOLS

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden/networks/metrics_golden.json").read_text())
FETCHED = network_path("i3d")
"""Resolved before tests are given an empty cache."""
FVD_ROWS = {
    "tfhub": ("fvd_common_metrics/fvd-comparison (np.cov ddof=1, fp64, scipy sqrtm)", 1e-6),
    "tats": ("fvd_tats fp32 svd (reference code)", 1e-3),
    "stylegan-v": ("fvd_styleganv (cov /N, fp64 raw moments, scipy sqrtm)", 1e-6),
}
SCORE_ROWS = {
    "tfhub": "tgan2_splits1",
    "tats": "tgan2_splits1",
    "stylegan-v": "styleganv_shuffle42_splits10 (no eps)",
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", PROTOCOLS)
def test_figures_are_those_of_the_implementation(name: str) -> None:
    """Catches a divisor, precision or number of splits in the wrong row of the table."""
    protocol, (row, tolerance) = PROTOCOLS[name], FVD_ROWS[name]
    for case in ("b", "c"):
        real, fake = features(case)
        assert protocol.fvd(real, fake) == pytest.approx(GOLDEN[case][row], rel=tolerance)
    kvd = GOLDEN["c"]["kvd_tats polynomial_mmd unbiased deg3 gamma1/d coef1 (fp64 inputs)"]
    assert protocol.kvd(real, fake) == pytest.approx(kvd, rel=1e-6)
    golden = GOLDEN["inception_score"]
    logits = torch.from_numpy(random(5).standard_normal((golden["n"], golden["classes"])) * 3)
    assert protocol.inception_score(logits) == pytest.approx(golden[SCORE_ROWS[name]], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "way"), [("tfhub", "tf1_legacy"), ("tats", "tf2_halfpixel"), ("stylegan-v", "tf2_halfpixel")]
)
def test_pixels_are_resized_as_the_implementation_does(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks resizing, where implementations differ by tens of gray levels, and the range of [-1, 1]."""
    golden = np.load(Path(__file__).parents[1] / "golden/networks/resize_golden.npz")
    frames = golden["up_in"]
    assert frames.dtype == np.uint8
    monkeypatch.setattr("cogvideo.evaluation.protocols.SIDE", 28)
    pixels = PROTOCOLS[name].to_i3d(frames).permute(1, 2, 3, 0).numpy()
    np.testing.assert_allclose((pixels + 1) * 127.5, golden[f"up_{way}"], rtol=0, atol=1e-3)


def test_clips_are_reduced_to_a_square() -> None:
    """Checks the center crop and rounding (TATS truncates), and that without a size, clips stay as they are."""
    wide = np.zeros((1, 4, 12, 3), np.uint8)
    wide[:, :, 4:8] = 255
    for name in ("tats", "tfhub"):
        assert (PROTOCOLS[name].reduced(wide, 4) == 255).all()
        assert PROTOCOLS[name].reduced(wide, 2).shape == (1, 2, 2, 3)
        assert PROTOCOLS[name].reduced(wide, None) is wide
    steps = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1).repeat(2, 1).repeat(3, 3)
    assert PROTOCOLS["tats"].reduced(steps, 1).ravel()[0] == 127
    assert PROTOCOLS["tfhub"].reduced(steps, 1).ravel()[0] == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clips": 1}, "clips is 1"),
        ({"frames": 0}, "frames is 0"),
        ({"step": 0}, "step is 0"),
        ({"size": 0}, "size is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    """Refuses impossible settings up front, not hours later inside a layer."""
    with pytest.raises(ValueError, match=f"{message}, expected"):
        replace(PROTOCOLS["tats"], **change)


@pytest.mark.parametrize("name", ["tfhub", "stylegan-v"])
def test_black_is_as_far_from_white_as_published(name: str) -> None:
    """Checks the whole path from pixels to FVD: 569.771 for 10 frames, whatever their size."""
    if not FETCHED.is_file():
        pytest.skip(f"there is no {FETCHED}: `cogvideo fetch i3d`")
    encode = i3d(FETCHED, PROTOCOLS[name]).load("cpu")
    black, white = encode([(np.full((10, 64, 48, 3), level, np.uint8),) for level in (0, 255)]).double()
    assert (black - white).square().sum().item() == pytest.approx(569.771, abs=0.01)
    assert PROTOCOLS[name].fvd(black.expand(2, -1), white.expand(2, -1)) == pytest.approx(569.771, abs=0.01)
