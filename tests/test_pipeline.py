"""Text to video: prompt, seed and settings determine a clip; what cannot be done is rejected at the call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor, nn

from cogvideo.bundle.format import MODULES
from cogvideo.bundle.model import CogVideo
from cogvideo.config import SamplingConfig, UpscalerConfig
from cogvideo.generation.hierarchy import collect, generate
from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.generation.sampling import spawn
from cogvideo.generation.upscale import slot_noise, upscale
from cogvideo.media.video import read_video
from cogvideo.packing import PackedLinear
from cogvideo.pipeline import CogVideoPipeline, Frame, export_to_video
from cogvideo.planning import memory
from cogvideo.text import PaddedText
from gallery import loud, make_model, make_parts
from workshop import GRID, NUM_CODES, RATIO, small_config

WIDE = 256
"""Hidden width at which every matrix is packed."""
SIDE, PROMPTS = 16, ("a cat runs", "一只猫")
pytestmark = pytest.mark.usefixtures("without_shape_checks")  # whole clips: tests/generation checks the parts

ONE = GenerationSettings(rounds=1)
SMALL = GenerationSettings(rounds=1, should_enlarge=False)


@pytest.fixture(scope="module")
def folder(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete model."""
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    make_model(folder, train_text_model())
    return folder


@pytest.fixture(scope="module")
def wide(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> CogVideoPipeline:
    """The pipeline of a model whose weights are packed."""
    folder = tmp_path_factory.mktemp("pipeline") / "wide"
    model = make_model(folder, train_text_model(), WIDE)
    with torch.no_grad():  # make logits as large as the noise
        for name in ("base", "sequential", "interpolation", "superres"):
            for each in model.component(name).parameters():  # type: ignore[union-attr]
                each.mul_(0.3 if each.ndim > 1 else 1.0)
    return CogVideoPipeline(model)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(
    pipeline: CogVideoPipeline,
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
    settings: GenerationSettings = ONE,
) -> list[Frame]:
    """Return all frames in order of time."""
    frames = pipeline.stream(prompts, generators(*seeds), settings)
    return sorted(frames, key=lambda frame: frame.place)


def codes_of(frames: list[Frame]) -> Tensor:
    return torch.stack([frame.codes for frame in frames], 1)


def pixels_of(frames: list[Frame]) -> np.ndarray:
    return np.stack([frame.pixels for frame in frames], 1)


def test_weights_are_packed_and_draw_what_they_did(wide: CogVideoPipeline, tmp_path: Path) -> None:
    """Guards packed weights: the same codes as without packing, in float32, also if super-resolution uses that base.
    Loaded weights are in memory once, packed, and kept for the next clip."""
    plain = collect(generate(wide.model, Request(PROMPTS[:1], [spawned(5)], ONE)))
    wide.model.save_pretrained(tmp_path / "model")
    pipeline = CogVideoPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(codes_of(run(pipeline, PROMPTS[:1], (5,))), plain)
    kept = dict(pipeline._kept)
    assert torch.equal(codes_of(run(pipeline, PROMPTS[:1], (5,))), plain), "packed twice"
    assert {"base", "sequential", "interpolation"} <= kept.keys()
    assert all(pipeline._kept[name] is part for name, part in kept.items())
    for name in ("base", "sequential", "interpolation"):
        assert not pipeline.model.is_loaded(name)
        modules = list(kept[name].modules())
        assert any(isinstance(each, PackedLinear) for each in modules)
        assert not any(isinstance(each, nn.Linear) for each in modules)


def test_the_callers_model_stays_as_it_is(wide: CogVideoPipeline, tmp_path: Path) -> None:
    """Guards a model that generates clips while it is trained or saved: its layers stay in place, and clips use its
    current weights. Packed copies take no memory after a clip."""
    model = CogVideo(wide.model.config, **{name: wide.model.component(name) for name in wide.model.components})
    pipeline = CogVideoPipeline(model)
    before = {name: tensor.data_ptr() for name, tensor in model.base.state_dict().items()}
    frames = pipeline.stream(PROMPTS[:1], generators(5), ONE)
    first, packed = next(frames), weakref.WeakSet[nn.Module]()
    packed.update(each for each in gc.get_objects() if type(each) is PackedLinear)
    assert packed
    codes = codes_of(sorted([first, *frames], key=lambda frame: frame.place))
    del frames
    assert not packed
    assert {name: tensor.data_ptr() for name, tensor in model.base.state_dict().items()} == before
    model.save_pretrained(tmp_path / "model")
    model.base.to(torch.bfloat16)
    assert {each.dtype for each in model.base.parameters()} == {torch.bfloat16}
    model.base.to(torch.float32)
    with torch.no_grad():
        model.base.words.weight.neg_()
    assert not torch.equal(codes_of(run(pipeline, PROMPTS[:1], (5,))), codes)
    with torch.no_grad():
        model.base.words.weight.neg_()


def test_a_generator_goes_on(folder: Path) -> None:
    """Guards several samples from one generator: a second call gives new clips, a fresh generator the same ones."""
    pipeline, generator = CogVideoPipeline.from_pretrained(folder), torch.Generator().manual_seed(5)
    options: dict[str, Any] = {"num_samples": 3, "settings": GenerationSettings(rounds=0, should_enlarge=False)}
    first, second = (pipeline(PROMPTS[0], generator=generator, **options).codes for _ in range(2))
    for one in first:
        assert not any(torch.equal(one, other) for other in second)
    assert torch.equal(pipeline(PROMPTS[0], generator=generators(5)[0], **options).codes, first)


def test_memory_is_computed_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards calls in Python against being killed while loading; the memory of equal calls is computed once."""
    pipeline, batch = CogVideoPipeline.from_pretrained(folder), 4000
    monkeypatch.setattr(memory, "free_memory", lambda _: 1 << 20)
    with pytest.raises(ValueError, match=r"this needs \d+\.\d GiB of memory on cpu, .*; what helps: a batch of 2000,"):
        pipeline("a cat", num_samples=batch)
    assert not pipeline._kept
    monkeypatch.setattr(memory, "free_memory", lambda _: 1 << 40)
    for _ in range(2):
        pipeline.stream(["a cat"], generators(1))
        monkeypatch.setattr(memory, "free_memory", lambda _: pytest.fail("computed again"))


def spawned(seed: int) -> torch.Generator:
    """Return a generator in the state in which the pipeline passes it to the stages: super-resolution has its own."""
    generator = torch.Generator().manual_seed(seed)
    spawn(generator, 1)
    return generator


def test_a_clip_is_the_same_alone_in_a_batch_and_in_another_order(wide: CogVideoPipeline) -> None:
    """Guards seeds: codes and pixels of a clip depend on its own seed, and not on the rest of the batch."""
    prompts = PROMPTS[:2]
    together, turned = run(wide, prompts, (1, 2)), run(wide, prompts[::-1], (2, 1))
    for number, prompt in enumerate(prompts):
        alone = run(wide, (prompt,), (number + 1,))
        for frames, place in ((together, number), (turned, 1 - number)):
            assert torch.equal(codes_of(frames)[place], codes_of(alone)[0])
            assert np.array_equal(pixels_of(frames)[place], pixels_of(alone)[0])


def test_prompt_and_seed_make_a_clip(folder: Path) -> None:
    """Guards several clips of one prompt, which differ by their noise, and several prompts with one seed."""
    pipeline = CogVideoPipeline.from_pretrained(folder)
    codes = codes_of(run(pipeline, (PROMPTS[0], PROMPTS[0], PROMPTS[1]), (1, 2, 1), GenerationSettings(rounds=0)))
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize(("rounds", "number"), [(0, 5), (1, 9), (2, 17), (3, 33)])
def test_rounds_are_frames(rounds: int, number: int, folder: Path) -> None:
    """Guards places: each occurs once, key frames come first, and a round only adds frames between them."""
    pipeline = CogVideoPipeline.from_pretrained(folder)
    settings = GenerationSettings(rounds=rounds, should_enlarge=False)
    frames = list(pipeline.stream(PROMPTS[:1], generators(1), settings))
    assert sorted(frame.place for frame in frames) == list(range(number))
    assert all(frame.num_frames == number for frame in frames)
    step = 2**rounds
    assert [(frame.stage, frame.place) for frame in frames[:5]] == [
        ("image", 0),
        *(("sequential", place * step) for place in range(1, 5)),
    ]
    assert all(frame.stage == "interpolation" for frame in frames[5:])
    ordered = sorted(frames, key=lambda frame: frame.place)
    expected = collect(generate(pipeline.model, Request(PROMPTS[:1], [spawned(1)], settings)))
    assert torch.equal(codes_of(ordered), expected)
    if rounds:
        fewer = run(pipeline, PROMPTS[:1], (1,), replace(settings, rounds=rounds - 1))
        assert torch.equal(codes_of(fewer), expected[:, ::2])


@torch.no_grad()
def decoded(model: CogVideo, codes: Tensor) -> np.ndarray:
    """Decode one frame to pixels."""
    side = round(len(codes) ** 0.5)
    frame = model.autoencoder.decode(codes.view(1, side, side))[0].clamp(0, 1)
    return (frame * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_frames_are_what_the_tokenizer_decodes(folder: Path) -> None:
    """Guards pixels: decoded from the codes of the same frame, with the right axes and colors, as whole numbers."""
    pipeline = CogVideoPipeline.from_pretrained(folder)
    for frame in run(pipeline, PROMPTS[:2], (1, 2), SMALL):
        assert frame.pixels.shape == (2, SIDE, SIDE, 3)
        for sample in range(2):
            assert np.array_equal(frame.pixels[sample], decoded(pipeline.model, frame.codes[sample]))


def test_frames_are_enlarged(folder: Path) -> None:
    """Guards super-resolution in the chain: its released sampler, the caption without a frame rate, separate noise for
    each place. The low codes do not change."""
    pipeline = CogVideoPipeline.from_pretrained(folder)
    model, small = pipeline.model, run(pipeline, PROMPTS[:2], (1, 2), SMALL)
    large = run(pipeline, PROMPTS[:2], (1, 2), ONE)
    assert torch.equal(codes_of(large), codes_of(small))
    slots, sampling = (GRID * RATIO) ** 2, SamplingConfig(1.0, clusters=6, cluster_temperature=0.6)
    for sample, prompt in enumerate(PROMPTS[:2]):
        noise = spawn(spawn(torch.Generator().manual_seed(sample + 1), 1)[0], len(large))
        tokens = model.text.encode_image_caption(prompt)
        row = torch.tensor([[model.text.pad] * (16 - len(tokens)) + tokens])
        text = PaddedText(row, torch.arange(16)[None] >= 16 - len(tokens))
        for place, frame in enumerate(large):
            own = slot_noise(noise[place], slots, NUM_CODES, torch.device("cpu"))
            high = upscale(
                model.upscaler, text, frame.codes[sample : sample + 1], [own], sampling, model.cluster_labels
            )
            assert np.array_equal(frame.pixels[sample], decoded(model, high[0]))
    greedy = run(pipeline, PROMPTS[:2], (1, 2), replace(ONE, superres=SamplingConfig(0.0)))
    assert not np.array_equal(pixels_of(greedy), pixels_of(large))


def test_a_model_without_super_resolution_draws_small_frames(
    train_text_model: Callable[..., bytes], tmp_path: Path
) -> None:
    """Guards unfinished models, and those without interpolation or labels: components not needed may be missing."""
    without = ("superres", "interpolation", "cluster_labels")
    pipeline = CogVideoPipeline(make_model(tmp_path / "model", train_text_model(), without=without))
    assert pixels_of(run(pipeline, PROMPTS[:1], (1,), GenerationSettings(rounds=0))).shape == (1, 5, SIDE, SIDE, 3)


def test_nothing_else_is_drawn_from(folder: Path) -> None:
    """Guards surrounding code: the global generator does not advance, and stopping early leaves nothing behind."""
    pipeline, state = CogVideoPipeline.from_pretrained(folder), torch.get_rng_state()
    stream = pipeline.stream(PROMPTS[:1], generators(1), ONE)
    next(iter(stream))
    del stream
    first = run(pipeline, PROMPTS[:1], (1,))
    assert torch.equal(torch.get_rng_state(), state)
    fresh = run(CogVideoPipeline.from_pretrained(folder), PROMPTS[:1], (1,))
    assert np.array_equal(pixels_of(first), pixels_of(fresh))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype, folder: Path) -> None:
    """Guards every type that weights can be loaded as."""
    frames = run(CogVideoPipeline.from_pretrained(folder, dtype), PROMPTS[:1], (1,), GenerationSettings(rounds=0))
    assert pixels_of(frames).shape == (1, 5, SIDE * RATIO, SIDE * RATIO, 3)


def test_stages_with_bases_of_their_own(train_text_model: Callable[..., bytes]) -> None:
    """Guards stages that trained their base: each uses its own, and the image model keeps the shared one."""
    config = small_config(train_text_model())
    own = {
        f"{stage}_base": loud(MODULES["base"](config), 50 + seed)
        for seed, stage in enumerate(("sequential", "superres"))
    }
    usual, special = (
        run(
            CogVideoPipeline(CogVideo(config, **make_parts(train_text_model()), **more)),
            PROMPTS[:1],
            (1,),
            GenerationSettings(rounds=0),
        )
        for more in ({}, own)
    )
    assert torch.equal(codes_of(usual)[:, 0], codes_of(special)[:, 0])
    assert not torch.equal(codes_of(usual)[:, 1:], codes_of(special)[:, 1:])
    assert not np.array_equal(usual[0].pixels, special[0].pixels)


@pytest.mark.parametrize(
    ("without", "rounds", "message"),
    [
        (("image_tokenizer",), 0, "has no image_tokenizer for pixels; it has base, "),
        (("sequential",), 0, "has no sequential"),
        (("interpolation",), 1, "has no interpolation"),
        (("base",), 0, "has no base"),
        (("text",), 0, "has no text"),
    ],
)
def test_a_model_that_lacks_a_part_is_refused_at_the_call(
    without: tuple[str, ...], rounds: int, message: str, train_text_model: Callable[..., bytes], tmp_path: Path
) -> None:
    """Guards against an error that comes only after the first frame, or after minutes of loading."""
    pipeline = CogVideoPipeline(make_model(tmp_path / "model", train_text_model(), without=without))
    with pytest.raises(ValueError, match=message):
        pipeline.stream(PROMPTS[:1], generators(1), GenerationSettings(rounds=rounds))


@pytest.mark.parametrize(
    ("prompts", "seeds", "settings", "message"),
    [
        (("a cat", " \n"), (1, 2), ONE, "the prompt is empty"),
        (("",), (1,), ONE, "the prompt is empty: ''"),
        (("x" * 10_000,), (1,), ONE, r"the prompt has \d+ tokens, 16 fit"),
        (("a cat",), (1, 2), ONE, "got 2 generators for 1 prompts"),
        ((), (), ONE, "got no prompt"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_the_call(
    prompts: tuple[str, ...], seeds: tuple[int, ...], settings: GenerationSettings, message: str, folder: Path
) -> None:
    """Guards batches: one bad prompt is found before any frame is generated, and before weights are loaded."""
    pipeline = CogVideoPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        pipeline.stream(prompts, generators(*seeds), settings)
    assert "base" not in pipeline.model._parts


def test_long_prompts_are_cut_where_that_is_allowed(folder: Path) -> None:
    """Guards the setting `truncate`: the stages accept a prompt that is too long."""
    pipeline = CogVideoPipeline.from_pretrained(folder)
    assert (
        len(run(pipeline, ("a cat runs over the grass " * 99,), (1,), GenerationSettings(rounds=0, truncate=True))) == 5
    )


def test_prompts_that_super_resolution_cannot_take_are_refused_at_the_call(
    train_text_model: Callable[..., bytes],
) -> None:
    """Guards models whose super-resolution has fewer text slots than the other stages."""
    config = replace(small_config(train_text_model()), upscaler=UpscalerConfig(RATIO, 4, 17))
    parts = make_parts(train_text_model()) | {"superres": MODULES["superres"](config)}
    pipeline = CogVideoPipeline(CogVideo(config, **parts))
    prompt = "a cat runs on"
    assert 4 < len(pipeline.model.text.encode_image_caption(prompt)) <= 12
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, 4 fit"):
        pipeline.stream([prompt], generators(1), ONE)
    pipeline.stream([prompt], generators(1), SMALL)


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    """Guards the message for a missing folder."""
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere: pass the folder of a bundle"):
        CogVideoPipeline.from_pretrained(tmp_path / "nowhere")


# Calling the pipeline


def test_a_call_gives_the_clips_of_the_command(folder: Path, tmp_path: Path) -> None:
    """Guards the call: clips are in order of time and of prompts, with consecutive seeds; the callback gets frames as
    they are finished; the exported video is the generated clip."""
    pipeline, seen = CogVideoPipeline.from_pretrained(folder), list[Frame]()
    generator = torch.Generator().manual_seed(5)
    options: dict[str, Any] = {"guidance_scale": 2.0, "settings": ONE}
    clips = pipeline(PROMPTS, num_samples=2, generator=generator, callback=seen.append, **options)
    settings = replace(ONE, later=ONE.later | {"guidance": 2.0})
    prompts = (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])
    expected = run(pipeline, prompts, (5, 6, 7, 8), settings)
    assert np.array_equal(clips.frames, pixels_of(expected))
    assert torch.equal(clips.codes, codes_of(expected))
    assert clips.fps == 2
    assert [frame.place for frame in seen[:5]] == [0, 2, 4, 6, 8]
    assert sorted(frame.place for frame in seen) == list(range(9))
    one = pipeline(PROMPTS[1], generator=torch.Generator().manual_seed(7), **options)
    assert np.array_equal(one.frames[0], clips.frames[2])
    listed = pipeline(PROMPTS, generator=generators(5, 7), **options)
    assert np.array_equal(listed.frames, clips.frames[[0, 2]])
    random = [pipeline(PROMPTS[0], settings=GenerationSettings(rounds=0)).frames for _ in range(2)]
    assert not np.array_equal(*random)

    assert export_to_video(one.frames[0], str(tmp_path / "x.webp"), fps=one.fps) == str(tmp_path / "x.webp")
    assert np.array_equal(read_video(tmp_path / "x.webp", 2).frames, one.frames[0])
    away = replace(settings, negative="the sun")
    moved = run(pipeline, PROMPTS[:1], (5,), away)
    for asked in ({"settings": away}, {"settings": settings, "negative_prompt": "the sun"}):
        assert torch.equal(pipeline(PROMPTS[0], generator=generators(5), **asked).codes, codes_of(moved))

    export_to_video([Image.fromarray(each) for each in one.frames[0]], tmp_path / "y.webp")
    assert np.array_equal(read_video(tmp_path / "y.webp", 8).frames, one.frames[0])


def test_a_call_takes_pictures_of_all_kinds(folder: Path) -> None:
    """Guards given frames: Pillow images in any mode and NumPy arrays, center-cropped, transparent ones on white."""
    pipeline = CogVideoPipeline.from_pretrained(folder)
    square = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8).repeat(5, 0).repeat(5, 1)
    wide = np.pad(square, ((0, 0), (8, 8), (0, 0)))
    codes = pipeline.encode([square])
    assert codes.shape == (1, GRID**2)
    transparent = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    white = pipeline.encode([np.full((20, 20, 3), 255, np.uint8)])
    palette = transparent.convert("P")
    palette.info["transparency"] = 0
    turned = Image.fromarray(square[::-1, ::-1])
    turned.getexif()[ExifTags.Base.Orientation] = 3
    deep = Image.fromarray(square[..., 0].astype(np.uint16) * 257)
    for each, expected in (
        (wide, codes),
        (turned, codes),
        (deep, pipeline.encode([square[..., :1].repeat(3, 2)])),
        (Image.fromarray(square), codes),
        (Image.fromarray(square).convert("RGBA"), codes),
        (Image.fromarray(square[..., 0]), pipeline.encode([square[..., :1].repeat(3, 2)])),
        (transparent, white),
        (palette, white),
    ):
        assert torch.equal(pipeline.encode([each]), expected)
    settings = GenerationSettings(rounds=0)
    seed = torch.Generator().manual_seed(1)
    clips = pipeline(PROMPTS[0], Image.fromarray(square), generator=seed, settings=settings)
    assert torch.equal(clips.codes[0, 0], codes[0])
    both = pipeline(PROMPTS[0], square, last_image=wide[::-1].copy(), settings=settings)
    assert torch.equal(both.codes[0, [0, -1]], torch.cat([codes, pipeline.encode([square[::-1].copy()])]))
    longer = pipeline(PROMPTS[0], video=clips.frames[0], settings=settings)
    assert longer.codes.shape[1] == 8
    assert len(pipeline(PROMPTS[0], square, loop=True, settings=settings).codes[0]) == 4


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((4, 9, 16, 16, 3), np.uint8), r"got frames of shape \(9, 16, 16, 3\), expected one clip"),
        ([], "got frames of 0 sizes, expected one clip"),
        (np.zeros((9, 16, 16, 3)), "got frames of type float64, expected uint8"),
    ],
)
def test_what_is_no_clip_is_not_exported(frames: Any, message: str, tmp_path: Path) -> None:
    """Guards against the most common mistake: exporting a batch instead of one of its clips."""
    with pytest.raises(ValueError, match=message):
        export_to_video(frames, tmp_path / "z.mp4")


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": np.zeros((4, 4, 3))}, r"got a picture of type float64 of shape \(4, 4, 3\), expected uint8"),
        ({"image": np.zeros((4, 4), np.uint8)}, r"got a picture of type uint8 of shape \(4, 4\), expected uint8"),
        ({"video": []}, "got no pictures, expected one or more"),
        ({"image": "heart.png"}, "got a str, expected a Pillow image"),
        ({"image": Image.new("F", (4, 4))}, "the picture has floating-point pixels, expected 8 or 16 bits"),
        ({"image": np.zeros((4, 4, 3), np.uint8), "video": []}, "got an image and a video to start from"),
        ({"last_image": np.zeros((4, 4, 3), np.uint8)}, "got a last frame and 0 leading ones, expected one"),
        ({"num_samples": 0}, "num_samples is 0, expected a positive whole number"),
        ({"num_samples": 1.5}, "num_samples is 1.5, expected a positive whole number"),
        ({"num_samples": True}, "num_samples is True, expected a positive whole number"),
        ({"prompt": []}, r"prompt is \[\], expected a text or a sequence of texts"),
        ({"prompt": 5}, "prompt is 5, expected a text or a sequence of texts"),
        ({"prompt": ["a cat", 5]}, r"prompt is \['a cat', 5\], expected a text or a sequence of texts"),
        ({"guidance_scale": "x"}, "guidance is 'x', expected 0 to 100"),
        ({"video": 3}, "video is 3, expected frames"),
        ({"loop": "yes"}, "loop is 'yes', expected True or False"),
        ({"settings": 3}, "settings is 3, expected Settings"),
        ({"callback": 3}, "callback is 3, expected a function of a Frame"),
        ({"generator": 7}, "generator is 7, expected one torch.Generator per clip"),
        ({"generator": [7]}, r"generator is \[7\], expected one torch.Generator per clip"),
        ({"generator": []}, r"generator is \[\], expected one torch.Generator per clip"),
        ({"negative_prompt": " "}, "the negative prompt is empty: ' '"),
        ({"generator": [torch.Generator()] * 2}, "got 2 generators for 1 prompts"),
    ],
)
def test_calls_that_cannot_be_right_are_refused(options: dict[str, Any], message: str, folder: Path) -> None:
    """Catches arguments that users of other libraries might pass."""
    with pytest.raises(ValueError, match=message):
        CogVideoPipeline.from_pretrained(folder)(**{"prompt": PROMPTS[0]} | options)


@pytest.mark.soak  # the model in the box
def test_long_clips_have_no_joints() -> None:
    """Guards clips of several sequences of key frames: at the joints, frames change no more than elsewhere."""
    pipeline = CogVideoPipeline.from_pretrained("pocket")
    settings = replace(pipeline.settings.lasting(20, pipeline.model.config), rounds=0, should_enlarge=False)
    prompt = "a yellow face blinks, then opens its mouth into a happy smile, on a light blue background"
    clips = pipeline(prompt, settings=settings, generator=torch.Generator().manual_seed(3))
    assert (clips.frames.shape[:2], clips.fps) == ((1, 21), 1)
    changes = np.abs(np.diff(clips.frames[0].astype(float), axis=0)).mean((1, 2, 3))
    joints, others = changes[4::3], np.delete(changes, np.s_[4::3])
    assert joints.mean() < 1.25 * others.mean()
    assert joints.max() <= others.max()
