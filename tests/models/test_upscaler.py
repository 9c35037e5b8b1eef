"""Super-resolution: parity with the released model, and which keys a high slot attends to."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import repeat
from safetensors import safe_open
from torch.nn import functional as F

from cogvideo.bundle.convert import released_base_names, released_channel_names
from cogvideo.config import LayoutConfig, SamplingConfig, TransformerConfig, UpscalerConfig
from cogvideo.generation.sampling import Clusters, log_probabilities
from cogvideo.generation.upscale import SLOTS_PER_DRAW, slot_noise, upscale
from cogvideo.layout import UpscaleLayout
from cogvideo.models.attention import attend
from cogvideo.models.transformer import Base, initialize
from cogvideo.models.upscaler import UpscaleChannel, Upscaler, inherit_upscaler, neighborhoods
from cogvideo.text import PaddedText
from reference import relative_error

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")
GRID, RATIO, NUM_CODES = 6, 3, 32
ONE_BY_ONE = SamplingConfig()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(num_layers=2, grid=GRID, ratio=RATIO, dtype=torch.float64, **sizes):
    """Random upscaler with weights large enough that every slot differs."""
    upscaler = UpscalerConfig(ratio=ratio, text_slots=4, low_position=5, **sizes)
    layout = LayoutConfig(grid=grid, text_slots=4, image_text_slots=4, frame_position=4)
    config = TransformerConfig(num_layers, 16, 2, 48, NUM_CODES, 46, 32, num_positions=5 + grid**2)
    model = Upscaler(Base(config), UpscaleChannel(config, layout, upscaler)).double()
    for part, seed in ((model.base, 1), (model.channel, 2)):
        initialize(part, num_layers, seeded(seed))
        for name, parameter in part.named_parameters():
            if "norm" not in name:
                parameter.data.mul_(20)
    return model.to(dtype)


def inputs(batch=2, grid=GRID, seed=0):
    """Text whose first row starts with a pad, and low codes."""
    tokens = torch.randint(NUM_CODES, 46, (batch, 4), generator=seeded(seed))
    mask = torch.ones(batch, 4, dtype=torch.bool)
    mask[0, 0] = False
    return PaddedText(tokens, mask), torch.randint(NUM_CODES, (batch, grid**2), generator=seeded(seed + 1))


def noise_of(model, count):
    slots, codes = model.channel.layout.high_slots, model.base.config.num_codes
    return [slot_noise(seeded(7 + frame), slots, codes, CPU) for frame in range(count)]


def seen_by(slot, layout, upscaler):
    """Keys [high slots | low codes] that a high slot attends to, straight from the spec: the oracle."""
    height, width = layout.shape or (layout.low_grid, layout.low_grid)
    ratio = layout.ratio
    row, column = divmod(slot, width * ratio)
    keys = []
    for down, across, first, top, left, rows, columns in (
        (height * ratio, width * ratio, 0, row, column, upscaler.high_rows, upscaler.high_columns),
        (height, width, layout.high_slots, row // ratio, column // ratio, *[upscaler.low_side] * 2),
    ):
        for r in range(top - (rows - 1) // 2, top + (rows - 1) // 2 + 1):
            for c in range(left - (columns - 1) // 2, left + (columns - 1) // 2 + 1):
                if 0 <= r < down and 0 <= c < across:
                    keys.append(first + r * across + c)
    return keys


def neighborhood_attention(q, k, v, layout, upscaler):
    """Slot-by-slot attention over the oracle's keys, (batch, high, heads * head_dim)."""
    outs = []
    for slot in range(layout.high_slots):
        keys = seen_by(slot, layout, upscaler)
        scores = torch.einsum("bhd,bhkd->bhk", q[:, :, slot], k[:, :, keys]) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), v[:, :, keys]).flatten(1))
    return torch.stack(outs, dim=1)


