"""Initialization of a stage: what is inherited, random or frozen, and in which dtypes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogvideo.bundle.model import CogVideo
from cogvideo.models.transformer import Base, TemporalChannel, initialize
from cogvideo.models.upscaler import Upscaler
from cogvideo.training.stages import Choice, StageName, Target, configured
from workshop import make_bundle


@pytest.fixture(scope="module")
def source(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> CogVideo:
    """A bundle with a base, and a sequential stage that has its own base."""
    folder = tmp_path_factory.mktemp("start") / "model"
    made = make_bundle(folder, train_text_model())
    channel = TemporalChannel(made.config.transformer, made.config.layout, made.config.sequential)
    other = Base(made.config.transformer)
    for seed, module in enumerate((channel, other)):
        initialize(module, 2, torch.Generator().manual_seed(10 + seed))
    make_bundle(folder, train_text_model(), sequential=channel, sequential_base=other)
    return CogVideo.from_pretrained(folder)


def target(stage: StageName, choice: Choice, source: CogVideo) -> Target:
    """Create a target whose bundle is never written."""
    return Target(Path("out"), source, configured(source.config, stage, choice), stage, choice)


def start(stage: StageName, choice: Choice, source: CogVideo, dtype: torch.dtype = torch.float32, seed: int = 0):  # type: ignore[no-untyped-def]
    return target(stage, choice, source).build(dtype, seed)


@pytest.mark.parametrize("stage", ["sequential", "interpolation"])
def test_a_channel_inherits_the_base(stage: StageName, source: CogVideo) -> None:
    """Guards paper section 3.2: q, k, v start as the base's, gates at one half, positions as the first frame's."""
    model = start(stage, Choice("inherit"), source)
    for block, added in zip(model.base.blocks, model.channel.blocks, strict=True):
        assert torch.equal(added.qkv.weight, block.qkv.weight)
        assert torch.equal(added.qkv.bias, block.qkv.bias)
        assert not torch.equal(added.out.weight, block.out.weight)
        assert not added.gate.any()
    layout = source.config.layout
    rows = model.base.positions.weight[layout.frame_position : layout.frame_position + layout.grid**2]
    for table in model.channel.positions.weight.split(layout.grid**2):
        assert torch.equal(table, rows)


def test_super_resolution_inherits_attention_and_coarse_positions(source: CogVideo) -> None:
    """Checks that each high slot starts with the attention and the position of the low code that covers it."""
    model = start("superres", Choice("inherit"), source)
    assert isinstance(model, Upscaler)
    for block, added in zip(model.base.blocks, model.channel.blocks, strict=True):
        assert torch.equal(added.qkv.weight, block.qkv.weight)
        assert torch.equal(added.out.weight, block.out.weight)
    layout, ratio = model.channel.layout, model.channel.upscaler.ratio
    for row in range(layout.high_grid):
        for column in range(layout.high_grid):
            low = layout.low_position + (row // ratio) * layout.low_grid + column // ratio
            high = model.channel.positions.weight[row * layout.high_grid + column]
            assert torch.equal(high, model.base.positions.weight[low])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_base_is_frozen_and_small(dtype: torch.dtype, source: CogVideo) -> None:
    """A frozen base gets no gradients and is stored in the requested dtype, except vectors, which stay in float32."""
    model = start("sequential", Choice("inherit"), source, dtype)
    for name, each in model.base.named_parameters():
        assert not each.requires_grad
        assert each.dtype == (dtype if each.ndim > 1 else torch.float32), name
    assert all(each.requires_grad and each.dtype == torch.float32 for each in model.channel.parameters())


def test_interpolation_continues_from_key_frames(source: CogVideo) -> None:
    """Guards spec section 1: interpolation starts from the sequential stage's channel, and from its own base if any."""
    model = start("interpolation", Choice("sequential"), source)
    assert torch.equal(model.channel.blocks[1].out.weight, source.sequential.channel.blocks[1].out.weight)
    assert torch.equal(model.base.words.weight, source.sequential.base.words.weight)
    assert not torch.equal(model.base.words.weight, source.base.words.weight)
    assert target("interpolation", Choice("sequential"), source).parents() == ("sequential_base", "sequential")


def test_variants(source: CogVideo) -> None:
    """Guards the comparison runs: random channels, trained or random bases, other windows, and seeds."""
    random = [
        start("sequential", Choice("random"), source, seed=seed).channel.blocks[0].qkv.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2])
    trained = start("sequential", Choice("inherit", "trained"), source)
    assert all(each.requires_grad for each in trained.base.parameters())
    assert torch.equal(trained.base.words.weight, source.base.words.weight)
    fresh = start("sequential", Choice("inherit", "random"), source)
    assert not torch.equal(fresh.base.words.weight, source.base.words.weight)
    assert torch.equal(fresh.channel.blocks[0].qkv.weight, fresh.base.blocks[0].qkv.weight)
    assert start("interpolation", Choice("inherit", window=4), source).window == 4
    assert target("sequential", Choice("inherit"), source).own == ("sequential",)
    assert target("sequential", Choice("inherit", "trained"), source).own == ("sequential", "sequential_base")
    assert target("sequential", Choice("continue"), source).base == "sequential_base"
    again = start("sequential", Choice("continue"), source)
    assert torch.equal(again.channel.positions.weight, source.sequential.channel.positions.weight)


def test_training_a_copy_leaves_the_source_alone(source: CogVideo) -> None:
    """Protects the bundle in memory, whose tensors may be memory-mapped files, from training."""
    model = start("sequential", Choice("inherit", "trained"), source)
    before = source.base.words.weight.clone()
    with torch.no_grad():
        for each in model.parameters():
            each.fill_(3.0)
    assert torch.equal(source.base.words.weight, before)


def test_what_is_missing_is_said(train_text_model: Callable[..., bytes], tmp_path: Path) -> None:
    """Checks the errors for a missing parent stage and for a window that does not fit."""
    bundle = make_bundle(tmp_path / "model", train_text_model(), base=False)
    with pytest.raises(ValueError, match=r"has no base, it has: image_tokenizer.*`cogvideo train image` makes it"):
        target("sequential", Choice("inherit"), bundle).parents()
    with pytest.raises(ValueError, match=r"has no base"):
        target("image", Choice("continue"), bundle).parents()
    assert target("image", Choice("random"), bundle).parents() == ()
    bundle = make_bundle(tmp_path / "other", train_text_model())
    with pytest.raises(ValueError, match=r"has no sequential, it has: base.*`cogvideo train sequential` makes it"):
        target("interpolation", Choice("sequential"), bundle).parents()
    with pytest.raises(ValueError, match=r"has no superres"):
        target("superres", Choice("continue"), bundle).parents()
    with pytest.raises(ValueError, match="grid 4 is not divisible by the interpolation window 6"):
        configured(bundle.config, "interpolation", Choice("inherit", window=6))
