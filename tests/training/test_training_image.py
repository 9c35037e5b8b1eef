"""The image model's tasks: what each slot is fed, sees and predicts, the mixture of tasks, and memorizing samples."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideo.config import LayoutConfig, SamplingConfig, TextConfig, TransformerConfig, preset
from cogvideo.data.loader import ClipSample
from cogvideo.generation.decode import decode
from cogvideo.generation.decoder import Condition
from cogvideo.layout import SequenceLayout
from cogvideo.models.plans import full_pass
from cogvideo.models.transformer import Base, Transformer, initialize
from cogvideo.text import PaddedText, TextTokenizer, pad_left
from cogvideo.training.objectives.image import NOTHING, PARTS, ImageBatch, ImageMixture, ImageTask, Kind
from lessons import changed_in, changes, large, learn, random_codes, rows_of, sample
from reference import Oracle

NUM_CODES, SLOTS = 40, 24
ALWAYS: dict[Kind, ImageMixture] = {
    "image": ImageMixture(0.0, 0.0),
    "understanding": ImageMixture(1.0, 0.0),
    "text": ImageMixture(0.0, 1.0, masked_text=0.4),
}
CAPTION = "a cat runs over the grass"


@pytest.fixture(scope="module")
def text(text_model: bytes) -> TextTokenizer:
    return TextTokenizer(text_model, TextConfig(), NUM_CODES)


def make_task(text: TextTokenizer, kind: Kind = "image", grid: int = 6, slots: int = SLOTS) -> ImageTask:
    """A task with only one kind of sample; a grid of 6 has squares of four sizes."""
    layout = SequenceLayout.text_to_image(LayoutConfig(grid, 5, slots, slots, slots))
    return ImageTask(layout, text, ALWAYS[kind])


def make_model(task: ImageTask, hidden: int = 16, num_layers: int = 2) -> Transformer:
    text, positions = task.text, task.layout.first_extra_position
    config = TransformerConfig(
        num_layers, hidden, 2, text.num_tokens, NUM_CODES, text.start_of_image, text.pad, positions
    )
    return Transformer(Base(config))


def some_sample(grid: int = 6, seed: int = 0, caption: str | None = CAPTION) -> ClipSample:
    return sample(random_codes(1, grid, grid, num_codes=NUM_CODES, seed=seed), caption, seed)


def text_length(batch: ImageBatch, task: ImageTask) -> int:
    return int((batch.tokens[0, : task.layout.text_slots] != task.text.pad).sum())


# The tasks spelled out, slot by slot


class Rule:
    """Which slots of one sample see each other. Masked squares and tokens are inferred from the targets."""

    def __init__(self, task: ImageTask, kind: Kind, targets: list[int], num_text: int) -> None:
        self.kind, self.grid, self.slots = kind, task.layout.grid, task.layout.text_slots
        self.first = self.slots - num_text
        learnt = {slot for slot, target in enumerate(targets) if target != NOTHING}
        self.squares = {self.square(slot - self.slots) for slot in learnt if slot >= self.slots}
        self.words = {slot + 1 for slot in learnt if slot < self.slots}

    def square(self, code: int) -> tuple[int, int]:
        row, column = divmod(code, self.grid)
        return row // 4, column // 4

    def hidden(self, slot: int) -> bool:
        """True if a slot is fed something masked: a text slot its own token, an image slot the previous code."""
        if slot < self.slots:
            return slot in self.words
        code = slot - self.slots - 1
        return code >= 0 and self.square(code) in self.squares

    def sees(self, query: int, key: int) -> bool:
        """CogLM's attention rule for a pair of slots."""
        word, other_word = query < self.slots, key < self.slots
        if query == key:
            return True
        if query < self.first or key < self.first:  # padding
            return False
        if self.kind == "image":
            return other_word or (not word and key < query)
        if self.kind == "text":
            return word and other_word and (not self.hidden(key) or (self.hidden(query) and key < query))
        if word:
            return not other_word or key < query
        return not other_word and (not self.hidden(key) or (self.hidden(query) and key < query))

    def mask(self, length: int) -> Tensor:
        return torch.tensor([[self.sees(query, key) for key in range(length)] for query in range(length)])


