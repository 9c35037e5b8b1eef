"""Cached decoding of frames: prefill, then one slot after another, or several at once with the same result.

`decode` is the generator that everything else consumes: it yields each frame when it is finished. One by one is the
reference. Parallel frames and drafting need fewer passes and give the same codes (spec, Fewer passes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cogvideo.config import require
from cogvideo.generation.sampling import Sampling, log_probabilities
from cogvideo.layout import SequenceLayout, check_code_range, lag
from cogvideo.models.cache import Cache, CacheMap, Write
from cogvideo.models.plans import CachedPlans, Rows, full_pass, text_masks
from cogvideo.models.transformer import Pass, Stores, Transformer
from cogvideo.text import PaddedText

Noise = Callable[[int], Float[Tensor, "batch slots codes"]]
"""Noise of the frame of a rank, asked for once a frame."""


@dataclass(frozen=True)
class Condition:
    """What a batch is generated from."""

    text: PaddedText
    unconditional: PaddedText | None = None
    """PaddedText of the rows that guidance moves away from; None is no guidance."""
    scale: float = 1.0
    """Guidance: `unconditional + scale * (conditional - unconditional)`."""
    text_bonus: float = 0.0
    """Added to text scores (spec section 3: 1.4 in the released pipeline where there is no guidance)."""

    @property
    def rows(self) -> PaddedText:
        """Texts of all rows of a pass: the conditional ones, then the unconditional ones."""
        if self.unconditional is None:
            return self.text
        return PaddedText(*(torch.cat(pair) for pair in zip(self.text, self.unconditional, strict=True)))


@dataclass(frozen=True)
class Passes:
    """How many slots go through the model at once. Whatever is chosen, the codes are the same."""

    parallel_frames: bool = False
    """Decode several frames at once, each trailing the one before as far as the masks require."""
    draft: int = 1
    """Slots of a frame that are drafted and verified in one pass (fixed-noise Jacobi decoding); 1 is one by one."""

    def __post_init__(self) -> None:
        require(self.draft >= 1, f"draft is {self.draft}, expected at least 1")
        require(self.draft == 1 or not self.parallel_frames, "choose one of parallel_frames and draft > 1, got both")


Text = PaddedText  # until callers are renamed


class Frame(NamedTuple):
    """A finished frame."""

    place: int
    """Place in the sequence's clip."""
    codes: Int64[Tensor, "batch slots"]
    passes: int
    """Passes of the model since decoding began, prefill not counted."""


