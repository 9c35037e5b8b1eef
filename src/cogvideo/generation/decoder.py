"""One run of cached decoding: a model and its caches. Prefill, step and draft are small functions of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cogvideo.layout import SequenceLayout, kinds
from cogvideo.models.attention import MaskPlan
from cogvideo.models.cache import Cache, CacheMap
from cogvideo.models.plans import full_pass, text_mask
from cogvideo.models.transformer import Pass, Transformer
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
    """One run: the model and its caches. `prefill` comes first. Slots are counted over all frames in feed order.

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
        mask = text_mask(text.mask.to(self.device), condition.text_bonus, like.dtype)
        shape = (len(text.tokens), config.num_heads, config.head_dim)
        shifted = () if model.window is None else kinds(model.window)
        maps = [CacheMap.temporal(layout, model.window or 0, each) for each in shifted]
        self.spatial = Cache(CacheMap.spatial(layout, lanes), config.num_layers, mask, shape, like)
        self.temporal = tuple(
            Cache(where, len(range(kind, config.num_layers, len(maps))), mask, shape, like)
            for kind, where in enumerate(maps)
        )
        self.positions = layout.frame_positions(range(layout.num_frames)).to(self.device)

    @torch.inference_mode()
    def prefill(self, given: Int64[Tensor, "batch frames slots"]) -> None:
        """Feed text and the given frames, the leading ranks."""
        layout, text = self.layout, self.condition.rows
        num_given, rows = given.shape[1], text.tokens.to(self.device)
        fed = layout.feed(self._all_rows(given.to(self.device)), self.model.base.config.start_of_image)
        positions = layout.text_positions(text.mask).to(self.device)
        frames = self.positions[: num_given * layout.frame_slots].expand(len(rows), -1)
        mask, dtype = text.mask.to(self.device), self.model.base.words.weight.dtype
        plan = full_pass(layout, self.model.window, mask, dtype, num_given, self.condition.text_bonus)
        plan = Pass(
            plan.num_text,
            self.spatial.keep(plan.spatial, 0),
            tuple(
                cache.keep(each, num_given * layout.frame_slots)
                for cache, each in zip(self.temporal, plan.temporal, strict=True)
            ),
        )
        self.model(torch.cat([rows, fed], 1), torch.cat([positions, frames], 1), plan)

    @torch.inference_mode()
    def step(self, slots: Sequence[int], tokens: Int64[Tensor, "batch rows"]) -> Float[Tensor, "batch rows codes"]:
        """Feed one slot of each of a few frames, the same in every sample; the logits of their codes, guided."""
        positions = self.positions[slots[0] : slots[0] + 1]
        if len(slots) > 1:
            positions = torch.stack([self.positions[slot] for slot in slots])
        return self._logits(tokens, positions[None], lambda cache: cache.step(slots))

    @torch.inference_mode()
    def draft(self, rank: int, runs: Sequence[range], fed: Int64[Tensor, "batch _"]) -> Float[Tensor, "rows codes"]:
        """Feed consecutive slots of one frame, a run a sample, which may be empty; the logits of all, one sample after
        another. `fed` has in column j what slot j is fed."""
        first = rank * self.layout.frame_slots
        slots = [range(first + run.start, first + run.stop) for run in runs]
        is_alike = len(set(runs)) == 1
        used = slots[:1] if is_alike else slots
        positions = torch.cat([self.positions[run.start : run.stop] for run in used])
        if is_alike:
            tokens = fed[:, runs[0].start : runs[0].stop]
        else:
            tokens = torch.cat([row[run.start : run.stop] for row, run in zip(fed, runs, strict=True)])[None]
        return self._logits(tokens, positions[None], lambda cache: cache.runs(slots)).flatten(0, 1)

    def _logits(
        self, tokens: Tensor, positions: Tensor, plan: Callable[[Cache], MaskPlan]
    ) -> Float[Tensor, "batch rows codes"]:
        self.passes += 1
        seen = Pass(0, plan(self.spatial), tuple(plan(cache) for cache in self.temporal))
        logits = self.model.base.logits(self.model(self._all_rows(tokens), positions, seen))
        if self.condition.unconditional is None:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + self.condition.scale * (conditional - unconditional)

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
        area = self.layout.frame_slots
        frame = range(rank * area, (rank + 1) * area)
        slots = self._all_rows(slots)
        return self._logits(tokens, self.positions[frame.start + slots], lambda cache: cache.masked(frame, slots))
