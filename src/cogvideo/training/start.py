"""Where a stage starts from: which weights it inherits, which are random, which are trained and which stay frozen.

| stage | trained | starts from |
|---|---|---|
| image | the base | random weights |
| sequential | its channel | the base's attention and positions (paper section 3.2) |
| interpolation | its channel | that of the sequential stage (spec section 1) |
| superres | its channel | the base's attention, and the positions of the low codes |

All else is a variant for comparison, which `Choice` says.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cogvideo.bundle.format import MODULES
from cogvideo.bundle.model import CogVideo
from cogvideo.config import CogVideoConfig, StageConfig, require
from cogvideo.models.transformer import Base, TemporalChannel, Transformer, inherit, initialize
from cogvideo.models.upscaler import UpscaleChannel, Upscaler, inherit_upscaler

StageName = Literal["image", "sequential", "interpolation", "superres"]
STAGES: tuple[StageName, ...] = get_args(StageName)
BaseChoice = Literal["frozen", "trained", "random"]
StartChoice = Literal["inherit", "sequential", "random", "continue"]


@dataclass(frozen=True)
class Choice:
    """What a stage begins with."""

    start: StartChoice
    """Of what the stage adds. inherit: from the base; sequential: from that stage's channel; random; continue: from
    what the bundle has for this stage."""
    base: BaseChoice = "frozen"
    """frozen; trained too (full fine-tuning); random: trained from random weights, as the paper's ablation."""
    window: int | None = None
    """Side of the temporal windows in place of the configuration's; 0 is full attention."""


def configured(config: CogVideoConfig, stage: StageName, choice: Choice) -> CogVideoConfig:
    """The configuration with the stage's window in place.

    Raises:
        ValueError: the grid cannot be cut into such windows.
    """
    if choice.window is None:
        return config
    changes: dict[str, Any] = {stage: StageConfig(choice.window)}
    return replace(config, **changes)


def parents(stage: StageName, choice: Choice, source: CogVideo) -> tuple[str, ...]:
    """Components that the start is made from, except the stage's own.

    Raises:
        ValueError: the bundle lacks one.
    """
    names = [] if stage == "image" or choice.base == "random" else [base_of(stage, choice, source)]
    if choice.start == "sequential":
        names.append("sequential")
    for name in (*names, *own(stage, choice)):
        known = name in source.components or name not in (*names, *continued(stage, choice))
        there = ", ".join(source.components) or "nothing"
        require(known, f"the bundle to start from has no {name}, it has: {there}; {_advice(name)}")
    return tuple(names)


def own(stage: StageName, choice: Choice) -> tuple[str, ...]:
    """Components that the stage trains."""
    if stage == "image":
        return ("base",)
    return (stage,) if choice.base == "frozen" else (stage, f"{stage}_base")


def base_of(stage: StageName, choice: Choice, source: CogVideo) -> str:
    """The component that the stage's base is read from."""
    parent = "sequential" if choice.start == "sequential" else stage
    special = f"{parent}_base"
    return special if choice.start in ("sequential", "continue") and special in source.components else "base"


def relying(stage: StageName, components: Collection[str]) -> tuple[str, ...]:
    """Those of the components that were trained on what a stage replaces: stages on the shared base, if that is new;
    interpolation, which starts from key frames, if those are."""
    if stage == "image":
        return tuple(each for each in STAGES[1:] if each in components and f"{each}_base" not in components)
    names = ("interpolation", "interpolation_base") if stage == "sequential" else ()
    return tuple(each for each in names if each in components)


def continued(stage: StageName, choice: Choice) -> tuple[str, ...]:
    """Components of the stage's own that it begins with."""
    if choice.start != "continue":
        return ()
    return ("base",) if stage == "image" else (stage,)


def _advice(name: str) -> str:
    stage = {"base": "image"}.get(name, name.removesuffix("_base"))
    return f"`cogvideo train {stage}` makes it" if stage in STAGES else "expected a bundle with it"


def build(
    stage: StageName, choice: Choice, source: CogVideo, config: CogVideoConfig, dtype: torch.dtype, seed: int
) -> Transformer | Upscaler:
    """The model of a stage at its start, on the CPU: what is trained in float32, frozen matrices in `dtype`.

    Args:
        stage: which one.
        choice: what it begins with.
        source: has its `parents`.
        config: sizes.
        dtype: of frozen matrices; frozen vectors are float32.
        seed: of what is random.
    """
    generator = torch.Generator().manual_seed(seed)
    base = _base(stage, choice, source, config, dtype, generator)
    if stage == "image":
        return Transformer(base)
    channel = MODULES[stage](config)
    if choice.start == "random":
        initialize(channel, config.transformer.num_layers, generator)
    elif choice.start != "inherit":
        _copy(source.component(stage if choice.start == "continue" else "sequential"), channel)
    if isinstance(channel, UpscaleChannel):
        if choice.start == "inherit":
            inherit_upscaler(channel, base)
        return Upscaler(base, channel)
    assert isinstance(channel, TemporalChannel)
    if choice.start == "inherit":
        inherit(channel, base, generator)
    return Transformer(base, channel)


def _base(
    stage: StageName,
    choice: Choice,
    source: CogVideo,
    config: CogVideoConfig,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Base:
    base = Base(config.transformer)
    if choice.base == "random" or (stage == "image" and choice.start == "random"):
        initialize(base, config.transformer.num_layers, generator)
        return base
    stored = source.component(base_of(stage, choice, source))
    if stage == "image" or choice.base == "trained":
        _copy(stored, base)
        return base
    return _frozen(stored, config, dtype)


@torch.no_grad()
def _copy(stored: object, module: nn.Module) -> None:
    assert isinstance(stored, nn.Module)
    module.load_state_dict(stored.state_dict())


def _frozen(stored: object, config: CogVideoConfig, dtype: torch.dtype) -> Base:
    """The base without gradients; tensors that already have their type stay memory-mapped."""
    assert isinstance(stored, Base)
    with torch.device("meta"):
        base = Base(config.transformer)

    def converted(each: Tensor) -> Tensor:
        return each.to(dtype if each.ndim > 1 else torch.float32)

    base.load_state_dict({name: converted(each) for name, each in stored.state_dict().items()}, assign=True)
    return base.requires_grad_(False)
