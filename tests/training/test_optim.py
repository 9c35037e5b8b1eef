"""Optimization: the learning rate schedule, weight decay, the choice of optimizer, and the running average."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from cogvideo.training.optim import Average, StageOptimization, adamw, make_optimizers, trained


def small() -> nn.Module:
    """A frozen linear layer, followed by a trained norm and linear layer."""
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    return module


def test_rate_rises_and_falls() -> None:
    """Checks the schedule: linear warmup, cosine decay to the final rate, and no step at rate 0."""
    settings = StageOptimization(steps=110, warmup=10, learning_rate=1.0, final_rate=0.2)
    assert [settings.rate_at(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert settings.rate_at(10) == 1.0
    assert settings.rate_at(60) == pytest.approx(0.6)  # halfway between 1 and 0.2
    assert settings.rate_at(109) == pytest.approx(0.2, abs=1e-3)
    assert settings.rate_at(10_000) == pytest.approx(0.2)
    assert StageOptimization(steps=5, warmup=0).rate_at(0) == 2e-4


def test_only_matrices_decay_and_frozen_ones_are_unknown() -> None:
    """Guards against weight decay of norms and biases, and against optimizer state for frozen weights."""
    module = small()
    optimizer = adamw(trained(module), StageOptimization(weight_decay=0.1))
    decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert decays == {id(each): 0.1 if each.ndim > 1 else 0.0 for each in trained(module)}
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    assert not any(id(each) in decays for each in module[0].parameters())


def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    """Guards against parameters updated by both optimizers or neither, and against orthogonalized embeddings."""
    blocks = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
    module = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "blocks": blocks})
    blocks[0].bias.requires_grad_(False)
    adam, muon = make_optimizers(module, StageOptimization(optimizer="muon", learning_rate=0.1))
    names = {each: name for name, each in module.named_parameters()}
    owned = [{names[each] for group in one.param_groups for each in group["params"]} for one in (adam, muon)]
    assert owned == [{"embedding.weight", "blocks.1.weight", "blocks.1.bias"}, {"blocks.0.weight"}]
    before = blocks[0].weight.detach().clone()
    blocks[0](torch.eye(4)).square().sum().backward()
    muon.step()
    update = (before - blocks[0].weight.detach()) / 0.1
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.4)  # the typical RMS of AdamW's updates


def test_average_is_that_of_the_formula() -> None:
    """Checks the running average, its shorter memory at the start, and that the weights are restored bit for bit."""
    module = small()
    average = Average(module, 0.5)
    weight = module[2].weight
    expected = weight.detach().clone()
    for done in range(1, 6):
        with torch.no_grad():
            weight += done
        average.update(done)
        keep = min(0.5, (1 + done) / (10 + done))
        expected = keep * expected + (1 - keep) * weight.detach()
    before = weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight, before)
    assert average.state.keys() == {"1.weight", "1.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch", -1),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 1e38),
        ("clip", 0.0),
        ("clip", 1e39),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("final_rate", 1.1),
        ("ema", 1.0),
        ("seed", -1),
    ],
)
def test_bad_settings_are_refused(name: str, value: float) -> None:
    """Catches settings that would fail, or train nothing, after an hour."""
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value}")):
        StageOptimization(**{name: value})
    with pytest.raises(ValueError, match=r"learning_rate 1e\+20, weight_decay 1e\+20: expected 1e\+30 at most"):
        StageOptimization(learning_rate=1e20, weight_decay=1e20)
