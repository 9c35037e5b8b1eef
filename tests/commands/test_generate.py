"""`cogvideo generate`: a playable file and a sidecar for each prompt, and one-line errors before any generation."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from itertools import count
from pathlib import Path
from threading import Barrier
from typing import Any
from unicodedata import normalize

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import cogvideo
from cogvideo.bundle.model import CogVideo, update
from cogvideo.cli import main
from cogvideo.commands.generate import ClipMaker
from cogvideo.commands.outputs import Folder, Format, write_clip
from cogvideo.commands.prompts import read_prompts
from cogvideo.config import SamplingConfig
from cogvideo.generation.request import ADDED, GenerationSettings, Request
from cogvideo.media.images import write_image
from cogvideo.media.video import read_video, write_video
from cogvideo.pipeline import CogVideoPipeline, Frame
from cogvideo.planning import memory
from gallery import make_model
from killing import full_disk, kill_at
from workshop import RATIO

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # whole clips; tests/generation checks the parts

SIDE = 16
STAGES = ("", "first_", "superres_")
UNGUIDED = GenerationSettings().later | {"guidance": 1.0}
QUICK = ("--rounds", "0", "--no-superres", "--guidance", "1")


@pytest.fixture(scope="module")
def model(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a complete model."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    make_model(folder, train_text_model())
    return str(folder)


@pytest.fixture(scope="module")
def record(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a clip."""
    path = tmp_path_factory.mktemp("record") / "x.mp4"
    run("a cat", "--model", model, "--output", path, *QUICK)
    return record_of(path)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, nested inside one that reveals files written outside it."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def run(*arguments: object, status: int = 0) -> None:
    """Run the command in this process."""
    assert main(["generate", *map(str, arguments)]) == status


