"""Samples during training: the same as in generation, reproducible, and without side effects on training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cogvideo.bundle.model import CogVideo
from cogvideo.config import SamplingConfig
from cogvideo.data.clips import ClipSampling
from cogvideo.data.loader import ClipStream, hash_numbers
from cogvideo.generation.decode import decode
from cogvideo.generation.decoder import Condition
from cogvideo.generation.sampling import GumbelNoise, spawn
from cogvideo.generation.upscale import slot_noise, upscale
from cogvideo.layout import SequenceLayout
from cogvideo.models.transformer import Transformer
from cogvideo.text import PaddedText
from cogvideo.training.export import modules
from cogvideo.training.optim import StageOptimization
from cogvideo.training.parallel import full_state
from cogvideo.training.samples import Example, Preview, SampleRow, draw, from_clips, missing, write_samples
from cogvideo.training.stages import Choice, StageName, Target
from cogvideo.training.step import Execution
from gallery import COMPONENTS, assert_same, loud, make_model, make_parts, make_trainer
from lessons import random_codes, sample
from workshop import GRID, NUM_CODES, RATIO, make_data, small_config

SLOTS, HIGH_SLOTS, SIDE = GRID**2, (GRID * RATIO) ** 2, 16
FIRST, LATER, LARGER = (
    SamplingConfig(1.0, clusters=8, cluster_temperature=0.89),
    SamplingConfig(1.05, clusters=8, cluster_temperature=0.89),
    SamplingConfig(1.0, clusters=6, cluster_temperature=0.6),
)
"""Samplers as released (spec section 3), limited to the 8 clusters of the test codebook."""
ODD_PROMPTS = (
    "x" * 10_000,
    "🐈‍⬛🎉",
    "一只猫在草地上奔跑",
    "a\nb\tc\x01\x1b[31m",
    "{caption} {0} %s",
    "<pad><n>",
    "../../x",
    "‮abc",
)


@pytest.fixture(scope="module")
def system(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> CogVideo:
    return make_model(tmp_path_factory.mktemp("samples") / "model", train_text_model())


@pytest.fixture
def examples() -> list[Example]:
    """Two clips with different frame rates."""
    return [
        Example(
            f"clip {number} moves",
            duration,
            random_codes(5, SLOTS, num_codes=NUM_CODES, seed=number),
            random_codes(5, HIGH_SLOTS, num_codes=NUM_CODES, seed=10 + number),
        )
        for number, duration in enumerate((4.0, 1.0))
    ]


def same(one: list[SampleRow], other: list[SampleRow]) -> bool:
    return len(one) == len(other) and all(
        mine.label == theirs.label and np.array_equal(mine.frames, theirs.frames)
        for mine, theirs in zip(one, other, strict=True)
    )


def generator(seed: int, place: int, variant: int = 0) -> torch.Generator:
    """Generator for a variant of an example, as documented: its seed depends only on the arguments."""
    return torch.Generator().manual_seed(int(hash_numbers(seed, place, variant)[0] >> np.uint64(1)))


def stream(generator: torch.Generator, stage: str) -> torch.Generator:
    """The part of a sample's generator that a stage uses."""
    return spawn(generator, 3)[("image", "sequential", "interpolation").index(stage)]


def padded(tokens: list[int], pad: int) -> PaddedText:
    """One row of 16 slots, padded on the left and cut at the end."""
    tokens = tokens[:16]
    row = [pad] * (16 - len(tokens)) + tokens
    return PaddedText(torch.tensor([row]), torch.arange(16)[None] >= 16 - len(tokens))


def drawn(
    system: CogVideo,
    model: Transformer,
    layout: SequenceLayout,
    tokens: list[int],
    given: Tensor,
    seed: torch.Generator,
) -> Tensor:
    """Generated frames of one sample, after the given ones, slot by slot."""
    noise = GumbelNoise([seed], layout.num_frames, SLOTS, NUM_CODES)
    text = Condition(padded(tokens, system.text.pad), text_bonus=0.0)
    sampler = FIRST if model.channel is None else LATER
    return torch.cat(
        [frame.codes for frame in decode(model, layout, text, given[None], noise, sampler, system.cluster_labels)]
    )


