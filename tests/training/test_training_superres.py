"""The super-resolution task: inputs and targets, corruption of low codes, and memorizing samples."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cogvideo.config import LayoutConfig, SamplingConfig, TextConfig, TransformerConfig, UpscalerConfig
from cogvideo.data.loader import ClipSample
from cogvideo.generation.upscale import upscale
from cogvideo.layout import UpscaleLayout
from cogvideo.models.transformer import Base, initialize
from cogvideo.models.upscaler import UpscaleChannel, Upscaler, inherit_upscaler
from cogvideo.text import TextTokenizer, pad_left
from cogvideo.training.objectives.superres import SuperresTask
from lessons import (
    assert_the_channel_alone_is_trained,
    changed_in,
    changes,
    large,
    learn,
    random_codes,
    rows_of,
    sample,
)

NUM_CODES, GRID, RATIO, SLOTS = 40, 4, 2, 20
SIZES, UPSCALER = LayoutConfig(GRID), UpscalerConfig(RATIO, SLOTS, SLOTS + 1, low_side=3)
LAYOUT = UpscaleLayout.of(SIZES, UPSCALER)
PROMPT = "two birds fly"


@pytest.fixture(scope="module")
def text(text_model: bytes) -> TextTokenizer:
    return TextTokenizer(text_model, TextConfig(), NUM_CODES)


def make_model(text: TextTokenizer, hidden: int = 16) -> Upscaler:
    positions = LAYOUT.low_position + LAYOUT.low_slots
    config = TransformerConfig(2, hidden, 2, text.num_tokens, NUM_CODES, text.start_of_image, text.pad, positions)
    return Upscaler(Base(config), UpscaleChannel(config, SIZES, UPSCALER))


def some_sample(seed: int = 0, caption: str | None = PROMPT, grid: int = GRID) -> ClipSample:
    low, high = (random_codes(1, side, side, num_codes=NUM_CODES, seed=seed) for side in (grid, grid * RATIO))
    return sample(low, caption, seed, high=high)


def test_loss_is_that_of_each_high_code(text: TextTokenizer) -> None:
    """Guards the pairing of slots and codes, and that a sample's loss is the mean over its own codes."""
    task, model = SuperresTask(LAYOUT, text, 0.0), large(make_model(text))
    samples = [some_sample(0), some_sample(1, "a"), some_sample(2, None)]
    words = [text.encode_image_caption(PROMPT), text.encode_image_caption("a"), text.encode_image_caption(None)]
    padded = pad_left(words, SLOTS, text.pad)
    low = torch.stack([torch.from_numpy(each.codes.astype("int64")).flatten() for each in samples])
    logits = model.base.logits(model(padded.tokens, padded.mask, low)).log_softmax(-1)
    measured = task.losses(model, task.collate(samples))
    for row, one in enumerate(samples):
        picked = [-logits[row, slot, int(code)] for slot, code in enumerate(one.high_codes.flatten())]
        torch.testing.assert_close(measured.loss[row], torch.stack(picked).mean())
    assert torch.equal(measured.parts, measured.loss.detach()[:, None])
    assert task.layout.length == SLOTS + 16 + 64
    assert (task.parts, measured.parts.requires_grad) == (("codes",), False)


def test_high_codes_are_learnt_and_never_seen(text: TextTokenizer) -> None:
    """Catches high codes that are fed: changing one must change only its own term of the loss, and no hidden row."""
    task, model, one = SuperresTask(LAYOUT, text, 0.0), large(make_model(text)), some_sample()
    high = torch.from_numpy(one.high_codes.astype("int64"))
    others = [one._replace(high_codes=changed_in(high, slot, NUM_CODES).numpy()) for slot in range(high.numel())]
    batch = task.collate([one, *others])
    assert not changes(model, task, batch).any()
    logits = model.base.logits(rows_of(model, task, batch))[0].log_softmax(-1)
    codes, slots = high.flatten(), torch.arange(high.numel())
    terms = logits[slots, codes] - logits[slots, (codes + 1) % NUM_CODES]
    losses = task.losses(model, batch).loss
    torch.testing.assert_close((losses[1:] - losses[0]) * high.numel(), terms)


def test_low_codes_are_seen_around_their_place(text: TextTokenizer) -> None:
    """Catches low codes that are shifted, unseen or mixed up: every high slot depends on those near it."""
    task, model, one = SuperresTask(LAYOUT, text, 0.0), large(make_model(text)), some_sample()
    low = torch.from_numpy(one.codes.astype("int64"))
    others = [one._replace(codes=changed_in(low, code, NUM_CODES).numpy()) for code in range(low.numel())]
    assert changes(model, task, task.collate([one, *others])).all()  # all low codes see each other in the first block
    alone = Upscaler(copy.deepcopy(model.base), copy.deepcopy(model.channel))
    alone.base.blocks, alone.channel.blocks = alone.base.blocks[:1], alone.channel.blocks[:1]
    changed = changes(alone, task, task.collate([one, *others]))
    for code in range(low.numel()):
        row, column = divmod(code, GRID)
        near = [
            (high // LAYOUT.high_grid // RATIO, high % LAYOUT.high_grid // RATIO) for high in range(LAYOUT.high_slots)
        ]
        expected = [abs(row - r) <= 1 and abs(column - c) <= 1 for r, c in near]
        assert changed[code].tolist() == expected
    other = task.collate([one, one._replace(caption="two birds sit")])
    assert changes(model, task, other).all()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 1.0])
