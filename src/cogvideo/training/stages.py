"""The table of stages, and how a stage is initialized: what is inherited, random, trained or frozen.

| stage | trained | starts from |
|---|---|---|
| image | the base | random weights |
| sequential | its channel | the base's attention and positions (paper section 3.2) |
| interpolation | its channel | the channel of the sequential stage (spec section 1) |
| superres | its channel | the base's attention, and the positions of the low codes |

Everything else is a variant for comparison, selected by `Choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cogvideo.bundle.format import MODULES, module_of
from cogvideo.bundle.model import CogVideo
from cogvideo.config import CogVideoConfig, require
from cogvideo.data.clips import Mode
from cogvideo.layout import SequenceLayout, UpscaleLayout
from cogvideo.models.adapters import adapt
from cogvideo.models.transformer import Base, TemporalChannel, Transformer, inherit, initialize
from cogvideo.models.upscaler import UpscaleChannel, Upscaler, inherit_upscaler
from cogvideo.training.objectives.image import ImageTask
from cogvideo.training.objectives.superres import SuperresTask
from cogvideo.training.objectives.task import Task
from cogvideo.training.objectives.video import VideoTask

StageName = Literal["image", "sequential", "interpolation", "superres"]
BaseChoice = Literal["frozen", "trained", "random"]
StartChoice = Literal["inherit", "sequential", "random", "continue"]


class Stage(NamedTuple):
    """A row of the table: what the stage trains, on which clips, with which sequence layout."""

    trains: str
    parents: tuple[str, ...]
    """Components that must exist first, since the stage is trained on them or starts from them."""
    mode: Mode
    layout: Callable[[CogVideoConfig], SequenceLayout | UpscaleLayout]
    task: Callable[..., Task]
    """Constructor of the task, from its layout, the text tokenizer and its own settings."""
    is_prompted: bool = False
    """True if the stage's samples need nothing but a prompt."""
    has_high_codes: bool = False
    """True if the stage learns codes of super-resolution."""

    @property
    def is_base(self) -> bool:
        """True if the stage trains the base, which all others share."""
        return self.trains == "base"


STAGES: dict[StageName, Stage] = {
    "image": Stage(
        trains="base",
        parents=(),
        mode="image",
        layout=lambda config: SequenceLayout.text_to_image(config.layout),
        task=ImageTask,
        is_prompted=True,
    ),
    "sequential": Stage(
        trains="sequential",
        parents=("base",),
        mode="sequential",
        layout=lambda config: SequenceLayout.sequential(config.layout),
        task=VideoTask,
        is_prompted=True,
    ),
    "interpolation": Stage(
        trains="interpolation",
        parents=("base", "sequential"),
        mode="interpolation",
        layout=lambda config: SequenceLayout.interpolation(config.layout),
        task=VideoTask,
    ),
    "superres": Stage(
        trains="superres",
        parents=("base",),
        mode="image",
        layout=lambda config: UpscaleLayout.of(config.layout, config.upscaler),
        task=SuperresTask,
        has_high_codes=True,
    ),
}
"""Stages in the order in which a bundle gets them."""


@dataclass(frozen=True)
class Choice:
    """Start of a stage, and the part to train."""

    start: StartChoice
    """Start of what the stage adds. inherit: from the base; sequential: from that stage's channel; random; continue:
    from what the bundle has for this stage."""
    base: BaseChoice = "frozen"
    """frozen; trained too (full fine-tuning); random: trained from random weights, as the paper's ablation."""
    window: int | None = None
    """Side of the temporal windows in place of the configuration's; 0 is full attention."""
    lora: int | None = None
    """Rank of an adapter, which is trained in place of the weights that the stage continues."""

    def __post_init__(self) -> None:
        if self.lora is not None:
            is_plain = self.base == "frozen" and self.start == "continue" and self.window is None
            require(is_plain, "got --lora with --base or --window, expected a stage as it is in the bundle")


def configured(config: CogVideoConfig, stage: StageName, choice: Choice) -> CogVideoConfig:
    """The configuration with the window that was chosen for the stage."""
    if choice.window is None:
        return config
    changes: dict[str, Any] = {stage: replace(getattr(config, stage), window=choice.window)}
    return replace(config, **changes)


def relying(stage: StageName, components: Collection[str]) -> tuple[str, ...]:
    """Components that were trained on what a stage replaces, or that belong to such a stage.

    A stage with a base of its own does not rely on the shared one.
    """
    names = []
    for follower, row in STAGES.items():
        special = f"{follower}_base"
        if STAGES[stage].trains not in row.parents or (STAGES[stage].is_base and special in components):
            continue
        names += [each for each in (row.trains, special) if each in components]
    return tuple(names)


