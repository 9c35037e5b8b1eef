"""Objective of the video stages: the codes of later frames from caption, frame rate and earlier frames.

Only slots that carry loss go through the code head: those of frames 1 to 4 in the sequential stage, of frames 1 and 3
in interpolation. Logits cover image codes only (spec section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Int64
from torch import Tensor, nn

from cogvideo.data.loader import ClipSample
from cogvideo.layout import SequenceLayout
from cogvideo.models.plans import full_pass
from cogvideo.models.transformer import Transformer
from cogvideo.text import PaddedText, TextTokenizer
from cogvideo.training.objectives.task import BatchLosses, cross_entropy


class VideoBatch(NamedTuple):
    """A batch of sequences."""

    text: PaddedText
    codes: Int64[Tensor, "batch frames rows columns"]
    """Image codes of the frames, by place."""


@dataclass(frozen=True)
class VideoTask:
    """The task of a video stage."""

    layout: SequenceLayout
    text: TextTokenizer

    @property
    def parts(self) -> tuple[str, ...]:
        """Losses of the frames that carry loss, by their places."""
        return tuple(f"frame_{place}" for place in self.layout.loss_places)

    def collate(self, samples: list[ClipSample]) -> VideoBatch:
        """Collate samples. Captions that do not fit are truncated; dropped ones become the unconditional text."""
        captions, durations = [each.caption for each in samples], [each.duration for each in samples]
        text = self.text.batch(captions, durations, self.layout.text_slots, truncate=True)
        return VideoBatch(text, torch.stack([torch.from_numpy(sample.codes.astype("int64")) for sample in samples]))

    def losses(self, model: nn.Module, batch: VideoBatch) -> BatchLosses:
        """Cross entropy over the image codes, of each frame that carries loss."""
        assert isinstance(model, Transformer)
        layout = self.layout.shaped((batch.codes.shape[2], batch.codes.shape[3]))
        places = _places(layout, batch.codes.device)
        codes = batch.codes.flatten(2).index_select(1, places.order)
        dtype = model.base.words.weight.dtype
        plan = full_pass(layout, model.window, batch.text.mask, dtype, layout.num_frames)
        tokens = torch.cat([batch.text.tokens, layout.feed(codes, self.text.start_of_image)], dim=1)
        positions = torch.cat([layout.text_positions(batch.text.mask), places.frames.expand(len(tokens), -1)], dim=1)
        hidden = model(tokens, positions, plan)
        logits = model.base.logits(hidden.index_select(1, layout.text_slots + places.loss))
        losses = cross_entropy(logits, codes.flatten(1).index_select(1, places.loss))
        parts = rearrange(losses, "batch (parts slots) -> batch parts slots", parts=len(self.parts)).mean(2)
        return BatchLosses(parts.mean(1), parts.detach())


class _Places(NamedTuple):
    """Places in a sequence, as tensors on the device of the batch."""

    order: Int64[Tensor, " frames"]
    """Place of the frame of each rank."""
    frames: Int64[Tensor, " slots"]
    """Positions of the frame slots."""
    loss: Int64[Tensor, " learned"]
    """Frame slots that carry loss."""


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # tensors cached during evaluation must also work in training
def _places(layout: SequenceLayout, device: torch.device) -> _Places:
    order = torch.tensor(layout.order)
    frames = layout.frame_positions(range(layout.num_frames))
    return _Places(order.to(device), frames.to(device), layout.loss_slots().to(device))
