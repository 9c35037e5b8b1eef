"""Inputs of generation: a model, settings, and a request for a batch of clips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from cogvideo.bundle.model import StageModels
from cogvideo.config import (
    CLIP_SECONDS,
    MAX_MAGNITUDE,
    CogVideoConfig,
    InputError,
    Limited,
    NotNegative,
    Positive,
    SamplingConfig,
    Sides,
    both,
    require,
    size_text,
    within,
)
from cogvideo.generation.decode import Passes
from cogvideo.generation.decoder import Condition
from cogvideo.layout import SequenceLayout, check_code_range
from cogvideo.text import is_visible

MAX_CONTEXT = 2
"""Number of last key frames that the next sequence of a long clip, or an extension, begins with; two show motion."""
MAX_SECONDS = 60.0
"""Seconds of the longest clip."""
MAX_ROUNDS = 6
"""Rounds of interpolation that give 257 frames in four seconds."""
MAX_SEED = 2**63 - 1
ADDED: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "cluster_temperature": 0.89}
ADDED |= {f"first_{name}": value for name, value in ADDED.items()}
ADDED |= {"superres_top_k": 0, "superres_top_p": 1.0, "superres_cluster_temperature": 0.6, "seconds": CLIP_SECONDS}
ADDED |= {"channel": None, "adapter": [], "size": None, "fit": "crop"}
"""Options that older sidecars lack, with the values that their clips were made with."""


@dataclass(frozen=True)
class GenerationSettings(Limited):
    """Everything that determines a clip except its prompt, seed and given frames."""

    rounds: int = 3
    """Rounds of interpolation: 5 key frames become 9, 17, 33, ..."""
    duration: Positive[float] = 4.0
    """Seconds that a sequence of key frames spans."""
    more_key_frames: NotNegative[int] = 0
    """Key frames after the first sequence, generated in further sequences that overlap by two."""
    first: SamplingConfig = CogVideoConfig.first_sampling
    """Sampler and guidance of the first frame."""
    later: SamplingConfig = CogVideoConfig.later_sampling
    """Sampler of all later frames, and guidance of the key frames among them."""
    superres: SamplingConfig = CogVideoConfig.superres_sampling
    """Sampler of super-resolution."""
    should_enlarge: bool = True
    """Enlarge frames by super-resolution, if the model has it."""
    interpolation_guidance: Annotated[float, within(0, MAX_MAGNITUDE)] = 1.0
    """Guidance scale of the frames between key frames."""
    negative: str | None = None
    """Negative prompt, which replaces the model's unconditional text."""
    text_bonus: Annotated[float, within(-MAX_MAGNITUDE, MAX_MAGNITUDE)] = CogVideoConfig.text_bonus
    """Added to the attention scores of text keys when guidance is off."""
    sequences_at_once: int = 0
    """Number of sequences of a round (two gaps each) decoded as one batch; 0 is all, or in a long
    clip those of four seconds. Fewer need less memory but more passes, and give the same clip."""
    passes: Passes = Passes(draft=8)  # noqa: RUF009  # frozen
    """Slots per pass, which only affect the speed: drafts of up to 8 need fewer passes."""
    truncate: bool = False
    """Cut prompts that are too long, instead of refusing them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds in range(MAX_ROUNDS + 1), f"rounds is {self.rounds!r:.60}, expected 0 to {MAX_ROUNDS}")
        require(self.sequences_at_once >= 0, f"sequences_at_once is {self.sequences_at_once}, expected 0 (all) or more")
        require(self.negative is None or is_visible(self.negative), f"the negative prompt is empty: {self.negative!r}")

    @classmethod
    def of(cls, config: CogVideoConfig) -> GenerationSettings:
        """Settings from a model's configuration: clips as long as those that its key frames were trained on."""
        return cls(
            rounds=usual_rounds(config.seconds),
            duration=config.seconds,
            first=config.first_sampling,
            later=config.later_sampling,
            superres=config.superres_sampling,
            text_bonus=config.text_bonus,
        )

    def lasting(self, seconds: float, own: CogVideoConfig) -> GenerationSettings:
        """Copy for clips of this length, in several sequences if they are longer than in training."""
        duration = min(seconds, own.seconds)
        return replace(self, duration=duration, more_key_frames=round((seconds - duration) / _spacing(own)))

    @property
    def sampling_options(self) -> dict[str, float]:
        """Values of all `SamplingOptions` that result in these settings."""
        values = {"text_bonus": self.text_bonus}
        for prefix, sampling in (("", self.later), ("first_", self.first), ("superres_", self.superres)):
            values |= {f"{prefix}{name}": value for name, value in asdict(sampling).items()}
        return {each.name: values[each.name] for each in fields(SamplingOptions)}