def slow_logits(model: Transformer, task: ImageTask, tokens: list[int], mask: Tensor, num_text: int) -> Tensor:
    """Logits over all tokens at every slot, from the dense oracle."""
    base, layout, config = model.base.state_dict(), task.layout, model.base.config
    oracle = Oracle("image", base, None, config.num_layers, config.num_heads, NUM_CODES, 0, layout.grid, 1, 0)
    first = layout.text_slots - num_text
    positions = [max(0, slot - first) for slot in range(layout.text_slots)]
    positions += [layout.frame_position + slot for slot in range(layout.frame_slots)]
    x = base["words.weight"][tokens] + base["positions.weight"][positions]
    nothing = torch.zeros(mask.shape, dtype=torch.float64)
    for layer in range(config.num_layers):
        x = oracle._block(layer, x, torch.zeros(len(x), dtype=torch.bool), mask, mask, (nothing, nothing))
    return oracle.logits(x, whole_vocabulary=True)


def expected_tokens(task: ImageTask, kind: Kind, one: ClipSample) -> list[int]:
    """The tokens that the model is fed."""
    if kind == "understanding":
        words = [task.text.start_of_english, *task.text.encode(CAPTION)]
    else:
        words = task.text.encode_image_caption(CAPTION)
    image = [task.text.start_of_image, *map(int, one.codes.flatten()[:-1])]
    pads = [task.text.pad]
    return [
        *pads * (task.layout.text_slots - len(words)),
        *words,
        *(pads * task.layout.frame_slots if kind == "text" else image),
    ]


@pytest.mark.parametrize("kind", ["image", "understanding", "text"])
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_equal_the_rule_in_words(text: TextTokenizer, kind: Kind, seed: int) -> None:
    """Checks everything at once: inputs, positions, attention, targets, and which tokens each loss covers."""
    task, one = make_task(text, kind), some_sample(seed=seed)
    model, batch = large(make_model(task)), task.collate([one])
    tokens, targets, num_text = batch.tokens[0].tolist(), batch.targets[0].tolist(), text_length(batch, task)
    assert tokens == expected_tokens(task, kind, one)
    truth = {slot: tokens[slot + 1] for slot in range(task.layout.text_slots - 1)}
    truth |= {task.layout.text_slots + place: int(code) for place, code in enumerate(one.codes.flatten())}
    logits = slow_logits(model, task, tokens, Rule(task, kind, targets, num_text).mask(len(tokens)), num_text)
    losses: dict[str, list[float]] = {name: [] for name in PARTS}
    for slot in [slot for slot, target in enumerate(targets) if target != NOTHING]:
        word = slot < task.layout.text_slots
        ids = logits[slot, NUM_CODES:] if word else logits[slot, :NUM_CODES]  # image codes never compete with words
        chosen = ids[truth[slot] - (NUM_CODES if word else 0)]
        part = {"image": "image", "understanding": "caption" if word else "squares", "text": "spans"}[kind]
        losses[part].append(math.log(sum(math.exp(each) for each in ids.tolist())) - float(chosen))
    measured = task.losses(model, batch)
    flat = [each for part in losses.values() for each in part]
    assert measured.loss[0].item() == pytest.approx(sum(flat) / len(flat), rel=1e-9)
    for name, value in zip(PARTS, measured.parts[0].tolist(), strict=True):
        assert math.isnan(value) if not losses[name] else value == pytest.approx(np.mean(losses[name]), rel=1e-9)


def test_text_to_image_is_what_generation_runs(text: TextTokenizer) -> None:
    """Prevents training on text or positions that differ from those of the pass that generates images."""
    task = make_task(text)
    layout, samples = task.layout, [some_sample(seed=seed, caption=each) for seed, each in enumerate(("a", CAPTION))]
    model = large(make_model(task))
    padded = pad_left([text.encode_image_caption(each.caption) for each in samples], layout.text_slots, text.pad)
    codes = torch.stack([torch.from_numpy(each.codes.astype(np.int64)).flatten(1) for each in samples])
    plan = full_pass(layout, None, padded.mask, torch.float64, 1)
    places = torch.cat([layout.text_positions(padded.mask), layout.frame_positions(range(1)).expand(2, -1)], 1)
    rows = model(torch.cat([padded.tokens, layout.feed(codes, text.start_of_image)], 1), places, plan)
    logits = model.base.logits(rows[:, layout.text_slots :])
    expected = F.cross_entropy(logits.transpose(1, 2), codes[:, 0], reduction="none").mean(1)
    torch.testing.assert_close(task.losses(model, task.collate(samples)).loss, expected)


# Attention: nothing leaks, and everything allowed is seen


