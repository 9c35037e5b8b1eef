"""The hierarchy of generation: key frames, then rounds of recursive interpolation (paper section 3.1, spec section 3).

`generate` is one generator for the command line, the web and the tests: it yields every frame as it is finished, with
its place in the clip; `collect` puts them in order. Given frames are never changed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Int64
from torch import Tensor

from cogvideo.config import SamplingConfig, require
from cogvideo.generation.decode import decode
from cogvideo.generation.decoder import Condition
from cogvideo.generation.request import MOST_CONTEXT, Request, System
from cogvideo.generation.sampling import GumbelNoise, spawn
from cogvideo.layout import SequenceLayout
from cogvideo.models.transformer import Transformer
from cogvideo.text import PaddedText

Codes = Int64[Tensor, "batch frames slots"]


class Finished(NamedTuple):
    """A frame of every clip of a batch that will not change any more."""

    stage: str
    """`given`, `image`, `sequential` or `interpolation`."""
    place: int
    """Its place in the clip, of `num_frames`."""
    num_frames: int
    """Frames of the whole clip."""
    codes: Int64[Tensor, "batch slots"]


def generate(system: System, request: Request) -> Iterator[Finished]:
    """Frames as they are finished, given ones first.

    Raises:
        ValueError: a prompt is empty or too long, counts differ, given frames cannot be right, or the model lacks a
            part that is needed. At the call, before anything heavy: models are not even loaded.
    """
    run = _Run(system, request)
    run.check(request.given is None, request.last is None, run.rounds)
    return run.frames()


def first_frames(system: System, request: Request) -> Int64[Tensor, "batch slots"]:
    """First frames alone, for which a model needs no video stage; raises what `generate` raises."""
    run = _Run(system, request)
    run.check(image=True, key_frames=False, rounds=0)
    (frame,) = run.image()
    return frame.codes


def between(system: System, request: Request, frames: Codes) -> Codes:
    """One round: the frames, with a new one in every gap; raises what `generate` raises.

    Args:
        system: the model.
        request: its durations are those of a sequence of the interpolation stage.
        frames: in order of time; the given frames of the request are not read.
    """
    run = _Run(system, request)
    run.check(image=False, key_frames=False, rounds=1)
    spacing = 2
    codes = frames.new_zeros(len(frames), spacing * (frames.shape[1] - 1) + 1, frames.shape[2])
    codes[:, ::spacing] = frames
    for frame in run.interpolate(frames, run.streams["interpolation"], 1.0, spacing):
        codes[:, frame.place] = frame.codes
    return codes


def collect(frames: Iterable[Finished]) -> Codes:
    """All frames that were yielded, in order of time."""
    return torch.stack([frame.codes for frame in sorted(frames, key=lambda frame: frame.place)], 1)


class _Run:
    """A request on its way through the stages.

    Places of frames count from the first key frame that the new frames follow, in the spacing of the finished clip.
    """

    def __init__(self, system: System, request: Request) -> None:
        request.check(system.config)
        self.system, self.request, self.settings = system, request, request.settings
        self.layout, self.gaps = system.config.layout, system.config.layout.num_frames - 1
        self.rounds = self.settings.rounds
        if request.last is not None:
            power = self.gaps & (self.gaps - 1) == 0
            require(power, f"{self.gaps} gaps between key frames are no power of two: in-between is not possible")
            self.rounds += self.gaps.bit_length() - 1
        # A generator a sample for each stage, so that one stage's draws do not depend on whether another ran.
        names = ("image", "sequential", "interpolation")
        children = [spawn(generator, len(names)) for generator in request.generators]
        self.streams = dict(zip(names, map(list, zip(*children, strict=True)), strict=True))

    def check(self, image: bool, key_frames: bool, rounds: int) -> None:
        """Refuse a model that would be found incomplete half-way, and texts that are too long, before any work."""
        there, settings = self.system.components, self.settings
        needed = {"base": True, "text": True, "sequential": key_frames, "interpolation": rounds > 0}
        missing = [name for name, needs in needed.items() if needs and name not in there]
        require(
            not missing,
            f"this model has no {', '.join(missing)}, which these settings need; it has {', '.join(there)}",
        )
        clusters = max(settings.first.clusters * image, settings.later.clusters * (key_frames or rounds > 0))
        require(
            not clusters or "cluster_labels" in there or "image_tokenizer" in there,
            f"the samplers keep {clusters} clusters, but this model has neither cluster labels nor an image tokenizer "
            "to make them from: choose samplers with clusters=0",
        )
        if image:
            self.condition(None, settings.first.guidance)
        if key_frames:
            self.condition(1.0, settings.later.guidance)
        for number in range(rounds):
            self.condition(self.share(number), settings.interpolation_guidance)

    def share(self, number: int) -> float:
        """Seconds that a sequence of a round spans, over those from the first to the last key frame."""
        return (1 if self.request.last is None else self.gaps) / 2 ** (number + 1)

    def condition(self, share: float | None, guidance: float) -> Condition:
        """Texts of a stage: with the seconds that a sequence spans, as a share of the duration, or without."""
        text, settings, prompts = self.system.text, self.settings, self.request.prompts
        durations = None if share is None else [seconds * share for seconds in self.request.seconds]
        slots = self.layout.image_text_slots if share is None else self.layout.text_slots
        rows = text.batch(prompts, durations, slots, settings.truncate)
        if guidance == 1:
            return Condition(rows, text_bonus=settings.text_bonus)
        others = text.batch([settings.negative] * len(prompts), durations, slots, settings.truncate)
        return Condition(rows, others, guidance)

    def frames(self) -> Iterator[Finished]:
        """All frames: those that are given, then new ones; what lies between given ones is not drawn anew."""
        request, step = self.request, 2**self.settings.rounds
        given = self.nothing()[0] if request.given is None else request.given
        context = min(MOST_CONTEXT, 1 + (len(given) - 1) // step) if len(given) else 0
        start = len(given) - 1 - (context - 1) * step if len(given) else 0
        num_frames = start + self.gaps * step + 1 - request.loop
        for place, codes in enumerate(given):
            yield Finished("given", place, num_frames, codes.expand(len(request.prompts), -1))
        for frame in self.new(given[start::step].expand(len(request.prompts), -1, -1), step):
            place = start + frame.place
            if len(given) <= place < num_frames:
                yield frame._replace(place=place, num_frames=num_frames)

    def nothing(self) -> Codes:
        """No frame of any clip."""
        return torch.empty(len(self.request.prompts), 0, self.layout.grid**2, dtype=torch.int64)

    def new(self, given: Codes, step: int) -> Iterator[Finished]:
        """Frames that follow given key frames, which are `step` places apart, or lie between two."""
        last = self.request.last
        if last is None:
            codes = yield from self.key_frames(given, step)
        else:
            step *= self.gaps
            codes = torch.stack([given[:, 0], last.expand(len(given), -1)], 1)
            yield Finished("given", step, 0, codes[:, 1])
        noise = [spawn(generator, self.rounds) for generator in self.streams["interpolation"]]
        for number in range(self.rounds):
            longer = codes.new_zeros(len(codes), 2 * codes.shape[1] - 1, codes.shape[2])
            longer[:, ::2] = codes
            for frame in self.interpolate(codes, [each[number] for each in noise], self.share(number), step):
                longer[:, 2 * frame.place // step] = frame.codes
                yield frame
            codes, step = longer, step // 2

    def key_frames(self, given: Codes, step: int) -> Generator[Finished, None, Codes]:
        """The first frame by the image model alone, the others by the sequential stage; returns all of them."""
        if not given.shape[1]:
            for first in self.image():
                given = first.codes[:, None]
                yield first
        layout, again = SequenceLayout.sequential(self.layout), given[:, : int(self.request.loop)]
        codes = [*given.unbind(1)]
        wanted = layout.num_frames - len(codes) - again.shape[1]
        if wanted:
            model, condition = self.system.sequential, self.condition(1.0, self.settings.later.guidance)
            drawn = self.decode(model, layout, condition, given, self.streams["sequential"], self.settings.later)
            for place, frame in islice(drawn, wanted):  # what follows is never drawn
                codes.append(frame)
                yield Finished("sequential", place * step, 0, frame)
        return torch.cat([torch.stack(codes, 1), again], 1)

    def image(self) -> Iterator[Finished]:
        """The first frame."""
        model, layout = self.system.image_model, SequenceLayout.text_to_image(self.layout)
        condition, first = self.condition(None, self.settings.first.guidance), self.settings.first
        for place, codes in self.decode(model, layout, condition, self.nothing(), self.streams["image"], first):
            yield Finished("image", place, 0, codes)

    def decode(
        self,
        model: Transformer,
        layout: SequenceLayout,
        condition: Condition,
        given: Codes,
        generators: Sequence[torch.Generator],
        sampling: SamplingConfig,
    ) -> Iterator[tuple[int, Int64[Tensor, "batch slots"]]]:
        """Frames that a stage adds, with their places in its sequence."""
        noise = GumbelNoise(generators, layout.num_frames, layout.frame_slots, model.base.config.num_codes)
        labels, passes = self.system.cluster_labels, self.settings.passes
        for frame in decode(model, layout, condition, given, noise, sampling, labels, passes):
            yield frame.place, frame.codes.cpu()

    def interpolate(
        self, codes: Codes, generators: Sequence[torch.Generator], share: float, step: int
    ) -> Iterator[Finished]:
        """One frame into every gap: the sequences of the round, (samples x sequences) rows, are one batch or a few.

        A sequence takes neighbouring frames, the first of the next being the last of this one. Where the gaps do not
        come out even, the last sequence overlaps the one before, and what it draws for that one's gap is dropped.
        """
        most = SequenceLayout.interpolation(self.layout).num_bidirectional
        layout = SequenceLayout.interpolation(self.layout, min(most, codes.shape[1]))
        spans = _spans(codes.shape[1], layout.num_bidirectional)
        streams = [spawn(generator, len(spans)) for generator in generators]
        condition = self.condition(share, self.settings.interpolation_guidance)
        at_once = self.settings.sequences_at_once or len(spans)
        for first in range(0, len(spans), at_once):
            part = slice(first, first + at_once)
            rows = [generator for stream in streams for generator in stream[part]]
            for number, place, drawn in self.fill(layout, condition, codes, spans[part], rows):
                span = spans[first + number]
                place += 2 * span.start
                if place > 2 * span.filled:
                    yield Finished("interpolation", place * step // 2, 0, drawn)

    def fill(
        self,
        layout: SequenceLayout,
        condition: Condition,
        codes: Codes,
        spans: list[_Span],
        rows: Sequence[torch.Generator],
    ) -> Iterator[tuple[int, int, Int64[Tensor, "batch slots"]]]:
        """Frames that some sequences add: the number of the sequence, the place in it, and codes."""
        given = torch.stack([codes[:, span.start : span.start + layout.num_bidirectional] for span in spans], 1)
        given = rearrange(given, "batch spans frames slots -> (batch spans) frames slots")
        model, condition = self.system.interpolation, _repeat(condition, len(spans))
        for place, drawn in self.decode(model, layout, condition, given, rows, self.settings.later):
            of_spans = rearrange(drawn, "(batch spans) slots -> spans batch slots", spans=len(spans))
            for number, each in enumerate(of_spans):
                yield number, place, each


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
    """Every row several times in a row."""

    def repeat(text: PaddedText) -> PaddedText:
        return PaddedText(*(part.repeat_interleave(times, 0) for part in text))

    other = condition.unconditional
    return replace(condition, text=repeat(condition.text), unconditional=None if other is None else repeat(other))