class Decoder:
    """One run: the model, its caches and what its rows see. `prefill` comes first.

    Args:
        model: image model or video stage; its device and dtype are those of the run.
        layout: of the sequence.
        condition: texts and guidance.
        lanes: frames that are decoded at once.
        cache_dtype: of keys and values; float32 for a bfloat16 model on the CPU by default, else the model's.
    """

    def __init__(
        self,
        model: Transformer,
        layout: SequenceLayout,
        condition: Condition,
        lanes: int = 1,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.layout, self.condition = model, layout, condition
        config, like = model.base.config, model.base.words.weight
        text = condition.rows
        _check_text(text, layout, config.vocab_size)
        self.device, self.passes = like.device, 0
        narrow = like.device.type == "cpu" and like.dtype == torch.bfloat16
        like = like.new_empty(0, dtype=cache_dtype or (torch.float32 if narrow else like.dtype))
        masks = text_masks(text.mask.to(self.device), condition.text_bonus, like.dtype)
        maps = _maps(layout, model, lanes)
        sizes = (config.num_layers, len(text.tokens), config.num_heads, config.head_dim, like)
        self.caches = tuple(Cache(each, *sizes) for each in maps if each)
        self.plans = CachedPlans(layout, maps[0][0], maps[1], masks, self.device)
        self.positions = layout.frame_positions(range(layout.num_frames)).to(self.device)

    @torch.inference_mode()
    def prefill(self, given: Int64[Tensor, "batch frames slots"]) -> None:
        """Feed text and the given frames, the leading ranks."""
        layout, text = self.layout, self.condition.rows
        num_given, rows = given.shape[1], text.tokens.to(self.device)
        fed = layout.feed(self._all_rows(given.to(self.device)), self.model.base.config.start_of_image)
        positions = layout.text_positions(text.mask).to(self.device)
        frames = self.positions[: num_given * layout.frame_slots].expand(len(rows), -1)
        masks = text_masks(text.mask.to(self.device), self.condition.text_bonus, self.model.base.words.weight.dtype)
        plan = full_pass(layout, self.model.window, masks, num_given, self.model.channel is not None, self.device)
        self._forward(
            torch.cat([rows, fed], 1),
            torch.cat([positions, frames], 1),
            plan,
            self.plans.prefill_writes(num_given),
            True,
        )

    @torch.inference_mode()
    def step(self, rows: Sequence[Rows], tokens: Int64[Tensor, "batch rows"]) -> Float[Tensor, "batch rows codes"]:
        """Feed one slot of each of a few frames, the same in every sample; the logits of their codes, guided."""
        slots = self.layout.frame_slots
        first = rows[0].rank * slots + rows[0].slot
        positions = self.positions[first : first + 1]
        if len(rows) > 1:
            positions = self.positions[[row.rank * slots + row.slot for row in rows]]
        return self._logits(tokens, positions[None], *self.plans.step(rows))

    @torch.inference_mode()
    def draft(
        self, rank: int, slots: Int64[Tensor, "batch rows"], last: int, tokens: Int64[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch rows codes"]:
        """Feed any slots of one frame, other ones in every sample; `last` is the highest of them."""
        slots = self._all_rows(slots)
        positions = self.positions[rank * self.layout.frame_slots + slots]
        return self._logits(tokens, positions, *self.plans.draft(rank, slots, last))

    def _logits(
        self, tokens: Tensor, positions: Tensor, plan: Pass, writes: tuple[Write, ...]
    ) -> Float[Tensor, "batch rows codes"]:
        self.passes += 1
        hidden = self._forward(self._all_rows(tokens), positions, plan, writes, False)
        logits = self.model.base.logits(hidden)
        if self.condition.unconditional is None:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + self.condition.scale * (conditional - unconditional)

    def _forward(
        self, tokens: Tensor, positions: Tensor, plan: Pass, writes: tuple[Write, ...], complete: bool
    ) -> Float[Tensor, "batch rows hidden"]:
        temporal = self.caches[-1]
        self.caches[0].writes, temporal.writes = writes[:1], writes[1:] or writes[:1]
        for cache in self.caches:
            cache.complete = complete
        return self.model(tokens, positions, plan, Stores(self.caches[0], temporal))

    def _all_rows(self, x: Tensor) -> Tensor:
        """Guidance runs every sample twice."""
        return x if self.condition.unconditional is None else torch.cat([x, x])


def _maps(layout: SequenceLayout, model: Transformer, lanes: int) -> tuple[tuple[CacheMap, ...], tuple[CacheMap, ...]]:
    spatial = (CacheMap.spatial(layout, lanes),)
    if model.channel is None:
        return spatial, ()
    kinds = (False, True) if model.window else (False,)
    return spatial, tuple(CacheMap.temporal(layout, model.window, shifted) for shifted in kinds)


def _check_text(text: PaddedText, layout: SequenceLayout, vocab_size: int) -> None:
    shape = tuple(text.tokens.shape)
    require(
        len(shape) == 2 and shape[1] == layout.text_slots and shape == tuple(text.mask.shape),
        f"got text of shape {shape}, expected (batch, {layout.text_slots}) and a mask of the same shape",
    )
    require(bool(text.mask.any(1).all()), "got a text without any token, expected at least one in every row")
    check_code_range(text.tokens, vocab_size)


def decode(
    model: Transformer,
    layout: SequenceLayout,
    condition: Condition,
    given: Int64[Tensor, "batch frames slots"],
    noise: Noise,
    sampling: Sampling,
    labels: Int64[Tensor, " codes"] | None = None,
    passes: Passes = Passes(),
    cache_dtype: torch.dtype | None = None,
) -> Iterator[Frame]:
    """Generate the frames that follow the given ones in the layout's order, each yielded when it is finished.

    Args:
        model: image model or video stage.
        layout: of the sequence.
        condition: texts and guidance.
        given: codes of the leading ranks, none (batch, 0, slots) to all but one of them.
        noise: of every frame to generate.
        sampling: which sampler.
        labels: clusters of the codebook, for cluster sampling.
        passes: how many slots go through the model at once.
        cache_dtype: of keys and values, see `Decoder`.

    Raises:
        ValueError: text, given frames or codes cannot be right.
    """
    layout.check_codes(given, given.shape[1], model.base.config.num_codes)
    num_given, least = given.shape[1], max(layout.num_bidirectional, 0)
    require(
        least <= num_given < layout.num_frames,
        f"got {num_given} given frames, expected {least} to {layout.num_frames - 1}",
    )
    behind = lag(layout.grid, model.window) if passes.parallel_frames else layout.frame_slots
    decoder = Decoder(model, layout, condition, -(-layout.frame_slots // behind), cache_dtype)
    decoder.prefill(given)
    draw = _Draw(sampling, labels, noise, len(given), layout.frame_slots, decoder.device)
    ways = (
        _drafted(decoder, draw, num_given, passes.draft)
        if passes.draft > 1
        else _lockstep(decoder, draw, num_given, behind)
    )
    yield from ways


class _Draw:
    """The sampler of a run, with the noise of the frames in flight."""

    def __init__(
        self, sampling: Sampling, labels: Tensor | None, noise: Noise, batch: int, slots: int, device: torch.device
    ) -> None:
        self.sampling, self.noise, self.batch, self.slots, self.device = sampling, noise, batch, slots, device
        self.labels = None if labels is None else labels.to(device)

    def start(self, rank: int) -> Float[Tensor, "batch slots #codes"]:
        """The noise of a frame."""
        if self.sampling.greedy:
            return torch.zeros(self.batch, self.slots, 1, device=self.device)
        return self.noise(rank).to(self.device)

    def scores(self, logits: Float[Tensor, "batch rows codes"]) -> Float[Tensor, "batch rows codes"]:
        """What noise is added to."""
        return log_probabilities(logits, self.sampling, self.labels)


def _lockstep(decoder: Decoder, draw: _Draw, first: int, behind: int) -> Iterator[Frame]:
    """One slot of every frame in flight a pass; each frame trails the one before by `behind` slots."""
    layout, start = decoder.layout, decoder.model.base.config.start_of_image
    slots, count = layout.frame_slots, layout.num_frames - first
    lanes = -(-slots // behind)
    codes = torch.full((draw.batch, count, slots + 1), start, device=decoder.device)  # column j is fed at slot j
    noise: dict[int, Tensor] = {}
    for tick in range((count - 1) * behind + slots):
        flying = [(frame, tick - frame * behind) for frame in range(count) if 0 <= tick - frame * behind < slots]
        rows = [Rows(first + frame, slot, frame % lanes) for frame, slot in flying]
        noise |= {frame: draw.start(first + frame) for frame, slot in flying if slot == 0}
        tokens = torch.stack([codes[:, frame, slot] for frame, slot in flying], 1)
        scores = draw.scores(decoder.step(rows, tokens))
        for row, (frame, slot) in enumerate(flying):
            codes[:, frame, slot + 1] = (scores[:, row] + noise[frame][:, slot]).argmax(-1)
        frame, slot = flying[0]
        if slot == slots - 1:
            del noise[frame]
            yield Frame(layout.order[first + frame], codes[:, frame, 1:].clone(), decoder.passes)


def _drafted(decoder: Decoder, draw: _Draw, first: int, width: int) -> Iterator[Frame]:
    """Fixed-noise Jacobi decoding: `width` slots a pass; the prefix whose drafts come out as they went in is kept.

    With the noise of every slot fixed, a code is a function of the codes before it. A pass over drafted codes therefore
    yields the true code of the first slot, and of each next one as long as the drafts before it were true.
    """
    layout, start = decoder.layout, decoder.model.base.config.start_of_image
    slots, window = layout.frame_slots, torch.arange(width, device=decoder.device)
    for rank in range(first, layout.num_frames):
        noise = draw.start(rank)
        codes = torch.full((draw.batch, slots + width + 1), start, device=decoder.device)  # column j is fed at slot j
        done = torch.zeros(draw.batch, dtype=torch.int64, device=decoder.device)
        while (behind := int(done.min())) < slots:
            last = min(max(behind, int(done.max())) + width, slots) - 1
            at = (done[:, None] + window).clamp(max=slots - 1)
            scores = draw.scores(decoder.draft(rank, at, last, codes.gather(1, at)))
            drawn = (scores + _rows(noise, at)).argmax(-1)
            true = (drawn == codes.gather(1, at + 1))[:, :-1].cumprod(1).sum(1) + 1
            codes.scatter_(1, at + 1, drawn)
            done = (done + true).clamp(max=slots)
            ahead = (at[:, -1:] + 1 + window).clamp(
                max=slots - 1
            )  # first guess: the last row's scores, their own noise
            guess = (scores[:, -1:] + _rows(noise, ahead)).argmax(-1)
            fresh = ahead > at[:, -1:]
            codes.scatter_(1, ahead + 1, torch.where(fresh, guess, codes.gather(1, ahead + 1)))
        yield Frame(layout.order[rank], codes[:, 1 : slots + 1].clone(), decoder.passes)


def _rows(
    noise: Float[Tensor, "batch slots codes"], at: Int64[Tensor, "batch rows"]
) -> Float[Tensor, "batch rows codes"]:
    return noise.gather(1, at[..., None].expand(-1, -1, noise.shape[-1]))
