"""The video stages' task: which frames are predicted from which, what is trained, and memorizing clips."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideo.bundle.model import CogVideo
from cogvideo.config import (
    CogVideoConfig,
    LayoutConfig,
    SamplingConfig,
    StageConfig,
    TextConfig,
    TransformerConfig,
    preset,
)
from cogvideo.data.loader import ClipSample
from cogvideo.generation.hierarchy import collect, generate
from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.layout import SequenceLayout
from cogvideo.models.transformer import Base, TemporalChannel, Transformer, inherit, initialize
from cogvideo.text import TextTokenizer, pad_left
from cogvideo.training.objectives.image import ImageMixture, ImageTask
from cogvideo.training.objectives.video import VideoTask
from lessons import assert_the_channel_alone_is_trained, changed_in, changes, large, learn, random_codes, sample
from reference import Oracle, Prompt, Stage, window_labels

NUM_CODES, GRID, SLOTS = 40, 4, 26
AREA = GRID**2
SIZES = LayoutConfig(GRID, 5, SLOTS, SLOTS, SLOTS)
LEARNT = {"sequential": (1, 2, 3, 4), "interpolation": (1, 3)}
STAGES: list[tuple[Stage, int]] = [("sequential", 0), ("sequential", 2), ("interpolation", 0), ("interpolation", 2)]


@pytest.fixture(scope="module")
def text(text_model: bytes) -> TextTokenizer:
    return TextTokenizer(text_model, TextConfig(), NUM_CODES)


def make_task(text: TextTokenizer, stage: Stage) -> VideoTask:
    return VideoTask(getattr(SequenceLayout, stage)(SIZES), text)


def config_of(text: TextTokenizer, hidden: int) -> TransformerConfig:
    return TransformerConfig(2, hidden, 2, text.num_tokens, NUM_CODES, text.start_of_image, text.pad, SLOTS + AREA)


def make_model(text: TextTokenizer, window: int = 0, hidden: int = 16) -> Transformer:
    config = config_of(text, hidden)
    return Transformer(Base(config), TemporalChannel(config, SIZES, StageConfig(window)))


def some_sample(seed: int = 0, caption: str | None = "two birds fly", duration: float = 4.0) -> ClipSample:
    return sample(random_codes(5, GRID, GRID, num_codes=NUM_CODES, seed=seed), caption, seed, duration)


@pytest.mark.parametrize(("stage", "window"), STAGES)
def test_losses_equal_the_oracle(text: TextTokenizer, stage: Stage, window: int) -> None:
    """Guards inputs and attention, and that each part is the mean over the slots of its own frame."""
    task, model = make_task(text, stage), large(make_model(text, window))
    samples = [some_sample(0), some_sample(1, "a", 0.5), some_sample(2, None, 2.0)]
    measured = task.losses(model, task.collate(samples))
    assert task.parts == tuple(f"frame_{place}" for place in LEARNT[stage])
    assert task.layout.length == SLOTS + 5 * AREA
    base, channel = model.base.state_dict(), model.channel.state_dict()
    oracle = Oracle(stage, base, channel, 2, 2, NUM_CODES, text.start_of_image, GRID, 5, SLOTS, window)
    for row, one in enumerate(samples):
        words = text.encode_caption(one.caption, one.duration)
        empty = SLOTS - len(words)
        prompt = Prompt([text.pad] * empty + words, (False,) * empty + (True,) * len(words))
        codes = {place: [int(code) for code in one.codes[place].flatten()] for place in range(5)}
        logits = oracle.frame_logits(prompt, codes)
        expected = [F.cross_entropy(logits[place], torch.tensor(codes[place])) for place in LEARNT[stage]]
        torch.testing.assert_close(measured.parts[row], torch.stack(expected))
        torch.testing.assert_close(measured.loss[row], torch.stack(expected).mean())
    assert not measured.parts.requires_grad


def may_know(stage: Stage, slot: tuple[int, int], code: tuple[int, int]) -> bool:
    """True if a slot (place of its frame, index) may depend on a code, given that the stage sees whole frames."""
    (place, index), (other, number) = slot, code
    if number == AREA - 1:  # the last code of a frame is never fed
        return False
    if stage == "sequential":
        return other < place or (other == place and number < index)
    if other % 2 == 0:  # a given frame
        return True
    return place % 2 == 1 and (other < place or (other == place and number < index))


def slots_of(task: VideoTask) -> list[tuple[int, int]]:
    """Place and index of the rows after the text."""
    return [(place, index) for place in task.layout.order for index in range(AREA)]


@pytest.mark.parametrize(("stage", "window"), STAGES)
def test_a_code_changes_only_who_may_know_it(text: TextTokenizer, stage: Stage, window: int) -> None:
    """Catches codes that are seen before they are predicted, and frames that do not see each other."""
    task, one = make_task(text, stage), some_sample()
    codes = torch.from_numpy(one.codes.astype("int64"))
    others = [one._replace(codes=changed_in(codes, place, NUM_CODES).numpy()) for place in range(codes.numel())]
    changed = changes(large(make_model(text, window)), task, task.collate([one, *others]))
    slots = slots_of(task)
    allowed = torch.tensor([[may_know(stage, slot, divmod(code, AREA)) for slot in slots] for code in range(5 * AREA)])
    assert not changed[:, :SLOTS].any()
    found = changed[:, SLOTS:]
    if window == 0:
        assert torch.equal(found, allowed)
        return
    labels = window_labels(GRID, window, shifted=False)
    near = torch.tensor([[labels[slot[1]] == labels[(code + 1) % AREA] for slot in slots] for code in range(5 * AREA)])
    assert not (found & ~allowed).any()
    assert not (allowed & near & ~found).any()


@pytest.mark.parametrize("stage", ["sequential", "interpolation"])
def test_all_frames_see_the_text(text: TextTokenizer, stage: Stage) -> None:
    """Catches captions and frame rates that are not seen, and padding that is."""
    task, model = make_task(text, stage), large(make_model(text))
    samples = [some_sample(), some_sample(caption="two birds sit"), some_sample(duration=2.0)]
    assert changes(model, task, task.collate(samples))[:, SLOTS:].all()
    batch = task.collate(samples[:1] * 2)
    batch.text.tokens[1, ~batch.text.mask[1]] = text.line_break
    assert not batch.text.mask.all()
    assert not changes(model, task, batch)[:, SLOTS:].any()


def test_texts(text_model: bytes) -> None:
    """Guards each sample's text: frame rate and caption, or the unconditional text; long captions are truncated."""
    text = TextTokenizer(text_model, replace(preset("cogvideo").text, unconditional_caption="thing"), NUM_CODES)
    samples = [some_sample(caption=None, duration=0.5), some_sample(duration=2.0), some_sample(caption="a cat " * 20)]
    batch = make_task(text, "sequential").collate(samples)
    long = text.encode_caption("a cat " * 20, 4.0)
    rows = [text.encode_caption(None, 0.5), text.encode_caption("two birds fly", 2.0), long[:SLOTS]]
    expected = pad_left(rows, SLOTS, text.pad)
    assert len(long) > SLOTS
    assert torch.equal(batch.text.tokens, expected.tokens)
    assert torch.equal(batch.text.mask, expected.mask)


