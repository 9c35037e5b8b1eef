"""Attention of the temporal channel: agreement with the dense oracle and the model's own output, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cogvideo.bundle.model import CogVideo
from cogvideo.cli import main
from cogvideo.evaluation.attention import measure, replay, stage_attention
from cogvideo.generation.decoder import Condition
from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.layout import SequenceLayout
from cogvideo.models import transformer
from cogvideo.models.attention import MaskPlan, attend, attention_weights
from conftest import HEADS, MakeSystem, MakeText, System
from gallery import make_model
from reference import TEXT, Slot
from workshop import NUM_CODES

STAGES = [("sequential", 4, 0), ("sequential", 4, 2), ("interpolation", 4, 2), ("interpolation", 4, 0)]
BONUS = 1.4


def oracle_looks(system: System, text: Condition, codes: Tensor) -> tuple[list[Slot], list[Tensor]]:
    """The oracle's slots, which are both rows and keys, and each layer's attention as (heads, rows, keys)."""
    looks: list[Tensor] = []
    given = max(1, system.layout.num_bidirectional)
    known, drawn = system.at_places(codes[0]), system.layout.order[given:]
    slots, _ = system.oracle.hidden(system.prompt(text.text, 0), known, text.text_bonus, drawn, looks)
    return slots, looks


@pytest.fixture(scope="module")
def model(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> CogVideo:
    """A small model with both stages, loaded from its folder."""
    return make_model(tmp_path_factory.mktemp("attention") / "model", train_text_model())


@pytest.mark.parametrize(("stage", "grid", "window"), STAGES)
@torch.no_grad()
def test_replayed_attention_is_that_of_the_oracle(
    make_system: MakeSystem, make_text: MakeText, stage, grid, window
) -> None:
    """Checks every attention weight in every layer, and so masks, windows, positions, the cache and the text bonus."""
    system, condition = make_system(stage, grid, window, 5, None, 2), Condition(make_text((3,)), text_bonus=BONUS)
    codes, text = system.codes(1, 5), system.layout.text_slots
    slots, looks = oracle_looks(system, condition, codes)
    frames = system.layout.num_frames * system.layout.frame_slots
    found = torch.full((len(looks), HEADS, frames, 1 + frames), torch.nan, dtype=torch.float64)

    def see(layer: int, rows: range, weights: Tensor) -> None:
        found[layer, :, rows.start : rows.stop] = weights

    replay(system.model, system.layout, condition, codes, see)
    assert [slot.place for slot in slots[:text]] == [TEXT] * text
    for ours, dense in zip(found, looks, strict=True):
        expected = torch.cat([dense[:, text:, :text].sum(2, keepdim=True), dense[:, text:, text:]], 2)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("stage", "grid", "window"), STAGES[1:3])
@torch.no_grad()
def test_weights_times_values_are_the_output(
    make_system: MakeSystem, make_text: MakeText, monkeypatch, stage, grid, window
) -> None:
    """Checks the weights of every pass, spatial ones included: multiplied by the values, they give the output."""
    system, condition = make_system(stage, grid, window, 5, None, 2), Condition(make_text((3,)), text_bonus=BONUS)
    seen = 0

    def compared(q: Tensor, kv: Tensor, plan: MaskPlan) -> Tensor:
        nonlocal seen
        seen += 1
        out = attend(q, kv, plan)
        weights = attention_weights(q, kv[0], plan)
        torch.testing.assert_close(weights.sum(3), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-12)
        torch.testing.assert_close((weights @ kv[1]).transpose(1, 2).flatten(2), out, rtol=1e-9, atol=1e-12)
        return out

    monkeypatch.setattr(transformer, "attend", compared)
    replay(system.model, system.layout, condition, system.codes(1, 5), lambda *_: None)
    assert seen == 2 * system.oracle.num_layers * (5 if stage == "sequential" else 3)


@pytest.mark.parametrize(("stage", "grid", "window"), STAGES[1:3])
@torch.no_grad()
def test_figures_are_those_of_the_oracle(make_system: MakeSystem, make_text: MakeText, stage, grid, window) -> None:
    """Checks means and positions: which frame attends to which, and which slot was fed the code at its position."""
    system, condition = make_system(stage, grid, window, 5, None, 2), Condition(make_text((3,)), text_bonus=BONUS)
    layout, codes = system.layout, system.codes(1, 5)
    slots, looks = oracle_looks(system, condition, codes[:, layout.order])
    found = measure(stage, system.model, layout, condition, codes)
    area = layout.frame_slots
    for layer, dense in enumerate(looks):
        shares = torch.zeros(HEADS, 5, 6)
        same = torch.zeros(HEADS)
        right = torch.zeros(HEADS)
        for row, query in enumerate(slots):
            for column, key in enumerate(slots):
                if query.place == TEXT:
                    continue
                weights = dense[:, row, column].float()
                shares[:, query.place, key.place + 1] += weights / area
                if query.place in layout.loss_places and key.place == query.place - 1 and key.index > 0:
                    fed = key.index - 1
                    same += weights * (fed == query.index)
                    right += weights * (fed == query.index + 1 and fed % grid > 0)
        count = area * len(layout.loss_places)
        torch.testing.assert_close(found.shares[layer], shares, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.same_place[layer], same / count, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.steps[layer, :, grid - 1, grid], right / count, rtol=1e-4, atol=1e-6)
        gate = 1 - torch.sigmoid(system.model.channel.blocks[layer].gate)
        torch.testing.assert_close(found.gates[layer], gate.float())


def test_stages_see_their_own_part_of_the_clip(model: CogVideo) -> None:
    """Checks the frames and the rate that each stage sees: every second frame of the whole clip, or all frames of its
    first half. A stage with guidance gets no text bonus."""
    prompt, later = "一只猫在草地上奔跑。", replace(model.config.later_sampling, guidance=3.0)
    settings = replace(GenerationSettings.of(model.config), later=later, text_bonus=BONUS)
    sizes = model.config.layout
    codes = torch.randint(NUM_CODES, (1, 9, sizes.grid**2), generator=torch.Generator().manual_seed(0))
    found = stage_attention(model, Request([prompt], [torch.Generator()], settings), codes)
    whole, half = (model.text.batch([prompt], [seconds], sizes.text_slots) for seconds in (4.0, 2.0))
    keys = measure(
        "sequential",
        model.sequential,
        SequenceLayout.sequential(sizes),
        Condition(whole),
        codes[:, [0, 2, 4, 6, 8]],
    )
    between = measure(
        "interpolation",
        model.interpolation,
        SequenceLayout.interpolation(sizes),
        Condition(half, text_bonus=BONUS),
        codes[:, :5],
    )
    for ours, expected in zip(found, (keys, between), strict=True):
        assert ours.name == expected.name
        assert torch.equal(ours.shares, expected.shares)
        assert torch.equal(ours.steps, expected.steps)


def test_the_command_writes_a_picture_and_figures(model: CogVideo, tmp_path: Path) -> None:
    """Checks the command's output: both stages, shares that sum to one, and a picture that is not blank."""
    output = tmp_path / "new" / "look.png"
    assert main(["inspect", "attention", str(model.folder), "一只猫在草地上奔跑。", "--output", str(output)]) == 0
    assert np.asarray(Image.open(output)).std() > 10
    record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["prompt"] == "一只猫在草地上奔跑。"
    assert record["model"] == "model"
    assert [each["stage"] for each in record["stages"]] == ["sequential", "interpolation"]
    sequential, interpolation = record["stages"]
    assert (sequential["seconds"], interpolation["seconds"]) == ([0, 1, 2, 3, 4], [0, 0.5, 1, 1.5, 2])
    for stage in record["stages"]:
        shares = np.array(stage["shares"])
        assert shares.shape[1:] == (5, 6)
        np.testing.assert_allclose(shares.sum(2), 1, atol=1e-4)
    assert np.array(sequential["shares"])[:, 0, 2:].max() == 0  # the first frame attends to no later one
    assert np.array(interpolation["shares"])[:, 0, [2, 4]].max() == 0  # given frames attend to no generated one


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--output", "x.jpg"], "output is x.jpg, expected a .png file"),
        (["--seed", "-1"], "seed is -1, expected a number"),
    ],
)
def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    """Reports bad options without a traceback, before any model is loaded."""
    assert main(["inspect", "attention", "nowhere", "a cat", *arguments]) == 2
    assert told in capsys.readouterr().err