@pytest.mark.parametrize(("kind", "grid"), [("image", 6), ("understanding", 6), ("understanding", 8), ("image", 5)])
def test_a_code_changes_only_who_may_know_it(text: TextTokenizer, kind: Kind, grid: int) -> None:
    """Catches slots that see what they predict, at any distance, and slots that see too little."""
    task, one = make_task(text, kind, grid), some_sample(grid)
    codes = torch.from_numpy(one.codes.astype(np.int64))
    others = [one._replace(codes=changed_in(codes, code, NUM_CODES).numpy()) for code in range(grid**2)]
    batch = task.collate([one, *others])
    rule = Rule(task, kind, batch.targets[0].tolist(), text_length(batch, task))
    changed, slots = changes(large(make_model(task)), task, batch), task.layout.text_slots
    for code in range(grid**2):
        fed = slots + code + 1  # the slot that is fed the code
        if kind == "image" or code == grid**2 - 1:
            expected = set(range(fed, task.layout.length))
        elif rule.hidden(fed):
            knows = {slot for slot in range(fed, task.layout.length) if rule.hidden(slot)}
            expected = knows | set(range(rule.first, slots))
        else:
            expected = set(range(rule.first, task.layout.length))
        assert set(changed[code].nonzero()[:, 0].tolist()) == expected, code
        assert slots + code not in expected or batch.targets[0, slots + code] == NOTHING


@pytest.mark.parametrize("kind", ["image", "understanding", "text"])
def test_a_token_changes_only_who_may_know_it(text: TextTokenizer, kind: Kind) -> None:
    """Catches captions and spans that are seen before they are predicted, and images that see them."""
    task = make_task(text, kind)
    batch = task.collate([some_sample()])
    num_text, slots = text_length(batch, task), task.layout.text_slots
    rule = Rule(task, kind, batch.targets[0].tolist(), num_text)
    batch = ImageBatch(*(each.repeat(num_text + 1, *[1] * (each.ndim - 1)) for each in batch))
    for row, slot in enumerate(range(rule.first, slots), 1):
        batch.tokens[row, slot] = (batch.tokens[row, slot] - NUM_CODES + 1) % 300 + NUM_CODES
    changed = changes(large(make_model(task)), task, batch)
    for row, slot in enumerate(range(rule.first, slots)):
        if kind == "understanding":
            expected = set(range(slot, slots))
        elif rule.hidden(slot):
            expected = {each for each in range(slot, slots) if rule.hidden(each)}
        else:
            expected = set(range(rule.first, slots if kind == "text" else task.layout.length))
        assert set(changed[row].nonzero()[:, 0].tolist()) == expected, slot
        assert slot - 1 not in expected or batch.targets[0, slot - 1] == NOTHING


# Masking