def test_a_sample_is_the_same_in_every_batch(text: TextTokenizer) -> None:
    """Guards micro-batches and ranks: the losses of a batch are those of its pieces, for captions of any length."""
    task, model = make_task(text, "interpolation"), large(make_model(text, 2))
    samples = [some_sample(seed, caption) for seed, caption in enumerate(("a", "two birds", None, "a cat runs over"))]
    whole = task.losses(model, task.collate(samples))
    halves = [task.losses(model, task.collate(part)) for part in (samples[:1], samples[1:])]
    for ours, pieces in zip(whole, zip(*halves, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(pieces), rtol=1e-12, atol=0)


# Training


@pytest.mark.parametrize(("stage", "window"), STAGES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_channel_alone_is_trained(text: TextTokenizer, stage: Stage, window: int, precision: str) -> None:
    """Guards a frozen base, including one stored in bfloat16: only the channel gets gradients, in all its parts."""
    task, model = make_task(text, stage), large(make_model(text, window)).float()
    samples = [some_sample(seed) for seed in range(3)]
    assert_the_channel_alone_is_trained(model, task, samples, precision)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """Eight clips of nine frames."""
    return random_codes(8, 9, GRID, GRID, num_codes=NUM_CODES, seed=5)


CAPTIONS = [f"{number} birds fly" for number in range(8)]


@pytest.fixture(scope="module")
def base(text: TextTokenizer, clips: Tensor) -> Base:
    """An image model that has memorized the clips' first frames."""
    model = Transformer(Base(config_of(text, 64)))
    initialize(model.base, 2, torch.Generator().manual_seed(0))
    task = ImageTask(SequenceLayout.text_to_image(SIZES), text, ImageMixture(0.0, 0.0))
    samples = [sample(clip[:1], caption) for clip, caption in zip(clips, CAPTIONS, strict=True)]
    assert learn(model, task, samples, 200) < 0.05
    return model.base.requires_grad_(False)


def taught(text: TextTokenizer, base: Base, stage: Stage, samples: list[ClipSample]) -> Transformer:
    """A stage that has memorized the samples, on a frozen base."""
    channel = TemporalChannel(base.config, SIZES, StageConfig(0 if stage == "sequential" else 2))
    inherit(channel, base, torch.Generator().manual_seed(1))
    model = Transformer(base, channel)
    before = copy.deepcopy(base.state_dict())
    assert learn(model, make_task(text, stage), samples, 250, 8e-3) < 0.1
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    return model


@pytest.fixture(scope="module")
def sequential(text: TextTokenizer, base: Base, clips: Tensor) -> Transformer:
    """A sequential stage that has memorized the clips' key frames."""
    samples = [sample(clip[::2], caption, duration=4.0) for clip, caption in zip(clips, CAPTIONS, strict=True)]
    return taught(text, base, "sequential", samples)


def generated(text: TextTokenizer, base: Base, rounds: int, **stages: Transformer) -> Tensor:
    """Codes generated from the captions alone, (clips, frames, slots)."""
    config = replace(
        CogVideoConfig(),
        transformer=base.config,
        layout=SIZES,
        interpolation=StageConfig(2),
        autoencoder=replace(CogVideoConfig().autoencoder, num_codes=NUM_CODES),
        upscaler=replace(CogVideoConfig().upscaler, text_slots=SLOTS, low_position=SLOTS),
    )
    channels = {name: model.channel for name, model in stages.items()}
    system = CogVideo(config, base=base, text=text, **channels)
    # As in training: no guidance and no text bonus.
    settings = GenerationSettings(rounds, first=SamplingConfig(0.0), later=SamplingConfig(0.0), text_bonus=0.0)
    return collect(generate(system, Request(CAPTIONS, [torch.Generator() for _ in CAPTIONS], settings)))


def test_sequential_learns_by_heart(text: TextTokenizer, base: Base, sequential: Transformer, clips: Tensor) -> None:
    """Checks training end to end: captions alone reproduce the memorized key frames."""
    assert torch.equal(generated(text, base, 0, sequential=sequential), clips[:, ::2].flatten(2))


def test_interpolation_learns_by_heart(text: TextTokenizer, base: Base, sequential: Transformer, clips: Tensor) -> None:
    """Checks training end to end: a round of interpolation reproduces the memorized frames between key frames."""
    pairs = [
        (clip[start : start + 5], caption) for clip, caption in zip(clips, CAPTIONS, strict=True) for start in (0, 4)
    ]
    model = taught(text, base, "interpolation", [sample(*pair, duration=2.0) for pair in pairs])
    assert torch.equal(generated(text, base, 1, sequential=sequential, interpolation=model), clips.flatten(2))
