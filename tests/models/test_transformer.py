"""The transformer of every stage: masks, equality with a dense oracle, causality, and what a stage inherits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cogvideo import kernels
from cogvideo.config import LayoutConfig, StageConfig, TransformerConfig, preset
from cogvideo.layout import SequenceLayout
from cogvideo.models.attention import CellGroup, Chunk, MaskPlan, attend, split_heads
from cogvideo.models.plans import _dense, _structure, _with_text, full_pass, text_mask
from cogvideo.models.transformer import Base, TemporalChannel, Transformer, inherit, initialize
from cogvideo.text import PaddedText
from conftest import HEADS, NUM_CODES, START, TEXT_SLOTS, VOCAB_SIZE, MakeSystem, MakeText, System
from reference import TEXT, Slot, all_slots, relative_error, visible

CPU = torch.device("cpu")
STAGES = [
    ("image", 4, 0, 1),
    ("sequential", 4, 0, 5),
    ("sequential", 4, 2, 5),
    ("sequential", 4, 4, 3),
    ("sequential", 6, 2, 2),
    ("interpolation", 4, 0, 5),
    ("interpolation", 4, 2, 5),
    ("interpolation", 4, 4, 5),
    ("interpolation", 8, 4, 3),
    ("image", (2, 5), 0, 1),
    ("sequential", (3, 5), 2, 2),
    ("interpolation", (5, 3), 4, 3),
]


def weights_of(plan: MaskPlan, num_rows: int, num_keys: int, batch: int) -> Tensor:
    """Attention weights of a plan if all scores are 0, (batch, rows, keys); each key's value is one-hot."""
    kv = torch.stack([torch.zeros(num_keys, num_keys), torch.eye(num_keys)]).double()
    q = torch.zeros(batch, 1, num_rows, num_keys, dtype=torch.float64)
    return attend(q, kv[:, None, None].expand(-1, batch, 1, -1, -1), plan)


def fed_slots(layout: SequenceLayout, num_frames: int) -> list[int]:
    """Row of each slot of a pass in the natural order that the oracle's masks use."""
    natural = {slot: row for row, slot in enumerate(all_slots(layout.text_slots, layout.num_frames, layout.sides))}
    text = [natural[Slot(TEXT, index)] for index in range(layout.text_slots)]
    places = layout.order[:num_frames]
    return text + [natural[Slot(place, index)] for place in places for index in range(layout.frame_slots)]


def check_masks(stage: str, layout: SequenceLayout, window: int, mask: Tensor, num_frames: int) -> None:
    """Check that in a full pass, every row attends to exactly the keys of the reference rule, with equal weight."""
    video = stage != "image"
    plan = full_pass(layout, window if video else None, mask, torch.float64, num_frames)
    order, text, rows = fed_slots(layout, num_frames), layout.text_slots, num_frames * layout.frame_slots
    assert len(plan.temporal) == (0 if not video else 2 if window else 1)
    spatial = weights_of(plan.spatial, text + rows, text + rows, len(mask))
    temporal = [weights_of(each, rows, text + rows, len(mask)) for each in plan.temporal if rows]
    for sample, real in enumerate(mask.tolist()):
        for block, ours in enumerate(temporal or [None]):
            seen = visible(stage, layout.num_frames, layout.shape or layout.grid, window, block == 1, tuple(real))
            expected = seen.spatial[order][:, order].double()
            torch.testing.assert_close(spatial[sample], expected / expected.sum(1, keepdim=True))
            if ours is not None:
                expected = seen.temporal[order][text:, order].double()
                torch.testing.assert_close(ours[sample], expected / expected.sum(1, keepdim=True))


def run(system: System, text: PaddedText, codes: Tensor, bonus: float = 0.0) -> Tensor:
    """Rows of a full pass over text and the frames of `codes`, which are in rank order."""
    layout, num_frames = system.layout, codes.shape[1]
    dtype = system.model.base.words.weight.dtype
    plan = full_pass(layout, system.model.window, text.mask, dtype, num_frames, bonus)
    positions = layout.frame_positions(range(num_frames)).expand(len(codes), -1)
    return system.model(
        torch.cat([text.tokens, layout.feed(codes, START)], 1),
        torch.cat([layout.text_positions(text.mask), positions], 1),
        plan,
    )


