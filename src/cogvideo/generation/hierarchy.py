"""The hierarchy of generation: key frames, then rounds of recursive interpolation (paper section 3.1, spec section 3).

`generate` is one generator for the command line, the web and the tests: it yields every frame as it is finished, with
its time in the clip; `collect` puts them in order. Given frames are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from jaxtyping import Int64
from torch import Tensor

from cogvideo.config import CogVideoConfig, DrawingConfig, require
from cogvideo.generation.decode import Passes, decode
from cogvideo.generation.decoder import Condition
from cogvideo.generation.sampling import GumbelNoise, Sampling, spawn
from cogvideo.layout import SequenceLayout
from cogvideo.models.transformer import Transformer
from cogvideo.text import PaddedText, TextTokenizer, fit, is_visible, pad_left


class System(Protocol):
    """What generation needs of a model; `bundle.CogVideo` is one, and loads each part when it is first used."""

    @property
    def config(self) -> CogVideoConfig:
        """Sizes and templates."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts that there are."""

    @property
    def image_model(self) -> Transformer:
        """Draws the first frame."""

    @property
    def sequential(self) -> Transformer:
        """Draws the other key frames."""

    @property
    def interpolation(self) -> Transformer:
        """Draws the frames between."""

    @property
    def text(self) -> TextTokenizer:
        """Of captions."""

    @property
    def cluster_labels(self) -> Int64[Tensor, " codes"] | None:
        """Cluster of each code, for cluster sampling."""


@dataclass(frozen=True)
class Guidance:
    """How strongly a stage is guided; the defaults are those of the released pipeline (spec section 3)."""

    image: float = DrawingConfig.first_guidance
    """Of the first frame; 1 is no guidance, and no second row."""
    sequential: float = DrawingConfig.guidance
    """Of the other key frames."""
    interpolation: float = 1.0
    """Of the frames between."""
    negative: str | None = None
    """Caption to move away from, instead of the model's own unconditional one."""
    text_bonus: float = DrawingConfig.text_bonus
    """Added to text scores in stages that are not guided."""

    def __post_init__(self) -> None:
        for name in ("image", "sequential", "interpolation"):
            scale = getattr(self, name)
            fits = isinstance(scale, int | float) and 0 <= scale < math.inf
            require(fits, f"guidance of the {name} stage is {scale!r:.60}, expected 0 or more")
        require(self.negative is None or is_visible(self.negative), f"the negative prompt is empty: {self.negative!r}")
        require(math.isfinite(self.text_bonus), f"text_bonus is {self.text_bonus}, expected a number")


@dataclass(frozen=True)
class Settings:
    """All that decides a clip beside its prompt, its seed and given frames."""

    rounds: int = 3
    """Rounds of interpolation: 5 key frames become 9, 17, 33, ..."""
    duration: float = 4.0
    """Seconds from the first to the last key frame."""
    first: Sampling = Sampling(DrawingConfig.first_temperature, clusters=DrawingConfig.first_clusters)  # noqa: RUF009
    """Sampler of the first frame."""
    later: Sampling = Sampling(DrawingConfig.temperature, clusters=DrawingConfig.clusters)  # noqa: RUF009  # frozen
    """Sampler of all other frames."""
    guidance: Guidance = Guidance()  # frozen
    """Guidance of each stage."""
    sequences_at_once: int = 0
    """Sequences of a round (two gaps each) that are decoded as one batch; 0 is all. Fewer need less memory and more
    passes, and give the same clip."""
    passes: Passes = Passes(draft=8)  # noqa: RUF009  # frozen
    """How many slots go through the model at once; changes the speed alone. Drafts of up to 8 need half the passes."""
    truncate: bool = False
    """Cut prompts that are longer than the text slots, instead of refusing them."""

    def __post_init__(self) -> None:
        require(self.rounds >= 0, f"rounds is {self.rounds}, expected 0 or more")
        require(self.sequences_at_once >= 0, f"sequences_at_once is {self.sequences_at_once}, expected 0 (all) or more")
        require(self.duration > 0, f"duration is {self.duration}, expected a positive number of seconds")

    @classmethod
    def of(cls, drawing: DrawingConfig) -> Settings:
        """Those of a model, from its configuration.

        Raises:
            ValueError: a value cannot be used.
        """
        return cls(
            first=Sampling(drawing.first_temperature, clusters=drawing.first_clusters),
            later=Sampling(drawing.temperature, clusters=drawing.clusters),
            guidance=Guidance(drawing.first_guidance, drawing.guidance, text_bonus=drawing.text_bonus),
        )


