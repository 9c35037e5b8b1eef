"""The report on fine-tuning: its advice for clips that look bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cogvideo.report.finetune import advice
from cogvideo.report.runs import Curve, Run
from cogvideo.training.finetune import Finetuning


def run(stage: str, figure: str, last: float, held_out: list[float]) -> Run:
    """A run of 30 steps with the given last figure of training, and three of held-out clips."""
    steps = np.array([10, 20, 30])
    figures = {figure: Curve(steps, np.array([1.0, 1.0, last]))}
    return Run(Path(), stage, stage, 30, {}, figures, {}, Curve(steps, np.array(held_out)), True, 1.0, None)


@pytest.mark.parametrize(
    ("psnr", "loss", "held_out", "has_adapters", "advised"),
    [
        (20.0, 0.5, [5.0, 6.0, 7.0], False, "codes still blur what they learn from (20.0 dB)"),
        (30.0, 0.5, [5.0, 6.0, 7.0], False, "knows these by heart"),
        (30.0, 4.0, [7.0, 6.0, 5.0], False, "was still falling"),
        (30.0, 4.0, [5.0, 6.0, 7.0], True, "without --lora"),
        (30.0, 4.0, [5.0, 6.0, 7.0], False, "more clips, and more time"),
    ],
)
def test_advice(psnr: float, loss: float, held_out: list[float], has_adapters: bool, advised: str) -> None:
    """Prevents advice that does not fit the symptoms, such as adapters that learned nothing, or a tokenizer that blurs
    only the one held-out clip."""
    runs = [run("tokenizer", "psnr", psnr, [20.0, 19.0, 18.0]), run("image", "loss", loss, held_out)]
    settings = Finetuning(lora=8 if has_adapters else None)
    assert advised in advice(runs, [{"notes": []}], settings)


def test_captions_come_first() -> None:
    """Recommends captions before more training if clips have none."""
    assert "write captions" in advice([], [{"notes": ["no caption"]}], Finetuning())


def test_advice_names_the_option_that_set_the_length() -> None:
    """Prevents advice to change --minutes for users who set --steps."""
    assert "`--minutes`" in advice([], [{"notes": []}], Finetuning())
    assert "`--steps`" in advice([], [{"notes": []}], Finetuning(steps=9))
