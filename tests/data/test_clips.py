"""Multi-frame-rate sampling: sequences stay inside the clip, use its lowest usable rate, and state true durations."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.config import TextConfig
from cogvideo.data.clips import (
    ClipSampling,
    FrameRates,
    choose_window,
    duration_of,
    filled_rates,
    lowest_rate,
    sampled_rates,
)

DEFAULT = FrameRates()
LAST = math.nextafter(1.0, 0.0)

draws = st.floats(0, 1, exclude_max=True)
lengths = st.integers(0, 300)


bases = st.sampled_from([1.0, 6.0, 8.0, 12.5, 24000 / 1001, 30.0])
stride_sets = st.sets(st.integers(1, 24), min_size=1, max_size=5)
settings = st.tuples(bases, stride_sets, st.integers(2, 9))


def rates_of(setting: tuple[float, set[int], int]) -> FrameRates:
    """Frame rates from their strides, which must be integers."""
    base, strides, num_frames = setting
    return FrameRates(base, tuple(base / stride for stride in sorted(strides, reverse=True)), num_frames)


def starts_by_trial(num_frames: int, stride: int, wanted: int) -> list[int]:
    """All starts at which every frame of a sequence exists, by brute force."""
    exists = set(range(num_frames))
    return [start for start in exists if all(start + step * stride in exists for step in range(wanted))]


@given(lengths, settings, draws, draws, st.sampled_from(["sequential", "interpolation", "image"]))
def test_windows_stay_inside_the_clip(
    num_frames: int, setting: tuple[float, set[int], int], rate_draw: float, offset_draw: float, mode: str
) -> None:
    """Catches windows that run past the clip's end, have the wrong length, or are unevenly spaced."""
    rates = rates_of(setting)
    if mode == "interpolation" and len(rates.rates) == 1:
        return
    sampling = ClipSampling(mode, rates)
    window = choose_window(num_frames, sampling, rate_draw, offset_draw)
    wanted = 1 if mode == "image" else rates.num_frames
    if window is None:
        assert num_frames < sampling.min_frames
        assert not starts_by_trial(num_frames, min(map(rates.stride, rates.rates)), wanted)
        return
    clip = np.arange(num_frames)
    taken = clip[window.start : window.stop : window.step].tolist()
    assert taken == list(window)
    assert len(taken) == wanted
    assert len(set(np.diff(taken))) <= 1, "frames are equally far from each other"


@given(lengths, settings)
def test_lowest_rate_is_the_lowest(num_frames: int, setting: tuple[float, set[int], int]) -> None:
    """Catches a clip sampled at a higher rate than necessary, or at a rate that it cannot fill."""
    rates = rates_of(setting)
    strides = [stride for stride in setting[1] if starts_by_trial(num_frames, stride, rates.num_frames)]
    got = lowest_rate(num_frames, rates)
    assert (got is None) == (not strides)
    if got is not None:
        assert rates.stride(got) == max(strides)
    assert [rates.stride(rate) for rate in filled_rates(num_frames, rates)] == sorted(strides, reverse=True)


@given(lengths, settings)
def test_every_start_can_be_drawn(num_frames: int, setting: tuple[float, set[int], int]) -> None:
    """Catches clip ends that are never sampled: offsets from 0 to just below 1 must reach every valid start."""
    rates = rates_of(setting)
    for rate in filled_rates(num_frames, rates):
        starts = starts_by_trial(num_frames, rates.stride(rate), rates.num_frames)
        sampling = ClipSampling(rates=rates, fixed_rate=rate)
        offsets = [(index + 0.5) / len(starts) for index in range(len(starts))]
        got = [choose_window(num_frames, sampling, 0.0, offset) for offset in offsets]
        assert [window.start for window in got if window] == starts
        assert choose_window(num_frames, sampling, 0.0, LAST) == got[-1]
        assert choose_window(num_frames, sampling, 0.0, 0.0) == got[0]


@given(st.integers(1, 300), settings, draws, draws)
def test_text_says_the_true_spacing(
    num_frames: int, setting: tuple[float, set[int], int], rate_draw: float, offset_draw: float
) -> None:
    """Catches captions with a wrong duration: the text must state the time from the first to the last frame."""
    rates = rates_of(setting)
    window = choose_window(num_frames, ClipSampling("sequential", rates), rate_draw, offset_draw)
    if window is None:
        return
    first, *_, last = window
    spanned = Fraction(last - first) / Fraction(rates.base)
    text = TextConfig().duration_template.format(
        duration=duration_of(window, ClipSampling(rates=rates), 0.0), caption="a 3s cat"
    )
    said = float(text.split("s<n>")[0])
    assert said == pytest.approx(float(spanned), rel=1e-5)


