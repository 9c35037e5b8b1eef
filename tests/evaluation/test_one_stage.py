"""Clips by one stage at one rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo.evaluation import one_stage
from cogvideo.evaluation.one_stage import OneStage
from cogvideo.generation.hierarchy import after, first_frames
from cogvideo.generation.request import Request
from cogvideo.pipeline import collect
from gallery import make_model


@pytest.mark.parametrize(("overlap", "sequences"), [(1, 8), (2, 11)])
def test_sequences_begin_with_the_end_of_the_clip(
    overlap: int,
    sequences: int,
    train_text_model: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards the comparison with one stage: 33 frames, the next ones after the last one or two of all before."""
    model = make_model(tmp_path / "model", train_text_model())
    pipeline = OneStage(model, overlap)
    made: list[Tensor] = []

    def watched(system: Any, request: Request, frames: Tensor) -> Tensor:
        whole = torch.cat(made, 1)
        assert torch.equal(frames, whole[:, -overlap:])
        made.append(after(system, request, frames))
        return made[-1]

    def first(system: Any, request: Request) -> Tensor:
        made.append(first_frames(system, request)[:, None])
        return made[0][:, 0]

    monkeypatch.setattr(one_stage, "after", watched)
    monkeypatch.setattr(one_stage, "first_frames", first)
    settings = replace(pipeline.settings, rounds=0, duration=0.5)
    clips = collect(pipeline.stream(["a cat"], [torch.Generator().manual_seed(3)], settings), 8.0)
    assert pipeline.num_frames(settings) == 33
    assert len(made) == 1 + sequences
    assert torch.equal(clips.codes, torch.cat(made, 1)[:, :33])
    assert clips.frames.shape == (1, 33, 16, 16, 3)