class Finished(NamedTuple):
    """A frame of every sample of a batch that will not change any more."""

    stage: str
    """`given`, `image`, `sequential` or `interpolation`."""
    time: float
    """Seconds from the start of the clip."""
    codes: Int64[Tensor, "batch slots"]
    passes: int
    """Passes of the model for the frames of this stage (of this round), up to here."""


class Clip(NamedTuple):
    """Frames in order of time, equally spaced."""

    codes: Int64[Tensor, "batch frames slots"]
    spacing: float
    """Seconds between neighbours."""


class _Streams(NamedTuple):
    """A generator a sample for each stage, so that one stage's draws do not depend on whether another ran."""

    image: list[torch.Generator]
    sequential: list[torch.Generator]
    interpolation: list[torch.Generator]

    @classmethod
    def of(cls, generators: Sequence[torch.Generator]) -> _Streams:
        children = [spawn(generator, len(cls._fields)) for generator in generators]
        return cls(*(list(stage) for stage in zip(*children, strict=True)))


Frames = Generator[Finished, None, Clip]
"""Yields frames as they are finished and returns the clip so far."""


def generate(
    system: System,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    settings: Settings | None = None,
    given: Int64[Tensor, "batch frames slots"] | None = None,
    last: Int64[Tensor, "batch slots"] | None = None,
    loop: bool = False,
) -> Frames:
    """A clip for each prompt, all in one batch, from nothing or from given frames.

    Args:
        system: models and text tokenizer.
        prompts: captions.
        generators: one CPU generator a sample, advanced here; a sample depends on nothing else in the batch.
        settings: all other choices; the model's own unless given.
        given: leading key frames: one continues an image, several continue a clip.
        last: last key frame; the clip then goes from `given`, which must be one frame, to this.
        loop: the last key frame is the first one again.

    Raises:
        ValueError: a prompt is empty or too long, counts differ, given frames cannot be right, or the model lacks a
            part that these settings need. At the call, before anything heavy: models are not even loaded.
    """
    config = system.config
    settings = settings or Settings.of(config.drawing)
    given = _check(config, prompts, generators, given, last)
    require(not (loop and last is not None), "a loop ends with its first frame, expected no other last frame")
    _check_parts(system.components, settings, image=not given.shape[1], key_frames=last is None)
    texts = _Texts(system, prompts, settings)
    spacing = settings.duration / (config.layout.num_frames - 1)
    rounds = settings.rounds if last is None else settings.rounds + _rounds_between(config)
    texts.check(not given.shape[1], spacing, settings.duration if last is not None else spacing, rounds)
    return _generate(system, texts, _Streams.of(generators), given, last, loop, spacing, rounds)


def _generate(
    system: System,
    texts: _Texts,
    streams: _Streams,
    given: Tensor,
    last: Tensor | None,
    loop: bool,
    spacing: float,
    rounds: int,
) -> Frames:
    if last is None:
        clip = yield from _key_frames(system, texts, streams, given, loop, spacing)
    else:
        clip = Clip(torch.stack([given[:, 0], last], 1), texts.settings.duration)
        yield from _finished("given", clip)
    noise = [spawn(generator, rounds) for generator in streams.interpolation]
    for number in range(rounds):
        clip = yield from _interpolate(system, texts, [each[number] for each in noise], clip)
    return clip


def collect(frames: Iterable[Finished]) -> Int64[Tensor, "batch frames slots"]:
    """All frames that were yielded, in order of time."""
    return torch.stack([frame.codes for frame in sorted(frames, key=lambda frame: frame.time)], 1)


def _check(
    config: CogVideoConfig,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    given: Tensor | None,
    last: Tensor | None,
) -> Int64[Tensor, "batch frames slots"]:
    """The given frames, none as an empty tensor."""
    layout, batch = SequenceLayout.sequential(config.layout), len(prompts)
    require(not isinstance(prompts, str), f"got the text {prompts!r} as prompts, expected a list of texts")
    require(batch > 0, "got no prompt, expected at least one")
    require(len(generators) == batch, f"got {len(generators)} generators for {batch} prompts, expected one each")
    require(len(set(map(id, generators))) == batch, "got one generator for several samples, expected one each")
    given = torch.empty(batch, 0, layout.frame_slots, dtype=torch.int64) if given is None else given
    num_given = layout.check_given(given, config.transformer.num_codes)
    if last is not None:
        require(num_given == 1, f"got {num_given} given frames and a last one, expected 1")
        layout.check_given(last[:, None], config.transformer.num_codes)
    for codes in [given] if last is None else [given, last]:
        require(len(codes) == batch, f"got given frames of {len(codes)} clips for {batch} prompts")
    return given


