"""Decoding with CUDA graphs: a pass has thousands of small kernels, which take longer to launch than to run.

A drafting pass has static shapes, since the visibility of its rows is computed from tensors. So one graph per
frame and width is captured at the first pass and replayed for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cogvideo.generation.decoder import MaskedDecoder


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    slots: Int64[Tensor, "batch rows"]
    tokens: Int64[Tensor, "batch rows"]
    logits: Float[Tensor, "batch rows codes"]


class GraphedDecoder(MaskedDecoder):
    """A `MaskedDecoder` whose passes are replayed as CUDA graphs. The results are the same."""

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
