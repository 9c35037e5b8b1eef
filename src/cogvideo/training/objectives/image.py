"""Objective of the image model (CogLM, CogView2 section 3.1; spec section 2): three tasks in one batch.

| task | fed | learns |
|---|---|---|
| image | a caption that sees itself in full; then an image, causal | the image |
| understanding | an image with masked squares of 4 x 4; a caption after its language tag, causal | squares, caption |
| text | a caption with masked spans | the spans |

Masked tokens are predicted one by one, each from all unmasked tokens and the masked ones before it. A predicted caption
sees the whole image (except its last code, which is never fed); an image with masked squares sees no caption.

All tasks use the same slots; a task is an attention mask, and the slots that carry loss. An image slot is fed the code
before the one that it predicts, as everywhere. So the slot that predicts the first column of a square is fed the code
to the left of it. If that code is not masked, all other slots see this slot, so it must see nothing masked: it would
predict from less than the rest of its square. So first columns are only seen, not predicted. They are the last columns
in CogLM, whose slots are named after what they are fed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from cogvideo.config import Limited, Share, require
from cogvideo.data.loader import ClipSample
from cogvideo.layout import SequenceLayout
from cogvideo.models.attention import CellGroup, Chunk, MaskPlan
from cogvideo.models.transformer import Pass, Transformer
from cogvideo.text import TextTokenizer, fit
from cogvideo.training.objectives.task import BatchLosses, cross_entropy

SQUARE = 4
"""Side of a masked square, in codes. If it does not divide a side, squares at the right and lower edge are smaller; a
strip of a single column has nothing to learn."""
MEAN_SPAN = 3.0
"""Mean length of a masked span, in tokens (Poisson)."""
NOTHING = -1
"""Target of a slot that carries no loss."""
PARTS = ("image", "squares", "caption", "spans")
CHINESE = range(0x3400, 0xA000)
"""Characters whose captions are tagged as Chinese."""

Kind = Literal["image", "understanding", "text"]


@dataclass(frozen=True)
class ImageMixture(Limited):
    """Tasks. The remaining share of samples is text to image."""

    understanding: Share = 0.3
    """Share of samples that predict the caption of an image with masked squares."""
    text: Share = 0.05
    """Share of samples that are text only."""
    masked_squares: Share = 0.8
    """Share of an image to mask."""
    masked_text: Share = 0.15
    """Share of a text to mask."""

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.understanding + self.text
        require(both <= 1, f"understanding plus text is {both:g}, expected at most 1")

    def kind(self, draw: float) -> Kind:
        """The task of a sample, given a random number in [0, 1)."""
        if draw < self.understanding:
            return "understanding"
        return "text" if draw < self.understanding + self.text else "image"


class ImageBatch(NamedTuple):
    """A batch of sequences: text slots, then the slots of one image."""

    tokens: Int64[Tensor, "batch slots"]
    positions: Int64[Tensor, "batch slots"]
    """Rows of the position table."""
    sees: Bool[Tensor, "batch slots slots"]
    """True where a slot (second axis) sees another (third). Padding only sees itself."""
    targets: Int64[Tensor, "batch slots"]
    """Tokens to predict; `NOTHING` where there is no loss."""
    parts: Int64[Tensor, "batch slots"]
    """Index in `PARTS` of the part that a slot with loss belongs to."""
    words: Int64[Tensor, "batch words"]
    """Text slots that carry loss, padded with `NOTHING`."""


@dataclass(frozen=True)
class ImageTask:
    """The tasks of the image model."""

    layout: SequenceLayout
    text: TextTokenizer
    mixture: ImageMixture = field(default_factory=ImageMixture)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the losses of each task."""
        return PARTS

    def collate(self, samples: list[ClipSample]) -> ImageBatch:
        """Collate samples, each for the task that its seed draws. Captions that do not fit are truncated.

        A sample without a caption is always text to image, with the unconditional text.
        """
        tokens, positions, sees, targets, parts = map(torch.stack, zip(*map(self._row, samples), strict=True))
        learned = targets[:, : self.layout.text_slots] != NOTHING
        words = learned.int().argsort(dim=1, descending=True, stable=True)[:, : int(learned.sum(1).max())]
        return ImageBatch(tokens, positions, sees, targets, parts, words.where(learned.gather(1, words), NOTHING))

    def _row(self, sample: ClipSample) -> tuple[Tensor, ...]:
        random = np.random.default_rng(sample.seed)
        kind = self.mixture.kind(random.random())
        if sample.caption is None:  # there is nothing to understand
            kind = "image"
        layout = self.layout.shaped(sample.codes.shape[1:])
        row = _Row(layout, self.text)
        if kind == "image":
            row.put_text(self._caption(sample))
            row.put_image(sample.codes)
            row.learn_image()
        elif kind == "understanding":
            assert sample.caption is not None
            row.put_text([self._language(sample.caption), *self.text.encode(sample.caption)])
            row.put_image(sample.codes)
            row.learn_squares(_squares(layout.sides, self.mixture.masked_squares, random))
            row.learn_caption()
        else:
            row.put_text(self._caption(sample))
            row.learn_spans(_spans(row.num_text, self.mixture.masked_text, random))
        return row.finished()

    def _caption(self, sample: ClipSample) -> list[int]:
        """Tokens of the caption, in the template of the video stages if the sample has a duration."""
        return self.text.row(sample.caption, sample.duration if sample.duration > 0 else None)

    def _language(self, caption: str) -> int:
        chinese = any(ord(each) in CHINESE for each in caption)
        return self.text.start_of_chinese if chinese else self.text.start_of_english

    def losses(self, model: nn.Module, batch: ImageBatch) -> BatchLosses:
        """Cross entropy over the image codes, or over the rest of the vocabulary for text."""
        assert isinstance(model, Transformer)
        plan = MaskPlan((CellGroup(None, None, (Chunk(None, None, batch.sees[:, None]),)),))
        hidden = model(batch.tokens, batch.positions, Pass(self.layout.text_slots, plan, ()))
        image = slice(self.layout.text_slots, None)
        words = batch.words.clamp(min=0)
        rows = hidden.gather(1, words[..., None].expand(-1, -1, hidden.shape[-1]))
        codes = batch.targets[:, image]
        tokens = batch.targets.gather(1, words) - self.text.num_codes
        losses = [
            cross_entropy(model.base.logits(hidden[:, image]), codes.clamp(min=0)),
            cross_entropy(model.base.text_logits(rows), tokens.clamp(min=0)),
        ]
        learned = torch.cat([codes != NOTHING, batch.words != NOTHING], dim=1)
        parts = torch.cat([batch.parts[:, image], batch.parts.gather(1, words)], dim=1)
        return _by_sample(torch.cat(losses, dim=1), learned, parts)