def test_share_of_replaced_low_codes(text: TextTokenizer, share: float) -> None:
    """Guards the corruption of low codes: its share, evenly over the frame, with any code; high codes stay the same."""
    task, one, count = SuperresTask(LAYOUT, text, share), some_sample(), 600
    batch = task.collate([one._replace(seed=seed) for seed in range(count)])
    true = torch.from_numpy(one.codes.astype("int64")).flatten()
    differ = batch.low.flatten(1) != true
    expected = share * (1 - 1 / NUM_CODES)  # some are replaced by the same code
    spread = (expected * (1 - expected) / count) ** 0.5
    assert abs(differ.float().mean() - expected) <= 4 * spread / true.numel() ** 0.5
    assert (differ.float().mean(0) - expected).abs().max() <= 5 * spread
    assert not share or set(batch.low.unique().tolist()) == set(range(NUM_CODES))
    assert (batch.high == torch.from_numpy(one.high_codes.astype("int64")).flatten()).all()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_cannot_be(text: TextTokenizer, share: float) -> None:
    """Catches a mistyped share."""
    with pytest.raises(ValueError, match=f"corruption is {share}, expected a share"):
        SuperresTask(LAYOUT, text, share)


def test_a_sample_is_the_same_in_every_batch(text: TextTokenizer) -> None:
    """Guards resuming, also with a different number of ranks: a sample and its loss do not depend on its batch."""
    task, model = SuperresTask(LAYOUT, text, 0.5), large(make_model(text))
    samples = [some_sample(seed, caption) for seed, caption in enumerate(("a", PROMPT, None, "a cat"))]
    whole, parts = task.collate(samples), [task.collate(samples[:1]), task.collate(samples[1:])]
    for name in ("low", "high"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert torch.equal(whole.text.tokens, torch.cat([part.text.tokens for part in parts]))
    losses = torch.cat([task.losses(model, part).loss for part in parts])
    torch.testing.assert_close(task.losses(model, whole).loss, losses, rtol=1e-12, atol=0)


def test_texts(text_model: bytes) -> None:
    """Guards the text: a caption without frame rate, or the unconditional one; an empty text is refused."""
    config = TextConfig(image_template="{caption} nice", unconditional_caption="thing")
    text = TextTokenizer(text_model, config, NUM_CODES)
    batch = SuperresTask(LAYOUT, text).collate(
        [some_sample(caption=None), some_sample(), some_sample(caption="a " * 90)]
    )
    rows = [text.encode_image_caption("thing"), text.encode_image_caption(PROMPT), text.encode_image_caption("a " * 90)]
    expected = pad_left([row[:SLOTS] for row in rows], SLOTS, text.pad)
    assert torch.equal(batch.text.tokens, expected.tokens)
    assert torch.equal(batch.text.mask, expected.mask)
    empty = TextTokenizer(text_model, replace(config, image_template="{caption}", unconditional_caption=""), NUM_CODES)
    with pytest.raises(ValueError, match="the unconditional text is empty"):
        SuperresTask(LAYOUT, empty).collate([some_sample(caption=None)])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_channel_alone_is_trained(text: TextTokenizer, precision: str) -> None:
    """Guards a frozen base, including one stored in bfloat16: only the channel gets gradients, in all its parts."""
    task, model = SuperresTask(LAYOUT, text), large(make_model(text)).float()
    samples = [some_sample(seed) for seed in range(3)]
    assert_the_channel_alone_is_trained(model, task, samples, precision)


def test_learns_by_heart(text: TextTokenizer) -> None:
    """Checks training end to end: `upscale` reproduces memorized high codes from low codes and captions."""
    task, model = SuperresTask(LAYOUT, text, 0.0), make_model(text, hidden=64)
    initialize(model.base, 2, torch.Generator().manual_seed(0))
    for table in (model.base.words, model.base.positions):  # as large as trained ones, for a confident tied head
        table.weight.data.mul_(10)
    inherit_upscaler(model.channel, model.base)
    model.base.requires_grad_(False)
    samples = [some_sample(seed, f"{seed} birds fly") for seed in range(3)]
    assert learn(model, task, samples, 300, 8e-3) < 0.2
    batch = task.collate(samples)
    drawn = upscale(model, batch.text, batch.low.flatten(1), [iter([])] * 3, SamplingConfig(0.0))
    expected: list[Tensor] = [torch.from_numpy(each.high_codes.astype("int64")).flatten() for each in samples]
    assert torch.equal(drawn, torch.stack(expected))
