"""A complete model of every stage, as small as possible.

Weights are large enough that everything visible affects the codes, and small enough that noise does too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo.bundle.format import MODULES
from cogvideo.bundle.model import CogVideo
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.text import TextTokenizer
from cogvideo.training.objectives.image import ImageMixture
from cogvideo.training.objectives.task import Objective, Task
from cogvideo.training.optim import StageOptimization
from cogvideo.training.parallel import ALONE, ParallelSettings
from cogvideo.training.stages import STAGES, Choice, StageName, Target
from cogvideo.training.step import Execution, Trainer
from workshop import NUM_CODES, small_config

COMPONENTS = ("base", "sequential", "interpolation", "superres")


@torch.no_grad()
def loud(module: nn.Module, seed: int) -> nn.Module:
    """Set large random weights; norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, each in module.named_parameters():
        each.normal_(float("norm" in name and name.endswith("weight")), 0.3, generator=generator)
    return module


def make_parts(text_model: bytes, hidden: int = 32) -> dict[str, Any]:
    """Create every component, by name."""
    config = small_config(text_model, hidden)
    torch.manual_seed(0)  # for the autoencoder's initialization
    stages = {name: loud(MODULES[name](config), seed) for seed, name in enumerate(COMPONENTS)}
    return stages | {
        "image_tokenizer": Autoencoder(config.autoencoder),
        "cluster_labels": torch.arange(NUM_CODES) // 5,
        "text": TextTokenizer(text_model, config.text, NUM_CODES),
    }


def make_model(folder: Path, text_model: bytes, hidden: int = 32, without: tuple[str, ...] = ()) -> CogVideo:
    """Save all components as a bundle, and load it."""
    parts = {name: part for name, part in make_parts(text_model, hidden).items() if name not in without}
    CogVideo(small_config(text_model, hidden), **parts).save_pretrained(folder)
    return CogVideo.from_pretrained(folder)


def make_task(stage: StageName, source: CogVideo) -> Task:
    """Create a stage's training task; the image model's mixture has all kinds of samples about equally often."""
    settings: Any = {"image": {"mixture": ImageMixture(0.4, 0.3)}, "superres": {"corruption": 0.1}}
    row = STAGES[stage]
    return row.task(row.layout(source.config), source.text, **settings.get(stage, {}))


def make_trainer(
    stage: StageName,
    source: CogVideo,
    settings: StageOptimization,
    execution: Execution = Execution(),  # noqa: B008  # frozen
    wide: bool = False,
) -> Trainer:
    """Create a trainer that continues a stage in one process on the CPU; in float64 if `wide`."""
    model = Target(Path("out"), source, source.config, stage, Choice("continue")).build(settings.dtype, seed=0)
    objective = Objective(model.double() if wide else model, make_task(stage, source))
    return Trainer(objective, settings, execution, ParallelSettings(), ALONE)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check for the same tensors under the same names, bit for bit."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
