"""A run of cached decoding: a model with its caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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
    """Texts that a batch is conditioned on."""

    text: PaddedText
    unconditional: PaddedText | None = None
    """Texts that guidance moves away from; None disables guidance."""
    scale: float = 1.0
    """Guidance scale: `unconditional + scale * (conditional - unconditional)`."""
    text_bonus: float = 0.0
    """Added to the scores of text keys (spec section 3: 1.4 in the released pipeline without guidance)."""

    @property
    def texts(self) -> tuple[PaddedText, ...]:
        """The conditional text, and the unconditional one if there is guidance."""
        return (self.text,) if self.unconditional is None else (self.text, self.unconditional)

    @property
    def rows(self) -> PaddedText:
        """Texts of all rows of a pass: conditional rows, then unconditional ones."""
        return PaddedText(*(torch.cat(parts) for parts in zip(*self.texts, strict=True)))


class Decoder:
    """A decoding run. Call `prefill` first. Slots are counted over all frames in feeding order.

    Args:
        model: image model or video stage; the run uses its device and dtype.
        layout: layout of the sequence.
        condition: texts and guidance.
        lanes: number of frames decoded in parallel.
        cache_dtype: type of keys and values; by default the model's, but float32 for bfloat16 on a CPU.
    """

    rows_are_free = False
    """True if a pass of many rows takes as long as one of few."""

    def __init__(
        self,
        model: Transformer,
        layout: SequenceLayout,
        condition: Condition,
        lanes: int = 1,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.layout = layout
        self.condition = condition
        config = model.base.config
        like = model.base.words.weight
        for each in condition.texts:
            check_text(each, len(condition.text.tokens), layout.text_slots, config.vocab_size)
        text = condition.rows
        self.device = like.device
        self.passes = 0
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
        layout = self.layout
        text, num_given = self.condition.rows, given.shape[1]
        given_slots = num_given * layout.frame_slots
        rows, mask = text.tokens.to(self.device), text.mask.to(self.device)
        fed = layout.feed(self._all_rows(given.to(self.device)), self.model.base.config.start_of_image)
        frames = self.positions[:given_slots].expand(len(rows), -1)
        dtype = self.model.base.words.weight.dtype
        full = full_pass(layout, self.model.window, mask, dtype, num_given, self.condition.text_bonus)
        pairs = zip(self.temporal, full.temporal, strict=True)
        temporal = tuple(cache.keep(plan, given_slots) for cache, plan in pairs)
        plan = Pass(full.num_text, self.spatial.keep(full.spatial, 0), temporal)
        self.model(torch.cat([rows, fed], 1), torch.cat([layout.text_positions(mask), frames], 1), plan)

    @torch.inference_mode()
    def step(self, slots: Sequence[int], tokens: Int64[Tensor, "batch rows"]) -> Float[Tensor, "batch rows codes"]:
        """Feed one slot of each of a few frames, the same in every sample; return guided logits."""
        positions = self.positions[slots[0] : slots[0] + 1]
        if len(slots) > 1:
            positions = torch.stack([self.positions[slot] for slot in slots])
        return self._logits(tokens, positions[None], lambda cache: cache.step(slots))

    @torch.inference_mode()
    def draft(self, rank: int, runs: Sequence[range], fed: Int64[Tensor, "batch _"]) -> Float[Tensor, "rows codes"]:
        """Feed consecutive slots of one frame: one run per sample, which may be empty. Column j of `fed`
        holds the tokens for slot j. Returns the guided logits of all runs, one after another."""
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
        """Repeat the samples for the unconditional rows of guidance."""
        return x if self.condition.unconditional is None else torch.cat([x, x])


class MaskedDecoder(Decoder):
    """A `Decoder` for devices where launching kernels costs more than reading unneeded keys: all samples
    draft as many slots as the longest run, in one masked attention. Results are the same, up to rounding."""

    rows_are_free = True
    width = 1
    """Slots per draft: the maximum so far, so that shapes rarely change."""

    @torch.inference_mode()
    def draft(self, rank: int, runs: Sequence[range], fed: Int64[Tensor, "batch _"]) -> Float[Tensor, "rows codes"]:
        """See `Decoder.draft`. Short runs are padded with the slots that follow, at most the frame's last."""
        self.width = max(self.width, *map(len, runs))
        last = self.layout.frame_slots - 1
        starts = torch.tensor([run.start for run in runs])
        slots = (starts[:, None] + torch.arange(self.width)).clamp(max=last).to(self.device)
        logits = self.rectangle(rank, slots, fed.gather(1, slots)).flatten(0, 1)
        asked = [sample * self.width + row for sample, run in enumerate(runs) for row in range(len(run))]
        return logits if len(asked) == len(logits) else logits[asked]

    @torch.inference_mode()
    def rectangle(
        self, rank: int, slots: Int64[Tensor, "batch rows"], tokens: Int64[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch rows codes"]:
        """Feed any slots of one frame, the same number in every sample; return guided logits."""
        area = self.layout.frame_slots
        frame = range(rank * area, (rank + 1) * area)
        slots = self._all_rows(slots)
        return self._logits(tokens, self.positions[frame.start + slots], lambda cache: cache.masked(frame, slots))


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    slots: Int64[Tensor, "batch rows"]
    tokens: Int64[Tensor, "batch rows"]
    logits: Float[Tensor, "batch rows codes"]


class GraphedDecoder(MaskedDecoder):
    """A `MaskedDecoder` whose passes are replayed as CUDA graphs, with the same results: a pass has thousands of small
    kernels, which take longer to launch than to run.

    A drafting pass has static shapes, since the visibility of its rows is computed from tensors. So one graph per frame
    and width is captured at the first pass and replayed for the others.
    """

    @cached_property
    def _captured(self) -> dict[tuple[int, int], _Captured]:
        """Graphs by rank and width."""
        return {}

    @cached_property
    def _slots(self) -> Int64[Tensor, " slots"]:
        return torch.arange(self.layout.frame_slots, device=self.device)

    def step(self, slots: Sequence[int], tokens: Int64[Tensor, "batch rows"]) -> Float[Tensor, "batch rows codes"]:
        """See `Decoder.step`, for one frame, without device synchronization. Valid until the next call."""
        assert len(slots) == 1
        rank, slot = divmod(slots[0], self.layout.frame_slots)
        return self.rectangle(rank, self._slots[slot : slot + 1].expand(len(tokens), 1), tokens)

    @torch.inference_mode()
    def rectangle(
        self, rank: int, slots: Int64[Tensor, "batch rows"], tokens: Int64[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch rows codes"]:
        """See `MaskedDecoder.rectangle`. Valid until the next call."""
        key = rank, slots.shape[1]
        if key not in self._captured:
            self._captured[key] = self._capture(rank, slots, tokens)
        graph, static_slots, static_tokens, logits = self._captured[key]
        static_slots.copy_(slots)
        static_tokens.copy_(tokens)
        graph.replay()
        self.passes += 1
        return logits

    def _capture(self, rank: int, slots: Tensor, tokens: Tensor) -> _Captured:
        slots, tokens = slots.clone(), tokens.clone()
        passes = self.passes
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up outside the graph; the same keys are written again
            for _ in range(3):
                super().rectangle(rank, slots, tokens)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = super().rectangle(rank, slots, tokens)
        self.passes = passes
        return _Captured(graph, slots, tokens, logits)