@pytest.fixture(scope="module")
def released():
    """The released case: its tensors, its settings, and our model with the released weights in float64."""
    with safe_open(GOLDEN / "dsr.safetensors", "pt") as file:
        case, meta = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["meta"])  # noqa: SIM118
    layers, hidden, vocab = meta["num_layers"], meta["hidden_size"], meta["vocab_size"]
    text_slots, low_end, _ = meta["layout"]
    config = TransformerConfig(
        layers, hidden, meta["num_attention_heads"], vocab, meta["num_image_tokens"], meta["boi"], meta["pad"], 1024
    )
    grid = round((low_end - text_slots) ** 0.5)
    layout = LayoutConfig(grid, text_slots=text_slots, image_text_slots=text_slots, frame_position=512)
    channel = UpscaleChannel(config, layout, UpscalerConfig(text_slots=text_slots, low_position=513))
    model = Upscaler(Base(config), channel).double()
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = json.loads((GOLDEN / "state_dict_shapes_dsr.json").read_text())
    weights = {name: torch.from_numpy(value).double() for name, value in module.weights(shapes, meta["seed"]).items()}
    names = {name: ours for name, ours in released_channel_names(layers).items() if not ours.endswith("gate")}
    channel.load_state_dict({ours: weights.pop(name) for name, ours in names.items()})
    model.base.load_state_dict({ours: weights.pop(name) for name, ours in released_base_names(layers).items()})
    assert not weights
    slots = torch.full((len(case["text"]), text_slots), meta["pad"])
    slots[:, -case["text"].shape[1] :] = case["text"]
    return case, meta, model, PaddedText(slots, torch.arange(text_slots).expand_as(slots) >= text_slots - 7)


def test_released_codes_and_logits(released):
    """Catches a deviation in any convention: positions, inputs, masks, which weights apply where, tied logits."""
    case, meta, model, text = released
    codes, high = case["image_tokens"], model.channel.layout.high_slots
    with torch.inference_mode():
        logits = model.base.logits(model(*text, codes)[:, case["probe"]])
    assert (logits - case["logits"]).abs().max() < 1e-4
    rng = np.random.default_rng(meta["noise_seed"])
    noise = torch.from_numpy(rng.gumbel(size=(len(codes), high, meta["num_image_tokens"])))
    drawn = upscale(model, text, codes, [iter(frame.split(SLOTS_PER_DRAW)) for frame in noise], ONE_BY_ONE)
    assert torch.equal(drawn, case["upsampled"])


@pytest.mark.parametrize(
    ("grid", "ratio", "tile"), [(4, 1, 4), (5, 2, 4), (6, 3, 4), (7, 3, 2), (8, 2, 3), (8, 4, 4), (1, 3, 4), (11, 1, 4)]
)
def test_tiles_equal_attention_slot_by_slot(grid, ratio, tile):
    """Catches wrong neighborhoods, especially at borders and where tiles do not divide the frame."""
    upscaler, layout = UpscalerConfig(ratio=ratio), UpscaleLayout(4, grid, ratio, 5)
    q = torch.randn(2, 2, layout.high_slots, 4, dtype=torch.float64, generator=seeded())
    kv = torch.randn(2, 2, 2, layout.high_slots + layout.low_slots, 4, dtype=torch.float64, generator=seeded(1))
    ours = attend(q, kv, neighborhoods(layout, upscaler, CPU, tile))
    torch.testing.assert_close(ours, neighborhood_attention(q, *kv, layout, upscaler))


