"""Non-square frames through every command, from video files to mp4."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogvideo.bundle.model import CogVideo
from cogvideo.cli import main
from cogvideo.config import LayoutConfig
from cogvideo.data.dataset import Dataset
from cogvideo.media.images import write_image
from cogvideo.media.video import read_video, write_video
from cogvideo.text import TextTokenizer
from workshop import NUM_CODES, make_bundle, small_config

WIDE, TALL = (16, 8), (8, 16)
"""Width and height of frames in pixels, for codes of 4 pixels in a grid of 4."""


def write_clips(folder: Path, width: int, height: int) -> Path:
    """Write clips of a bright bar moving along the longer side of dark frames, which reveals turning or squeezing."""
    folder.mkdir()
    for number in range(6):
        frames = np.full((9, height, width, 3), 20 * number, np.uint8)
        for time, frame in enumerate(frames if width > height else frames.transpose(0, 2, 1, 3)):
            frame[:, 6 * time : 6 * time + 8] = 250
        write_video(folder / f"{number}.mp4", frames, 8)
        (folder / f"{number}.txt").write_text(f"bar {number} moves")
    return folder


def run(*arguments: object) -> None:
    assert main([str(each) for each in arguments]) == 0


def test_wide_and_tall_frames_in_one_model(
    text_model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards frame shapes through every command, with one shape per batch; the first dataset sets the shape that a
    model generates by default, and --size selects others."""
    monkeypatch.chdir(tmp_path)
    make_bundle(Path("model"), text_model, base=False)
    for name, (width, height) in (("wide", WIDE), ("tall", TALL)):
        write_clips(tmp_path / f"{name}-clips", 6 * width, 6 * height)
        size = ("--size", f"{width}x{height}", "--superres", "--validation", "0.3", "--workers", "1")
        run("data", "prepare", f"{name}-clips", "--out", name, "--tokenizer", "model", *size)
        assert Dataset(Path(name)).row(0).codes.shape == (9, height // 4, width // 4)
    run("data", "report", "wide", "--out", "wide.html")
    assert "16 × 8" in Path("wide.html").read_text()
    fast = ("--steps", "2", "--batch", "2", "--warmup", "1", "--sample-every", "2", "--evaluate-every", "2")
    for stage in ("image", "sequential", "interpolation", "superres"):
        run("train", stage, "--data", "wide", "tall", "--out", "model", *fast)
        assert "2 x 4" in capsys.readouterr().out  # held-out losses by shape
        assert list(Path("model").glob(f".{stage}-run/samples/*.png"))
    run("train", "report", "model", "--out", "report.html")
    assert CogVideo.from_pretrained("model").config.layout.shape == (2, 4)
    assert "2 x 4 codes" in Path("model/README.md").read_text()
    quick = ("--model", "model", "--seed", "1", "--rounds", "0")
    write_image(Path("picture.png"), np.full((30, 90, 3), 90, np.uint8))
    for name, size, more in (
        ("a.mp4", WIDE, ("--no-superres", "--rounds", "1")),
        ("b.mp4", (16, 32), ("--size", "16x32", "--image", "picture.png", "--fit", "letterbox")),
        ("c.mp4", (16, 16), ("--size", "16x16", "--no-superres")),
    ):
        run("generate", "a bar", *quick, "--output", name, *more)
        assert read_video(Path(name), 1).frames.shape[1:] == (*size[::-1], 3)
    run("generate", "--from-sidecar", "b.json", "--output", "again.mp4")
    capsys.readouterr()
    assert main(["generate", "a bar", *quick, "--size", "36x16"]) == 2
    assert "size is 36x16, expected multiples of 8 pixels, at most 32x32" in capsys.readouterr().err
    assert main(["data", "prepare", "wide-clips", "--out", "x", "--tokenizer", "model", "--size", "16x"]) == 2
    assert "--size: got '16x', expected pixels such as 96, or 128x72" in capsys.readouterr().err


@pytest.mark.soak
@pytest.mark.parametrize(("width", "height"), [(64, 36), (36, 64)])
def test_a_model_of_one_shape(
    width: int, height: int, text_model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards training 16:9 and 9:16 from scratch: only the tokenizer gets the size, and each stage learns."""
    monkeypatch.chdir(tmp_path)
    write_clips(Path("clips"), 2 * width, 2 * height)
    config = small_config(text_model)
    layout = LayoutConfig(grid=16, text_slots=16, image_text_slots=16, frame_position=16)
    config = replace(config, layout=layout, transformer=replace(config.transformer, num_positions=280))
    CogVideo(config, text=TextTokenizer(text_model, config.text, NUM_CODES)).save_pretrained("model")
    quick = ("--batch", "8", "--warmup", "5", "--report-every", "5", "--learning-rate", "4e-3")
    size = ("--size", f"{width}x{height}", "--adversary-weight", "0", "--perceptual-weight", "0")
    run("train", "tokenizer", "clips", "--out", "model", "--steps", "150", *quick[:4], *size)
    run("data", "prepare", "clips", "--out", "data", "--tokenizer", "model", "--superres", "--workers", "1")
    for stage, steps in (("image", 80), ("sequential", 30), ("interpolation", 20), ("superres", 20)):
        run("train", stage, "--data", "data", "--out", "model", "--steps", steps, *quick)
        lines = Path(f"model/.{stage}-run/metrics.jsonl").read_text().splitlines()
        losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        assert losses[-1] < losses[0]
    assert CogVideo.from_pretrained("model").config.layout.shape == (height // 4, width // 4)
    run("generate", "bar 3", "--model", "model", "--seed", "1", "--seconds", "1", "--output", "clip.mp4")
    assert read_video(Path("clip.mp4"), 8).frames.shape == (9, 2 * height, 2 * width, 3)