@pytest.mark.parametrize("grid", [4, 5, 6, 9, 20])
def test_squares(text: TextTokenizer, grid: int) -> None:
    """Guards masked squares: 80% of them, chosen evenly, always whole; all columns but the first are predicted."""
    task = make_task(text, "understanding", grid)
    side, seeds = -(-grid // 4), 60
    batch = task.collate([some_sample(grid)._replace(seed=seed) for seed in range(seeds)])
    learnt = (batch.targets[:, task.layout.text_slots :] != NOTHING).view(seeds, grid, grid)
    first = torch.arange(grid) % 4 == 0
    assert not learnt[:, :, first].any()
    wide = [column for column in range(side) if min(4, grid - 4 * column) > 1]
    squares = torch.stack([learnt[:, ::4, 4 * column + 1] for column in wide], 2)
    for row in range(grid):
        for column in (each for each in range(grid) if not first[each]):
            assert torch.equal(learnt[:, row, column], squares[:, row // 4, column // 4])
    if len(wide) == side:
        assert (squares.flatten(1).sum(1) == max(1, round(0.8 * side**2))).all()
    assert (squares.float().mean(0) - squares.float().mean()).abs().max() < 0.25
    if grid == 20:
        assert squares.float().mean() == pytest.approx(0.8)


def test_spans(text: TextTokenizer) -> None:
    """Guards masked spans: 15% of the tokens, in runs of about three; the first token is never masked."""
    task = replace(make_task(text, slots=200), mixture=ImageMixture(0.0, 1.0))
    caption = " ".join([CAPTION] * 8)
    batch = task.collate([some_sample(caption=caption)._replace(seed=seed) for seed in range(200)])
    num_text = text_length(batch, task)
    masked = (batch.targets != NOTHING)[:, 200 - num_text - 1 : 199]  # a slot predicts the next token
    assert num_text > 100
    assert not masked[:, 0].any()
    assert (masked.sum(1) == round(0.15 * num_text)).all()
    starts = (masked[:, 1:] & ~masked[:, :-1]).sum()
    assert 2.5 < float(masked.sum() / starts) < 4
    often = masked[:, 5:-5].float().mean(0)
    assert 0.05 < float(often.min()) < float(often.max()) < 0.3


def test_words_are_the_text_slots_with_loss(text: TextTokenizer) -> None:
    """Guards the precomputed list of text slots with loss, without which a GPU would have to synchronize."""
    task = replace(make_task(text), mixture=ImageMixture(0.4, 0.3))
    batch = task.collate(mixed(9))
    for words, targets in zip(batch.words, batch.targets[:, :SLOTS], strict=True):
        expected = (targets != NOTHING).nonzero()[:, 0].tolist()
        assert words.tolist() == expected + [NOTHING] * (batch.words.shape[1] - len(expected))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("words", ["a", CAPTION])
def test_any_share_of_a_text(text: TextTokenizer, share: float, words: str) -> None:
    """Prevents endless sampling of spans, and samples without a loss."""
    task = replace(make_task(text, "text"), mixture=ImageMixture(0.0, 1.0, masked_text=share))
    batch = task.collate([some_sample(caption=words)])
    learnt, num_text = int((batch.targets != NOTHING).sum()), text_length(batch, task)
    assert learnt == min(max(1, round(share * num_text)), num_text - 1)


# The task mixture


def kinds(batch: ImageBatch) -> list[Kind]:
    """The task of each sample, inferred from its loss parts."""
    names = {PARTS.index("image"): "image", PARTS.index("caption"): "understanding", PARTS.index("spans"): "text"}
    return [names[int(parts[targets != NOTHING][0])] for parts, targets in zip(batch.parts, batch.targets, strict=True)]


def test_shares_of_the_mixture(text: TextTokenizer) -> None:
    """Guards the shares of the tasks, which depend only on the samples' seeds."""
    task = replace(make_task(text, grid=4), mixture=ImageMixture(0.3, 0.1))
    count = 1500
    found = Counter(kinds(task.collate([some_sample(4)._replace(seed=seed) for seed in range(count)])))
    for kind, share in (("understanding", 0.3), ("text", 0.1), ("image", 0.6)):
        assert abs(found[kind] / count - share) < 4 * math.sqrt(share * (1 - share) / count), kind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.2, 0.0), "understanding is 1.2"),
        ((0.7, 0.4), "understanding plus text is 1.1"),
        ((0.1, 0.1, -1), "masked_squares is -1"),
    ],
)
def test_shares_that_cannot_be(values: tuple[float, ...], message: str) -> None:
    """Prevents a mistyped share from silently training something else."""
    with pytest.raises(ValueError, match=message):
        ImageMixture(*values)


def mixed(count: int, caption: str | None = CAPTION) -> list[ClipSample]:
    return [some_sample(seed=seed, caption=f"{caption} {seed}") for seed in range(count)]