@pytest.mark.parametrize("shape", [(3, 6), (5, 2)])
def test_frames_that_are_not_square(shape):
    """Checks neighborhoods and positions of non-square frames, which use only the center of both tables."""
    upscaler, layout = UpscalerConfig(ratio=2), UpscaleLayout(4, 6, 2, 5, shape)
    q = torch.randn(1, 2, layout.high_slots, 4, dtype=torch.float64, generator=seeded())
    kv = torch.randn(2, 1, 2, layout.high_slots + layout.low_slots, 4, dtype=torch.float64, generator=seeded(1))
    ours = attend(q, kv, neighborhoods(layout, upscaler, CPU))
    torch.testing.assert_close(ours, neighborhood_attention(q, *kv, layout, upscaler))
    model, (text, codes) = make(grid=6, ratio=2), inputs(grid=6)
    rows, columns = (slice((6 - side) // 2, (6 - side) // 2 + side) for side in shape)
    codes = codes.view(2, 6, 6)[:, rows, columns].flatten(1)
    before = model(*text, codes, layout)
    low, high = (
        model.base.positions.weight.data[5:41].view(6, 6, -1),
        model.channel.positions.weight.data.view(12, 12, -1),
    )
    changed = [table.clone() for table in (low, high)]
    for table, kept, ratio in zip((low, high), changed, (1, 2), strict=True):
        part = (slice(rows.start * ratio, rows.stop * ratio), slice(columns.start * ratio, columns.stop * ratio))
        table.normal_(generator=seeded(3))
        table[part] = kept[part]
    assert torch.equal(model(*text, codes, layout), before)
    for table, ratio in ((low, 1), (high, 2)):
        table[rows.stop * ratio - 1, columns.stop * ratio - 1] += 1
        after = model(*text, codes, layout)
        assert not torch.equal(after, before)
        before = after


def test_other_neighborhoods():
    """Guards against neighborhood sizes hard-coded to the released ones instead of read from the configuration."""
    upscaler, layout = UpscalerConfig(ratio=2, high_rows=3, high_columns=7, low_side=1), UpscaleLayout(4, 5, 2, 5)
    q = torch.randn(1, 2, layout.high_slots, 4, dtype=torch.float64, generator=seeded())
    kv = torch.randn(2, 1, 2, layout.high_slots + layout.low_slots, 4, dtype=torch.float64, generator=seeded(1))
    ours = attend(q, kv, neighborhoods(layout, upscaler, CPU))
    torch.testing.assert_close(ours, neighborhood_attention(q, *kv, layout, upscaler))


def test_memory_is_linear_in_slots():
    """Guards against masks or gathers that grow quadratically with the number of slots."""
    upscaler = UpscalerConfig()
    small, large = (neighborhoods(UpscaleLayout(4, grid, 3, 5), upscaler, CPU).groups for grid in (12, 24))
    keys = [sum(group.keys.numel() for group in groups) for groups in (small, large)]
    masks = [sum(group.chunks[0].mask.numel() for group in groups) for groups in (small, large)]
    assert keys[1] < 5 * keys[0]
    assert masks[1] == masks[0]


@pytest.mark.parametrize("slot", [0, 17, 160, 305, 323])
def test_one_block_sees_exactly_the_neighborhood(slot):
    """Catches high slots that miss a neighbor or attend outside their neighborhood in the whole model."""
    model, (text, codes) = make(num_layers=1), inputs(batch=1)
    layout, upscaler = model.channel.layout, model.channel.upscaler
    with torch.no_grad():
        before = model(*text, codes)
        low_slot = slot % layout.low_slots
        other = codes.clone()
        other[0, low_slot] = (other[0, low_slot] + 1) % NUM_CODES
        by_low = (model(*text, other) != before).any(-1)[0]
        model.channel.positions.weight[slot] *= -1
        by_high = (model(*text, codes) != before).any(-1)[0]
    seen = [seen_by(each, layout, upscaler) for each in range(layout.high_slots)]
    assert by_high.tolist() == [slot in keys for keys in seen]
    assert by_low.tolist() == [layout.high_slots + low_slot in keys for keys in seen]


def test_text_reaches_high_slots_through_low_codes_only():
    """Guards against high slots that attend to the text, and against pads that anything attends to."""
    text, codes = inputs(batch=1)
    word, pad = text.tokens.clone(), text.tokens.clone()
    word[0, 2] = (word[0, 2] - NUM_CODES + 1) % 14 + NUM_CODES
    pad[0, 0] = (pad[0, 0] - NUM_CODES + 1) % 14 + NUM_CODES
    for num_layers in (1, 2):
        model = make(num_layers)
        with torch.no_grad():
            before, by_word, by_pad = (model(tokens, text.mask, codes) for tokens in (text.tokens, word, pad))
        assert (by_word != before).any() == (num_layers == 2)
        assert torch.equal(by_pad, before)


def test_codes_do_not_depend_on_how_they_are_portioned():
    """Guards against noise or logits that are misaligned between chunks of slots."""
    model, (text, codes) = make(), inputs()
    labels, sampling = torch.arange(NUM_CODES) % 8, SamplingConfig(clusters=3, cluster_temperature=0.6)
    assert model.channel.layout.high_slots > SLOTS_PER_DRAW
    ours = upscale(model, text, codes, noise_of(model, 2), sampling, labels)
    with torch.no_grad():
        clusters = Clusters.of(labels, torch.device("cpu"))
        scores = log_probabilities(model.base.logits(model(*text, codes)), sampling, clusters)
    noise = torch.stack([torch.cat(list(frame)) for frame in noise_of(model, 2)])
    assert torch.equal(ours, (scores + noise).argmax(-1))
    assert (ours != scores.argmax(-1)).any()


def test_codes_do_not_depend_on_the_batch():
    """Guards against frames that depend on their batch position, the rest of the batch, or the frames per pass."""
    model, (text, codes), order = make(), inputs(batch=3), torch.tensor([2, 0, 1])
    whole = upscale(model, text, codes, noise_of(model, 3), ONE_BY_ONE, frames_per_pass=3)
    for frames in (1, 2):
        assert torch.equal(upscale(model, text, codes, noise_of(model, 3), ONE_BY_ONE, frames_per_pass=frames), whole)
    turned = PaddedText(text.tokens[order], text.mask[order])
    noise = [noise_of(model, 3)[frame] for frame in order]
    assert torch.equal(upscale(model, turned, codes[order], noise, ONE_BY_ONE, frames_per_pass=2), whole[order])


def test_noise_follows_from_the_frames_generator():
    """Guards against frames that share noise, and against chunks that repeat it."""
    first, again = (torch.cat(list(slot_noise(seeded(3), 600, 50, CPU))) for _ in range(2))
    generator = seeded(3)
    one, two = (torch.cat(list(slot_noise(generator, 600, 50, CPU))) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(one, first)
    assert not (one == two).all(-1).any()
    assert len(first.unique(dim=0)) == 600
    assert first.mean().item() == pytest.approx(0.5772, abs=0.03)  # Gumbel


def test_greedy_takes_the_most_likely_code():
    """Guards against noise in greedy sampling."""
    model, (text, codes) = make(), inputs()
    with torch.no_grad():
        expected = model.base.logits(model(*text, codes)).argmax(-1)
    assert torch.equal(upscale(model, text, codes, noise_of(model, 2), SamplingConfig(temperature=0.0)), expected)


def test_training_changes_the_channel_alone():
    """Guards against gradients that miss a channel parameter or reach the base, even after generation."""
    model, (text, codes) = make(), inputs()
    neighborhoods.cache_clear()
    upscale(model, text, codes, noise_of(model, 2), ONE_BY_ONE)  # caches the plan in inference mode
    model.base.requires_grad_(False)
    logits = model.base.logits(model(*text, codes))
    F.cross_entropy(logits.flatten(0, 1), torch.randint(NUM_CODES, (logits[..., 0].numel(),))).backward()
    assert all(each.grad is None for each in model.base.parameters())
    assert all(each.grad is not None and each.grad.abs().max() > 0 for each in model.channel.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    """Guards against masks or tables whose dtype differs from the model's."""
    (text, codes), exact = inputs(), make(num_layers=1)
    with torch.no_grad():
        ours, expected = make(num_layers=1, dtype=dtype)(*text, codes), exact(*text, codes)
    assert ours.dtype == dtype
    assert relative_error(ours, expected) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_channel_starts_from_the_base():
    """Catches an initialization that does not copy the image model's attention and positions to the right places."""
    model = make()
    inherit_upscaler(model.channel, model.base)
    base, low = model.base, model.base.positions.weight[5:].view(GRID, GRID, -1)
    for block, added in zip(base.blocks, model.channel.blocks, strict=True):
        assert torch.equal(added.qkv.weight, block.qkv.weight)
        assert torch.equal(added.out.bias, block.out.bias)
    high = model.channel.positions.weight.view(GRID * RATIO, GRID * RATIO, -1)
    assert torch.equal(high, repeat(low, "row column hidden -> (row a) (column b) hidden", a=RATIO, b=RATIO))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(2, 35, dtype=torch.int64)}, r"low codes of shape \(2, 35\), expected \(batch, 36\)"),
        ({"codes": torch.zeros(0, 36, dtype=torch.int64)}, "at least one frame"),
        ({"codes": torch.full((2, 36), NUM_CODES)}, r"got codes from 32 to 32, expected \[0, 32\)"),
        ({"codes": torch.zeros(2, 36)}, "expected torch.int64"),
        ({"tokens": torch.full((2, 5), 40)}, r"text of shape \(2, 5\) .* expected \(2, 4\)"),
        ({"tokens": torch.full((2, 4), 48)}, r"expected \[0, 48\)"),
        ({"mask": torch.zeros(2, 4, dtype=torch.bool)}, "text without any token"),
        ({"noise": []}, "noise of 0 frames, expected 2"),
        ({"frames_per_pass": 0}, "frames_per_pass is 0"),
    ],
)
def test_bad_input_is_refused(change, message, without_shape_checks):
    """Guards against invalid input that fails late, or not at all."""
    model, (text, codes) = make(num_layers=1), inputs()
    values = {"tokens": text.tokens, "mask": text.mask, "codes": codes, "noise": noise_of(model, 2)}
    values |= {"frames_per_pass": 1} | change
    with pytest.raises(ValueError, match=message):
        upscale(
            model,
            PaddedText(values["tokens"], values["mask"]),
            values["codes"],
            values["noise"],
            ONE_BY_ONE,
            frames_per_pass=values["frames_per_pass"],
        )
