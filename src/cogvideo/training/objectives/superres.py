"""Objective of super-resolution: all high codes of a frame in one pass, from low codes and caption (spec section 4).

No high slot is fed a high code, so none can leak: every slot predicts its code from the low ones and its position. In
training, low codes come from real frames; in generation, they are samples with errors. So some are replaced at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from cogvideo.config import Limited, Share, require
from cogvideo.data.loader import ClipSample
from cogvideo.layout import UpscaleLayout
from cogvideo.models.upscaler import Upscaler
from cogvideo.text import PaddedText, TextTokenizer
from cogvideo.training.objectives.task import BatchLosses, cross_entropy


class SuperresBatch(NamedTuple):
    """A batch of frames."""

    text: PaddedText
    """Captions without a frame rate."""
    low: Int64[Tensor, "batch rows columns"]
    """Low codes, some of them replaced."""
    high: Int64[Tensor, "batch high"]


@dataclass(frozen=True)
class SuperresTask(Limited):
    """The task of super-resolution."""

    layout: UpscaleLayout
    text: TextTokenizer
    corruption: Share = 0.05

    @property
    def parts(self) -> tuple[str, ...]:
        """Name of the only loss."""
        return ("codes",)

    def collate(self, samples: list[ClipSample]) -> SuperresBatch:
        """Collate samples. Captions that do not fit are truncated; dropped ones become the unconditional text."""
        text = self.text.batch([each.caption for each in samples], None, self.layout.text_slots, truncate=True)
        has_text = bool(text.mask.any(1).all())
        require(has_text, "the unconditional text is empty, and super-resolution needs text: use --caption-dropout 0")
        low = torch.stack([self._corrupted(sample) for sample in samples])
        high = torch.stack([_flat(sample.high_codes) for sample in samples])
        return SuperresBatch(text, low, high)

    def _corrupted(self, sample: ClipSample) -> Int64[Tensor, "rows columns"]:
        random = np.random.default_rng(sample.seed)
        codes = _flat(sample.codes)
        replaced = torch.from_numpy(random.random(len(codes)) < self.corruption)
        drawn = torch.from_numpy(random.integers(0, self.text.num_codes, len(codes)))
        return drawn.where(replaced, codes).view(sample.codes.shape[1:])

    def losses(self, model: nn.Module, batch: SuperresBatch) -> BatchLosses:
        """Cross entropy over the image codes."""
        assert isinstance(model, Upscaler)
        layout = self.layout.shaped((batch.low.shape[1], batch.low.shape[2]))
        hidden = model(batch.text.tokens, batch.text.mask, batch.low.flatten(1), layout)
        loss = cross_entropy(model.base.logits(hidden), batch.high).mean(1)
        return BatchLosses(loss, loss.detach()[:, None])


def _flat(codes: np.ndarray | None) -> Int64[Tensor, " slots"]:
    assert codes is not None, "the sampling asks for high codes"
    return torch.from_numpy(codes.astype(np.int64)).flatten()