def check_seconds(seconds: float, own: CogVideoConfig) -> None:
    """Refuse a length that the key frames of a model were never trained on, if the model records those lengths.
    Longer clips continue in overlapping sequences, by whole key frames."""
    seen, got = own.sequential.durations, f"seconds is {seconds}"
    if seconds > own.seconds:
        spacing = _spacing(own)
        fits = seconds <= MAX_SECONDS and math.isclose(seconds / spacing, round(seconds / spacing))
        require(fits, f"{got}, expected a multiple of {spacing:g}, the time between key frames, up to {MAX_SECONDS:g}")
        return
    known = ", ".join(f"{each:g}" for each in seen)
    reason = f"the key frames of this model were trained on clips of {known} seconds"
    require(not seen or seconds in seen, f"{got}, expected {known}, or a longer one: {reason}")


def shape_of(size: Sides, own: CogVideoConfig, ratio: int = 1) -> tuple[int, int]:
    """Rows and columns of codes of frames of this size, whose sides are enlarged by `ratio`; refuse other sizes."""
    (width, height), pixels = both(size), own.autoencoder.rate * ratio
    most = own.layout.grid * pixels
    fits = all(0 < side <= most and side % pixels == 0 for side in (width, height))
    require(fits, f"size is {size_text(size)}, expected multiples of {pixels} pixels, at most {most}x{most}")
    return height // pixels, width // pixels


def _spacing(own: CogVideoConfig) -> float:
    """Seconds between key frames of the longest clips that a model was trained on."""
    return own.seconds / (own.layout.num_frames - 1)


def usual_rounds(seconds: float) -> int:
    """Rounds of interpolation that give a clip of this length the frame rate of one of four seconds."""
    return max(0, GenerationSettings.rounds + math.floor(math.log2(seconds / CLIP_SECONDS)))


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling as commands offer it. An option that is not given is the model's own."""

    guidance: float | None = None
    """Guidance scale of key frames; 1 disables guidance and halves the compute. The model has its own default
    for this and each of the following options."""
    temperature: float | None = None
    """Sampling temperature of later frames; lower values give calmer motion."""
    top_k: int | None = None
    """Sample later frames from this number of most likely codes; 0 is all codes."""
    top_p: float | None = None
    """Sample later frames from the most likely codes whose probabilities add up to this; 1 is all codes."""
    clusters: int | None = None
    """Number of code clusters that later frames are sampled from; fewer give calmer motion, 0 is all codes."""
    cluster_temperature: float | None = None
    """Sampling temperature of later frames inside a cluster."""
    first_guidance: float | None = None
    """Guidance scale of the first frame; 1 disables guidance."""
    first_temperature: float | None = None
    """Sampling temperature of the first frame; lower values give likelier, less varied pictures."""
    first_top_k: int | None = None
    """Number of most likely codes that the first frame is sampled from; 0 is all codes."""
    first_top_p: float | None = None
    """Probability of the most likely codes that the first frame is sampled from; 1 is all codes."""
    first_clusters: int | None = None
    """Number of code clusters that the first frame is sampled from; 0 is all codes."""
    first_cluster_temperature: float | None = None
    """Sampling temperature of the first frame inside a cluster."""
    text_bonus: float | None = None
    """Number added to the attention scores of text where there is no guidance."""
    superres_temperature: float | None = None
    """Sampling temperature of super-resolution; 0 takes the most likely codes."""
    superres_top_k: int | None = None
    """Number of most likely codes that super-resolution samples from; 0 is all codes."""
    superres_top_p: float | None = None
    """Probability of the most likely codes that super-resolution samples from; 1 is all codes."""
    superres_clusters: int | None = None
    """Number of code clusters that super-resolution samples from; 0 is all codes."""
    superres_cluster_temperature: float | None = None
    """Sampling temperature of super-resolution inside a cluster."""

    def settings(self, own: CogVideoConfig) -> GenerationSettings:
        """A model's settings, overridden by the options given here."""
        return replace(
            GenerationSettings.of(own),
            first=self._merged(own.first_sampling, "first_"),
            later=self._merged(own.later_sampling, ""),
            superres=self._merged(own.superres_sampling, "superres_"),
            text_bonus=own.text_bonus if self.text_bonus is None else self.text_bonus,
        )

    def _merged(self, own: SamplingConfig, prefix: str) -> SamplingConfig:
        given = {each.name: getattr(self, f"{prefix}{each.name}", None) for each in fields(own)}
        try:
            return own | {name: value for name, value in given.items() if value is not None}
        except InputError as error:
            raise InputError(f"{prefix}{error}") from None