def logits_of(system: System, text: PaddedText, codes: Tensor) -> Tensor:
    """Logits of all frame slots, (batch, frames, slots, codes)."""
    x = run(system, text, codes)[:, system.layout.text_slots :]
    return system.model.base.logits(x).unflatten(1, codes.shape[1:])


# Masks


@pytest.mark.parametrize("lengths", [(TEXT_SLOTS,), (3, TEXT_SLOTS), (1, 4)])
@pytest.mark.parametrize(("stage", "grid", "window", "num_frames"), STAGES)
def test_masks_are_the_rule_in_words(
    make_system: MakeSystem, make_text: MakeText, stage, grid, window, num_frames, lengths
) -> None:
    """Catches any row that sees a key it must not, or misses one it should, in either channel and kind of block."""
    system = make_system(stage, grid, window, num_frames)
    check_masks(stage, system.layout, window, make_text(lengths).mask, system.layout.num_frames)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("stage", "grid", "window", "num_frames"), STAGES)
def test_the_plan_of_a_gpu_shows_the_same(
    make_system: MakeSystem, make_text: MakeText, stage, grid, window, num_frames, padded
) -> None:
    """Checks that the single mask for CUDA equals the cells and chunks it replaces, with and without pads."""
    layout = make_system(stage, grid, window, num_frames).layout
    text, rows = layout.text_slots, layout.num_frames * layout.frame_slots
    mask = text_mask(make_text((2, TEXT_SLOTS) if padded else (TEXT_SLOTS, TEXT_SLOTS)).mask, 0.0, torch.float64)
    for number, plan in enumerate(_structure(layout, None if stage == "image" else window, layout.num_frames, CPU)):
        own = rows if number else text + rows
        cells, whole = (_with_text(each, mask) for each in (plan, _dense(plan, own, text + rows)))
        assert len(whole.groups) == len(whole.groups[0].chunks) == 1
        expected = weights_of(cells, own, text + rows, 2)
        torch.testing.assert_close(weights_of(whole, own, text + rows, 2), expected, rtol=0, atol=1e-12)


