"""Hierarchical generation: key frames, then rounds of recursive interpolation (paper section 3.1, spec 3).

`generate` yields each frame when it is finished, with its place in the clip; `collect` sorts them. Given
frames are never changed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise, takewhile
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Int64
from torch import Tensor

from cogvideo.bundle.model import StageModels
from cogvideo.config import SamplingConfig, require
from cogvideo.generation.decode import decode
from cogvideo.generation.decoder import Condition
from cogvideo.generation.request import MAX_CONTEXT, Request
from cogvideo.generation.sampling import GumbelNoise, spawn
from cogvideo.layout import SequenceLayout
from cogvideo.models.transformer import Transformer
from cogvideo.text import PaddedText

Codes = Int64[Tensor, "batch frames slots"]


class FinishedFrame(NamedTuple):
    """A finished frame of every clip of a batch."""

    stage: str
    """`given`, `image`, `sequential` or `interpolation`."""
    place: int
    """Place in the clip, from 0."""
    num_frames: int
    codes: Int64[Tensor, "batch slots"]


def generate(system: StageModels, request: Request) -> Iterator[FinishedFrame]:
    """Yield frames as they are finished, given ones first.

    Raises:
        ValueError: a prompt is empty or too long, counts differ, given frames are invalid, or the model lacks
            a component. Raised at the call, before models are loaded.
    """
    run = _Run(system, request)
    run.check(request.given is None, request.last is None, run.rounds)
    return run.frames()


def first_frames(system: StageModels, request: Request) -> Int64[Tensor, "batch slots"]:
    """Generate only first frames, which needs no video stage; raises what `generate` raises."""
    run = _Run(system, request)
    run.check(image=True, key_frames=False, rounds=0)
    (frame,) = run.image()
    return frame.codes


def between(system: StageModels, request: Request, frames: Codes) -> Int64[Tensor, "batch filled slots"]:
    """Run one round of interpolation, which adds a frame in every gap; raises what `generate` raises.

    Args:
        system: the model.
        request: a request whose durations are those of the interpolation stage's sequences.
        frames: frames in temporal order; the given frames of the request are ignored.
    """
    run = _Run(system, request)
    run.check(image=False, key_frames=False, rounds=1)
    spacing = 2
    codes = frames.new_zeros(len(frames), spacing * (frames.shape[1] - 1) + 1, frames.shape[2])
    codes[:, ::spacing] = frames
    for frame in run.interpolate(frames, run.streams["interpolation"], 1.0, spacing):
        codes[:, frame.place] = frame.codes
    return codes


def after(system: StageModels, request: Request, frames: Codes) -> Int64[Tensor, "batch added slots"]:
    """Continue a sequence of key frames after given ones; raises what `generate` raises.

    Args:
        system: the model.
        request: a request whose duration is that of the sequence; its given frames are ignored.
        frames: first frames of each clip's sequence, fewer than a full sequence.
    """
    run = _Run(system, request)
    run.check(image=False, key_frames=True, rounds=0)
    return torch.stack([frame.codes for frame in run.key_frames(frames, 1)], 1)


def collect(frames: Iterable[FinishedFrame]) -> Codes:
    """Arrange yielded frames in temporal order."""
    return torch.stack([frame.codes for frame in sorted(frames, key=lambda frame: frame.place)], 1)


class _Run:
    """A request in progress.

    Places count from the first key frame that new frames build on, in the spacing of the finished clip.
    """

    def __init__(self, system: StageModels, request: Request) -> None:
        request.check(system.config)
        self.system = system
        self.request = request
        self.settings = request.settings
        self.condition = partial(request.condition, system)
        self.layout = system.config.layout
        self.gaps = self.layout.num_frames - 1
        self.num_key_frames = self.layout.num_frames + self.settings.more_key_frames
        self.rounds = self.settings.rounds
        if request.last is not None:
            got = f"{self.gaps} gaps between key frames are not a power of two"
            require(self.gaps.bit_count() == 1, f"{got}: a last frame cannot be used")
            self.rounds += self.gaps.bit_length() - 1
        # One generator per sample and stage, so that a stage's draws do not depend on the other stages; and one for
        # each further sequence of key frames, so that a long clip begins with the short one of the same seed.
        further = -(-self.settings.more_key_frames // (self.layout.num_frames - MAX_CONTEXT))
        self.sequences = ["sequential", *(f"sequence {number}" for number in range(further))]
        names = ("image", "sequential", "interpolation", *self.sequences[1:])
        children = [spawn(generator, len(names)) for generator in request.generators]
        self.streams = dict(zip(names, zip(*children, strict=True), strict=True))
        self.finished: dict[int, Int64[Tensor, "batch slots"]] = {}

    def check(self, image: bool, key_frames: bool, rounds: int) -> None:
        """Refuse incomplete models and long texts before any work."""
        there = self.system.components
        settings = self.settings
        needed = {"base": True, "text": True, "sequential": key_frames, "interpolation": rounds > 0}
        missing = [name for name, needs in needed.items() if needs and name not in there]
        names = ", ".join(missing)
        require(not missing, f"this model has no {names}, which these settings need; it has {', '.join(there)}")
        clusters = max(settings.first.clusters * image, settings.later.clusters * (key_frames or rounds > 0))
        lacks = "but this model has neither cluster labels nor an image tokenizer to make them from"
        has_labels = "cluster_labels" in there or "image_tokenizer" in there
        advice = "choose samplers with clusters=0"
        require(not clusters or has_labels, f"the samplers keep {clusters} clusters, {lacks}: {advice}")
        if image:
            self.condition(None, settings.first.guidance)
        if key_frames:
            self.condition(1.0, settings.later.guidance)
        for number in range(rounds):
            self.condition(self.share(number), settings.interpolation_guidance)

    def share(self, number: int) -> float:
        """Duration of a sequence in a round, relative to the time from the first to the last key frame."""
        return (1 if self.request.last is None else self.gaps) / 2 ** (number + 1)

    def frames(self) -> Iterator[FinishedFrame]:
        """Yield given frames, then new ones; frames between given ones, and finished ones, are not yielded."""
        request = self.request
        step = 2**self.settings.rounds
        given = self.nothing()[0] if request.given is None else request.given
        start = 0
        if len(given):
            context = min(MAX_CONTEXT, 1 + (len(given) - 1) // step)
            start = len(given) - 1 - (context - 1) * step
        num_frames = start + (self.num_key_frames - 1) * step + 1 - request.loop
        # Frames between given key frames are generated, though not kept: later frames see those, not the given ones.
        self.finished = {place - start: each for place, each in request.finished.items() if place >= len(given)}
        for place, codes in enumerate(given):
            if place not in request.finished:
                yield FinishedFrame("given", place, num_frames, codes.expand(len(request.prompts), -1))
        for frame in self.new(given[start::step].expand(len(request.prompts), -1, -1), step):
            place = start + frame.place
            if len(given) <= place < num_frames and place not in request.finished:
                yield frame._replace(place=place, num_frames=num_frames)

    def nothing(self) -> Codes:
        """Empty codes, of no frames."""
        return torch.empty(len(self.request.prompts), 0, self.layout.frame_slots, dtype=torch.int64)

    def new(self, given: Codes, step: int) -> Iterator[FinishedFrame]:
        """Generate frames after given key frames, `step` places apart, or between two of them."""
        last = self.request.last
        if last is None:
            codes = yield from self.key_frames(given, step)
        else:
            step *= self.gaps
            codes = torch.stack([given[:, 0], last.expand(len(given), -1)], 1)
            yield FinishedFrame("given", step, 0, codes[:, 1])
        noise = [spawn(generator, self.rounds) for generator in self.streams["interpolation"]]
        for number in range(self.rounds):
            longer = codes.new_zeros(len(codes), 2 * codes.shape[1] - 1, codes.shape[2])
            longer[:, ::2] = codes
            for frame in self.interpolate(codes, [each[number] for each in noise], self.share(number), step):
                longer[:, 2 * frame.place // step] = self.finished.get(frame.place, frame.codes)
                yield frame
            codes, step = longer, step // 2

    def key_frames(self, given: Codes, step: int) -> Generator[FinishedFrame, None, Codes]:
        """Generate the first frame with the image model and the others with the sequential stage; returns all.

        Each further sequence of a long clip begins with the last key frames of the previous one.
        """
        if not given.shape[1]:
            for first in self.image():
                given = first.codes[:, None]
                yield first
        layout = SequenceLayout.sequential(self.layout)
        again = given[:, : int(self.request.loop)]
        codes = [*given.unbind(1)]
        count = self.num_key_frames - again.shape[1]
        condition = self.condition(1.0, self.settings.later.guidance)
        for sequence in self.sequences:
            start = max(0, len(codes) - MAX_CONTEXT)
            given = torch.stack(codes[start:], 1)
            end = min(start + layout.num_frames, count)
            known = takewhile(self.finished.__contains__, range(len(codes) * step, end * step, step))
            finished = [self.finished[place] for place in known]
            codes += finished
            wanted = end - len(codes)
            if wanted:
                model, streams = self.system.sequential, self.streams[sequence]
                drawn = self.decode(model, layout, condition, given, streams, self.settings.later, finished)
                for place, frame in islice(drawn, wanted):  # later frames are never generated
                    codes.append(frame)
                    yield FinishedFrame("sequential", (start + place) * step, 0, frame)
        return torch.cat([torch.stack(codes, 1), again], 1)

    def image(self) -> Iterator[FinishedFrame]:
        """Generate the first frame."""
        if 0 in self.finished:
            yield FinishedFrame("image", 0, 0, self.finished[0])
            return
        model = self.system.image_model
        layout = SequenceLayout.text_to_image(self.layout)
        first = self.settings.first
        condition = self.condition(None, first.guidance)
        for place, codes in self.decode(model, layout, condition, self.nothing(), self.streams["image"], first):
            yield FinishedFrame("image", place, 0, codes)

    def decode(
        self,
        model: Transformer,
        layout: SequenceLayout,
        condition: Condition,
        given: Codes,
        generators: Sequence[torch.Generator],
        sampling: SamplingConfig,
        finished: Sequence[Int64[Tensor, "batch slots"]] = (),
    ) -> Iterator[tuple[int, Int64[Tensor, "batch slots"]]]:
        """Generate the frames that a stage adds after finished ones, with their places in its sequence."""
        noise = GumbelNoise(generators, layout.num_frames, layout.frame_slots, model.base.config.num_codes)
        labels = self.system.cluster_labels
        passes = self.settings.passes
        done = torch.stack([*finished], 1) if finished else None
        for frame in decode(model, layout, condition, given, noise, sampling, labels, passes, finished=done):
            yield frame.place, frame.codes.cpu()

    def interpolate(
        self, codes: Codes, generators: Sequence[torch.Generator], share: float, step: int
    ) -> Iterator[FinishedFrame]:
        """Generate one frame per gap; the sequences of a round are decoded in one batch or a few. By default, a long
        clip decodes as many at a time as a short clip has.

        A sequence takes neighboring frames; its last frame is the first of the next sequence. If the gaps
        cannot be divided evenly, the last sequence overlaps the previous one, and duplicate frames are dropped.
        """
        most = SequenceLayout.interpolation(self.layout).num_bidirectional
        layout = SequenceLayout.interpolation(self.layout, min(most, codes.shape[1]))
        spans = _spans(codes.shape[1], layout.num_bidirectional)
        streams = [spawn(generator, len(spans)) for generator in generators]
        condition = self.condition(share, self.settings.interpolation_guidance)
        at_once = self.settings.sequences_at_once or len(spans) * self.gaps // (self.num_key_frames - 1)
        for first in range(0, len(spans), at_once):
            part = slice(first, first + at_once)
            rows = [generator for stream in streams for generator in stream[part]]
            for number, place, drawn in self.fill(layout, condition, codes, spans[part], rows, step):
                span = spans[first + number]
                if place > span.repeated:
                    yield FinishedFrame("interpolation", (2 * span.start + place) * step // 2, 0, drawn)

    def fill(
        self,
        layout: SequenceLayout,
        condition: Condition,
        codes: Codes,
        spans: list[_Span],
        rows: Sequence[torch.Generator],
        step: int,
    ) -> Iterator[tuple[int, int, Int64[Tensor, "batch slots"]]]:
        """Generate the frames that some sequences add; yields sequence number, place in the sequence, and codes."""
        given = torch.stack([codes[:, span.start : span.start + layout.num_bidirectional] for span in spans], 1)
        finished: list[Tensor] = []
        for place in layout.order[layout.num_bidirectional :]:
            places = [(2 * span.start + place) * step // 2 for span in spans]
            if not self.finished.keys() >= set(places) or any(place <= span.repeated for span in spans):
                break
            known = [self.finished[each] for each in places]
            yield from ((number, place, each) for number, each in enumerate(known))
            finished.append(rearrange(known, "spans batch slots -> (batch spans) slots"))
        if layout.num_bidirectional + len(finished) == layout.num_frames:
            return
        given = rearrange(given, "batch spans frames slots -> (batch spans) frames slots")
        model = self.system.interpolation
        condition = _repeat(condition, len(spans))
        for place, drawn in self.decode(model, layout, condition, given, rows, self.settings.later, finished):
            of_spans = rearrange(drawn, "(batch spans) slots -> spans batch slots", spans=len(spans))
            for number, each in enumerate(of_spans):
                yield number, place, each


class _Span(NamedTuple):
    """A sequence of neighboring frames of a clip."""

    start: int
    filled: int
    """Frame up to which the gaps belong to earlier sequences."""

    @property
    def repeated(self) -> int:
        """Place in the sequence up to which new frames repeat those of earlier sequences."""
        return 2 * (self.filled - self.start)


def _spans(num_frames: int, width: int) -> list[_Span]:
    """Sequences of `width` neighboring frames that cover all gaps."""
    last = num_frames - width
    starts = [*range(0, last, width - 1), last]
    return [_Span(start, before + width - 1) for before, start in pairwise([1 - width, *starts])]


def _repeat(condition: Condition, times: int) -> Condition:
    """Repeat each row several times, with the copies next to each other."""

    def repeat(text: PaddedText) -> PaddedText:
        return PaddedText(*(part.repeat_interleave(times, 0) for part in text))

    other = condition.unconditional
    return replace(condition, text=repeat(condition.text), unconditional=None if other is None else repeat(other))
