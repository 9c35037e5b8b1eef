"""Clips by one stage at one frame rate, without a hierarchy: the baseline of the paper for interpolation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cogvideo.bundle.model import CogVideo
from cogvideo.evaluation.subjects import NUM_FRAMES
from cogvideo.generation.hierarchy import after, first_frames
from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.pipeline import CogVideoPipeline, Frame


class OneStage(CogVideoPipeline):
    """Clips made of sequences of the sequential stage, each of which begins with the last frames of the previous one.

    Args:
        model: a model whose sequential stage was trained at the rate of the finished clips.
        overlap: number of these frames; only one for the first sequence, after the clip's first frame.
    """

    def __init__(self, model: CogVideo, overlap: int) -> None:
        super().__init__(model)
        self.overlap = overlap

    def num_frames(self, settings: GenerationSettings) -> int:
        """Number of frames of a clip."""
        return NUM_FRAMES

    def frames(self, request: Request) -> Iterator[Frame]:
        """Yield the frames of a clip in order of time."""
        model = self._packed()
        codes = first_frames(model, request)[:, None]
        while codes.shape[1] < NUM_FRAMES:
            codes = torch.cat([codes, after(model, request, codes[:, -self.overlap :])], 1)
        for place, frame in enumerate(codes[:, :NUM_FRAMES].unbind(1)):
            yield Frame("sequential", place, NUM_FRAMES, frame, model.autoencoder.decode_pixels(frame))