def _by_sample(
    losses: Float[Tensor, "batch places"], learned: Bool[Tensor, "batch places"], parts: Int64[Tensor, "batch places"]
) -> BatchLosses:
    """Mean loss over the targets of each sample, and over each of its parts."""
    total = losses.where(learned, 0).sum(1) / learned.sum(1).clamp(min=1)
    each = learned[:, None] & (parts[:, None] == torch.arange(len(PARTS), device=parts.device)[:, None])
    return BatchLosses(total, losses.detach()[:, None].where(each, 0).sum(2) / each.sum(2))


class _Row:
    """One sequence under construction. Slots that no task sets are padding, which sees itself and carries no loss."""

    def __init__(self, layout: SequenceLayout, text: TextTokenizer) -> None:
        self.layout, self.text = layout, text
        self.tokens = torch.full((layout.length,), text.pad)
        self.sees = torch.eye(layout.length, dtype=torch.bool)
        self.targets = torch.full((layout.length,), NOTHING)
        self.parts = torch.zeros(layout.length, dtype=torch.int64)
        self.num_text = 0
        self.image = slice(layout.text_slots, layout.length)
        self.codes = torch.zeros(layout.frame_slots, dtype=torch.int64)

    @property
    def words(self) -> slice:
        """Slots of real text."""
        return slice(self.layout.text_slots - self.num_text, self.layout.text_slots)

    def put_text(self, tokens: list[int]) -> None:
        """Put tokens at the end of the text slots."""
        tokens = fit(tokens, self.layout.text_slots, truncate=True)
        self.num_text = len(tokens)
        self.tokens[self.words] = torch.tensor(tokens, dtype=torch.int64)

    def put_image(self, codes: np.ndarray) -> None:
        """Put codes after the start-of-image token."""
        self.codes = torch.from_numpy(codes.astype(np.int64)).flatten()
        self.tokens[self.image] = self.layout.feed(self.codes[None, None], self.text.start_of_image)[0]

    def learn_image(self) -> None:
        """Predict the image from the text."""
        self.sees[self.words, self.words] = True
        self.sees[self.image, self.words] = True
        self.sees[self.image, self.image] = _causal(self.layout.frame_slots)
        self._learn(self.image, self.codes, torch.ones(self.layout.frame_slots, dtype=torch.bool), "image")

    def learn_squares(self, masked: Bool[Tensor, "rows columns"]) -> None:
        """Predict masked codes, except in the first column of their square."""
        held = masked.flatten().roll(1)  # an image slot holds the code before its own
        held[0] = False  # the first slot holds the start token
        self.sees[self.image, self.image] = _infilling(held)
        learned = masked & (torch.arange(masked.shape[1]) % SQUARE != 0)
        self._learn(self.image, self.codes, learned.flatten(), "squares")

    def learn_caption(self) -> None:
        """Predict each token from the image and the tokens before it."""
        self.sees[self.words, self.words] = _causal(self.num_text)
        self.sees[self.words, self.image] = True
        before = slice(self.words.start, self.words.stop - 1)
        self._learn(before, self.tokens[self.words][1:], torch.ones(self.num_text - 1, dtype=torch.bool), "caption")

    def learn_spans(self, masked: Bool[Tensor, " tokens"]) -> None:
        """Predict masked tokens; never the first one, for which no slot is left."""
        self.sees[self.words, self.words] = _infilling(masked)
        before = slice(self.words.start, self.words.stop - 1)
        self._learn(before, self.tokens[self.words][1:], masked[1:], "spans")

    def _learn(
        self, slots: slice, targets: Int64[Tensor, " slots"], learned: Bool[Tensor, " slots"], part: str
    ) -> None:
        self.targets[slots] = targets.where(learned, self.targets[slots])
        self.parts[slots] = PARTS.index(part)

    def finished(self) -> tuple[Tensor, ...]:
        """The tensors of `ImageBatch`."""
        layout = self.layout
        mask = torch.arange(layout.text_slots) >= layout.text_slots - self.num_text
        positions = torch.cat([layout.text_positions(mask[None])[0], layout.frame_positions(range(1))])
        return self.tokens, positions, self.sees, self.targets, self.parts