def _check_parts(components: Sequence[str], settings: Settings, image: bool, key_frames: bool) -> None:
    """Refuse a model that would be found incomplete half-way."""
    drawn = [settings.first] * image + [settings.later]
    needed = {"base": True, "text": True, "sequential": key_frames, "interpolation": settings.rounds or not key_frames}
    missing = [name for name, needs in needed.items() if needs and name not in components]
    require(
        not missing,
        f"this model has no {', '.join(missing)}, which these settings need; it has {', '.join(components)}",
    )
    clusters = max(sampling.clusters for sampling in drawn)
    require(
        not clusters or "cluster_labels" in components or "image_tokenizer" in components,
        f"the samplers keep {clusters} clusters, but this model has neither cluster labels nor an image tokenizer to "
        "make them from: choose samplers with clusters=0",
    )


def _rounds_between(config: CogVideoConfig) -> int:
    """Rounds from two frames to as many as there are key frames."""
    gaps = config.layout.num_frames - 1
    require(gaps & (gaps - 1) == 0, f"{gaps} gaps between key frames are no power of two: in-between is not possible")
    return gaps.bit_length() - 1


class _Texts:
    """The texts of each stage, encoded once."""

    def __init__(self, system: System, prompts: Sequence[str], settings: Settings) -> None:
        self.system, self.prompts, self.settings = system, prompts, settings
        self.layout, self.tokenizer = system.config.layout, system.text

    def check(self, image: bool, spacing: float, start: float, rounds: int) -> None:
        """Encode every text that will be needed, so that one too long is refused before any work."""
        if image:
            self.image()
        self.sequential(spacing)
        for number in range(rounds):
            self.interpolation(start / 2 ** (number + 1))

    def image(self) -> Condition:
        """Of the first frame: no frame rate prefix."""
        tokenizer, negative = self.tokenizer, self.settings.guidance.negative
        rows = [tokenizer.encode_image_caption(prompt) for prompt in self.prompts]
        other = tokenizer.encode_unconditional_image() if negative is None else tokenizer.encode_image_caption(negative)
        return self._condition(rows, other, self.settings.guidance.image, self.layout.image_text_slots)

    def sequential(self, spacing: float) -> Condition:
        """Of the key frames."""
        return self._video(spacing, self.settings.guidance.sequential)

    def interpolation(self, spacing: float) -> Condition:
        """Of a round after which frames are `spacing` seconds apart."""
        return self._video(spacing, self.settings.guidance.interpolation)

    def _video(self, spacing: float, scale: float) -> Condition:
        duration, negative = spacing * (self.layout.num_frames - 1), self.settings.guidance.negative
        rows = [self.tokenizer.encode_caption(prompt, duration) for prompt in self.prompts]
        if negative is None:
            other = self.tokenizer.encode_unconditional(duration)
        else:
            other = self.tokenizer.encode_caption(negative, duration)
        return self._condition(rows, other, scale, self.layout.text_slots)

    def _condition(self, rows: list[list[int]], other: list[int], scale: float, slots: int) -> Condition:
        text = self._pad(rows, slots)
        if scale == 1:
            return Condition(text, text_bonus=self.settings.guidance.text_bonus)
        return Condition(text, self._pad([other] * len(rows), slots), scale)

    def _pad(self, rows: list[list[int]], slots: int) -> PaddedText:
        rows = [fit(row, slots, self.settings.truncate) for row in rows]
        return pad_left(rows, slots, self.tokenizer.pad)


def _finished(stage: str, clip: Clip) -> Generator[Finished, None, None]:
    for number in range(clip.codes.shape[1]):
        yield Finished(stage, number * clip.spacing, clip.codes[:, number], 0)


def _key_frames(system: System, texts: _Texts, streams: _Streams, given: Tensor, loop: bool, spacing: float) -> Frames:
    """The first frame by the image model alone, the others by the sequential stage."""
    yield from _finished("given", Clip(given, spacing))
    if not given.shape[1]:
        layout = SequenceLayout.text_to_image(system.config.layout)
        given = yield from _decode(system.image_model, layout, texts.image(), given, streams.image, texts, "image", 0)
    layout, again = SequenceLayout.sequential(system.config.layout), given[:, : int(loop)]
    codes, wanted = given, layout.num_frames - given.shape[1] - again.shape[1]
    if wanted:
        model, condition, streamed = system.sequential, texts.sequential(spacing), streams.sequential
        drawn = _decode(model, layout, condition, given, streamed, texts, "sequential", spacing)
        codes = torch.cat([given, (yield from _first(drawn, wanted))], 1)
    if loop:
        yield Finished("given", (layout.num_frames - 1) * spacing, again[:, 0], 0)
    return Clip(torch.cat([codes, again], 1), spacing)