def test_plans_are_made_once(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards against copying indices at every step, and against plans cached in generation that break training."""
    system, text = make_system("interpolation", 4, 2), make_text((2, 4))
    _structure.cache_clear()
    with torch.inference_mode():
        first = full_pass(system.layout, 2, text.mask, torch.float64, 5)
    second = full_pass(system.layout, 2, text.mask, torch.float64, 5)
    for one, other in zip(first.temporal, second.temporal, strict=True):
        assert one.restore is other.restore
        assert all(a.rows is b.rows for a, b in zip(one.groups, other.groups, strict=True))
    embeddings = system.model.base.words.weight
    torch.autograd.grad(logits_of(system, text, system.codes(2, 5)).sum(), embeddings)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_masks_of_any_sizes(data: st.DataObject) -> None:
    """Guards against masks that are only right at the sizes tested above, and against wrong partial prefills."""
    stage = data.draw(st.sampled_from(["image", "sequential", "interpolation"]), "stage")
    window = data.draw(st.sampled_from([0, 2, 4, 6]), "window") if stage != "image" else 0
    grid = window * data.draw(st.integers(1, max(1, 6 // window)), "grid") if window else data.draw(st.integers(1, 5))
    num_frames = data.draw(st.integers(3 if stage == "interpolation" else 1, 5), "frames")
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2), "lengths")
    sizes = LayoutConfig(grid, num_frames, 5, 5, 5)
    make = {
        "image": SequenceLayout.text_to_image,
        "sequential": SequenceLayout.sequential,
        "interpolation": SequenceLayout.interpolation,
    }
    layout = make[stage](sizes)
    mask = torch.arange(5) >= 5 - torch.tensor(lengths)[:, None]
    check_masks(stage, layout, window, mask, data.draw(st.integers(0, layout.num_frames), "fed"))


@pytest.mark.parametrize(("stage", "window"), [("sequential", 0), ("sequential", 2), ("interpolation", 2)])
def test_text_bonus_of_a_full_pass(make_system: MakeSystem, make_text: MakeText, stage, window) -> None:
    """Checks the bonus while given frames are prefilled: on text keys, in the spatial channel only."""
    layout, text, bonus = make_system(stage, 4, window).layout, make_text((3, TEXT_SLOTS)), 1.4
    plan = full_pass(layout, window, text.mask, torch.float64, 5, bonus)
    rows, words = layout.length, layout.text_slots
    spatial = weights_of(plan.spatial, rows, rows, 2)[:, words:]
    ratio = spatial[:, :, words - 1] / spatial[:, :, words:].amax(2)  # the last text slot is always real
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.exp(bonus)))
    for each in plan.temporal:
        temporal = weights_of(each, rows - words, rows, 2)
        ratio = temporal[:, :, words - 1] / temporal[:, :, words:].amax(2)
        torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_cost_follows_the_structure(make_system: MakeSystem, make_text: MakeText, monkeypatch) -> None:
    """Guards against scoring the dense (text + frames) square: scores that the structure rules out are not computed."""
    scored: list[tuple[int, int]] = []
    attention = F.scaled_dot_product_attention

    def count(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        scored.append((q.shape[0] * q.shape[1], q.shape[2] * k.shape[2]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)

    def cost(num_frames: int) -> tuple[int, int]:
        """Number of scores of a block in both channels, and the largest score matrix; window 2, grid 8."""
        scored.clear()
        system = make_system("sequential", 8, 2, num_frames, None, 1)
        with torch.no_grad():
            run(system, make_text((TEXT_SLOTS,)), system.codes(1, num_frames))
        return sum(cells * scores for cells, scores in scored) // HEADS, max(scores for _, scores in scored)

    slots, area, text = 64, 4, TEXT_SLOTS
    for num_frames in (1, 2, 5):
        spatial = text**2 + num_frames * slots * (text + slots)
        temporal = sum(slots * (text + rank * area) for rank in range(1, num_frames + 1))
        assert cost(num_frames) == (spatial + temporal, slots * (text + slots))


# Equality with the dense oracle


@pytest.mark.parametrize("bonus", [0.0, 1.4])
@pytest.mark.parametrize(("stage", "grid", "window", "num_frames"), STAGES)
@torch.no_grad()
def test_full_pass_equals_the_dense_oracle(
    make_system: MakeSystem, make_text: MakeText, stage, grid, window, num_frames, bonus
) -> None:
    """Checks the whole computation: norms, gates, positions, shift, which output projection applies, tied logits."""
    system, text = make_system(stage, grid, window, num_frames), make_text((2, TEXT_SLOTS))
    codes = system.codes(2, system.layout.num_frames)
    x = run(system, text, codes, bonus)
    words, area = system.layout.text_slots, system.layout.frame_slots
    ours = system.model.base.logits(x[:, words:]).unflatten(1, codes.shape[1:])
    text_logits = F.linear(system.model.base.norm(x[:, :words]), system.model.base.words.weight)
    for sample in range(2):
        prompt = system.prompt(text, sample)
        slots, rows = system.oracle.hidden(prompt, system.at_places(codes[sample]), bonus)
        assert [slot.place for slot in slots[words::area]] == list(system.layout.order)
        expected = system.oracle.logits(rows[words:]).view_as(ours[sample])
        torch.testing.assert_close(ours[sample], expected, rtol=1e-9, atol=1e-9)
        real, whole = text.mask[sample], system.oracle.logits(rows[:words], whole_vocabulary=True)
        torch.testing.assert_close(text_logits[sample][real], whole[real], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_oracles_weights_matter(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards the tests themselves: if the weights were too small, wrong masks would give nearly equal logits."""
    system, text = make_system("sequential", 4, 2), make_text((TEXT_SLOTS,))
    codes = system.codes(1, 5)
    other = make_system("sequential", 4, 0)._replace(layout=system.layout)
    windowed, full = logits_of(system, text, codes), logits_of(other, text, codes)
    assert (windowed - full).abs().max() > 0.5
    assert windowed.std() > 1


@torch.no_grad()
def test_what_pads_hold_does_not_matter(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards against pads that are attended to, or that shift the positions of real text."""
    system, text = make_system("interpolation", 4, 2), make_text((2, 5))
    codes = system.codes(2, 5)
    before = logits_of(system, text, codes)
    other = PaddedText(torch.where(text.mask, text.tokens, START), text.mask)
    assert torch.equal(logits_of(system, other, codes), before)
    assert not torch.equal(text.tokens, other.tokens)


# Causality


def reach(system: System, lengths_mask: tuple[bool, ...]) -> Tensor:
    """Matrix of which slots depend on which through all blocks, by the dense masks, in natural order."""
    oracle = system.oracle
    total = len(all_slots(len(lengths_mask), oracle.num_frames, oracle.grid))
    reached = torch.eye(total)
    for layer in range(oracle.num_layers):
        shifted = bool(oracle.window) and layer % 2 == 1
        masks = visible(oracle.stage, oracle.num_frames, oracle.grid, oracle.window, shifted, lengths_mask)
        step = torch.eye(total) + masks.spatial.float() + masks.temporal.float()
        reached = ((step @ reached) > 0).float()
    return reached > 0


@pytest.mark.parametrize(("stage", "grid", "window", "num_frames"), STAGES)
@torch.no_grad()
def test_a_code_changes_exactly_the_logits_that_may_see_it(
    make_system: MakeSystem, make_text: MakeText, stage, grid, window, num_frames
) -> None:
    """Guards against the future leaking into the past through any chain of blocks, and slots that see too little."""
    system, text = make_system(stage, grid, window, num_frames, None, 2), make_text((4,))
    layout, generator = system.layout, torch.Generator().manual_seed(3)
    codes = system.codes(1, layout.num_frames)
    before = logits_of(system, text, codes)
    order = fed_slots(layout, layout.num_frames)[layout.text_slots :]
    reached = reach(system, system.prompt(text, 0).mask)
    for rank in range(layout.num_frames):
        for slot in [*torch.randint(layout.frame_slots, (4,), generator=generator).tolist(), layout.frame_slots - 1]:
            other = codes.clone()
            other[0, rank, slot] = (other[0, rank, slot] + 1) % NUM_CODES
            changed = (logits_of(system, text, other) != before).any(-1).flatten()
            if slot == layout.frame_slots - 1:  # never fed
                assert not changed.any()
                continue
            fed = order[rank * layout.frame_slots + slot + 1]
            assert torch.equal(changed, reached[order, fed]), (rank, slot)


@torch.no_grad()
def test_text_changes_all_frames_and_frames_no_text(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards against text rows that see frames, which would invalidate a cached prefix."""
    system, text = make_system("sequential", 4, 2), make_text((4,))
    codes = system.codes(1, 5)
    before = run(system, text, codes)
    tokens = text.tokens.clone()
    tokens[0, -1] = (tokens[0, -1] - NUM_CODES + 1) % (START - NUM_CODES) + NUM_CODES
    changed = (run(system, PaddedText(tokens, text.mask), codes) != before).any(-1)[0]
    assert changed[2:].all()
    by_codes = run(system, text, (codes + 1) % NUM_CODES)
    assert torch.equal(by_codes[:, :TEXT_SLOTS], before[:, :TEXT_SLOTS])


# What a stage adds to the image model


@pytest.mark.parametrize(("stage", "window"), [("sequential", 0), ("interpolation", 2)])
def test_training_changes_the_channel_alone(make_system: MakeSystem, make_text: MakeText, stage, window) -> None:
    """Guards against gradients that reach the frozen base or miss part of the channel."""
    system = copy.deepcopy(make_system(stage, 4, window))
    system.model.base.requires_grad_(False)
    codes, slots = system.codes(2, 5), system.layout.loss_slots()
    logits = logits_of(system, make_text((2, 5)), codes).flatten(1, 2)[:, slots]
    F.cross_entropy(logits.flatten(0, 1), codes.flatten(1)[:, slots].flatten()).backward()
    assert all(each.grad is None for each in system.model.base.parameters())
    assert system.model.channel is not None
    without = {
        name for name, each in system.model.channel.named_parameters() if each.grad is None or not each.grad.any()
    }
    assert without == set()
    positions = system.model.channel.positions.weight.grad
    assert positions is not None
    assert positions[:64].any(1).all()  # four later frames; the table has room for a fifth
    assert not positions[64:].any()


@pytest.mark.parametrize("window", [0, 2])
@torch.no_grad()
def test_closed_gates_give_the_image_model_frame_by_frame(make_system: MakeSystem, make_text: MakeText, window) -> None:
    """Checks inheritance: with the temporal channel gated off, every frame matches the image model's output."""
    system, image = copy.deepcopy(make_system("sequential", 4, window)), make_system("image", 4)
    base, channel = system.model.base, system.model.channel
    assert channel is not None
    base.load_state_dict(image.model.base.state_dict())
    inherit(channel, base, torch.Generator().manual_seed(0))
    for block in channel.blocks:
        block.gate.fill_(1e4)
    text, codes = make_text((2, 5)), system.codes(2, 5)
    video = logits_of(system, text, codes)
    for frame in range(5):
        alone = logits_of(image, text, codes[:, frame : frame + 1])[:, 0]
        torch.testing.assert_close(video[:, frame], alone, rtol=0, atol=1e-10)
    for block in channel.blocks:
        block.gate.fill_(0)
    assert (logits_of(system, text, codes) - video).abs().max() > 0.1


@torch.no_grad()
def test_a_stage_starts_from_the_image_model() -> None:
    """Checks what is inherited: q, k, v, and positions are the base's, gates mix evenly, the rest is fresh."""
    config = TransformerConfig(3, 32, 2, VOCAB_SIZE, NUM_CODES, START, NUM_CODES, 40)
    base, channel = Base(config), TemporalChannel(config, LayoutConfig(4, 5, 8, 8, 10), StageConfig(2))
    for parameter in base.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    before = copy.deepcopy(base.state_dict())
    inherit(channel, base, torch.Generator().manual_seed(1))
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])
    for own, inherited in zip(channel.blocks, base.blocks, strict=True):
        assert torch.equal(own.qkv.weight, inherited.qkv.weight)
        assert torch.equal(own.qkv.bias, inherited.qkv.bias)
        assert own.qkv.weight.data_ptr() != inherited.qkv.weight.data_ptr()
        assert not torch.equal(own.out.weight, inherited.out.weight)
        assert own.out.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not own.out.bias.any()
        assert not own.gate.any()
    for frame in range(5):
        assert torch.equal(channel.positions.weight[16 * frame :][:16], base.positions.weight[10:26])