def _causal(slots: int) -> Bool[Tensor, "slots slots"]:
    return torch.ones(slots, slots, dtype=torch.bool).tril()


def _infilling(masked: Bool[Tensor, " slots"]) -> Bool[Tensor, "slots slots"]:
    """All slots see unmasked slots; masked ones also see themselves and the masked ones before them."""
    return ~masked | (masked[:, None] & masked & _causal(len(masked)))


def _squares(sides: tuple[int, int], share: float, random: np.random.Generator) -> Bool[Tensor, "rows columns"]:
    """Mask of a share of the squares that a frame is cut into, at least one."""
    rows, columns = sides
    down, across = -(-rows // SQUARE), -(-columns // SQUARE)
    chosen = np.zeros(down * across, bool)
    chosen[random.permutation(down * across)[: max(1, round(share * down * across))]] = True
    large = torch.from_numpy(chosen.reshape(down, across)).repeat_interleave(SQUARE, 0).repeat_interleave(SQUARE, 1)
    return large[:rows, :columns]


def _spans(num_tokens: int, share: float, random: np.random.Generator) -> Bool[Tensor, " tokens"]:
    """Mask of spans of Poisson length: at least one token, never the first. The last span is cut to the share."""
    masked = np.zeros(num_tokens, bool)
    missing = min(max(1, round(share * num_tokens)), num_tokens - 1)
    while missing > 0:
        start = random.integers(1, num_tokens)
        span = slice(start, start + min(missing, max(1, random.poisson(MEAN_SPAN))))
        missing -= int((~masked[span]).sum())
        masked[span] = True
    return torch.from_numpy(masked)
