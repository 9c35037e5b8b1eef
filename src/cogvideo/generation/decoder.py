"""One run of cached decoding: a model, its caches and what its rows see. Prefill, step and draft are small functions of
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cogvideo.layout import SequenceLayout
from cogvideo.models.cache import Cache, CacheMap, Write
from cogvideo.models.plans import CachedPlans, Rows, full_pass, text_masks
from cogvideo.models.transformer import Pass, Stores, Transformer
from cogvideo.text import PaddedText, check_text


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
    def texts(self) -> tuple[PaddedText, ...]:
        """The text, and the unconditional one if there is guidance."""
        return (self.text,) if self.unconditional is None else (self.text, self.unconditional)

    @property
    def rows(self) -> PaddedText:
        """Texts of all rows of a pass: the conditional ones, then the unconditional ones."""
        return PaddedText(*(torch.cat(parts) for parts in zip(*self.texts, strict=True)))


class Decoder:
    """One run: the model, its caches and what its rows see. `prefill` comes first.

    Args:
        model: image model or video stage; its device and dtype are those of the run.
        layout: of the sequence.
        condition: texts and guidance.
        lanes: frames that are decoded at once.
        cache_dtype: of keys and values; float32 for a bfloat16 model on the CPU by default, else the model's.
    """

    rows_are_free = False
    """Whether a pass of many rows takes as long as one of few."""

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
        for each in condition.texts:
            check_text(each, len(condition.text.tokens), layout.text_slots, config.vocab_size)
        text = condition.rows
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
            positions = torch.stack([self.positions[row.rank * slots + row.slot] for row in rows])
        return self._logits(tokens, positions[None], *self.plans.step(rows))

    @torch.inference_mode()
    def draft(self, rank: int, runs: Sequence[range], fed: Int64[Tensor, "batch _"]) -> Float[Tensor, "rows codes"]:
        """Feed consecutive slots of one frame, a run a sample, which may be empty; the logits of all, one sample after
        another. `fed` has in column j what slot j is fed."""
        first, alike = rank * self.layout.frame_slots, len(set(runs)) == 1
        used = runs[:1] if alike else runs
        positions = torch.cat([self.positions[first + run.start : first + run.stop] for run in used])
        if alike:
            tokens = fed[:, runs[0].start : runs[0].stop]
        else:
            tokens = torch.cat([row[run.start : run.stop] for row, run in zip(fed, runs, strict=True)])[None]
        return self._logits(tokens, positions[None], *self.plans.runs(rank, runs)).flatten(0, 1)

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


class MaskedDecoder(Decoder):
    """A `Decoder` for devices where starting kernels takes longer than reading keys in vain: all samples draft as many
    slots as the longest run, in one attention with a mask. Same arguments, same results up to rounding."""

    rows_are_free = True
    width = 1
    """Slots of a draft, the most that were asked for so far: shapes change as seldom as can be."""

    @torch.inference_mode()
    def draft(self, rank: int, runs: Sequence[range], fed: Int64[Tensor, "batch _"]) -> Float[Tensor, "rows codes"]:
        """See `Decoder.draft`. Where a run is too short, the last slot of the frame is fed again, as before."""
        self.width = max(self.width, *map(len, runs))
        last = self.layout.frame_slots - 1
        slots = torch.tensor([[min(run.start + row, last) for row in range(self.width)] for run in runs])
        slots = slots.to(self.device)
        logits = self.rectangle(rank, slots, fed.gather(1, slots)).flatten(0, 1)
        asked = [sample * self.width + row for sample, run in enumerate(runs) for row in range(len(run))]
        return logits if len(asked) == len(logits) else logits[asked]

    @torch.inference_mode()
    def rectangle(
        self, rank: int, slots: Int64[Tensor, "batch rows"], tokens: Int64[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch rows codes"]:
        """Feed any slots of one frame, as many in every sample."""
        slots = self._all_rows(slots)
        positions = self.positions[rank * self.layout.frame_slots + slots]
        return self._logits(tokens, positions, *self.plans.masked(rank, slots))


def _maps(layout: SequenceLayout, model: Transformer, lanes: int) -> tuple[tuple[CacheMap, ...], tuple[CacheMap, ...]]:
    spatial = (CacheMap.spatial(layout, lanes),)
    if model.channel is None:
        return spatial, ()
    kinds = (False, True) if model.window else (False,)
    return spatial, tuple(CacheMap.temporal(layout, model.window, shifted) for shifted in kinds)