class Target(NamedTuple):
    """Stage to train, the bundle `source` that it starts from, and the bundle `out` that receives it."""

    out: Path
    source: CogVideo
    config: CogVideoConfig
    stage: StageName
    choice: Choice

    @property
    def row(self) -> Stage:
        """The stage's row of the table."""
        return STAGES[self.stage]

    @property
    def own(self) -> tuple[str, ...]:
        """Components that the stage trains."""
        return (self.row.trains,) if self.choice.base == "frozen" else (self.row.trains, f"{self.stage}_base")

    @property
    def base(self) -> str:
        """Component of the source that the stage's base is read from."""
        parent = {"sequential": "sequential", "continue": self.stage}.get(self.choice.start)
        return "base" if parent is None else self.source.base_name(parent)

    @property
    def frozen_base(self) -> str | None:
        """Component of the source that the stage's base is read from; None if the stage trains the base."""
        return None if self.row.is_base or self.choice.base != "frozen" else self.base

    @property
    def in_place(self) -> bool:
        """True if the stage goes into the bundle that it starts from."""
        return self.source.folder is not None and self.source.folder.resolve() == self.out.resolve()

    @property
    def stays_behind(self) -> tuple[str, ...]:
        """Components of the source that are not copied, since they were trained on what is replaced; continued training
        keeps them."""
        return () if self.choice.start == "continue" else relying(self.stage, self.source.components)

    @property
    def comes_along(self) -> tuple[str, ...]:
        """Components of the source that are copied although what they were trained on is trained further; an adapter
        leaves it unchanged."""
        is_changed = self.choice.start == "continue" and self.choice.lora is None
        return relying(self.stage, self.source.components) if is_changed else ()

    @property
    def adapter(self) -> Path:
        """Folder of the adapter of the component that the stage trains."""
        return self.out / self.own[0]

    def parents(self) -> tuple[str, ...]:
        """Components that the stage is initialized from, including its own if it continues."""
        names = [] if self.row.is_base or self.choice.base == "random" else [self.base]
        names += {"sequential": ["sequential"], "continue": [self.row.trains]}.get(self.choice.start, [])
        there = ", ".join(self.source.components) or "nothing"
        made_by = {each.trains: f"`cogvideo train {name}` makes it" for name, each in STAGES.items()}
        for name in names:
            advice = made_by.get(name.removesuffix("_base"), "expected a bundle with it")
            known = name in self.source.components
            require(known, f"the bundle to start from has no {name}, it has: {there}; {advice}")
        return tuple(names)

    def build(self, dtype: torch.dtype, seed: int) -> Transformer | Upscaler:
        """Initial model, on the CPU: trained weights in float32, frozen matrices in `dtype`.

        The source has the `parents`; `seed` determines the random weights.
        """
        start, generator = self.choice.start, torch.Generator().manual_seed(seed)
        base = self._base(dtype, generator)
        if self.row.is_base:
            return Transformer(base)
        if self.choice.lora is not None:
            return Transformer(base, self._frozen(self.stage, dtype, self.choice.lora, generator))
        channel = MODULES[self.stage](self.config)
        if start == "random":
            initialize(channel, self.config.transformer.num_layers, generator)
        elif start != "inherit":
            channel.load_state_dict(self._state(self.stage if start == "continue" else "sequential"))
        if isinstance(channel, UpscaleChannel):
            if start == "inherit":
                inherit_upscaler(channel, base)
            return Upscaler(base, channel)
        assert isinstance(channel, TemporalChannel)
        if start == "inherit":
            inherit(channel, base, generator)
        return Transformer(base, channel)

    def _base(self, dtype: torch.dtype, generator: torch.Generator) -> Base:
        is_base, choice = self.row.is_base, self.choice
        base = Base(self.config.transformer)
        if choice.base == "random" or (is_base and choice.start == "random"):
            initialize(base, self.config.transformer.num_layers, generator)
            return base
        if choice.lora is None and (is_base or choice.base == "trained"):
            base.load_state_dict(self._state(self.base))
            return base
        return self._frozen(self.base, dtype, choice.lora if is_base else None, generator)

    def _frozen(self, name: str, dtype: torch.dtype, rank: int | None, generator: torch.Generator) -> Any:
        """A component with its matrices in `dtype`; those that already have this type stay memory-mapped. If `rank` is
        given, an adapter of this rank is added to train."""
        stored = self._state(name)
        types = {key: dtype if each.ndim > 1 else torch.float32 for key, each in stored.items()}
        frozen = module_of(name, {key: each.to(types[key]) for key, each in stored.items()}, self.config)
        if rank is not None:
            adapt(frozen, rank, generator)
        return frozen

    def _state(self, name: str) -> dict[str, Tensor]:
        return self.source.part(name, nn.Module).state_dict()
