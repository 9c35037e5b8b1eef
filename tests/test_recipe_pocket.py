"""The recipe of the model in the box: its captions, the public animations laid out as clips, and the training."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cogvideo.bundle.model import CogVideo
from cogvideo.config import preset
from cogvideo.media.video import read_video

RECIPE = Path(__file__).parent.parent / "recipes" / "pocket"


def captions() -> list[dict[str, str]]:
    with (RECIPE / "captions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_animation_has_a_caption_of_its_own() -> None:
    """Guards the table: 706 files, each listed once, with a caption that names no background."""
    rows = captions()
    assert len(rows) == len({row["file"] for row in rows}) == 706
    assert all(row["caption"].strip() == row["caption"] != "" for row in rows)
    assert not [row for row in rows if row["caption"].endswith("background")]


def test_the_chosen_animations_look_different() -> None:
    """Guards the selection that a small model learns: 211 animations, none repeated in another skin color."""
    rows = [row for row in captions() if row["pocket"]]
    assert {row["pocket"] for row in rows} == {"yes"}
    assert len(rows) == len({row["caption"] for row in rows}) == 211
    assert not [row for row in rows if "skin" in row["caption"] or "skin" in row["file"]]


@pytest.mark.parametrize(("options", "number"), [((), 211), (("--all",), 706)])
def test_animations_become_clips(tmp_path: Path, options: tuple[str, ...], number: int) -> None:
    """Guards the conversion of public files to training data: 128 pixels, with timing and transparency kept; the table
    lists only the selected animations, unless --all is given."""
    source, name = tmp_path / "gifs", Path(captions()[0]["file"])
    source.mkdir()
    frames = []
    for place in range(3):
        pixels = np.zeros((512, 512, 4), np.uint8)
        pixels[128:384, 128 * place : 128 * place + 128] = (250, 0, 0, 255)
        frames.append(Image.fromarray(pixels))
    path = source / name.with_suffix(".gif").name
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500, loop=0, disposal=2)
    command = [sys.executable, RECIPE / "layout.py", source, tmp_path / "out", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"{number - 1} animations are missing" in done.stderr
    with (tmp_path / "out" / "captions.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [row for row in captions() if options or row["pocket"]]
    video = read_video(tmp_path / "out" / name, 2, background=(0, 0, 250))
    assert video.has_alpha
    assert video.frames.shape == (3, 128, 128, 3)
    for place, frame in enumerate(video.frames):
        assert np.abs(frame[64, 32 * place + 16].astype(int) - (250, 0, 0)).max() < 9
        assert np.abs(frame[64, (32 * place + 80) % 128].astype(int) - (0, 0, 250)).max() < 9


BARE = """
import sys

LACKS = {"av", "beartype", "huggingface_hub", "tensorboard", "ray", "wandb"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
"""Hides packages, but not those that `gpu.sh` needs, some of which travel as wheels."""
TOY = """
[data]
tokenizer = [1, 4]
text = [1, 400]
frames = [1, 6, 2, 4]
moves = [1, 2, 1, 0]
large = [1, 2, 1, 0]

[tokenizer]
preset = "tiny"
steps = 3
batch = 2
plain-steps = 1
start-vectors = 1
num-frames = 8
num-held-out = 4

[prepare]
workers = 1
"""
STAGES = {"image": 60, "sequential": 2, "interpolation": 2, "superres": 2}
STAGE = """
[{name}]
steps = {steps}
batch = 2
num-workers = 0
checkpoint-every = 1000
evaluate-every = 1000
evaluate-samples = 1
report-every = 1
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder for gpu.sh: two animations, a recipe that takes seconds, and a hook that simulates a bare machine."""
    (tmp_path / "emoji" / "clips").mkdir(parents=True)
    lines = ["file,caption", "clips/a.webp,a disc turns left", "clips/b.webp,a disc sinks"]
    (tmp_path / "emoji" / "captions.csv").write_text("\n".join(lines) + "\n")
    for place, name in enumerate("ab"):
        frames = [Image.new("RGBA", (128, 128), (40 * shade, 90 * place, 200, 128 * (shade % 2))) for shade in range(4)]
        path = tmp_path / "emoji" / "clips" / f"{name}.webp"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=400, loop=0, lossless=True)
    toy = TOY + "".join(STAGE.format(name=name, steps=steps) for name, steps in STAGES.items())
    (tmp_path / "toy.toml").write_text(toy)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE)
    return tmp_path


def start(toy: Path, work: str) -> subprocess.Popen[str]:
    """Start a piece of the training."""
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(toy / "bare"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [RECIPE / "gpu.sh", "emoji", work, "results", "900", toy / "toy.toml"],
        cwd=toy,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(piece: subprocess.Popen[str]) -> None:
    """Terminate the training and nothing around it, as a time limit does."""
    for process in psutil.Process(piece.pid).children(recursive=True):
        if "run.py" in " ".join(process.cmdline()) and process.name() != "timeout":
            process.terminate()


def first_piece(toy: Path) -> None:
    """Train into the image stage, and stop; the results must fit what can be brought back."""
    piece = start(toy, "work")
    while not (toy / "work/model/.image-run/metrics.jsonl").exists():
        assert piece.poll() is None, piece.communicate()
        time.sleep(0.02)
    stop(piece)
    _, told = piece.communicate(timeout=600)
    assert piece.returncode == 75, told
    parts = list((toy / "results").iterdir())
    assert len(parts) <= 8
    assert all(each.stat().st_size <= 15_000_000 for each in parts)


@pytest.mark.soak
def test_a_gpu_trains_the_model_in_pieces(toy: Path) -> None:
    """Guards scarce GPU time: a fresh machine continues in the stage that the last one was in, and every stage runs
    without the packages that the machine lacks."""
    first_piece(toy)
    piece = start(toy, "other")
    _, told = piece.communicate(timeout=600)
    assert piece.returncode == 0, told
    assert "Continuing after step" in told
    assert "-- tokenizer" not in told
    assert CogVideo.from_pretrained(toy / "other" / "model").config.sizes == preset("tiny")
    assert {"base", *STAGES} - {"image"} <= set(CogVideo.from_pretrained(toy / "other" / "model").components)


def test_recipes_name_the_same_parts() -> None:
    """Guards against tables in gpu.toml that recipe.toml does not have."""
    tables, changes = (tomllib.loads((RECIPE / name).read_text()) for name in ("recipe.toml", "gpu.toml"))
    assert set(changes) <= set(tables)
    assert tables["tokenizer"]["preset"] == "pocket"
