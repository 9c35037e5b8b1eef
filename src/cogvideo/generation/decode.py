"""Cached decoding of frames: prefill, then one slot after another, or several at once with the same result.

`decode` yields each frame when it is finished. Decoding one slot at a time is the reference. Parallel frames
and drafting give the same codes in fewer passes (docs/sequence.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cogvideo.config import SamplingConfig, require
from cogvideo.generation.decoder import Condition, Decoder, MaskedDecoder
from cogvideo.generation.graphs import GraphedDecoder
from cogvideo.generation.pace import Pace
from cogvideo.generation.sampling import Clusters, check_clusters, log_probabilities
from cogvideo.layout import SequenceLayout, lag
from cogvideo.models.transformer import Transformer

Noise = Callable[[int], Float[Tensor, "batch slots codes"]]
"""Noise of the frame with a given rank; called once per frame."""


@dataclass(frozen=True)
class Passes:
    """Number of slots that go through the model in one pass. It does not change the codes."""

    parallel_frames: bool = False
    """Decode several frames at once, each trailing the one before by the lag that the masks require."""
    draft: int = 1
    """Maximum number of slots of a frame that are drafted and verified in one pass (fixed-noise Jacobi
    decoding); 1 disables drafting. Each sample drafts as many as pay off, judging by earlier drafts; on CUDA
    devices always the maximum."""
    graphs: bool = False
    """Replay each pass as a CUDA graph; needs a CUDA device."""

    def __post_init__(self) -> None:
        require(self.draft >= 1, f"draft is {self.draft}, expected at least 1")
        is_one = not self.parallel_frames or (self.draft == 1 and not self.graphs)
        require(is_one, "choose one of parallel_frames, and draft or graphs, got both")


class Frame(NamedTuple):
    """A finished frame."""

    place: int
    """Place in the sequence."""
    codes: Int64[Tensor, "batch slots"]
    passes: int
    """Number of passes of the model so far, without prefill."""


def decode(
    model: Transformer,
    layout: SequenceLayout,
    condition: Condition,
    given: Int64[Tensor, "batch frames slots"],
    noise: Noise,
    sampling: SamplingConfig,
    labels: Int64[Tensor, " codes"] | None = None,
    passes: Passes = Passes(),
    cache_dtype: torch.dtype | None = None,
) -> Iterator[Frame]:
    """Generate the frames that follow the given ones in the order of the layout.

    Args:
        model: image model or video stage.
        layout: layout of the sequence.
        condition: texts and guidance.
        given: codes of the leading ranks: none (batch, 0, slots) to all but one.
        noise: noise of every frame to generate.
        sampling: the sampler.
        labels: cluster of each code, for cluster sampling.
        passes: number of slots that go through the model at once.
        cache_dtype: type of keys and values, see `Decoder`.

    Raises:
        ValueError: text, given frames or codes are invalid, or labels are missing. Raised at the call.
    """
    check_clusters(sampling, labels, model.base.config.num_codes)
    layout.check_given(given, model.base.config.num_codes)
    behind = max(1, lag(layout.grid, model.window or 0)) if passes.parallel_frames else layout.frame_slots
    decoder = _kind(model, passes)(model, layout, condition, -(-layout.frame_slots // behind), cache_dtype)
    batch = len(condition.text.tokens)
    require(len(given) == batch, f"got given frames of {len(given)} clips for {batch} texts")
    clusters = None if labels is None else Clusters.of(labels, decoder.device)
    draw = _Draw(sampling, clusters, noise, batch, layout.frame_slots, decoder.device)
    if passes.draft > 1:
        return _drafted(decoder, draw, given, passes.draft)
    return _lockstep(decoder, draw, given, behind)


def _kind(model: Transformer, passes: Passes) -> type[Decoder]:
    device = model.base.words.weight.device
    if not passes.graphs:
        return MaskedDecoder if device.type == "cuda" else Decoder
    require(device.type == "cuda", f"graphs need a CUDA device, the model is on {device}")
    return GraphedDecoder


@dataclass(frozen=True)
class _Draw:
    """The sampler and noise of a run."""

    sampling: SamplingConfig
    clusters: Clusters | None
    noise: Noise
    batch: int
    slots: int
    device: torch.device

    def start(self, rank: int) -> Float[Tensor, "batch slots #codes"]:
        """Noise of a frame."""
        if self.sampling.is_greedy:
            return torch.zeros(self.batch, self.slots, 1, device=self.device)
        return self.noise(rank).to(self.device)

    def scores(self, logits: Float[Tensor, "*rows codes"]) -> Float[Tensor, "*rows codes"]:
        """Scores that noise is added to."""
        return log_probabilities(logits, self.sampling, self.clusters)


def _lockstep(decoder: Decoder, draw: _Draw, given: Tensor, behind: int) -> Iterator[Frame]:
    """Decode one slot of every frame in flight per pass; each trails the frame before by `behind` slots."""
    layout = decoder.layout
    start = decoder.model.base.config.start_of_image
    first = given.shape[1]
    decoder.prefill(given)
    slots = layout.frame_slots
    count = layout.num_frames - first
    codes = torch.full((draw.batch, count, slots + 1), start, device=decoder.device)  # column j is fed at slot j
    noise: dict[int, Tensor] = {}
    for tick in range((count - 1) * behind + slots):
        reached = [(frame, tick - frame * behind) for frame in range(count)]
        flying = [(frame, slot) for frame, slot in reached if 0 <= slot < slots]
        noise |= {frame: draw.start(first + frame) for frame, slot in flying if slot == 0}
        tokens = torch.stack([codes[:, frame, slot] for frame, slot in flying], 1)
        scores = draw.scores(decoder.step([(first + frame) * slots + slot for frame, slot in flying], tokens))
        for row, (frame, slot) in enumerate(flying):
            codes[:, frame, slot + 1] = (scores[:, row] + noise[frame][:, slot]).argmax(-1)
        frame, slot = flying[0]
        if slot == slots - 1:
            del noise[frame]
            yield Frame(layout.order[first + frame], codes[:, frame, 1:].clone(), decoder.passes)


def _drafted(decoder: Decoder, draw: _Draw, given: Tensor, most: int) -> Iterator[Frame]:
    """Decode several slots per pass by fixed-noise Jacobi iteration, keeping the prefix of confirmed drafts.

    With the noise of every slot fixed, a code is a function of the codes before it. So a pass over drafted
    codes yields the true code of the first slot, and of each next one as long as all drafts before it were
    true. Drafts start from the previous frame in time.
    """
    layout = decoder.layout
    decoder.prefill(given)
    paces = [Pace(most, free=decoder.rows_are_free) for _ in range(draw.batch)]
    frames = dict(zip(layout.order, given.to(decoder.device).unbind(1), strict=False))
    for rank in range(given.shape[1], layout.num_frames):
        place = layout.order[rank]
        frames[place] = _draft_frame(decoder, draw, rank, frames.get(place - 1), paces)
        yield Frame(place, frames[place].clone(), decoder.passes)


def _draft_frame(
    decoder: Decoder, draw: _Draw, rank: int, before: Int64[Tensor, "batch slots"] | None, paces: list[Pace]
) -> Int64[Tensor, "batch slots"]:
    """Decode one frame. Slots without a draft get one from the previous frame and the last row."""
    slots = decoder.layout.frame_slots
    device = decoder.device
    noise = draw.start(rank)
    start = decoder.model.base.config.start_of_image
    fed = torch.full((draw.batch, slots + 1), start, device=device)  # column j is fed at slot j
    if before is not None:
        fed[:, 1:] = before
    done = [0] * draw.batch
    drafted = [0] * draw.batch  # later slots have not been drawn yet, not even wrongly
    while min(done) < slots:
        runs = [range(at, min(at + pace.width, slots)) for at, pace in zip(done, paces, strict=True)]
        rows = [(sample, slot) for sample, run in enumerate(runs) for slot in run]
        samples, at = torch.tensor(rows).T.to(device)  # one copy to the device
        scores = draw.scores(decoder.draft(rank, runs, fed))
        drawn = (scores + noise[samples, at]).argmax(-1)
        compared = [fed[samples, at + 1]] if before is None else [fed[samples, at + 1], before[samples, at]]
        as_drafted, *as_before = (drawn == torch.stack(compared)).cpu().tolist()  # one synchronization
        fed[samples, at + 1] = drawn
        row = 0
        for sample, run in enumerate(runs):
            if not run:
                continue
            pace = paces[sample]
            own = slice(row, row + len(run))
            row += len(run)
            right = [*as_drafted[own], False].index(False)
            kept = min(right + 1, len(run))
            pace.saw(right, len(run), sum(sum(each[own][:kept]) for each in as_before))
            done[sample] += kept
            drafted[sample] = max(drafted[sample], run.stop)
            ahead = range(drafted[sample], min(done[sample] + pace.width, slots))
            if ahead:
                part = slice(ahead.start, ahead.stop)
                old = None if before is None else before[sample, part]
                fed[sample, 1:][part] = _guess(scores[row - 1], noise[sample, part], old, pace.repeats)
    return fed[:, 1:]


def _guess(
    scores: Float[Tensor, " codes"], noise: Float[Tensor, "_ _"], before: Int64[Tensor, " _"] | None, repeats: float
) -> Int64[Tensor, " _"]:
    """Sample codes, with their own noise, from a mixture: the code of the frame before with probability
    `repeats`, otherwise the distribution of the last row."""
    if before is None:
        return (scores + noise).argmax(-1)
    mixed = (scores.log_softmax(-1) + math.log(1 - repeats)).repeat(len(before), 1)
    own = mixed.gather(1, before[:, None])
    mixed.scatter_(1, before[:, None], torch.logaddexp(own, torch.full_like(own, math.log(repeats))))
    return (mixed + noise).argmax(-1)