def read(path: Path) -> tuple[np.ndarray, float, float, dict[str, Any]]:
    """Frames, rate, seconds, and record of an MP4, as a player sees them."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate is not None
        assert stream.duration is not None
        assert stream.time_base is not None
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        record = json.loads(container.metadata["comment"])
        return np.stack(frames), float(stream.average_rate), float(stream.duration * stream.time_base), record


def record_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return found


def frames_of(folder: Path) -> np.ndarray:
    """Exact frames from a folder of PNG files."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one-line message of a user error."""
    capsys.readouterr()
    assert main(["generate", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.strip().splitlines()) == 1, told.err
    return told.err


def tree(folder: Path) -> list[str]:
    """All files below a folder."""
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


def made(model: str, prompt: str, seed: int, given: Tensor | None = None, **options: Any) -> np.ndarray:
    """Pixels of a clip as the pipeline generates it."""
    settings = GenerationSettings(**{"should_enlarge": False} | options)
    request = Request([prompt], [torch.Generator().manual_seed(seed)], settings, given)
    stream = CogVideoPipeline.from_pretrained(model).frames(request)
    return np.stack([frame.pixels[0] for frame in sorted(stream, key=lambda frame: frame.place)])


def picture(path: Path, seed: int = 0, side: int = 40) -> Path:
    """A picture with a pattern that depends on the seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    write_image(path, coarse.repeat(side // 4, 0).repeat(side // 4, 1))
    return path


@pytest.mark.parametrize(
    ("rounds", "number", "rate", "superres"), [(0, 5, 1, False), (1, 9, 2, True), (2, 17, 4, False), (3, 33, 8, False)]
)
def test_a_clip_is_a_video(rounds: int, number: int, rate: int, superres: bool, model: str, inside: Path) -> None:
    """Checks the file: frames in temporal order, four seconds from first to last, playable everywhere."""
    options = ("--seed", 3, "--rounds", rounds, "--superres" if superres else "--no-superres")
    run("a cat runs", "--model", model, "--output", "x.mp4", *options)
    frames, found, seconds, _ = read(inside / "x.mp4")
    side = SIDE * RATIO if superres else SIDE
    assert (frames.shape, found, seconds) == ((number, side, side, 3), rate, number / rate)
    if superres:
        expected = made(model, "a cat runs", 3, rounds=rounds, should_enlarge=True)
        differences = abs(frames.astype(float)[:, None] - expected[None]).mean((2, 3, 4))
        assert (differences.argmin(1) == np.arange(number)).mean() > 0.8, "colours are stored at half the resolution"


def test_the_settings_stand_beside_the_clip_and_in_it(model: str, inside: Path) -> None:
    """Guards reproducibility: the record has every setting, and the model and versions that were used."""
    write_image(inside / "start.png", np.zeros((8, 8, 3), np.uint8))
    options = ("--rounds", 0, "--guidance", 2.5, "--temperature", 0.9, "--clusters", 5, "--no-superres")
    more = ("--negative", "the sun", "--dtype", "bfloat16", "--image", "start.png")
    run("a cat runs", "--model", model, "--output", "x.mp4", "--seed", 7, *options, *more)
    _, _, _, inner = read(inside / "x.mp4")
    record = record_of(inside / "x.mp4")
    assert record == inner
    codes, sums = record.pop("codes"), record.pop("sha256")
    assert re.fullmatch(r"[0-9a-f]{64}", codes)
    assert list(sums) == ["image"]
    assert record == {
        "file": "x.mp4",
        "prompt": "a cat runs",
        "seed": 7,
        "model": "model",
        "image": "start.png",
        "extend": None,
        "first": None,
        "last": None,
        "loop": False,
        "negative": "the sun",
        "guidance": 2.5,
        "temperature": 0.9,
        "clusters": 5,
        "first_temperature": 1.0,
        "first_clusters": 16,
        "first_guidance": 1.0,
        "text_bonus": 1.4,
        **{f"{stage}{name}": value for stage in STAGES for name, value in (("top_k", 0), ("top_p", 1.0))},
        "cluster_temperature": 0.89,
        "first_cluster_temperature": 0.89,
        "superres_temperature": 1.0,
        "superres_clusters": 6,
        "superres_cluster_temperature": 0.6,
        "seconds": 4.0,
        "size": None,
        "fit": "crop",
        "channel": None,
        "adapter": [],
        "rounds": 0,
        "superres": False,
        "dtype": "bfloat16",
        "bundle": CogVideo.from_pretrained(model).fingerprint,
        "fps": 1.0,
        "frames": 5,
        "width": SIDE,
        "height": SIDE,
        "device": "cpu",
        "torch": torch.__version__,
        "cogvideo": cogvideo.__version__,
    }


def test_a_sidecar_makes_its_clip_again(
    model: str, inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards reproducibility: the same pixels wherever the model is now, and changes since then are reported."""
    picture(inside / "start.png")
    more = ("--negative", "the sun", "--image", "start.png", "--temperature", 2.0, "--guidance", 2.0, "--rounds", 1)
    run("a cat runs", "--model", model, "--output", "x", "--format", "png", "--seed", 7, *more)
    frames = frames_of(inside / "x" / "a-cat-runs")
    moved = inside / "moved"
    os.symlink(model, moved)
    sidecar = inside / "x" / "a-cat-runs.json"
    run("--from-sidecar", sidecar, "--model", "moved", "--output", "y", "--format", "png")
    assert np.array_equal(frames_of(inside / "y" / "a-cat-runs"), frames)
    assert (
        json.loads((inside / "y" / "a-cat-runs.json").read_text())["codes"] == json.loads(sidecar.read_text())["codes"]
    )

    for changed, message in (
        ({"bundle": "0"}, "was made with a different model from"),
        ({"sha256": {"image": "0"}}, "was made with a different file from start.png"),
        ({"prompt": 3}, "other.json: prompt is 3: Expected `str`, got `int`"),
        ({"superres": "no"}, "other.json: superres is 'no': Expected `bool`, got `str`"),
        ({"image": 3}, "other.json: image is 3: Expected a path"),
        ({"dtype": "int8"}, "other.json: dtype is 'int8': Invalid enum value 'int8'"),
        ({"rounds": 99}, "other.json: rounds is 99, expected 0 to 6"),
    ):
        (inside / "other.json").write_text(json.dumps(json.loads(sidecar.read_text()) | changed))
        assert message in refused(capsys, "--from-sidecar", "other.json", "--model", model)
    (inside / "old.json").write_text('{"prompt": "a cat", "seed": 1}')
    assert "lacks clusters, dtype, " in refused(capsys, "--from-sidecar", "old.json")
    (inside / "none.json").write_text("[")
    assert "is not a sidecar" in refused(capsys, "--from-sidecar", "none.json")
    assert "No such file" in refused(capsys, "--from-sidecar", "nowhere.json")
    for option in (("a cat",), ("--seed", "1"), ("--rounds", "1"), ("--samples", "2")):
        assert "got --from-sidecar with a prompt" in refused(capsys, *option, "--from-sidecar", str(sidecar))
    (inside / "other.json").write_text(json.dumps(json.loads(sidecar.read_text()) | {"codes": "0", "torch": "1.0"}))
    run("--from-sidecar", "other.json", "--model", model, "--output", "z", status=1)
    assert "the codes differ from those of other.json, made by torch 1.0 on cpu" in capsys.readouterr().err


def test_a_sidecar_of_an_older_version_makes_its_clip_again(model: str, inside: Path) -> None:
    """Guards clips from before options such as top-k and top-p: they are reproduced, and a rerun skips them."""
    (inside / "x.txt").write_text("a cat runs")
    options = ("--model", model, "--rounds", 0, "--no-superres", "--prompts", "x.txt")
    run(*options)
    sidecar = inside / "out" / "a-cat-runs.json"
    record = json.loads(sidecar.read_text())
    assert ADDED.items() <= record.items()
    sidecar.write_text(json.dumps({name: value for name, value in record.items() if name not in ADDED}))
    run("--from-sidecar", sidecar, "--model", model, "--output", "y.mp4")
    assert record_of(inside / "y.mp4") == record | {"file": "y.mp4"}
    run(*options)
    assert len(list((inside / "out").glob("*.mp4"))) == 1


def test_options_mean_what_they_say(model: str, inside: Path) -> None:
    """Checks how options become settings: guidance, sampler, and negative prompt apply to later frames."""
    options = ("--rounds", 1, "--guidance", 2.5, "--temperature", 0.9, "--clusters", 5, "--negative", "the sun")
    run("a cat runs", "--model", model, "--format", "png", "--seed", 7, *options)
    expected = made(
        model,
        "a cat runs",
        7,
        rounds=1,
        later=SamplingConfig(0.9, clusters=5, guidance=2.5),
        negative="the sun",
        should_enlarge=True,
    )
    assert np.array_equal(frames_of(inside / "out" / "a-cat-runs"), expected)


def test_a_model_of_short_clips_makes_short_clips(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks that clips have the length and frame rate that a model was trained on; untrained lengths are rejected."""
    CogVideo.from_pretrained(model).save_pretrained("short")
    whole = CogVideo.from_pretrained("short")
    update("short", whole.config.trained_on("sequential", (1.0, 0.5)), base=whole.base)
    options = ("a cat", "--model", "short", "--no-superres", "--seed", 3)
    run(*options, "--output", "x.mp4")
    frames, rate, _, record = read(inside / "x.mp4")
    assert (len(frames), rate, record["seconds"], record["rounds"]) == (9, 8, 1, 1)
    run("--from-sidecar", "x.json", "--output", "again.mp4")
    run(*options, "--seconds", 0.5, "--format", "png")
    assert len(frames_of(inside / "out" / "a-cat")) == 5
    expected = made("short", "a cat", 3, rounds=0, duration=0.5)
    assert np.array_equal(frames_of(inside / "out" / "a-cat"), expected)
    run(*options, "--seconds", 1.5, "--rounds", 0, "--output", "long.mp4")
    frames, rate, _, record = read(inside / "long.mp4")
    assert (len(frames), rate, record["seconds"]) == (7, 4, 1.5)
    run("--from-sidecar", "long.json", "--output", "again.mp4")
    told = refused(capsys, "a cat", "--model", "short", "--seconds", "0.25")
    assert "seconds is 0.25, expected 1, 0.5, or a longer one: the key frames of this model" in told
    told = refused(capsys, "a cat", "--model", "short", "--seconds", "1.4")
    assert "seconds is 1.4, expected a multiple of 0.25, the time between key frames, up to 60" in told
    told = refused(capsys, "a cat", "--model", model, "--seconds", "2")
    assert "seconds is 2.0, but this model makes clips of 4 seconds or more" in told


def test_a_model_has_values_of_its_own(model: str, inside: Path) -> None:
    """Guards a model's samplers and guidance: they are used and recorded unless overridden, and a sidecar keeps them
    when the model's values change."""
    own = shutil.copytree(model, inside / "own")
    manifest = json.loads((own / "bundle.json").read_text())
    first = {"temperature": 0.7, "clusters": 2, "guidance": 1.5, "top_p": 0.9}
    later = {"temperature": 0.9, "clusters": 5, "guidance": 2.5, "top_k": 20}
    superres = {"temperature": 0.8, "clusters": 3, "cluster_temperature": 0.5}
    for stage, values in (("first", first), ("later", later), ("superres", superres)):
        manifest["config"][f"{stage}_sampling"] |= values
    manifest["config"]["text_bonus"] = 0.3
    (own / "bundle.json").write_text(json.dumps(manifest))
    expected = made(
        model,
        "a cat runs",
        7,
        rounds=1,
        first=SamplingConfig(**first),
        later=SamplingConfig(**later),
        superres=SamplingConfig(**superres),
        text_bonus=0.3,
        should_enlarge=True,
    )
    values = later | {f"first_{name}": value for name, value in first.items()} | {"text_bonus": 0.3}
    values |= {f"superres_{name}": value for name, value in superres.items()}
    plain = ("--format", "png")
    run("a cat runs", "--model", own, "--seed", 7, "--rounds", 1, *plain)
    assert np.array_equal(frames_of(inside / "out" / "a-cat-runs"), expected)
    assert values.items() <= record_of(inside / "out" / "a-cat-runs.png").items()

    options = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]
    run("a cat runs", "--model", model, "--seed", 7, "--rounds", 1, *plain, *options, "--output", "given")
    assert np.array_equal(frames_of(inside / "given" / "a-cat-runs"), expected)
    run("--from-sidecar", "out/a-cat-runs.json", "--model", model, "--output", "again", "--format", "png")
    assert np.array_equal(frames_of(inside / "again" / "a-cat-runs"), expected)


def test_each_option_changes_the_clip(model: str, inside: Path) -> None:
    """Catches options that are parsed and then ignored."""
    plain = ("a cat runs", "--model", model, "--format", "png", "--seed", 7, "--rounds", 0, "--no-superres")
    picture(inside / "start.png")
    changes = [
        (),
        ("--seed", 8),
        ("--guidance", 1),
        ("--temperature", 3),
        ("--clusters", 1),
        ("--top-k", 2),
        ("--top-p", 0.3),
        ("--cluster-temperature", 3),
        ("--first-temperature", 3),
        ("--first-clusters", 1),
        ("--first-top-k", 2),
        ("--first-top-p", 0.3),
        ("--first-cluster-temperature", 3),
        ("--first-guidance", 5),
        ("--text-bonus", 5),
        ("--negative", "the sun"),
        ("--image", "start.png"),
        ("--loop",),
        ("--rounds", 1),
        ("--superres",),
        ("--superres", "--superres-temperature", 0),
        ("--superres", "--superres-clusters", 1),
        ("--superres", "--superres-top-k", 2),
        ("--superres", "--superres-top-p", 0.5),
        ("--superres", "--superres-cluster-temperature", 5),
        ("--dtype", "bfloat16"),
    ]
    seen = []
    for number, change in enumerate(changes):
        run(*plain, *change, "--output", number)
        seen.append(frames_of(inside / str(number) / "a-cat-runs"))
    for first in range(len(seen)):
        for other in range(first):
            assert not np.array_equal(seen[first], seen[other]), (changes[first], changes[other])
    run(*plain, "--output", "again")
    assert np.array_equal(frames_of(inside / "again" / "a-cat-runs"), seen[0])


@pytest.mark.parametrize(
    ("name", "milliseconds"), [("x.gif", 500), ("x.webp", 500), ("X.GIF", 500), ("X.WEBP", 500), ("X.MP4", None)]
)
def test_other_formats(name: str, milliseconds: int | None, model: str, inside: Path) -> None:
    """Checks GIF and WebP: the clip plays at its rate, and its settings are in the file and in a sidecar."""
    run("a 猫 runs", "--model", model, "--output", name, "--seed", 3, "--rounds", 1, "--no-superres")
    assert tree(inside) == sorted([name, f"{name[0]}.json"])
    assert record_of(inside / name)["seed"] == 3
    if milliseconds is not None:
        with Image.open(inside / name) as image:
            image.load()
            assert (image.n_frames, image.size, image.info["duration"]) == (9, (SIDE, SIDE), milliseconds)
            is_gif = name.lower().endswith("gif")
            comment = image.info["comment"].decode() if is_gif else image.getexif()[0x010E]
            assert json.loads(comment) == record_of(inside / name)


def test_frames_are_a_folder_of_pictures(model: str, inside: Path) -> None:
    """Checks PNG: exact pixels, the record in each file, and nothing else in the folder."""
    run("a cat runs", "--model", model, "--format", "png", "--seed", 3, *QUICK)
    names = [f"out/a-cat-runs/{place:03}.png" for place in range(5)]
    assert tree(inside) == ["out/a-cat-runs.json", *names]
    expected = made(model, "a cat runs", 3, rounds=0, later=UNGUIDED)
    assert np.array_equal(frames_of(inside / "out" / "a-cat-runs"), expected)
    with Image.open(inside / names[2]) as image:
        assert json.loads(image.text["comment"])["seed"] == 3  # type: ignore[attr-defined]


def test_frames_can_be_played_at_another_rate(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks --fps: the same codes, faster; rates that a format lacks are rejected before generation."""
    run("a cat runs", "--model", model, "--output", "a.mp4", "--seed", 3, *QUICK)
    run("a cat runs", "--model", model, "--output", "b.mp4", "--seed", 3, "--fps", 5, *QUICK)
    (slow, rate, _, one), (fast, other, seconds, two) = read(inside / "a.mp4"), read(inside / "b.mp4")
    assert (rate, other, seconds) == (1, 5, 1)
    assert len(slow) == len(fast) == 5
    assert one["codes"] == two["codes"]
    told = refused(capsys, "a cat", "--model", model, "--output", "x.gif", "--rounds", "6")
    assert "fps is 64.0, expected a number in [0.01, 50] for .gif" in told


# Input frames


def test_an_image_starts_to_move(model: str, inside: Path) -> None:
    """Checks image-to-video: frame 0 is the center of the picture, as the image tokenizer reconstructs it."""
    wide = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    wide[:, SIDE : 2 * SIDE] = np.asarray(Image.open(picture(inside / "square.png", side=SIDE)))
    write_image(inside / "wide.png", wide)
    with Image.open(inside / "square.png") as image:
        image.convert("L").save(inside / "gray.jpg")
        image.convert("RGBA").save(inside / "alpha.webp", lossless=True)
    pipeline = CogVideoPipeline.from_pretrained(model)
    for name in ("square.png", "wide.png", "gray.jpg", "alpha.webp"):
        run("a cat runs", "--model", model, "--image", name, "--format", "png", "--output", name[:-4], *QUICK)
        square = read_video(inside / name, 1, SIDE, max_frames=1).frames
        codes = pipeline.encode(square)
        expected = pipeline.model.autoencoder.decode_pixels(codes)
        frames = frames_of(inside / name[:-4] / "a-cat-runs")
        assert np.array_equal(frames[0], expected[0]), name
        assert not np.array_equal(frames[1], frames[0])
    assert np.array_equal(*(frames_of(inside / name / "a-cat-runs")[0] for name in ("square", "wide")))


@pytest.mark.parametrize(("number", "start"), [(1, 0), (2, 1), (3, 0), (12, 9)])
def test_a_video_goes_on(number: int, start: int, model: str, inside: Path) -> None:
    """Checks extension: existing frames stay, frame by frame, and the continuation starts from the last second."""
    frames = np.random.default_rng(1).integers(0, 256, (number, 2, 2, 3), np.uint8).repeat(20, 1).repeat(20, 2)
    write_video(inside / "old.webp", frames, 2)
    options = ("--rounds", 1, "--no-superres", "--format", "png", "--seed", 3)
    run("a cat runs", "--model", model, "--extend", "old.webp", *options)
    found = frames_of(inside / "out" / "a-cat-runs")
    assert len(found) == start + 9
    pipeline = CogVideoPipeline.from_pretrained(model)
    codes = pipeline.encode(read_video(inside / "old.webp", 2, SIDE).frames)
    assert np.array_equal(found[:number], pipeline.model.autoencoder.decode_pixels(codes))
    alone = made(model, "a cat runs", 3, codes[start:number], rounds=1)
    assert np.array_equal(found[number:], alone[number - start :])


def test_what_lies_between_two_pictures(model: str, inside: Path) -> None:
    """Checks in-betweening: the clip begins with one picture and ends with the other."""
    picture(inside / "a.png", 1)
    picture(inside / "b.png", 2)
    options = ("--rounds", 1, "--no-superres", "--format", "png")
    run("a cat runs", "--model", model, "--first", "a.png", "--last", "b.png", *options)
    found = frames_of(inside / "out" / "a-cat-runs")
    pipeline = CogVideoPipeline.from_pretrained(model)
    codes = pipeline.encode([np.asarray(Image.open(inside / name)) for name in ("a.png", "b.png")])
    ends = pipeline.model.autoencoder.decode_pixels(codes)
    assert len(found) == 9
    assert np.array_equal(found[[0, -1]], ends)


def test_a_loop_ends_where_it_begins(model: str, inside: Path) -> None:
    """Checks loops: the first frame follows the last and is not shown twice; key frames match those without a loop."""
    options = ("--model", model, "--no-superres", "--format", "png", "--seed", 3)
    run("a cat runs", *options, "--rounds", 0, "--output", "open")
    run("a cat runs", *options, "--rounds", 0, "--loop", "--output", "keys")
    run("a cat runs", *options, "--rounds", 1, "--loop", "--output", "loop")
    found, keys, loop = (frames_of(inside / name / "a-cat-runs") for name in ("open", "keys", "loop"))
    assert np.array_equal(keys, found[:4])
    assert len(loop) == 8
    assert np.array_equal(loop[::2], keys)


# Many clips


def test_a_seed_is_drawn_and_told(model: str, inside: Path) -> None:
    """Guards reproducibility: each clip records its own random seed, which reproduces it alone."""
    run("a cat runs", "the sun", "a cat runs", "--model", model, "--format", "png", *QUICK)
    names = ["a-cat-runs", "the-sun", "a-cat-runs-2"]
    records = [json.loads((inside / "out" / f"{name}.json").read_text()) for name in names]
    assert [each["prompt"] for each in records] == ["a cat runs", "the sun", "a cat runs"]
    assert len({each["seed"] for each in records}) == 3
    run("a cat runs", "--model", model, "--format", "png", "--output", "alone", "--seed", records[2]["seed"], *QUICK)
    assert np.array_equal(frames_of(inside / "alone" / "a-cat-runs"), frames_of(inside / "out" / "a-cat-runs-2"))


def test_samples_and_batches(model: str, inside: Path) -> None:
    """Checks batches: seeds count up from clip to clip, and a clip does not depend on the rest of its batch."""
    options = ("a cat runs", "the sun", "--model", model, "--format", "png", "--seed", 5, "--samples", 2, *QUICK)
    run(*options)
    run(*options, "--batch", 3, "--output", "batch")
    names = ["a-cat-runs", "a-cat-runs-2", "the-sun", "the-sun-2"]
    for seed, name in enumerate(names, 5):
        record = json.loads((inside / "out" / f"{name}.json").read_text())
        assert record["seed"] == seed
        assert json.loads((inside / "batch" / f"{name}.json").read_text()) == record
        frames = frames_of(inside / "out" / name)
        assert np.array_equal(frames_of(inside / "batch" / name), frames)
        expected = made(model, record["prompt"], seed, rounds=0, later=UNGUIDED)
        assert np.array_equal(frames, expected)


def test_a_list_is_gone_on_with(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards long lists: finished clips are skipped unless settings differ; half-finished ones are generated again."""
    (inside / "list.csv").write_text('prompt,seed\na cat runs,7\nthe sun,\n"a cat, runs",9\n', encoding="utf-8")
    options = ("--prompts", "list.csv", "--model", model, *QUICK)
    run(*options)
    names = ["a-cat-runs.mp4", "the-sun.mp4", "a-cat-runs-2.mp4"]
    assert capsys.readouterr().out.split() == [f"out/{name}" for name in names]
    assert [record_of(inside / "out" / name)["seed"] for name in names][::2] == [7, 9]
    before = {name: (inside / "out" / name).stat().st_mtime_ns for name in names}
    (inside / "out" / "a-cat-runs-2.json").unlink()  # as after a kill: no record, so it is not finished
    run(*options)
    told = capsys.readouterr()
    assert told.out.split() == ["out/a-cat-runs-3.mp4"]
    assert told.err == "skipped 2 of 3 clips, which exist already\n"
    assert {name: (inside / "out" / name).stat().st_mtime_ns for name in names} == before
    run(*options, "--samples", "2")
    assert len(capsys.readouterr().out.split()) == 3, "one more of each"
    run(*options, "--temperature", 2)
    assert len(capsys.readouterr().out.split()) == 3, "all of them otherwise"


def test_a_list_may_name_some_seeds(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a clip for a row with a seed from being counted for a row without one."""
    run("a cat", "--seed", 7, "--model", model, *QUICK)
    capsys.readouterr()
    (inside / "list.csv").write_text("prompt,seed\na cat,\na cat,7\na cat,\n", encoding="utf-8")
    for number in (2, 0):
        run("--prompts", "list.csv", "--model", model, *QUICK)
        assert len(capsys.readouterr().out.split()) == number
    seeds = [json.loads(each.read_text())["seed"] for each in (inside / "out").glob("*.json")]
    assert seeds.count(7) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\n \n", "x.txt has no prompts, expected one per line"),
        ("x.txt", b"a cat\n\xff", "x.txt, line 2: it is not UTF-8 text"),
        ("x.tsv", b"prompt\na cat\n\xff", "cannot read x.tsv: line 3 is not UTF-8"),
        ("x.csv", b"words\na cat\n", "x.csv has the columns words, expected prompt or caption or text"),
        ("x.csv", b"Prompt,seed\na cat,1\n", "or text; unknown column 'Prompt', did you mean 'prompt'?"),
        ("x.csv", b"prompt,seed\na cat,-2\n", "x.csv, line 2: seed is '-2', expected a whole number in"),
        ("x.tsv", b"prompt\tseed\na cat\t1.5\n", "x.tsv, line 2: seed is '1.5', expected a whole number in"),
        ("x.jsonl", b'{"prompt": "a", "seed": true}', "x.jsonl, line 1: seed is True, expected a whole number in"),
        ("x.jsonl", b'{"prompt": "a", "seed": 1e18}', "x.jsonl, line 1: seed is 1e+18, expected a whole number in"),
        ("x.txt", b"a cat\n\xe2\x80\x8b\n", "x.txt, line 2: the prompt is empty"),
        ("x.txt", b"a cat\n" + b"a man pours water into a glass " * 40, "x.txt, line 2: the prompt has"),
        ("x.csv", b"prompt,seed\n" + b"a man pours water into a glass " * 40, "x.csv, line 2: the prompt has"),
        ("x.csv", b"prompt,seed\n,1\n", "x.csv, line 2: prompt is '', expected a text"),
        ("x.jsonl", b'{"prompt": 3}\n', "x.jsonl, line 1: prompt is 3, expected a text"),
        (
            "x.csv",
            b"prompt\na cat, on a mat\n",
            "x.csv, line 2: a cell has no column: quote prompts with commas",
        ),
        ("x.csv", b"prompt,seed\na cat," + b"1" * 5000, "x.csv, line 2: seed is '1111"),
        ("x.csv", b"", "x.csv is empty, expected names of columns"),
        ("x.jsonl", b"", "x.jsonl is empty, expected lines"),
        ("x.jsonl", b"[1]", 'x.jsonl, line 1: got [1], expected {"name": value'),
        ("x.jsonl", b'{"prompt": "\\ud800"}', "x.jsonl, line 1: prompt is '\\ud800', expected Unicode text"),
        ("x.json", b'[{"prompt": "a cat"}]', "x.json is not a list of prompts, expected a text file, .csv"),
        ("x.xlsx", b"PK", "x.xlsx is not a list of prompts, expected a text file, .csv"),
        ("x.txt", b"a cat\na red\0heart", "x.txt, line 2: it holds a zero byte"),
        ("x.csv", b"prompt\na red\0heart", "x.csv, line 2: prompt is 'a red\\x00heart', expected Unicode text"),
        ("x.csv", b"prompt\n" + b"a" * 200_000, "(a cell is too long)"),
        (
            "x.jsonl",
            b'{"seed": ' + b"1" * 5000 + b"}",
            "x.jsonl, line 1: it is not JSON (Exceeds the limit (4300 digits)",
        ),
        ("x.jsonl", b"{", "x.jsonl"),
        ("x.csv", None, "No such file or directory: x.csv"),
        ("x.txt", None, "No such file or directory: x.txt"),
    ],
)
def test_a_bad_list_is_refused(
    name: str, content: bytes | None, message: str, model: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents prompts and seeds of a list from being silently lost."""
    if content is not None:
        (inside / name).write_bytes(content)
    assert message in refused(capsys, "--prompts", name, "--model", model)


def test_seeds_of_every_table(tmp_path: Path) -> None:
    """Checks seeds as programs write them: text, exponents, floats in columns with gaps; -1 and gaps mean any seed."""
    values = [7, 7.0, "7", "7.0", "1e3", None, "", float("nan"), -1]
    rows = [{"prompt": "a cat", "seed": value} for value in values]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = [7, 7, 7, 7, 1000, None, None, None, None]
    assert [each.seed for each in read_prompts(tmp_path / "x.jsonl")] == expected
    for suffix, comma in ((".csv", ","), (".tsv", "\t")):
        told = [f"a cat{comma}{value}" for value in ("7", "7.0", "1e3", "", "-1")]
        (tmp_path / f"x{suffix}").write_text("\n".join([f"prompt{comma}seed", *told]))
        assert [each.seed for each in read_prompts(tmp_path / f"x{suffix}")] == [7, 7, 1000, None, None]
    for column in ([7.0, None], [7.0, float("nan")], ["7", ""], [7, -1], [Decimal("7.00"), None]):
        pq.write_table(pa.table({"prompt": ["a cat"] * 2, "seed": column}), tmp_path / "x.parquet")
        assert [each.seed for each in read_prompts(tmp_path / "x.parquet")] == [7, None], column


def test_a_misspelt_column_of_seeds_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches seeds silently ignored because of a misspelled column name; other columns give no warning."""
    for column, told in (("Seed", True), ("seeds", True), ("sed", True), ("scene", False), ("id", False)):
        (tmp_path / "x.csv").write_text(f"prompt,{column}\na cat,7\n")
        assert [each.seed for each in read_prompts(tmp_path / "x.csv")] == [None]
        assert (f"x.csv: unknown column {column!r}, did you mean 'seed'?\n" in capsys.readouterr().err) == told


@pytest.mark.parametrize("sign", "\v\f\x1c\x1d\x1e\x85\u2028\u2029")
def test_a_line_ends_where_editors_end_it(sign: str, tmp_path: Path) -> None:
    """Checks prompts with characters that only `str.splitlines` treats as line breaks; they become spaces."""
    (tmp_path / "x.txt").write_text(f"a cat,{sign}on a mat\r\nthe sun\rthe moon\n", encoding="utf-8", newline="")
    assert [each.text for each in read_prompts(tmp_path / "x.txt")] == ["a cat, on a mat", "the sun", "the moon"]
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": f"a cat,{sign}on a mat"}, ensure_ascii=False))
    assert [each.text for each in read_prompts(tmp_path / "x.jsonl")] == ["a cat, on a mat"]
    (tmp_path / "x.csv").write_text(f"prompt,seed\na cat{sign}runs,1\n", encoding="utf-8")
    assert read_prompts(tmp_path / "x.csv")[0][:2] == ("a cat runs", 1)


def test_conventions_of_other_tools(model: str, inside: Path) -> None:
    """Checks that an empty negative prompt means none, and that seed -1 means any."""
    run("a cat", "--model", model, "--negative", "", "--seed", -1, "--output", "x.mp4", *QUICK)
    record = record_of(inside / "x.mp4")
    assert record["negative"] is None
    assert record["seed"] >= 0


def test_a_clip_names_no_folder_of_its_maker(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards privacy: files elsewhere are recorded by name only, and files next to the sidecar are found."""
    private = inside.parent / "someone"
    private.mkdir()
    image = picture(private / "portrait.png")
    for given in (image, "../someone/portrait.png"):
        run("a cat", "--model", model, "--image", given, "--output", "x.mp4", "--seed", 3, *QUICK)
        _, _, _, inner = read(inside / "x.mp4")
        assert inner == record_of(inside / "x.mp4")
        assert (inner["image"], inner["model"]) == ("portrait.png", "model")
        assert str(inside.parent) not in json.dumps(inner)
    (inside / "kept").mkdir()
    for name in ("x.json", "x.mp4"):
        (inside / name).rename(inside / "kept" / name)
    again = ("--from-sidecar", "kept/x.json", "--output", "y.mp4")
    assert "was made with portrait.png, which is not there" in refused(capsys, *again, "--model", model)
    image.rename(inside / "kept" / "portrait.png")
    (inside / "kept" / "model").symlink_to(model)
    run(*again)
    assert record_of(inside / "y.mp4")["codes"] == record_of(inside / "kept" / "x.mp4")["codes"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_files_whose_accents_are_written_otherwise_are_found(form: Any, model: str, inside: Path) -> None:
    """Checks names that look alike: as a Mac writes them and as a keyboard types them."""
    other = "NFD" if form == "NFC" else "NFC"
    picture(inside / normalize(form, "café.png"))
    (inside / normalize(form, "é")).mkdir()
    (inside / normalize(form, "é") / normalize(form, "liste_é.txt")).write_text("a cat")
    names = (normalize(other, name) for name in ("é/liste_é.txt", "café.png"))
    run("--prompts", next(names), "--image", next(names), "--model", model, *QUICK)
    assert len(list((inside / "out").glob("*.mp4"))) == 1


def test_a_sidecar_is_checked_before_weights_are_read(
    model: str, inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rejects a different model or picture quickly, before weights are loaded."""
    picture(inside / "start.png")
    run("a cat", "--model", model, "--image", "start.png", "--output", "x.mp4", *QUICK)
    record = record_of(inside / "x.mp4")
    monkeypatch.setattr(CogVideo, "load", lambda *each: pytest.fail("weights were read"))
    for change in ({"bundle": "0"}, {"sha256": {"image": "0"}}):
        (inside / "y.json").write_text(json.dumps(record | change))
        told = refused(capsys, "--from-sidecar", "y.json", "--model", model, "--output", "z.mp4")
        assert "y.json was made with a different" in told


class Looks(set[str]):
    """Names that are taken; counts lookups."""

    number = 0

    def __rand__(self, other: Any) -> set[str]:
        self.number += 1
        return set(other) & set(self)


def test_names_of_many_clips_take_no_longer_each(tmp_path: Path) -> None:
    """Guards lists of thousands: choosing a name does not check all taken names."""
    folder = Folder(tmp_path, "mp4")
    assert [folder.name("A cat").name for _ in range(3)] == ["A-cat.mp4", "A-cat-2.mp4", "A-cat-3.mp4"]
    assert folder.name("a cat").name == "a-cat-4.mp4", "where case does not count"
    assert folder.name("a cat 5").name == "a-cat-5.mp4"
    assert [folder.name("a cat").name for _ in range(2)] == ["a-cat-6.mp4", "a-cat-7.mp4"]
    assert [folder.name(normalize(form, "é")).stem for form in ("NFC", "NFD")] == ["é", "é-2"]
    folder._names._taken = looks = Looks(folder._names._taken)
    for _ in range(100):
        folder.name("a cat")
    assert looks.number < 250


def test_names_that_are_taken_meanwhile_take_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards two processes that write the same long list to one folder: neither lists the folder for each clip."""
    folder = Folder(tmp_path, "mp4")
    path = folder.name("a cat")
    for name in ("a-cat.mp4", "a-cat-2.json"):
        (tmp_path / name).touch()
    monkeypatch.setattr(Path, "iterdir", lambda _: pytest.fail("all files were looked at"))
    with folder.holding(path) as found:
        assert found.name == "a-cat-3.mp4"


def test_writers_of_one_name_lose_no_clip(tmp_path: Path) -> None:
    """Guards runs that chose the same names in one folder before either wrote: names are shared by all formats."""
    formats: list[Format] = ["mp4", "mp4", "mp4", "gif", "webp", "png", "png", "png"]
    start = Barrier(len(formats))

    def write(number: int) -> Path:
        folder = Folder(tmp_path, formats[number])
        path = folder.name("a red heart")
        start.wait()
        with folder.holding(path) as path:
            pixels = np.full((2, SIDE, SIDE, 3), 30 * number, np.uint8)
            write_clip(path, pixels, 8, {"file": path.name, "number": number})
        return path

    with ThreadPoolExecutor(len(formats)) as pool:
        paths = list(pool.map(write, range(len(formats))))
    assert len({path.stem for path in paths}) == len(formats)
    for number, path in enumerate(paths):
        assert record_of(path) == {"file": path.name, "number": number}
        shades = frames_of(path) if path.is_dir() else read_video(path, 8).frames
        assert abs(shades.astype(float) - 30 * number).max() < 5
    assert len(list(tmp_path.iterdir())) == 2 * len(formats)


def test_a_failed_write_frees_its_name(tmp_path: Path) -> None:
    """Prevents leftovers of the empty files that reserve names while clips are written."""
    folder = Folder(tmp_path, "mp4")
    path = folder.name("a cat")
    with pytest.raises(ValueError, match="there are no frames"), folder.holding(path):
        write_clip(path, np.zeros((0, SIDE, SIDE, 3), np.uint8), 8, {})
    assert tree(tmp_path) == []


def test_lists_of_other_kinds(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks text files with one prompt per line, JSON Lines, and --json output."""
    (inside / "x.txt").write_text("\ufeffa cat runs\n\n  the sun  \r\n", encoding="utf-8")
    (inside / "x.jsonl").write_text('{"caption": "a cat", "seed": 4}\n{"caption": "the sun"}\n', encoding="utf-8")
    run("--prompts", "x.txt", "--model", model, "--output", "texts", *QUICK)
    assert capsys.readouterr().out.split() == ["texts/a-cat-runs.mp4", "texts/the-sun.mp4"]
    run("--prompts", "x.jsonl", "--model", model, "--output", "lines", "--json", *QUICK)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["file"], each["prompt"]) for each in records] == [("a-cat.mp4", "a cat"), ("the-sun.mp4", "the sun")]
    assert records[0]["seed"] == 4
    assert records == [record_of(inside / "lines" / each["file"]) for each in records]


# Previews and interruptions


def test_frames_are_there_before_the_clip(
    model: str, inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks --preview and Ctrl-C: previews and finished clips stay, and nothing half-finished looks like a clip."""
    stream = CogVideoPipeline.frames

    def interrupted(self: CogVideoPipeline, request: Request) -> Any:
        frames = stream(self, request)

        def some() -> Any:
            yield next(frames)
            yield next(frames)
            raise KeyboardInterrupt

        return some() if request.prompts == ["the sun"] else frames

    monkeypatch.setattr(CogVideoPipeline, "frames", interrupted)
    arguments = ("a cat runs", "the sun", "the sun", "--model", model, "--seed", 3, "--preview", *QUICK)
    run(*arguments, status=130)
    assert tree(inside / "out") == [
        *(f"a-cat-runs-frames/{place:03}.png" for place in range(5)),
        "a-cat-runs.json",
        "a-cat-runs.mp4",
        "the-sun-frames/000.png",
        "the-sun-frames/001.png",
    ]
    expected = made(model, "a cat runs", 3, rounds=0, later=UNGUIDED)
    assert np.array_equal(frames_of(inside / "out" / "a-cat-runs-frames"), expected)
    told = capsys.readouterr()
    assert told.out == "out/a-cat-runs.mp4\n"
    assert told.err.endswith("stopped at seed 4\n")


def test_control_c_ends_a_real_process(model: str, inside: Path) -> None:
    """Checks a real process: it ends at once with status 130, without a traceback, and keeps its previews."""
    arguments = ["a cat runs", "--model", model, "--samples", "500", "--preview", "--rounds", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cogvideo", "generate", *arguments],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 300
    while not list(inside.glob("out/*-frames/002.png")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert "stopped at seed" in told
    assert list(inside.glob("out/*-frames/002.png"))
    assert not [each for each in tree(inside) if ".tmp" in each]


# Odd prompts and mistakes


ODD = {
    "🐈‍⬛": "clip",
    "一只猫在草地": "一只猫在草地",
    "a\x01\t\nb\x1b[31m": "a-b-31m",
    "\"'\\ `x`": "x",
    "../../../x": "x-2",
    "/etc/x": "etc-x",
    "$(rm y);*|&": "rm-y",
    "C:\\nul.mp4": "C-nul-mp4",
    "..": "clip-2",
    "{x} %s %00": "x-s-00",
    "_": "_",
    "ñ é": "ñ-é",
}


def test_odd_prompts_stay_inside(model: str, inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the file system against prompts: plain names in the output folder; records keep the original prompt."""
    run("--model", model, *QUICK, "--", *ODD)
    assert capsys.readouterr().out.splitlines() == [f"out/{name}.mp4" for name in ODD.values()]
    files = [f"a/b/c/out/{name}.{kind}" for name in ODD.values() for kind in ("json", "mp4")]
    assert tree(tmp_path) == sorted(files)
    for prompt, name in ODD.items():
        assert record_of(inside / "out" / f"{name}.mp4")["prompt"] == prompt
        assert read(inside / "out" / f"{name}.mp4")[3]["prompt"] == prompt


def test_a_prompt_may_look_like_an_option(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks prompts that begin with a dash: -- ends the options, and nothing in a prompt is interpreted."""
    run("--model", model, "--seed", 1, "--output", "o", *QUICK, "--", "-rf /", "$HOME")
    assert capsys.readouterr() == ("o/rf.mp4\no/HOME.mp4\n", "")
    assert [record_of(inside / "o" / name)["prompt"] for name in ("rf.mp4", "HOME.mp4")] == ["-rf /", "$HOME"]


@pytest.mark.parametrize(
    ("prompts", "names"),
    [
        (("a b", "a-b", "a b!", "a b 2"), ["a-b", "a-b-2", "a-b-3", "a-b-2-2"]),
        (("A cat", "a Cat", "a cat"), ["A-cat", "a-Cat-2", "a-cat-3"]),
        (("x" * 200, "x" * 300), ["x" * 120, "x" * 120 + "-2"]),
        (("猫" * 100,), ["猫" * 40]),
        (("\U00020000" * 60, "?", "!"), ["\U00020000" * 30, "clip", "clip-2"]),
    ],
)
def test_every_prompt_has_a_file_of_its_own(
    prompts: tuple[str, ...], names: list[str], model: str, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents clips from replacing each other, even on case-insensitive file systems, and overlong names."""
    codes, pixels = torch.zeros(1, SIDE, dtype=torch.int64), np.zeros((1, SIDE, SIDE, 3), np.uint8)
    frames = [Frame("image", place, 5, codes, pixels) for place in range(5)]
    monkeypatch.setattr(CogVideoPipeline, "frames", lambda *_: iter(frames))  # only names matter here
    run("--model", model, "--seed", 1, *QUICK, "--", *prompts)
    assert tree(inside / "out") == sorted(f"{name}{suffix}" for name in names for suffix in (".json", ".mp4"))
    for prompt, name in zip(prompts, names, strict=True):
        assert record_of(inside / "out" / f"{name}.mp4")["prompt"] == prompt


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (("",), "the prompt is empty: ''"),
        (("a cat", " \t\n"), "the prompt is empty"),
        (("\u200b\u2060",), "the prompt is empty"),
        (("\x01\x02",), "the prompt is empty"),
        (("a cat", "x" * 10_000), r"the prompt has \d+ tokens, 16 fit"),
        (("a cat", "\udc80"), "is not valid Unicode"),
        ((), "got no prompt, expected texts or --prompts FILE"),
    ],
)
def test_one_bad_prompt_is_found_before_the_first_clip(
    prompts: tuple[str, ...], message: str, model: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rejects a list with an unusable prompt before any clip or folder is created."""
    assert re.search(message, refused(capsys, "--model", model, "--rounds", "0", "--", *prompts))
    assert list(inside.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "-1"), "rounds is -1, expected 0 to 6"),
        (("--rounds", "7"), "rounds is 7, expected 0 to 6"),
        (("--samples", "0"), "samples is 0, expected 1 to 100000"),
        (("--batch", "0"), "batch is 0, expected a positive number"),
        (("--fps", "0"), "fps is 0.0, expected a number in"),
        (("--image", "nowhere.png"), "--image: No such file or directory: nowhere.png"),
        (("--image", "file"), "file: "),
        (("--extend", "file"), "file: "),
        (("--first", "file"), "got one of --first and --last, expected both"),
        (("--image", "file", "--extend", "file"), "got --image and --extend, expected only one of them"),
        (("--extend", "file", "--loop"), "got --loop and --extend, expected only one of them"),
        (("--prompts", "file"), "got prompts and a file of prompts, expected one of them"),
        (("--device", "cuda"), "cannot use the device 'cuda'"),
        (("--model", "nobody/nothing"), "there is no folder nobody/nothing, and none came from the Hub"),
        (("--guidance", "nan"), " guidance is nan, expected 0 to 100"),
        (("--guidance", "1e30"), " guidance is 1e\\+30, expected 0 to 100"),
        (("--temperature", "-1"), " temperature is -1.0, expected 0 to 100"),
        (("--first-temperature", "inf"), "first_temperature is inf, expected 0 to 100"),
        (("--text-bonus", "nan"), "text_bonus is nan, expected -100 to 100"),
        (("--superres-temperature", "-1"), "superres_temperature is -1.0, expected 0 to 100"),
        (("--superres-clusters", "-1"), "superres_clusters is -1, expected 0 to 1000000"),
        (("--clusters", "9999999"), " clusters is 9999999, expected 0 to 1000000"),
        (("--top-k", "-1"), " top_k is -1, expected 0 to 1000000"),
        (("--first-top-p", "1.5"), "first_top_p is 1.5, expected above 0, at most 1"),
        (("--superres-cluster-temperature", "0"), "superres_cluster_temperature is 0.0, expected above 0, at most 100"),
        (("--samples", "300000000"), "samples is 300000000, expected 1 to 100000"),
        (("--samples", "2", "--seed", str(2**63 - 1)), f"the seed of the last clip would be {2**63}, expected"),
        (("--negative", " "), "the negative prompt is empty: ' '"),
        (("--device", "cpu:3"), "there is no device cpu:3, expected cpu"),
        (("--device", "mps"), r"cannot use the device 'mps' \(.{1,90}\), expected auto, cpu, or a GPU"),
        (("--image", "folder.mp4"), "Is a directory: folder.mp4, expected a file"),
        (("--fps", "0.005"), "fps is 0.005, expected a number in"),
        (("--device", "meta"), "cannot use the device 'meta'"),
        (("--model", ""), "the model has no name"),
        (("--output", "x.png"), "cannot write x.png: expected a folder, or a file that ends in .mp4"),
        (("--output", "x.mp4", "--format", "gif"), "output is x.mp4 and format gif, expected one format"),
        (("--output", "x" * 201), "the name xxxxxxxxxxxxxxxxxxxx... has 201 bytes, expected 200 at most"),
        (("--seed", "-2"), "seed is -2, expected a number in"),
        (("--device", "abacus"), "cannot use the device 'abacus'"),
        (("--model", "nowhere"), "there is no folder nowhere: pass the folder of a bundle"),
        (("--model", "."), "cannot use bundle.json: No such file or directory, expected the folder of a bundle"),
        (("--output", "x.avi"), r"cannot write x.avi: expected a folder, or a file that ends in .mp4, .gif, .webp"),
        (("--output", "file"), "file is a file, expected a folder"),
        (("--output", "folder.mp4"), "folder.mp4 is a folder, expected a file, or a folder without .mp4"),
        (("--output", "file/x.mp4"), "file is a file, expected a folder"),
        (("--output", "file/deeper/out"), "Not a directory: file/deeper"),
        (("--output", "/proc/out"), "No such file or directory: /proc/out"),
        (("--output", "/proc/x.mp4"), r"cannot write into /proc \(.+\), expected a folder"),
        (("--output", "\udcff.mp4"), r"the name '\\udcff.mp4' is not Unicode text: rename it"),
        (("--image", "\udcff.png"), r"the name '\\udcff.png' is not Unicode text: rename it"),
    ],
)
def test_mistakes_are_one_line(
    options: tuple[str, ...], message: str, model: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks the message for each impossible request; nothing is written."""
    (inside / "file").touch()
    (inside / "folder.mp4").mkdir()
    assert re.search(message, refused(capsys, "a cat", "--model", model, "--rounds", "0", *options))
    assert sorted(each.name for each in inside.iterdir()) == ["file", "folder.mp4"]


def test_a_file_is_for_one_prompt(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents all prompts but one from being lost."""
    told = refused(capsys, "a cat", "the sun", "--model", model, "--output", "x.mp4")
    assert "output is the file x.mp4 for 2 clips, expected a folder" in told
    assert list(inside.iterdir()) == []


def test_a_damaged_model_is_refused(
    train_text_model: Callable[..., bytes], inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rejects a model with a file of the wrong size, as in an incomplete copy."""
    make_model(inside / "model", train_text_model())
    with (inside / "model" / "sequential.safetensors").open("ab") as file:
        file.write(b"x")
    assert "sequential.safetensors has" in refused(capsys, "a cat", "--model", "model")


def test_what_is_there_is_replaced_as_a_whole(record: dict[str, Any], inside: Path) -> None:
    """Guards a clip that is replaced by name: whenever the process is killed, the old or the new clip is there, with
    its own sidecar or none."""

    def write(seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
        write_clip(path, pixels, 1.0, record | {"seed": seed})

    path = Path("x.mp4")
    write(2)
    new = path.read_bytes()
    write(1)
    old = path.read_bytes()
    seen = set()
    for number in count(1):
        killed = kill_at(number, lambda: write(2))
        assert path.read_bytes() in (old, new)
        seed = read(path)[3]["seed"]
        has = path.with_suffix(".json").exists()
        assert not has or record_of(path)["seed"] == seed
        seen.add((seed, has))
        if not killed:
            break
    assert seen == {(1, True), (1, False), (2, False), (2, True)}
    assert (path.read_bytes(), record_of(path)["seed"]) == (new, 2)


def test_what_is_there_outlasts_a_full_disk(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keeps the old clip and its record if the new one cannot be written."""
    run("a cat", "--model", model, "--output", "x.mp4", "--seed", 1, *QUICK)
    before = {name: (inside / name).read_bytes() for name in tree(inside)}
    with full_disk(1000):
        told = refused(capsys, "a cat", "--model", model, "--output", "x.mp4", "--seed", "2", *QUICK)
    assert told == "cogvideo: error: --output: File too large: x.mp4\n"
    assert {name: (inside / name).read_bytes() for name in tree(inside)} == before


def test_what_is_read_is_not_replaced(
    model: str, record: dict[str, Any], inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a command from overwriting its own inputs: a user's clip, list, or sidecar."""
    (inside / "heart.json").write_text(json.dumps(record | {"file": "heart.mp4", "codes": "others"}))
    write_video(inside / "x.mp4", np.zeros((3, SIDE, SIDE, 3), np.uint8), 1)
    os.symlink("x.mp4", inside / "y.mp4")
    (inside / "list.mp4").write_text("a cat")
    before = {name: (inside / name).read_bytes() for name in tree(inside)}
    for options in (("a cat", "--extend", "x.mp4"), ("a cat", "--image", "y.mp4"), ("--prompts", "list.mp4")):
        name = options[-1].replace("y", "x")
        told = refused(capsys, *options, "--model", model, "--output", name, *QUICK)
        assert f"output is {name}, which would replace the input {options[-1]}: choose another name" in told
    told = refused(capsys, "--from-sidecar", "heart.json", "--model", model, "--output", "heart.mp4")
    assert "output is heart.mp4, which would replace the input heart.json: choose another name" in told
    assert {name: (inside / name).read_bytes() for name in tree(inside)} == before


def test_what_may_never_end_is_not_read(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents hanging on pipes without a writer and endless devices; prompts from a shell's <(...) still work."""
    for suffix in (".mp4", ".csv", ".json"):
        os.mkfifo(inside / f"pipe{suffix}")
    options = ("--image pipe.mp4", "--extend pipe.mp4", "--first pipe.mp4 --last pipe.mp4", "--image /dev/zero")
    for each in options:
        told = refused(capsys, "a cat", "--model", model, *each.split())
        assert f"{each.split()[-1]} is a pipe or a device, expected a file" in told
    assert "/dev/zero has more than 64 MiB, expected a list" in refused(capsys, "--prompts", "/dev/zero")
    assert "pipe.csv is a pipe or a device" in refused(capsys, "--model", model, "--prompts", "pipe.csv")
    assert "pipe.json is not a sidecar" in refused(capsys, "--from-sidecar", "pipe.json")
    end, start = os.pipe()
    os.write(start, b"a cat\nthe sun\n")
    os.close(start)
    assert [each.text for each in read_prompts(Path(f"/dev/fd/{end}"))] == ["a cat", "the sun"]
    os.close(end)


def test_names_that_an_output_cannot_show(model: str, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a list from ending after its first clip because the terminal cannot encode a name."""
    prompts = ["猫", "\U0001f600 é"]
    for options in ((), ("--json",)):
        printed = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
        run(*prompts, "--model", model, "--seed", 1, *QUICK, *options)
        if options:
            assert [json.loads(line)["prompt"] for line in printed.getvalue().splitlines()] == prompts
        else:
            assert printed.getvalue() == b"out/\\u732b.mp4\nout/\\xe9.mp4\n"


def test_nothing_in_a_folder_is_replaced(model: str, inside: Path) -> None:
    """Guards earlier clips: the same prompt gets a new name, whatever kind of file has the first one."""
    for _ in range(2):
        run("a cat", "--model", model, "--seed", 1, *QUICK)
    (inside / "out" / "A-CAT-3.txt").touch()
    run("a cat", "--model", model, "--seed", 2, *QUICK)
    assert [record_of(inside / "out" / f"a-cat{each}.mp4")["seed"] for each in ("", "-2", "-4")] == [1, 1, 2]


def test_another_process_may_add_to_the_folder(
    model: str, inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards clips added to the folder during generation, after this clip's name was chosen."""
    make = ClipMaker.make

    def beside(self: ClipMaker, *arguments: Any) -> Any:
        for clip in make(self, *arguments):
            clip[0].path.write_text("of somebody else")
            yield clip

    monkeypatch.setattr(ClipMaker, "make", beside)
    run("a cat", "--model", model, *QUICK)
    assert capsys.readouterr().out == "out/a-cat-2.mp4\n"
    assert (inside / "out" / "a-cat.mp4").read_text() == "of somebody else"
    assert record_of(inside / "out" / "a-cat-2.mp4")["file"] == "a-cat-2.mp4"


def test_frames_of_a_stopped_run_stay(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keeps previews of earlier runs, even if a prompt is named like their folder, and reports the seed of new ones."""
    (inside / "out" / "a-cat-frames").mkdir(parents=True)
    (inside / "out" / "a-cat-frames" / "000.png").write_text("old")
    run("a cat", "a cat frames", "--model", model, "--preview", "--format", "png", "--seed", 4, *QUICK)
    told = capsys.readouterr()
    assert told.out.split() == ["out/a-cat-2", "out/a-cat-frames-2"]
    assert told.err == "out/a-cat-2-frames: frames of seed 4\nout/a-cat-frames-2-frames: frames of seed 5\n"
    assert (inside / "out" / "a-cat-frames" / "000.png").read_text() == "old"


def test_frames_never_replace_others(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keeps the user's pictures and earlier previews in folders named like that of new previews."""
    (inside / "x-frames").mkdir()
    (inside / "x-frames" / "2019.png").write_text("mine")
    for number in (2, 3):
        run("a cat", "--model", model, "--output", "x.mp4", "--preview", "--seed", 4, *QUICK)
        assert capsys.readouterr().err == f"x-frames-{number}: frames of seed 4\n"
        assert len(frames_of(inside / f"x-frames-{number}")) == 5
    assert tree(inside / "x-frames") == ["2019.png"]


def test_a_foreign_file_is_no_record(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents another clip's sidecar of the same name from being overwritten."""
    run("a cat", "--model", model, "--output", "x.mp4", *QUICK)
    before = (inside / "x.json").read_text()
    told = refused(capsys, "a cat", "--model", model, "--output", "x.gif", *QUICK)
    assert "x.json is not the sidecar of x.gif: give the clip another name" in told
    assert (inside / "x.json").read_text() == before


def test_a_list_is_made_in_every_format(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards reruns of a list: a clip in another format, or an empty file, does not count as finished."""
    (inside / "x.txt").write_text("a cat\n")
    options = ("--prompts", "x.txt", "--model", model, *QUICK)
    for names in ("a-cat.mp4", "a-cat-2.gif", "a-cat-3"):
        suffix = Path(names).suffix[1:] or "png"
        run(*options, "--format", suffix)
        run(*options, "--format", suffix)
        told = capsys.readouterr()
        assert (told.out, told.err) == (f"out/{names}\n", "skipped 1 of 1 clips, which exist already\n")
    (inside / "out" / "a-cat.mp4").write_bytes(b"")
    run(*options)
    assert capsys.readouterr().out == "out/a-cat-4.mp4\n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", "0"),
        ("seconds", "4"),
        ("rounds", True),
        ("guidance", "abc"),
        ("guidance", 10**400),
        ("temperature", float("nan")),
        ("text_bonus", float("inf")),
        ("model", "a\0b"),
        ("seed", "7"),
        ("clusters", 1.5),
        ("model", 5),
        ("image", ["a"]),
        ("dtype", "float8"),
        ("superres", "x"),
        ("negative", 5),
        ("loop", "no"),
        ("seed", 2**63),
        ("seed", -1),
        ("fps", "fast"),
        ("fps", 0),
        ("sha256", []),
    ],
)
def test_an_edited_sidecar_is_refused(
    field: str, value: object, record: dict[str, Any], inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches tracebacks, and values that an option would not accept."""
    (inside / "y.json").write_text(json.dumps(record | {field: value}))
    assert f"y.json: {field} is " in refused(capsys, "--from-sidecar", "y.json", "--output", "z.mp4")
    assert not (inside / "z.mp4").exists()


def test_a_sidecar_without_a_prompt_is_refused(
    model: str, record: dict[str, Any], inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks that the message names the file to fix."""
    (inside / "y.json").write_text(json.dumps(record | {"prompt": " "}))
    assert "y.json: the prompt is empty: ' '" in refused(capsys, "--from-sidecar", "y.json", "--model", model)


def test_a_sidecar_is_good_elsewhere(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards clips regenerated after a move: with the picture at its new path, and at the original frame rate."""
    picture(inside / "start.png")
    options = ("--image", "start.png", "--fps", 3, "--rounds", 0, "--no-superres")
    run("a cat", "--model", model, "--output", "x.mp4", *options)
    (inside / "new").mkdir()
    (inside / "start.png").rename(inside / "new" / "there.png")
    picture(inside / "new" / "other.png", seed=1)
    again = ("--from-sidecar", "x.json", "--output", "z.mp4", "--model", model)
    lost = "x.json: it was made with start.png, which is not there: pass its new path with --image"
    assert lost in refused(capsys, *again)
    assert "x.json was made with a different file from" in refused(capsys, *again, "--image", "new/other.png")
    run(*again, "--image", "new/there.png")
    assert record_of(inside / "z.mp4")["codes"] == record_of(inside / "x.mp4")["codes"]
    assert read(inside / "z.mp4")[1] == 3


def test_a_model_that_does_not_fit_is_refused(
    model: str, inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents being killed while loading: the error states how much memory is needed, and what helps."""
    monkeypatch.setattr(memory, "free_memory", lambda _: 1 << 20)
    told = refused(capsys, "a cat", "--model", model, "--batch", "100000", "--samples", "4")
    assert re.search(
        r"this needs \d+\.\d GiB of memory on cpu, where 0.0 GiB are free; what helps: a batch of 2,", told
    ), "of four clips"
    assert "offload, dtype bfloat16, rounds 0, a smaller model" in told
    monkeypatch.setattr(memory, "free_memory", lambda _: 1 << 30)
    run("a cat", "--model", model, *QUICK)


def test_offloading_makes_the_same_clip(model: str, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks --offload: the same pixels, and never the weights of two stages at once."""
    options = ("a cat runs", "--model", model, "--rounds", 1, "--seed", 3, "--format", "png")
    run(*options)
    run(*options, "--offload", "--output", "other")
    assert np.array_equal(*(frames_of(inside / name / "a-cat-runs") for name in ("out", "other")))
    pipeline = CogVideoPipeline.from_pretrained(model, offload=True)
    stages, seen, load = {"sequential", "interpolation", "superres"}, [], CogVideo.load

    def watched(model: CogVideo, component: str) -> Any:
        seen.append((component, stages & (pipeline.model._parts.keys() | pipeline._kept.keys())))
        return load(model, component)

    monkeypatch.setattr(CogVideo, "load", watched)
    list(pipeline.stream(["a cat"], [torch.Generator()], GenerationSettings(rounds=1)))
    assert {name for name, _ in seen} >= stages
    assert all(not there for name, there in seen if name in stages), seen