@pytest.mark.parametrize(
    ("num_frames", "rate", "duration"), [(33, 1.0, 4.0), (32, 2.0, 2.0), (17, 2.0, 2.0), (9, 4.0, 1.0), (5, 8.0, 0.5)]
)
def test_published_durations(num_frames: int, rate: float, duration: float) -> None:
    """Pins the durations in the released captions (4.0, 2.0, 1.0, 0.5): wrong strides could be self-consistent."""
    assert lowest_rate(num_frames, DEFAULT) == rate
    window = choose_window(num_frames, ClipSampling(), 0.0, 0.0)
    assert window is not None
    assert duration_of(window, ClipSampling(), 0.0) == duration
    released = "{duration}秒<n>{caption}".format(duration=duration_of(window, ClipSampling(), 0.0), caption="x")
    assert released == f"{duration}秒<n>x"


def test_interpolation_has_the_durations_of_the_rounds() -> None:
    """Catches interpolation over 4.0 seconds, which no round uses, and short clips denied the rates that they fill."""
    sampling = ClipSampling("interpolation")
    assert sampled_rates(33, sampling) == (2.0, 4.0, 8.0)
    assert sampled_rates(17, sampling) == (2.0, 4.0, 8.0)
    assert sampled_rates(5, sampling) == (8.0,)
    windows = [choose_window(33, sampling, (index + 0.5) / 3, 0.0) for index in range(3)]
    assert [duration_of(window, sampling, 0.0) for window in windows if window] == [2.0, 1.0, 0.5]


def test_fixed_rate() -> None:
    """Checks the option for comparison runs: one rate for all clips; those too short for it yield nothing."""
    sampling = ClipSampling(fixed_rate=4.0)
    assert sampling.min_frames == 9
    assert choose_window(33, sampling, LAST, LAST) == range(24, 34, 2)
    assert choose_window(8, sampling, 0.0, 0.0) is None
    interpolation = ClipSampling("interpolation", FrameRates(rates=(4.0,)), fixed_rate=4.0)
    assert choose_window(9, interpolation, 0.0, LAST) == range(0, 10, 2)


def test_offset_can_be_switched_off() -> None:
    """Catches evaluation that does not start at the first frame when random offsets are off."""
    sampling = ClipSampling(random_offset=False)
    assert choose_window(40, sampling, LAST, LAST) == range(0, 40, 8)


def test_image_takes_any_single_frame() -> None:
    """Catches frames that the image model never sees, and clips dropped because they are too short for video."""
    sampling = ClipSampling("image")
    got = {choose_window(3, sampling, 0.0, draw) for draw in (0.0, 0.5, LAST)}
    assert got == {range(1), range(1, 2), range(2, 3)}


def test_later_frames_have_durations() -> None:
    """Catches an image model that never sees later frames with video durations, or sees too few first frames."""
    sampling, rare = ClipSampling("image", durations=(4.0, 1.0)), 0.999
    first, _, last = windows = [range(place, place + 1) for place in (0, 1, 32)]
    assert [choose_window(33, sampling, 0.0, draw) for draw in (0.499, 0.5, LAST)] == windows
    got = [duration_of(window, sampling, draw) for window in windows for draw in (0.0, rare)]
    assert got == [0.0, 0.0, 4.0, 1.0, 4.0, 1.0]
    assert choose_window(1, sampling, 0.0, LAST) == first  # a still image
    assert duration_of(last, ClipSampling("image"), 0.0) == 0.0
    assert duration_of(range(3, 23, 4), ClipSampling(), rare) == 2.0
    held_out = ClipSampling("image", random_offset=False, durations=(4.0,))
    assert choose_window(33, held_out, 0.0, LAST) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 0.0}, "base is 0.0"),
        ({"base": math.nan}, "base is nan"),
        ({"num_frames": 1}, "num_frames is 1"),
        ({"rates": ()}, "rates are"),
        ({"rates": (2.0, 1.0)}, "lowest first"),
        ({"rates": (2.0, 2.0)}, "lowest first"),
        ({"rates": (-1.0, 2.0)}, "positive"),
        ({"rates": (3.0,)}, "not a multiple of the rate 3"),
        ({"rates": (8.0, 16.0)}, "not a multiple of the rate 16"),
    ],
)
def test_impossible_rates_are_refused(change: dict[str, object], message: str) -> None:
    """Rejects invalid rates, such as those that fall between stored frames and would be rounded silently."""
    with pytest.raises(ValueError, match=message):
        FrameRates(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "video"}, "mode is 'video'"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"fixed_rate": 3.0}, "the rate is 3"),
        ({"durations": (4.0, 0.0)}, "durations are"),
        ({"mode": "image", "fixed_rate": 1.0}, "single frames"),
        ({"mode": "interpolation", "rates": FrameRates(rates=(1.0,))}, "second one"),
    ],
)
def test_impossible_sampling_is_refused(change: dict[str, object], message: str, without_shape_checks: None) -> None:
    """Rejects mistakes in a recipe that would surface only hours later, or never."""
    with pytest.raises(ValueError, match=message):
        ClipSampling(**change)  # type: ignore[arg-type]


def test_unknown_rates_and_offsets_are_refused() -> None:
    """Rejects a rate that the model does not have, and an offset that would start past the end of the clip."""
    with pytest.raises(ValueError, match="expected one of"):
        DEFAULT.span(3.0)
    with pytest.raises(ValueError, match=r"random number 1\.0"):
        choose_window(33, ClipSampling(), 0.0, 1.0)