@torch.no_grad()
def pixels(system: CogVideo, codes: Tensor) -> np.ndarray:
    """Decode codes (frames, slots) to pixels, one frame at a time."""
    side = round(codes.shape[1] ** 0.5)
    frames = [system.autoencoder.decode(each.view(1, side, side))[0] for each in codes]
    return np.stack([(frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for frame in frames])


def test_images_are_what_the_image_model_draws(system: CogVideo, examples: list[Example]) -> None:
    """Catches a wrong text, sampler, or noise: a row shows the true frame, then four images of the prompt."""
    layout, none = SequenceLayout.text_to_image(system.config.layout), torch.empty(0, SLOTS, dtype=torch.int64)
    rows = draw("image", system, examples, seed=3)
    assert [(row.example, row.is_clip) for row in rows] == [(0, False), (1, False)]
    for place, (row, example) in enumerate(zip(rows, examples, strict=True)):
        tokens = system.text.encode_image_caption(example.prompt)
        images = [
            drawn(system, system.image_model, layout, tokens, none, stream(generator(3, place, variant), "image"))
            for variant in range(4)
        ]
        assert example.codes is not None
        assert np.array_equal(row.frames, pixels(system, torch.cat([example.codes[:1], *images])))
        assert row.label == f"truth, then drawn: {example.prompt}"
        assert len({image.numpy().tobytes() for image in images}) == 4


def test_key_frames_are_what_the_stage_draws(system: CogVideo, examples: list[Example]) -> None:
    """Checks key frames: the first one from the base, the right frame rate and order, and no guidance."""
    none = torch.empty(0, SLOTS, dtype=torch.int64)
    image, layout = (make(system.config.layout) for make in (SequenceLayout.text_to_image, SequenceLayout.sequential))
    rows = draw("sequential", system, examples, seed=4)
    assert [row.example for row in rows] == [0, 0, 1, 1]
    for place, example in enumerate(examples):
        assert example.codes is not None
        words = system.text.encode_image_caption(example.prompt)
        first = drawn(system, system.image_model, image, words, none, stream(generator(4, place), "image"))
        words = system.text.encode_caption(example.prompt, example.duration)
        later = drawn(system, system.sequential, layout, words, first, stream(generator(4, place), "sequential"))
        assert np.array_equal(rows[2 * place].frames, pixels(system, torch.cat([first, later])))
        assert np.array_equal(rows[2 * place + 1].frames, pixels(system, example.codes))
        assert rows[2 * place + 1].label == "truth"
        assert rows[2 * place].label == f"drawn, {example.duration:g} s: {example.prompt}"


def test_frames_between_are_what_the_stage_draws(system: CogVideo, examples: list[Example]) -> None:
    """Catches frames out of order: given frames keep their places, and generated ones go between them."""
    layout = SequenceLayout.interpolation(system.config.layout)
    rows = draw("interpolation", system, examples, seed=5)
    for place, example in enumerate(examples):
        assert example.codes is not None
        words = system.text.encode_caption(example.prompt, example.duration)
        seed = spawn(stream(generator(5, place), "interpolation"), 1)[0]
        between = drawn(system, system.interpolation, layout, words, example.codes[[0, 2, 4]], seed)
        codes = example.codes.clone()
        codes[1], codes[3] = between[0], between[1]
        assert np.array_equal(rows[2 * place].frames, pixels(system, codes))
        assert rows[2 * place].label == f"frames 1 and 3 drawn, {example.duration:g} s: {example.prompt}"


def test_larger_frames_are_what_super_resolution_draws(system: CogVideo, examples: list[Example]) -> None:
    """Catches super-resolution using the sampler for frames, and its three pictures in the wrong order."""
    rows = draw("superres", system, examples, seed=6)
    for place, (row, example) in enumerate(zip(rows, examples, strict=True)):
        assert example.codes is not None
        assert example.high_codes is not None
        text = padded(system.text.encode_image_caption(example.prompt), system.text.pad)
        noise = slot_noise(generator(6, place), HIGH_SLOTS, NUM_CODES, torch.device("cpu"))
        high = upscale(system.upscaler, text, example.codes[:1], [noise], LARGER, system.cluster_labels)
        small = pixels(system, example.codes[:1]).repeat(RATIO, 1).repeat(RATIO, 2)
        large = pixels(system, torch.cat([high, example.high_codes[:1]]))
        assert np.array_equal(row.frames, np.concatenate([small, large]))
        assert not row.is_clip


@pytest.mark.parametrize("stage", ["image", "sequential", "interpolation", "superres"])
def test_one_seed_is_one_sheet_whatever_else_is_drawn(
    stage: StageName, system: CogVideo, examples: list[Example]
) -> None:
    """Sheets of different steps must be comparable: a row depends only on weights, seed, example, and index."""
    rows = draw(stage, system, examples, seed=1)
    each = len(rows) // 2
    assert same(draw(stage, system, examples, seed=1), rows)
    assert same(draw(stage, system, examples[:1], seed=1), rows[:each])
    others = [examples[0]._replace(prompt="a man pours water"), examples[1]]
    assert same(draw(stage, system, others, seed=1)[each:], rows[each:])
    assert not np.array_equal(draw(stage, system, examples, seed=2)[0].frames, rows[0].frames)
    assert not np.array_equal(draw(stage, system, others, seed=1)[0].frames, rows[0].frames)


@pytest.mark.parametrize("stage", ["image", "sequential", "interpolation", "superres"])
def test_training_notices_nothing(
    stage: StageName, train_text_model: Callable[..., bytes], examples: list[Example]
) -> None:
    """Sampling must leave random state, modes, gradients, and weights of the run unchanged, even if it fails."""
    parts = make_parts(train_text_model())
    live = CogVideo(small_config(train_text_model()), **parts)
    for name in COMPONENTS:
        parts[name].train()
    modules = [module for name in (*COMPONENTS, "image_tokenizer") for module in parts[name].modules()]
    parameters = [each for module in modules for each in module.parameters(recurse=False)]
    for each in parameters:
        each.grad = torch.ones_like(each)

    def everything() -> tuple[object, ...]:
        return (
            torch.get_rng_state().tolist(),
            str(np.random.get_state()),  # noqa: NPY002
            [module.training for module in modules],
            [(each.requires_grad, float(each.detach().double().sum()), float(each.grad.sum())) for each in parameters],  # type: ignore[union-attr]
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
        )

    before = everything()
    with torch.autograd.graph.saved_tensors_hooks(lambda _: 1 / 0, lambda each: each):  # nothing is saved for backward
        draw(stage, live, examples, seed=1)
    assert everything() == before
    live.autoencoder.decode = lambda *_, **__: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        draw(stage, live, examples, seed=1)
    assert everything() == before


@pytest.mark.parametrize("stage", ["image", "sequential", "interpolation", "superres"])
def test_a_base_in_bfloat16_draws(
    stage: StageName, train_text_model: Callable[..., bytes], examples: list[Example]
) -> None:
    """Sampling must work in runs that store frozen matrices in bfloat16, where mixed types would fail."""
    parts = make_parts(train_text_model())
    for each in parts["base"].parameters():
        if each.ndim > 1:
            each.data = each.data.bfloat16()
    rows = draw(stage, CogVideo(small_config(train_text_model()), **parts), examples, seed=1)
    assert all(row.frames.dtype == np.uint8 for row in rows)


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_odd_prompts_are_drawn(prompt: str, system: CogVideo, tmp_path: Path) -> None:
    """Prevents a single odd caption in the data from ending a run of several days."""
    written = write_samples(tmp_path, 1, draw("image", system, [Example(prompt)], seed=0))
    with Image.open(written) as sheet:
        sheet.load()


def test_an_empty_prompt_is_refused(system: CogVideo) -> None:
    """An empty prompt must fail with a message that says so."""
    with pytest.raises(ValueError, match="the prompt is empty: '  '"):
        draw("image", system, [Example("  ")], seed=0)


@pytest.mark.parametrize("number", [1, 2])
def test_few_clusters_are_enough(number: int, train_text_model: Callable[..., bytes], examples: list[Example]) -> None:
    """Small codebooks, with fewer clusters than the released samplers keep, must work: all clusters are kept."""
    parts = make_parts(train_text_model()) | {"cluster_labels": torch.arange(NUM_CODES) % number}
    system = CogVideo(small_config(train_text_model()), **parts)
    layout, none = SequenceLayout.text_to_image(system.config.layout), torch.empty(0, SLOTS, dtype=torch.int64)
    for stage in ("image", "sequential", "interpolation", "superres"):
        rows = draw(stage, system, examples, seed=0)  # type: ignore[arg-type]
        if stage == "image":
            tokens = system.text.encode_image_caption(examples[0].prompt)
            codes = drawn(system, system.image_model, layout, tokens, none, stream(generator(0, 0), "image"))
            assert np.array_equal(rows[0].frames[1:2], pixels(system, codes))


def test_clusters_are_made_where_there_are_none(
    train_text_model: Callable[..., bytes], examples: list[Example]
) -> None:
    """Bundles without cluster labels must work, without touching the global random state."""
    parts = make_parts(train_text_model())
    del parts["cluster_labels"]
    state = torch.get_rng_state()
    draw("image", CogVideo(small_config(train_text_model()), **parts), examples, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_base_of_its_own_is_used(system: CogVideo, train_text_model: Callable[..., bytes]) -> None:
    """Stages that trained their base must use it for key frames, and the shared base for the first frame."""
    parts = make_parts(train_text_model())
    own = loud(make_parts(train_text_model())["base"], 99)
    special = CogVideo(system.config, **parts, sequential_base=own)
    usual, changed = (draw("sequential", each, [Example("clip 1")], seed=0)[0].frames for each in (system, special))
    assert np.array_equal(usual[0], changed[0])
    assert not np.array_equal(usual[1:], changed[1:])
    del parts["base"]
    alone = CogVideo(system.config, **parts, sequential_base=own)
    assert missing("sequential", alone.components, [Example("clip 1")]) == ""
    assert not np.array_equal(draw("sequential", alone, [Example("clip 1")], seed=0)[0].frames[0], usual[0])


def test_what_is_missing_is_said_once(train_text_model: Callable[..., bytes], examples: list[Example]) -> None:
    """Runs that cannot generate samples need a message, not an error, for each stage and each missing part."""
    config, parts = small_config(train_text_model()), make_parts(train_text_model())

    def told(stage: StageName, given: list[Example], without: tuple[str, ...] = ()) -> str:
        return missing(stage, parts.keys() - set(without), given)

    for stage in ("image", "sequential", "interpolation", "superres"):
        assert told(stage, examples) == ""  # type: ignore[arg-type]
        assert "neither a prompt nor a held-out clip" in told(stage, [])  # type: ignore[arg-type]
        assert told(stage, examples, ("image_tokenizer",)).endswith("the model has no image_tokenizer.")  # type: ignore[arg-type]
        lacks = told(stage, examples, ("base", "text"))  # type: ignore[arg-type]
        assert lacks == "No samples are generated during training: the model has no base, text."
    assert told("sequential", [Example("a")]) == ""
    assert "there are only prompts" in told("interpolation", [Example("a")])
    assert "there are only prompts" in told("superres", [each._replace(high_codes=None) for each in examples])
    with pytest.raises(ValueError, match="there are only prompts"):
        draw("interpolation", CogVideo(config, **parts), [Example("a")], seed=0)


def test_clips_become_examples() -> None:
    """Examples must keep codes in order, and leave out clips whose caption was dropped."""
    codes, high = (random_codes(5, side, side, num_codes=NUM_CODES) for side in (GRID, GRID * RATIO))
    clips = [sample(codes, "a", duration=2.0, high=high), sample(codes, None), sample(codes, "b")]
    first, second = from_clips(clips)
    assert (first.prompt, first.duration, second.prompt) == ("a", 2.0, "b")
    assert first.codes is not None
    assert torch.equal(first.codes, codes.view(5, -1))
    assert first.high_codes is not None
    assert torch.equal(first.high_codes, high.view(5, -1))
    assert second.high_codes is None


def frames_of(path: Path) -> tuple[list[np.ndarray], float]:
    """Pixels and frame rate of a video."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], float(stream.average_rate)


@pytest.mark.parametrize(("number", "across", "down"), [(1, 1, 1), (3, 3, 1), (5, 4, 2)])
def test_clips_are_written_as_a_sheet_and_a_video(
    number: int, across: int, down: int, system: CogVideo, examples: list[Example], tmp_path: Path
) -> None:
    """Sheets must show each frame of each row, enlarged; videos must play the clips side by side, in sync."""
    many = [examples[place % 2]._replace(prompt=f"clip {place}") for place in range(number)]
    rows = draw("interpolation", system, many, seed=0)
    written = write_samples(tmp_path / "not" / "there", 500, rows)
    assert (written.name, written.with_suffix(".mp4").exists()) == ("step-00000500.png", True)
    times, label, gap = 96 // SIDE, 14, 2
    sheet = np.asarray(Image.open(written))
    for place, row in enumerate(rows):
        for time, frame in enumerate(row.frames):
            top, left = place * (96 + label + gap) + label, time * (96 + gap)
            cell = sheet[top : top + 96, left : left + 96]
            assert np.array_equal(cell, frame.repeat(times, 0).repeat(times, 1))
    frames, rate = frames_of(written.with_suffix(".mp4"))
    assert (len(frames), rate, frames[0].shape) == (5, 2.0, (down * 192, across * 96, 3))
    for place, row in enumerate(rows):
        example, below = divmod(place, 2)
        top, left = (example // across) * 192 + below * 96, (example % across) * 96
        for time, frame in enumerate(row.frames):
            cell = frames[time][top : top + 96, left : left + 96].astype(float)
            assert abs(cell - frame.repeat(times, 0).repeat(times, 1)).mean() < 12  # chroma has half the resolution
    if number == 5:
        assert frames[0][192:, 104:].min() > 240


def test_images_are_a_sheet_alone(system: CogVideo, examples: list[Example], tmp_path: Path) -> None:
    """Prevents a video of images that do not follow each other in time."""
    for stage in ("image", "superres"):
        write_samples(tmp_path / stage, 3, draw(stage, system, examples, seed=0))  # type: ignore[arg-type]
        assert [each.name for each in (tmp_path / stage).iterdir()] == ["step-00000003.png"]


def test_without_pyav_the_sheet_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training must work on machines without PyAV: the sheet is written, without a video."""
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "cogvideo.media.ffmpeg", raising=False)
    written = write_samples(tmp_path, 1, [SampleRow("a", np.zeros((5, 16, 16, 3), np.uint8), 0, True)])
    assert [each.name for each in tmp_path.iterdir()] == [written.name]


@pytest.mark.parametrize(("label", "shown"), [("one\n two\tthree", "one two three"), ("i" * 111, "i" * 107 + "...")])
def test_labels_are_one_line(label: str, shown: str, tmp_path: Path) -> None:
    """Prevents multi-line or very long prompts from running over the frames of a sheet."""
    frames = np.zeros((5, 96, 96, 3), np.uint8)
    sheets = [
        write_samples(tmp_path, step, [SampleRow(each, frames, 0, False)]) for step, each in enumerate((label, shown))
    ]
    assert np.array_equal(*(np.asarray(Image.open(sheet)) for sheet in sheets))


# Previews of a run


@pytest.fixture(scope="module")
def place(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete bundle and data."""
    folder = tmp_path_factory.mktemp("preview")
    make_model(folder / "whole", train_text_model())
    make_data(folder / "data", folder / "whole")
    return folder


def preview_of(
    stage: StageName, place: Path, folder: Path, prompts: tuple[str, ...] = (), source: str = "whole", **options: Any
) -> Preview:
    """A preview of a stage in training, whose weights have moved a little from their start."""
    model = CogVideo.from_pretrained(place / source)
    settings = StageOptimization(batch=2, ema=0.5, seed=6, precision=options.pop("precision", "float32"))
    trainer = make_trainer(stage, model, settings, Execution(**options))
    assert trainer.average is not None
    with torch.no_grad():
        for seed, each in enumerate(trainer.average.state.values()):
            each.add_(torch.randn(each.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.05)
    mode = "image" if stage in ("image", "superres") else stage
    stream = ClipStream([place / "data"], "validation", ClipSampling(mode, high_codes=stage == "superres"))  # type: ignore[arg-type]
    return Preview(Target(folder, model, model.config, stage, Choice("continue")), trainer, stream, prompts, folder, 6)


def test_what_is_lacking_is_known(place: Path, tmp_path: Path) -> None:
    """A resumed run must generate the sheet that a killed one could not, and none that exists or is impossible."""
    preview = preview_of("sequential", place, tmp_path / "samples")
    assert preview.lacks(3)
    sheet = preview(3)
    assert not preview.lacks(3)
    assert sheet is not None
    sheet.unlink()  # as if the run had been killed before writing the sheet, which comes last
    assert list(sheet.parent.iterdir())
    assert preview.lacks(3)
    preview.problem = "nothing can be drawn"
    assert not preview.lacks(3)


def test_what_a_preview_draws_with_stays_where_it_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a leak: modules of the initial bundle were moved to the GPU for good, and took memory there."""
    preview = preview_of("sequential", place, tmp_path / "samples")
    source, weights = preview.target.source, full_state(preview.trainer.module)
    elsewhere = preview.trainer.ranks._replace(device=torch.device("meta"))
    monkeypatch.setattr(preview.trainer, "ranks", elsewhere)
    drawn = preview._system(weights)
    for name in ("base", "image_tokenizer"):
        assert {each.device.type for each in drawn.component(name).state_dict().values()} == {"meta"}
        assert {each.device.type for each in source.component(name).state_dict().values()} == {"cpu"}
    assert {each.device.type for each in preview.trainer.objective.parameters()} == {"cpu"}


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}])
@pytest.mark.parametrize("stage", ["image", "sequential", "interpolation", "superres"])
def test_a_preview_draws_with_the_average(
    stage: StageName, options: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Sheets must show the weights that would be exported, and the run must not change."""
    preview = preview_of(stage, place, tmp_path / "samples", **options)
    trainer = preview.trainer
    assert preview.problem == ""
    assert trainer.average is not None

    def everything() -> list[Tensor]:
        assert trainer.average is not None
        state = [each.detach().clone() for each in (*trainer.objective.parameters(), *trainer.average.state.values())]
        modes = [
            torch.tensor([each.training, *[p.requires_grad for p in each.parameters()]])
            for each in trainer.module.modules()
        ]
        return [*state, *modes, torch.get_rng_state()]

    before = everything()
    sheet = preview(20)
    assert all(torch.equal(*pair) for pair in zip(before, everything(), strict=True))
    assert sheet == tmp_path / "samples" / "step-00000020.png"
    component = "base" if stage == "image" else stage
    prefix = "model.base." if stage == "image" else "model.channel."
    parts: dict[str, Any] = {
        name: part for name in preview.target.source.components for part in [preview.target.source.component(name)]
    }
    live = modules(preview.target, trainer.average.state)[component]
    assert_same(live.state_dict(), {n.removeprefix(prefix): each for n, each in trainer.average.state.items()})
    rows = draw(stage, CogVideo(preview.target.config, **(parts | {component: live})), preview.examples, seed=6)
    expected = write_samples(tmp_path / "expected", 20, rows)
    assert np.array_equal(np.asarray(Image.open(sheet)), np.asarray(Image.open(expected)))
    assert len(preview.examples) == 4


@pytest.mark.parametrize("stage", ["sequential", "interpolation", "superres"])
def test_a_preview_of_a_base_in_bfloat16(stage: StageName, place: Path, tmp_path: Path) -> None:
    """Previews must work in bfloat16 runs, whose frozen base is stored in bfloat16."""
    assert preview_of(stage, place, tmp_path, precision="bfloat16")(1) is not None


def test_a_preview_shows_prompts_where_it_can(place: Path, tmp_path: Path) -> None:
    """Previews must show the user's prompts in stages that start from text, and real clips in the others."""
    prompts = ("a cat", "a dog")
    for stage, expected in (("image", list(prompts)), ("sequential", list(prompts)), ("interpolation", None)):
        shown = [each.prompt for each in preview_of(stage, place, tmp_path, prompts).examples]  # type: ignore[arg-type]
        assert shown == expected or (expected is None and all("moves" in each for each in shown))


def test_a_prompt_that_says_nothing_is_refused_at_once(place: Path, tmp_path: Path) -> None:
    """Prevents a run from failing at its first sheet, after hundreds of steps."""
    with pytest.raises(ValueError, match="the prompt is empty: ' '"):
        preview_of("sequential", place, tmp_path, ("a cat", " "))


def test_other_ranks_draw_nothing(place: Path, tmp_path: Path) -> None:
    """Prevents two ranks from writing the same file."""
    preview = preview_of("image", place, tmp_path / "samples")
    preview.trainer.ranks = preview.trainer.ranks._replace(rank=1)
    assert preview(1) is None
    assert not (tmp_path / "samples").exists()


def test_a_preview_without_a_tokenizer_says_why(
    place: Path, tmp_path: Path, train_text_model: Callable[..., bytes]
) -> None:
    """Runs on codes alone must train, and say why they generate no samples."""
    make_model(tmp_path / "model", train_text_model(), without=("image_tokenizer",))
    preview = preview_of("image", place, tmp_path / "samples", source=str(tmp_path / "model"))
    assert preview.problem == "No samples are generated during training: the model has no image_tokenizer."
    assert preview(1) is None
