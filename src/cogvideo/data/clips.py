"""Multi-frame-rate sampling: which of a clip's base-rate frames make one training sequence (paper section 3.1).

All sequences have the same number of frames. A clip is sampled at the lowest predefined rate at which it still fills a
sequence, to cover as much of the action as possible; interpolation is trained at the higher rates of its rounds.
Nothing here is random: random choices are passed in as numbers in [0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

from cogvideo.config import InputError, Limited, Seed, Share, require

Mode = Literal["sequential", "interpolation", "image"]
"""What samples are for: one of the two video stages, or the image model, which takes single frames."""


@dataclass(frozen=True)
class FrameRates:
    """The predefined frame rates. Strides are whole numbers of stored frames: nothing is interpolated in time."""

    base: float = 8.0
    """Frames per second of the stored codes."""
    rates: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Frames per second of sequences, lowest first: the sequential stage's rate, then those of the rounds."""
    num_frames: int = 5
    """Frames per sequence."""

    def __post_init__(self) -> None:
        require(0 < self.base < math.inf, f"base is {self.base}, expected a positive number of frames per second")
        require(self.num_frames >= 2, f"num_frames is {self.num_frames}, expected 2 or more")
        ascending = all(low < high for low, high in pairwise(self.rates))
        positive = all(0 < rate < math.inf for rate in self.rates)
        message = f"rates are {self.rates}, expected one or several positive numbers, lowest first"
        require(len(self.rates) > 0 and ascending and positive, message)
        for rate in self.rates:
            steps = self.base / rate
            is_multiple = round(steps) >= 1 and math.isclose(steps, round(steps), rel_tol=1e-9)
            message = f"the base rate {self.base:g} is not a multiple of the rate {rate:g}"
            require(is_multiple, f"{message}: frames between two codes do not exist")

    def stride(self, rate: float) -> int:
        """Stored frames from one frame of a sequence to the next."""
        if rate not in self._strides:  # no `require`: it would format its message for every sample
            raise InputError(f"the rate is {rate:g}, expected one of {self.rates}")
        return self._strides[rate]

    def span(self, rate: float) -> int:
        """Stored frames from the first to the last of a sequence, inclusive: the minimum length of a clip."""
        return (self.num_frames - 1) * self.stride(rate) + 1

    @cached_property
    def _strides(self) -> dict[float, int]:
        return {rate: round(self.base / rate) for rate in self.rates}


@dataclass(frozen=True)
class ClipSampling(Limited):
    """Choice of training samples from clips."""

    mode: Mode = "sequential"
    """sequential: at the lowest rate that the clip fills; interpolation: at one of the higher rates; image: one frame.
    """
    rates: FrameRates = field(default_factory=FrameRates)
    """The predefined rates."""
    fixed_rate: float | None = None
    """One rate for all clips regardless of `mode`, for comparison runs; clips too short for it are left out.
    """
    random_offset: bool = True
    """Start at a random frame where the sequence fits, not at the clip's first frame."""
    caption_dropout: Share = 0.0
    """Share of samples whose caption is dropped, to train the unconditional text for guidance."""
    high_codes: bool = False
    """Include the super-resolution codes, which the shards must have."""
    durations: tuple[float, ...] = ()
    """Mode image: half of the samples are first frames of clips, the others later frames with one of these durations,
    as in sequences of the video stages. If empty, a sample is any frame, without a duration."""
    seed: Seed = 0
    """Seed of the sample order and of random choices within samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = ("sequential", "interpolation", "image")
        require(self.mode in modes, f"mode is {self.mode!r}, expected one of {', '.join(modes)}")
        positive = all(0 < each < math.inf for each in self.durations)
        require(positive, f"durations are {self.durations}, expected positive numbers of seconds")
        if self.fixed_rate is not None:
            require(self.mode != "image", f"fixed_rate is {self.fixed_rate:g}, but single frames have no rate")
            self.rates.stride(self.fixed_rate)
        elif self.mode == "interpolation":
            rates = self.rates.rates
            require(len(rates) > 1, f"rates are {rates}, expected a second one: interpolation has the faster ones")

    @cached_property
    def min_frames(self) -> int:
        """Stored frames of the shortest usable clip."""
        if self.mode == "image":
            return 1
        return self.rates.span(self.rates.rates[-1] if self.fixed_rate is None else self.fixed_rate)


def filled_rates(num_frames: int, rates: FrameRates) -> tuple[float, ...]:
    """Rates at which a clip with this number of stored frames gives a whole sequence, lowest first; may be empty."""
    return tuple(rate for rate in rates.rates if rates.span(rate) <= num_frames)


def lowest_rate(num_frames: int, rates: FrameRates) -> float | None:
    """The rate of the sequential stage: the lowest at which the clip fills a sequence; None if there is none."""
    return next(iter(filled_rates(num_frames, rates)), None)


def sampled_rates(num_frames: int, sampling: ClipSampling) -> tuple[float, ...]:
    """Rates of samples from a clip with this number of stored frames, lowest first; empty in mode image.

    Interpolation uses all predefined rates but the lowest; by default, their durations are 2.0, 1.0 and 0.5.
    """
    if sampling.mode == "image" or num_frames < sampling.min_frames:
        return ()
    if sampling.fixed_rate is not None:
        return (sampling.fixed_rate,)
    filled = filled_rates(num_frames, sampling.rates)
    if sampling.mode == "interpolation":
        return tuple(rate for rate in filled if rate != sampling.rates.rates[0])
    return filled[:1]


def choose_window(num_frames: int, sampling: ClipSampling, rate_draw: float, offset_draw: float) -> range | None:
    """Frames of a clip that make a sample; None if the clip is shorter than `sampling.min_frames`.

    Both draws are uniform in [0, 1). The first picks one of the interpolation rates; the second, with `random_offset`,
    picks the start, or in mode image the frame.
    """
    if num_frames < sampling.min_frames:
        return None
    offset = offset_draw if sampling.random_offset else 0.0
    if sampling.mode == "image":
        place = _index(num_frames, offset)
        if sampling.durations and num_frames > 1:  # half of the samples are the first frame
            place = 0 if offset < 0.5 else 1 + _index(num_frames - 1, 2 * offset - 1)
        return range(place, place + 1)
    filled, rates = sampled_rates(num_frames, sampling), sampling.rates
    if not filled:
        return None
    rate = filled[_index(len(filled), rate_draw)]
    start, stride = _index(num_frames - rates.span(rate) + 1, offset), rates.stride(rate)
    return range(start, start + rates.num_frames * stride, stride)


def duration_of(window: range, sampling: ClipSampling, rate_draw: float) -> float:
    """Duration for a sample's caption, in seconds: in videos, from the first frame to the last; 0 for none.

    The draw, uniform in [0, 1), picks one of the durations of single frames.
    """
    if sampling.mode == "image":
        if window.start == 0 or not sampling.durations:
            return 0.0
        return sampling.durations[_index(len(sampling.durations), rate_draw)]
    return (window[-1] - window[0]) / sampling.rates.base


def _index(count: int, draw: float) -> int:
    """An index below `count`, all equally likely if `draw` is uniform in [0, 1)."""
    if not 0 <= draw < 1:
        raise InputError(f"got the random number {draw}, expected one in [0, 1)")
    return int(draw * count)