@torch.no_grad()
def test_random_start() -> None:
    """Checks what `initialize` assigns: wrong standard deviations make deep models diverge or learn slowly."""
    config = TransformerConfig(8, 128, 2, 300, 200, 299, 200, 300)
    layout = LayoutConfig(4, 5, 8, 8, 10)
    base, channel = Base(config), TemporalChannel(config, layout, StageConfig())
    for module in (base, channel):
        initialize(module, 8, torch.Generator().manual_seed(0))
        for name, value in module.named_parameters():
            kind = name.split(".")[-1]
            if kind in ("bias", "gate"):
                assert not value.any(), name
            elif "norm" in name:
                assert (value == 1).all(), name
            else:
                narrow = module is base and name.split(".")[-2] in ("out", "mlp_out")
                assert value.std().item() == pytest.approx(0.02 / 4 if narrow else 0.02, rel=0.05), name
    again = Base(config)
    initialize(again, 8, torch.Generator().manual_seed(0))
    for ours, other in zip(base.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, other)


def test_released_numbers_of_parameters() -> None:
    """Checks the size of the released model: 5.90 billion parameters in the base, 1.82 billion more per video stage."""
    config = preset("cogvideo")
    with torch.device("meta"):
        base = Base(config.transformer)
        channel = TemporalChannel(config.transformer, config.layout, config.sequential)
    sizes = [sum(each.numel() for each in module.parameters()) for module in (base, channel)]
    assert [round(each / 1e9, 2) for each in sizes] == [5.90, 1.82]