def _first(frames: Iterable[Finished], number: int) -> Generator[Finished, None, Int64[Tensor, "batch frames slots"]]:
    """Yield so many frames and return their codes; what follows is never drawn."""
    codes = []
    for frame in islice(frames, number):
        codes.append(frame.codes)
        yield frame
    return torch.stack(codes, 1)


def _decode(
    model: Transformer,
    layout: SequenceLayout,
    condition: Condition,
    given: Int64[Tensor, "batch frames slots"],
    generators: Sequence[torch.Generator],
    texts: _Texts,
    stage: str,
    spacing: float,
) -> Generator[Finished, None, Int64[Tensor, "batch frames slots"]]:
    """Yield the frames that a stage adds; return them."""
    settings = texts.settings
    sampling = settings.first if stage == "image" else settings.later
    noise = GumbelNoise(generators, layout.num_frames, layout.frame_slots, model.base.config.num_codes)
    frames = []
    for frame in decode(model, layout, condition, given, noise, sampling, texts.system.cluster_labels, settings.passes):
        frames.append(frame.codes.cpu())
        yield Finished(stage, frame.place * spacing, frames[-1], frame.passes)
    return torch.stack(frames, 1)


def _interpolate(system: System, texts: _Texts, generators: Sequence[torch.Generator], clip: Clip) -> Frames:
    """One frame into every gap: the sequences of the round, (samples x sequences) rows, are one batch or a few.

    A sequence takes neighbouring frames, the first of the next being the last of this one. Where the gaps do not come
    out even, the last sequence overlaps the one before, and what it draws for that one's gap is dropped.
    """
    num_frames, spacing = clip.codes.shape[1], clip.spacing / 2
    most = SequenceLayout.interpolation(system.config.layout).num_bidirectional
    layout = SequenceLayout.interpolation(system.config.layout, min(most, num_frames))
    spans = _spans(num_frames, layout.num_bidirectional)
    streams = [spawn(generator, len(spans)) for generator in generators]
    codes = clip.codes.new_zeros(len(clip.codes), 2 * num_frames - 1, clip.codes.shape[2])
    codes[:, ::2] = clip.codes
    at_once = texts.settings.sequences_at_once or len(spans)
    for first in range(0, len(spans), at_once):
        part = slice(first, first + at_once)
        rows = [generator for stream in streams for generator in stream[part]]
        for frame in _fill(system, texts, layout, clip, spans[part], rows):
            codes[:, round(frame.time / spacing)] = frame.codes
            yield frame
    return Clip(codes, spacing)


def _fill(
    system: System,
    texts: _Texts,
    layout: SequenceLayout,
    clip: Clip,
    spans: list[_Span],
    rows: Sequence[torch.Generator],
) -> Generator[Finished, None, None]:
    """The frames that some sequences add to the gaps of a clip."""
    spacing, width = clip.spacing / 2, layout.num_bidirectional
    given = torch.stack([clip.codes[:, span.start : span.start + width] for span in spans], 1)
    for frame in _decode(
        system.interpolation,
        layout,
        _repeat(texts.interpolation(spacing), len(spans)),
        rearrange(given, "batch spans frames slots -> (batch spans) frames slots"),
        rows,
        texts,
        "interpolation",
        spacing,
    ):
        drawn = rearrange(frame.codes, "(batch spans) slots -> batch spans slots", spans=len(spans))
        for number, span in enumerate(spans):
            time = frame.time + span.start * clip.spacing
            if time > span.filled * clip.spacing:
                yield Finished("interpolation", time, drawn[:, number], frame.passes)


class _Span(NamedTuple):
    """A sequence among the frames of a clip."""

    start: int
    """Its first frame."""
    filled: int
    """Gaps before this frame belong to earlier sequences."""


def _spans(num_frames: int, width: int) -> list[_Span]:
    """Sequences of `width` neighbours whose gaps are all gaps."""
    last = num_frames - width
    starts = [*range(0, last, width - 1), last]
    return [_Span(start, before + width - 1) for before, start in pairwise([1 - width, *starts])]


def _repeat(condition: Condition, times: int) -> Condition:
    """Every row so many times in a row."""

    def repeat(text: PaddedText) -> PaddedText:
        return PaddedText(*(part.repeat_interleave(times, 0) for part in text))

    other = condition.unconditional
    return replace(condition, text=repeat(condition.text), unconditional=None if other is None else repeat(other))