@dataclass(frozen=True, eq=False)
class Request:
    """Clips that are generated as one batch."""

    prompts: Sequence[str]
    generators: Sequence[torch.Generator]
    """CPU generators, one per clip, which are advanced; a clip depends on nothing else in the batch."""
    settings: GenerationSettings
    """All other choices."""
    given: Int64[Tensor, "frames slots"] | None = None
    """Leading frames at the rate of the finished clip, which are kept: one is an image to animate, more are a
    clip to extend from its last second."""
    last: Int64[Tensor, " slots"] | None = None
    """The last frame; `given` must then be one frame, the first."""
    loop: bool = False
    """End on the first frame again, but leave it out of the clip, which then loops seamlessly."""
    durations: Sequence[float] = ()
    """Seconds that the key frames of each clip span; by default, the duration of the settings."""
    finished: Mapping[int, Int64[Tensor, "batch slots"]] = field(default_factory=dict)
    """Frames of an interrupted run of the same request, by place. The others are generated as if there had been no
    interruption; these are not generated again."""

    def __post_init__(self) -> None:
        require(isinstance(self.loop, bool), f"loop is {self.loop!r:.60}, expected True or False")
        number = 0 if self.given is None else len(self.given)
        if self.loop:
            require(self.last is None, "a loop ends with its first frame: expected no last frame")
            require(number <= 1, "an extended clip cannot end where it began: expected no loop")
        require(self.last is None or number == 1, f"got a last frame and {number} leading ones, expected one")
        is_short = self.last is None or self.settings.more_key_frames == 0
        require(is_short, "a clip with a last frame has one sequence of key frames: expected fewer seconds")

    @property
    def seconds(self) -> list[float]:
        """Seconds that the key frames of each clip span."""
        return list(self.durations) or [self.settings.duration] * len(self.prompts)

    def condition(self, system: StageModels, share: float | None, guidance: float) -> Condition:
        """Texts of a stage, with their bonus or guidance; a guidance of 1 is none.

        A sequence spans `share` of the duration; None is for the image model, whose texts have no frame rate.
        """
        settings, layout = self.settings, system.config.layout
        durations = None if share is None else [seconds * share for seconds in self.seconds]
        slots = layout.image_text_slots if share is None else layout.text_slots
        rows = system.text.batch(self.prompts, durations, slots, settings.truncate)
        if guidance == 1:
            return Condition(rows, text_bonus=settings.text_bonus)
        others = system.text.batch([settings.negative] * len(self.prompts), durations, slots, settings.truncate)
        return Condition(rows, others, guidance)

    def check(self, config: CogVideoConfig) -> None:
        """Refuse a request that a model of this configuration cannot take."""
        batch, generators = len(self.prompts), self.generators
        is_list = not isinstance(self.prompts, str)
        require(is_list, f"got the text {self.prompts!r} as prompts, expected a list of texts")
        require(batch > 0, "got no prompt, expected at least one")
        require(len(generators) == batch, f"got {len(generators)} generators for {batch} prompts, expected one each")
        require(len(set(map(id, generators))) == batch, "got one generator for several samples, expected one each")
        require(len(self.seconds) == batch, f"got {len(self.seconds)} durations for {batch} prompts, expected one each")
        layout = SequenceLayout.sequential(config.layout)
        for frames in (self.given, None if self.last is None else self.last[None]):
            if frames is not None:
                layout.check_given(frames[None, :1], config.transformer.num_codes)
                check_code_range(frames, config.transformer.num_codes)