@torch.no_grad()
def test_one_base_serves_all_stages(make_system: MakeSystem, make_text: MakeText) -> None:
    """Guards against a stage that copies or changes the base it is given."""
    image, video = make_system("image", 4), make_system("sequential", 4)
    base = copy.deepcopy(image.model.base)
    before = logits_of(image, make_text((3,)), image.codes(1, 1))
    stage = System(Transformer(base, video.model.channel), video.layout, video.oracle)
    logits_of(stage, make_text((3,)), video.codes(1, 5))
    shared = System(Transformer(base), image.layout, image.oracle)
    assert stage.model.base is shared.model.base
    assert torch.equal(logits_of(shared, make_text((3,)), image.codes(1, 1)), before)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_other_precisions(make_system: MakeSystem, make_text: MakeText, dtype, error) -> None:
    """Guards against masks or tables whose dtype differs from the model's, with pads and with a bonus."""
    text = make_text((3, TEXT_SLOTS))
    for stage, window in (("sequential", 0), ("interpolation", 2)):
        exact = make_system(stage, 4, window)
        rough = System(copy.deepcopy(exact.model).to(dtype), exact.layout, exact.oracle)
        codes = exact.codes(2, 5)
        for bonus in (0.0, 1.4):
            ours, expected = run(rough, text, codes, bonus), run(exact, text, codes, bonus)
            assert ours.dtype == dtype
            real = torch.cat([text.mask, torch.ones(2, 80, dtype=torch.bool)], 1)
            assert relative_error(ours[real], expected[real]) < error