def test_a_sample_is_the_same_in_every_batch(text: TextTokenizer) -> None:
    """Guards resuming, also with a different number of ranks: a sample and its loss do not depend on its batch."""
    task = replace(make_task(text), mixture=ImageMixture(0.4, 0.3))
    samples, model = mixed(9), large(make_model(task))
    whole, parts = task.collate(samples), [task.collate(samples[:4]), task.collate(samples[4:])]
    assert set(kinds(whole)) == set(ALWAYS)
    for ours, pieces in zip(whole[:-1], zip(*(part[:-1] for part in parts), strict=True), strict=True):
        assert torch.equal(ours, torch.cat(pieces))
    assert [row[row != NOTHING].tolist() for row in whole.words] == [
        row[row != NOTHING].tolist() for part in parts for row in part.words
    ]
    halves = [task.losses(model, part) for part in parts]
    for ours, pieces in zip(task.losses(model, whole), zip(*halves, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(pieces), equal_nan=True, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["image", "understanding", "text"])
def test_a_dropped_caption_is_the_unconditional_text(text_model: bytes, kind: Kind) -> None:
    """Guards guidance: without a caption, only the image is predicted, after the unconditional text."""
    config = replace(preset("cogvideo").text, unconditional_caption="something")
    text = TextTokenizer(text_model, config, NUM_CODES)
    task = make_task(text, kind, slots=30)
    batch = task.collate([some_sample(caption=None)])
    padded = pad_left([text.encode_image_caption(None)], 30, text.pad)
    assert kinds(batch) == ["image"]
    assert torch.equal(batch.tokens[:, :30], padded.tokens)
    assert torch.equal(batch.sees[:, -1, :30], padded.mask)


@pytest.mark.parametrize("caption", [CAPTION, None])
def test_later_frames_have_the_text_of_video_stages(text: TextTokenizer, caption: str | None) -> None:
    """Guards the text of later frames: that of the video stages, with the duration in front, for their frozen base."""
    task = make_task(text, slots=30)
    batch = task.collate([some_sample(caption=caption)._replace(duration=each) for each in (0.0, 4.0, 0.5)])
    rows = [text.encode_image_caption(caption), *(text.encode_caption(caption, each) for each in (4.0, 0.5))]
    assert torch.equal(batch.tokens[:, :30], pad_left(rows, 30, text.pad).tokens)
    assert len({tuple(row) for row in rows}) == 3


def test_no_text_at_all(text_model: bytes) -> None:
    """Prevents NaN losses when the unconditional text is empty."""
    text = TextTokenizer(text_model, TextConfig(image_template="{caption}"), NUM_CODES)
    task = make_task(text)
    assert text.encode_image_caption(None) == []
    assert task.losses(large(make_model(task)), task.collate([some_sample(caption=None)])).loss.isfinite().all()


def test_language_tags_and_long_captions(text: TextTokenizer) -> None:
    """Guards the language tag before a caption, and that a caption that is too long loses only its end."""
    task = make_task(text, "understanding")
    batch = task.collate([some_sample(caption=each) for each in ("一只猫", CAPTION, CAPTION * 5)])
    first = [row[row != text.pad][0].item() for row in batch.tokens]
    assert first == [text.start_of_chinese, text.start_of_english, text.start_of_english]
    assert batch.tokens[2, 1:SLOTS].tolist() == text.encode(CAPTION * 5)[: SLOTS - 1]


# Learning


def test_gradients_reach_all_weights(text: TextTokenizer) -> None:
    """Catches weights that no task trains, including under autocast and in a batch without text loss."""
    task = replace(make_task(text), mixture=ImageMixture(0.5, 0.2))
    model = make_model(task)
    initialize(model.base, 2, torch.Generator().manual_seed(0))
    wide = task.losses(model, task.collate(mixed(6)))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = task.losses(model, task.collate(mixed(6)))
    assert narrow.loss.dtype == torch.float32
    torch.testing.assert_close(narrow.loss, wide.loss, rtol=0.02, atol=0.02)
    for loss in (narrow.loss, make_task(text).losses(model, make_task(text).collate(mixed(2))).loss):
        model.zero_grad()
        loss.mean().backward()
        assert all(each.grad is not None and bool(each.grad.any()) for each in model.parameters())


def test_learns_by_heart(text: TextTokenizer) -> None:
    """Checks training end to end: the image model memorizes clips, and generation reproduces them from captions."""
    task = make_task(text, grid=4)
    model, samples = make_model(task, hidden=64), [some_sample(4, seed, f"clip {seed} of a ball") for seed in range(8)]
    initialize(model.base, 2, torch.Generator().manual_seed(0))
    assert learn(model, task, samples, steps=200) < 0.05
    padded = pad_left([text.encode_image_caption(str(each.caption)) for each in samples], SLOTS, text.pad)
    nothing = torch.empty(8, 0, 16, dtype=torch.int64)
    (frame,) = decode(
        model, task.layout, Condition(PaddedText(*padded)), nothing, lambda _: nothing, SamplingConfig(0.0)
    )
    assert frame.codes.tolist() == [each.codes.flatten().tolist() for each in samples]


def test_all_tasks_learn_by_heart(text: TextTokenizer) -> None:
    """Catches squares, captions and spans that cannot be predicted from what they see."""
    task = replace(make_task(text, grid=4), mixture=ImageMixture(0.4, 0.3))
    model, samples = make_model(task, hidden=64), [some_sample(4, seed, f"clip {seed} of a ball") for seed in range(8)]
    initialize(model.base, 2, torch.Generator().manual_seed(0))
    assert len(set(kinds(task.collate(samples)))) == 3
    assert learn(model, task, samples, steps=200) < 0.05
    assert rows_of(model, task, task.collate(samples)).isfinite().all()
