"""`cogvideo generate`: a file for each prompt, which every player opens, with its settings beside it; mistakes in one
line, before anything is made.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import cogvideo
from cogvideo.cli import main
from cogvideo.generate import _check_rounds, generate
from cogvideo.generation.hierarchy import Guidance, Settings
from cogvideo.generation.sampling import Sampling
from cogvideo.pipeline import CogVideoPipeline, Frame
from cogvideo.video import write_video
from gallery import make_model
from killing import kill_at
from workshop import RATIO

SIDE = 16
QUICK: dict[str, Any] = {"rounds": 0, "superres": False, "guidance": 1.0}


@pytest.fixture(scope="module")
def model(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a whole model."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    make_model(folder, train_text_model())
    return str(folder)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, empty, deep inside one that shows what leaves it."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def read(path: Path) -> tuple[np.ndarray, float, float, dict[str, Any]]:
    """Frames, rate, seconds and record of an mp4, as a player finds them."""
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


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake is told in."""
    capsys.readouterr()
    assert main(["generate", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.strip().splitlines()) == 1, told.err
    return told.err


def tree(folder: Path) -> list[str]:
    """All files below."""
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


@pytest.mark.parametrize(
    ("rounds", "number", "rate", "superres"), [(0, 5, 1, False), (1, 9, 2, True), (2, 17, 4, False), (3, 33, 8, False)]
)
def test_a_clip_is_a_video(rounds: int, number: int, rate: int, superres: bool, model: str, inside: Path) -> None:
    """Guards the file: its frames in order of time, four seconds from the first to the last, for every player."""
    generate(("a cat runs",), model=model, output=Path("x.mp4"), seed=3, rounds=rounds, superres=superres)
    frames, found, seconds, _ = read(inside / "x.mp4")
    side = SIDE * RATIO if superres else SIDE
    assert (frames.shape, found, seconds) == ((number, side, side, 3), rate, number / rate)
    if superres:
        pipeline = CogVideoPipeline.from_pretrained(model)
        stream = pipeline.stream(["a cat runs"], [torch.Generator().manual_seed(3)], Settings(rounds=rounds))
        expected = [frame.pixels[0] for frame in sorted(stream, key=lambda frame: frame.place)]
        differences = abs(frames.astype(float)[:, None] - np.stack(expected)[None]).mean((2, 3, 4))
        assert (differences.argmin(1) == np.arange(number)).mean() > 0.8, "colours are stored at half the resolution"


def test_the_settings_stand_beside_the_clip_and_in_it(model: str, inside: Path) -> None:
    """Guards reproduction: the record names every setting, and with them the same clip is made again."""
    options: dict[str, Any] = {"rounds": 0, "guidance": 2.5, "temperature": 0.9, "clusters": 5, "superres": False}
    generate(("a cat runs",), model=model, output=Path("x.mp4"), seed=7, device="cpu", dtype="bfloat16", **options)
    frames, _, _, inner = read(inside / "x.mp4")
    record = record_of(inside / "x.mp4")
    assert record == inner
    assert record == {
        "prompt": "a cat runs",
        "seed": 7,
        "model": model,
        **options,
        "device": "cpu",
        "dtype": "bfloat16",
        "cogvideo": cogvideo.__version__,
    }
    settings = {name: value for name, value in record.items() if name not in ("prompt", "cogvideo")}
    generate((record["prompt"],), output=Path("again.mp4"), **settings)
    assert np.array_equal(read(inside / "again.mp4")[0], frames)
    for name, value in (("seed", 8), ("guidance", 1.0), ("temperature", 3.0), ("clusters", 1)):
        generate((record["prompt"],), output=Path("other.mp4"), **settings | {name: value})
        assert not np.array_equal(read(inside / "other.mp4")[0], frames), name


def test_options_mean_what_they_say(model: str, inside: Path) -> None:
    """Guards the way from options to settings: guidance and sampler are those of later frames."""
    options: dict[str, Any] = {"rounds": 1, "guidance": 2.5, "temperature": 0.9, "clusters": 5, "superres": True}
    generate(("a cat runs",), model=model, output=Path("x.webp"), seed=7, **options)
    settings = Settings(rounds=1, later=Sampling(0.9, clusters=5), guidance=Guidance(sequential=2.5))
    stream = CogVideoPipeline.from_pretrained(model).stream(
        ["a cat runs"], [torch.Generator().manual_seed(7)], settings
    )
    with Image.open(inside / "x.webp") as image:
        for frame in sorted(stream, key=lambda frame: frame.place):
            image.seek(frame.place)
            assert np.array_equal(np.asarray(image.convert("RGB")), frame.pixels[0])


@pytest.mark.parametrize(("name", "milliseconds"), [("x.gif", 500), ("x.webp", 500), ("X.GIF", 500), ("X.MP4", None)])
def test_other_formats(name: str, milliseconds: int | None, model: str, inside: Path) -> None:
    """Guards GIF and WebP, which hold no metadata: the clip moves at its rate, its settings stand beside it."""
    generate(("a cat runs",), model=model, output=Path(name), seed=3, rounds=1, superres=False)
    assert tree(inside) == sorted([name, f"{name[0]}.json"])
    assert record_of(inside / name)["seed"] == 3
    if milliseconds is not None:
        with Image.open(inside / name) as image:
            image.load()
            assert (image.n_frames, image.size, image.info["duration"]) == (9, (SIDE, SIDE), milliseconds)


def test_a_seed_is_drawn_and_told(model: str, inside: Path) -> None:
    """Guards clips that someone wants again: each has a seed of its own, which gives it alone, too."""
    prompts = ("a cat runs", "the sun", "a cat runs")
    generate(prompts, model=model, **QUICK)
    names = ["a-cat-runs.mp4", "the-sun.mp4", "a-cat-runs-2.mp4"]
    assert tree(inside / "out") == sorted(each for name in names for each in (name, name.replace("mp4", "json")))
    records = [record_of(inside / "out" / name) for name in names]
    first = records[0]["seed"]
    assert [(each["prompt"], each["seed"]) for each in records] == [
        (prompt, first + place) for place, prompt in enumerate(prompts)
    ]
    generate(prompts[2:], model=model, output=Path("alone.mp4"), seed=first + 2, **QUICK)
    assert np.array_equal(read(inside / "alone.mp4")[0], read(inside / "out" / names[2])[0])
    generate((prompts[0],), model=model, output=Path("random.mp4"), **QUICK)
    assert record_of(inside / "random.mp4")["seed"] != first


ODD = {
    "🐈‍⬛": "clip",
    "一只猫在草地": "一只猫在草地",
    "a\x01\t\nb\x1b[31m": "a-b-31m",
    "\"'\\ `x`": "x",
    "../../../x": "x",
    "/etc/x": "etc-x",
    "$(rm y);*|&": "rm-y",
    "C:\\nul.mp4": "C-nul-mp4",
    "..": "clip",
    "{x} %s %00": "x-s-00",
    "_": "_",
    "ñ é": "ñ-é",
}


@pytest.mark.parametrize("prompt", ODD)
def test_odd_prompts_stay_inside(
    prompt: str, model: str, inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the file system against prompts: a plain name in the output folder; the record has the prompt itself."""
    assert main(["generate", "--model", model, "--rounds", "0", "--no-superres", "--guidance", "1", "--", prompt]) == 0
    name = ODD[prompt]
    assert capsys.readouterr().out == f"{Path('out') / name}.mp4\n"
    assert tree(tmp_path) == [f"a/b/c/out/{name}.json", f"a/b/c/out/{name}.mp4"]
    assert record_of(inside / "out" / f"{name}.mp4")["prompt"] == prompt
    assert read(inside / "out" / f"{name}.mp4")[3]["prompt"] == prompt


def test_a_prompt_may_look_like_an_option(model: str, inside: Path) -> None:
    """Guards a whole process, as a shell calls it: two dashes end the options, and nothing is read from a prompt."""
    arguments = [
        "--model",
        model,
        "--rounds",
        "0",
        "--no-superres",
        "--seed",
        "1",
        "--output",
        "o",
        "--",
        "-rf /",
        "$HOME",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "cogvideo", "generate", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "o/rf.mp4\no/HOME.mp4\n"), done.stderr
    assert done.stderr == ""
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
    """Guards against clips that replace each other, also where a file system knows no case, and against names that it
    does not take."""
    codes, pixels = torch.zeros(1, SIDE, dtype=torch.int64), np.zeros((1, SIDE, SIDE, 3), np.uint8)
    frames = [Frame("image", place, 5, codes, pixels) for place in range(5)]
    monkeypatch.setattr(CogVideoPipeline, "stream", lambda *_: iter(frames))  # names alone are looked at
    generate(prompts, model=model, seed=1, **QUICK)
    assert tree(inside / "out") == sorted(f"{name}{suffix}" for name in names for suffix in (".json", ".mp4"))
    for prompt, name in zip(prompts, names, strict=True):
        assert record_of(inside / "out" / f"{name}.mp4")["prompt"] == prompt


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (("",), "the prompt is empty: ''"),
        (("a cat", " \t\n"), "the prompt is empty"),
        (("a cat", "x" * 10_000), r"the prompt has \d+ tokens, 16 fit"),
        (("a cat", "\udc80"), "surrogates not allowed"),
        ((), "there is no prompt, expected one or several texts"),
    ],
)
def test_one_bad_prompt_is_found_before_the_first_clip(
    prompts: tuple[str, ...], message: str, model: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards lists of prompts: nothing is made, and no folder, where one of them cannot be used."""
    assert re.search(message, refused(capsys, "--model", model, "--rounds", "0", "--", *prompts))
    assert list(inside.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "-1"), "rounds is -1, expected 0 or more"),
        (("--rounds", "9"), "rounds is 9, expected 0 to 8: a .mp4 has at most 500 frames a second"),
        (("--rounds", "6", "--output", "x.GIF"), "rounds is 6, expected 0 to 5: a .GIF has at most 50 frames a second"),
        (("--rounds", "99999"), "rounds is 99999, expected 0 to 8"),
        (("--guidance", "nan"), "guidance of the sequential stage is nan, expected 0 or more"),
        (("--temperature", "-1"), "temperature is -1.0, expected 0"),
        (("--clusters", "-1"), "clusters is -1, expected 0"),
        (("--seed", "-1"), "seed is -1, expected a number in"),
        (("--device", "abacus"), "cannot use the device 'abacus'"),
        (("--model", "nowhere"), "there is no folder nowhere: pass the folder of a bundle"),
        (("--model", "."), "cannot use bundle.json: No such file"),
        (("--output", "x.avi"), r"cannot write x.avi: expected a folder, or a file that ends in .mp4, .gif, .webp"),
        (("--output", "file"), "file is a file, expected a folder"),
        (("--output", "folder.mp4"), "folder.mp4 is a folder, expected a folder, or a file"),
        (("--output", "file/x.mp4"), "(File exists|Not a directory): file"),
        (("--output", "file/deeper/out"), "Not a directory: file/deeper"),
        (("--output", "/proc/out"), "No such file or directory: /proc/out"),
    ],
)
def test_mistakes_are_one_line(
    options: tuple[str, ...], message: str, model: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards what a user sees who asks for what cannot be; nothing was made meanwhile."""
    (inside / "file").touch()
    (inside / "folder.mp4").mkdir()
    assert re.search(message, refused(capsys, "a cat", "--model", model, "--rounds", "0", *options))
    assert sorted(each.name for each in inside.iterdir()) == ["file", "folder.mp4"]


@pytest.mark.parametrize(("name", "most"), [("x.mp4", 8), ("x.gif", 5), ("x.webp", 8)])
def test_as_many_rounds_as_can_be_written(name: str, most: int, tmp_path: Path) -> None:
    """Guards the limit itself: what it allows, `write_video` writes; what it refuses, that would refuse."""
    _check_rounds(tmp_path / name, Settings(most), 5)
    write_video(tmp_path / name, np.zeros((2, 16, 16, 3), np.uint8), 2.0**most)
    with pytest.raises(ValueError, match=f"expected 0 to {most}"):
        _check_rounds(tmp_path / name, Settings(most + 1), 5)
    with pytest.raises(ValueError, match="fps is"):
        write_video(tmp_path / name, np.zeros((2, 16, 16, 3), np.uint8), 2.0 ** (most + 1))


def test_a_file_is_for_one_prompt(model: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against all prompts but one being lost."""
    told = refused(capsys, "a cat", "the sun", "--model", model, "--output", "x.mp4")
    assert "output is the file x.mp4 for 2 prompts, expected a folder" in told
    assert list(inside.iterdir()) == []


def test_a_damaged_model_is_refused(
    train_text_model: Callable[..., bytes], inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards incomplete copies of a model."""
    make_model(inside / "model", train_text_model())
    with (inside / "model" / "sequential.safetensors").open("ab") as file:
        file.write(b"x")
    assert "sequential.safetensors has" in refused(capsys, "a cat", "--model", "model")


def test_what_is_there_is_replaced_as_a_whole(model: str, inside: Path) -> None:
    """Guards clips that are made again: whenever the process is killed, there is the old clip or the new one, and
    beside it its own settings or none."""
    path = Path("out") / "a-cat.mp4"
    generate(("a cat",), model=model, seed=1, **QUICK)
    old = path.read_bytes()
    generate(("a cat",), model=model, seed=2, **QUICK)
    new = path.read_bytes()
    assert old != new
    generate(("a cat",), model=model, seed=1, **QUICK)
    seen = set()
    for number in count(1):
        killed = kill_at(number, lambda: generate(("a cat",), model=model, seed=2, **QUICK))
        assert path.read_bytes() in (old, new)
        seed = read(path)[3]["seed"]
        has = path.with_suffix(".json").exists()
        assert not has or record_of(path)["seed"] == seed
        seen.add((seed, has))
        if not killed:
            break
    assert seen == {(1, True), (1, False), (2, False), (2, True)}
    assert (path.read_bytes(), record_of(path)["seed"]) == (new, 2)
    generate(("a cat",), model=model, seed=2, **QUICK)
    assert path.read_bytes() == new
