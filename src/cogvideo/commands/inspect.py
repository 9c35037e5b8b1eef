"""`cogvideo inspect attention`: where the temporal channel of a model looks while it makes a clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cogvideo
from cogvideo.commands.outputs import public
from cogvideo.config import require
from cogvideo.devices import usable
from cogvideo.evaluation.attention import StageAttention, stage_attention
from cogvideo.files import write_json
from cogvideo.generation.request import MAX_SEED, Request
from cogvideo.pipeline import CogVideoPipeline
from cogvideo.report.attention import write_picture

DIGITS = 5
"""Decimals of shares in the JSON."""
LEVELS = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Quantiles of the gates over channels."""


def attention(
    model: str, prompt: str, /, *, output: Path = Path("attention.png"), seed: int = 0, device: str = "auto"
) -> None:
    """Show where the temporal channel looks while a model makes a clip (appendix A of the paper).

    Makes the key frames of the clip and the frames between them, then feeds them again and reads the attention of each
    pass. Writes a picture, and a JSON file of the same name with the figures: the share of each frame's attention that
    goes to the text, to itself and to every other frame, by layer; the gates, by layer; and the attention of each head
    to the same place in the previous frame.

    Args:
        model: Folder of a bundle, its ID on the Hugging Face Hub, or pocket, the model in the box.
        prompt: Text of the clip.
        output: PNG file for the picture. The JSON file is written next to it.
        seed: Seed of the clip.
        device: Device to run on: cpu, cuda, cuda:0, or auto.
    """
    require(output.suffix == ".png", f"output is {output}, expected a .png file")
    require(0 <= seed <= MAX_SEED, f"seed is {seed}, expected a number in [0, {MAX_SEED}]")
    pipeline = CogVideoPipeline.from_pretrained(model, device=usable(device))
    system = pipeline.model
    has_rounds = "interpolation" in system.components
    settings = replace(pipeline.settings, rounds=int(has_rounds), should_enlarge=False)
    generator = torch.Generator().manual_seed(seed)
    clips = pipeline(prompt, generator=generator, settings=settings)
    found = stage_attention(system, Request([prompt], [generator], settings), clips.codes)
    times = np.arange(clips.frames.shape[1]) / clips.fps
    output.parent.mkdir(parents=True, exist_ok=True)
    shown = []
    for stage in found:
        step = 2 if has_rounds and stage.name == "sequential" else 1
        places = slice(None, step * stage.layout.num_frames, step)
        shown.append((stage, times[places].tolist(), clips.frames[0][places]))
    write_picture(output, prompt, shown)
    record = {
        "prompt": prompt,
        "seed": seed,
        "model": public(Path(model)),
        "bundle": system.fingerprint,
        "cogvideo": cogvideo.__version__,
        "torch": torch.__version__,
        "stages": [_record(stage, seconds) for stage, seconds, _ in shown],
    }
    write_json(output.with_suffix(".json"), record)
    print(f"{output}, {output.with_suffix('.json')}")


def _record(stage: StageAttention, seconds: list[float]) -> dict[str, Any]:
    """Figures of a stage; lists are by layer, then by frame or head, in order of time."""
    layout = stage.layout
    return {
        "stage": stage.name,
        "window": stage.window,
        "seconds": seconds,
        "generated": list(layout.loss_places),
        "targets": ["text", *(f"frame {place}" for place in range(layout.num_frames))],
        "shares": _rounded(stage.shares.mean(1)),
        "gate_mean": _rounded(stage.gates.mean(1)),
        "gate_quantiles": {f"{level:g}": _rounded(stage.gates.quantile(level, dim=1)) for level in LEVELS},
        "same_place": _rounded(stage.same_place),
    }


def _rounded(values: torch.Tensor) -> Any:
    return np.round(values.double().numpy(), DIGITS).tolist()