def test_a_pass_of_text_alone(make_system: MakeSystem, make_text: MakeText) -> None:
    """Checks the prefill of a stage without given frames: text rows match the image model's."""
    system, image = make_system("sequential", 4, 2), make_system("image", 4)
    none = torch.zeros(2, 0, 16, dtype=torch.int64)
    text = make_text((2, 5))
    torch.testing.assert_close(run(system, text, none), run(image, text, none), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bonus", [0.0, 1.4])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(("stage", "window"), [("sequential", 0), ("sequential", 2), ("interpolation", 2)])
def test_gradients_of_attention(
    stage: str, window: int, short: bool, bonus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the hand-written backward pass, for runs of keys and for few rows, against finite differences."""
    monkeypatch.setattr(kernels, "_is_short", lambda q: short)
    layout = getattr(SequenceLayout, stage)(LayoutConfig(4, 5, 3, 3, 3))
    mask = torch.tensor([[False, True, True], [True, True, True]])
    plan = full_pass(layout, window, mask, torch.float64, 5, bonus)
    fused = torch.randn(2, layout.length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def outputs(fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, kv = split_heads(fused, 1)
        return attend(q, kv, plan.spatial), *(attend(q[:, :, 3:], kv, each) for each in plan.temporal)

    torch.autograd.gradcheck(outputs, (fused.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("rows", [kernels.SHORT_ROWS - 1, kernels.SHORT_ROWS])
def test_gradients_of_bfloat16_attention(rows: int) -> None:
    """Checks that both CPU backward paths stay close to float64, with either kind of mask or none."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(2, 3, rows, 16, generator=generator).bfloat16() for _ in range(4))
    seen = torch.rand(2, 1, rows, rows, generator=generator) > 0.5
    for mask in (None, seen, seen * 1.5):
        plan = MaskPlan((CellGroup(None, None, (Chunk(None, None, mask),)),))
        found = []
        for dtype in (torch.bfloat16, torch.float64):
            inputs = [each.to(dtype).requires_grad_() for each in (q, k, v)]
            out = attend(inputs[0], torch.stack(inputs[1:]), plan)
            found.append(torch.autograd.grad(out, inputs, gradient.to(dtype).transpose(1, 2).flatten(2)))
        for ours, exact in zip(*found, strict=True):
            assert (ours - exact).norm() < 0.01 * exact.norm()
