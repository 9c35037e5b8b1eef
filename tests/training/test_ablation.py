"""Ablations: variants differ in one thing each, killed runs resume, and one command does everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo import world
from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import CogVideo
from cogvideo.cli import main
from cogvideo.config import preset
from cogvideo.data.engines import Machines
from cogvideo.evaluation.features import Judge
from cogvideo.evaluation.networks.cache import network_path
from cogvideo.evaluation.reader import resized
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.transformer import Base, initialize
from cogvideo.text import TextTokenizer
from cogvideo.training import ablation
from cogvideo.training.ablation import PROTOCOL, VARIANTS, Ablation, Experiment
from cogvideo.training.optim import StageOptimization
from cogvideo.training.stages import Choice
from cogvideo.training.text import train_model
from killing import kill_at

RECIPE = str(Path(__file__).parents[2] / "recipes" / "ablation" / "tiny.toml")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle with random weights and a text tokenizer trained on World captions."""
    config = preset("tiny")
    config = replace(config, transformer=replace(config.transformer, num_layers=2, hidden=32, num_heads=2))
    captions = [text for number in range(400) for text in world.captions(world.scene(number, "simple"))]
    text = TextTokenizer(train_model(captions, config.transformer), config.text, config.transformer.num_codes)
    image_model = Base(config.transformer)
    initialize(image_model, config.transformer.num_layers, torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("ablation") / "base"
    parts: dict[str, Any] = {"base": image_model, "text": text, "image_tokenizer": Autoencoder(config.autoencoder)}
    CogVideo(config, **parts).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, without evaluation networks."""
    monkeypatch.setenv("COGVIDEO_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_variants_differ_in_one_thing() -> None:
    """Checks each variant's start, trained parts, frame rate in the text, and windows."""
    config = preset("pocket")
    frozen, trained = Choice("sequential"), Choice("sequential", "trained")
    assert VARIANTS["full"].stages == {"sequential": Choice("inherit"), "interpolation": frozen}
    assert VARIANTS["random"].stages == {"sequential": Choice("random", "random"), "interpolation": trained}
    assert VARIANTS["trained"].stages == {"sequential": Choice("inherit", "trained"), "interpolation": trained}
    assert VARIANTS["one-stage"].stages == {"sequential": Choice("inherit")}
    for name in ("full", "random", "trained", "one-stage"):
        assert VARIANTS[name].configured(config) == config
    no_rate, no_window = (VARIANTS[name].configured(config) for name in ("no-rate", "no-window"))
    assert no_rate == replace(config, text=replace(config.text, duration_template=config.text.image_template))
    assert no_window == replace(config, interpolation=replace(config.interpolation, window=0))


def test_jobs_are_listed(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks job arrays: `--list` prints all runs by seed, `--only` refuses unknown names; neither writes anything."""
    arguments = ["ablate", RECIPE, "--out", str(tmp_path / "out"), "--base", base, "--variants", "full", "no-rate"]
    assert main([*arguments, "--seed", "3", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["full-3", "no-rate-3", "full-4", "no-rate-4"]
    for listing in ([], ["--list"]):
        assert main([*arguments, *listing, "--only", "no-rate-2"]) == 2
        told = capsys.readouterr().err
        assert "only is 'no-rate-2', expected one of data, full-0, no-rate-0, full-1" in told
    assert not (tmp_path / "out").exists()


def fake_i3d(path: Path, protocol: object) -> Judge:
    """A stand-in for I3D that returns eight features per clip."""

    def load(device: str) -> Callable[[Any], Tensor]:
        return lambda clips: torch.stack([eight(frames) for (frames,) in clips])

    return Judge(("fake",), load)


def eight(frames: np.ndarray) -> Tensor:
    assert frames.shape == (16, 64, 64, 3)
    pixels = torch.from_numpy(frames).float() / 255
    return torch.cat([pixels.mean((0, 1, 2)), pixels.std((0, 1, 2)), pixels.diff(dim=0).abs().mean((0, 1, 2))[:2]])


@pytest.mark.soak
def test_a_killed_run_goes_on(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed anywhere resumes to the same clips and metrics; FVD matches a direct calculation from the clips."""
    monkeypatch.setattr(ablation, "i3d", fake_i3d)
    network_path("i3d").parent.mkdir()
    network_path("i3d").write_bytes(b"")
    settings = Ablation(base, seeds=1, scenes=60, held_out=2, clips=4, at_once=2)

    def work(out: Path) -> Experiment:
        experiment = Experiment(out, settings, StageOptimization(steps=3, batch=2, warmup=1), "cpu")
        experiment.prepare(Machines("cpu", workers=1))
        experiment.make("full-0")
        return experiment

    def attempt() -> None:
        work(tmp_path / "killed")

    number = 30
    while kill_at(number, attempt):
        number += 45
    assert number > 150
    killed, whole = (work(tmp_path / name) for name in ("killed", "whole"))
    assert killed.report("full-0") == whole.report("full-0")
    clips = []
    for experiment in (killed, whole):
        files = sorted((experiment.out / "full-0" / "clips-0").glob("*.npz"))
        clips.append([np.load(file)["clip"] for file in files])
    assert len(clips[0]) == 4
    np.testing.assert_array_equal(*clips)
    report = whole.report("full-0")
    assert report is not None
    subject = whole._subject(0)
    features = [
        torch.stack([eight(clip[:32:2]) for clip in each]) for each in (map(subject.real, range(4), [64] * 4), clips[1])
    ]
    assert set(report) == {"full system"}
    assert report["full system"]["FVD"] == pytest.approx(PROTOCOL.fvd(*features), rel=1e-4)
    autoencoder = CogVideo.from_pretrained(base).autoencoder
    shown = [resized(autoencoder.reconstruct(subject.real(number, 32)), 64) for number in range(4)]
    ceiling = PROTOCOL.fvd(features[0], torch.stack([eight(clip[:32:2]) for clip in shown]))
    assert whole.ceiling is not None
    assert whole.ceiling["FVD"] == pytest.approx(ceiling, rel=1e-4)


@pytest.mark.soak
def test_all_variants_in_one_command(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command trains all variants and fills every row of the page and the file; a rerun finds nothing to do."""
    out = tmp_path / "out"
    arguments = ["ablate", RECIPE, "--base", base, "--out", str(out), "--seeds", "1", "--steps", "2", "--clips", "2"]
    assert main([*arguments, "--workers", "2", "--device", "cpu"]) == 0
    assert "6 of 6 runs done" in capsys.readouterr().out
    found = {name: Manifest.read(out / f"{name}-0") for name in VARIANTS}
    for name, manifest in found.items():
        assert ("sequential_base" in manifest.components) == (name in ("random", "trained"))
        assert ("interpolation" in manifest.components) == (name != "one-stage")
        assert manifest.components["base"].sha256 == Manifest.read(Path(base)).components["base"].sha256
    assert found["one-stage"].config.sequential.durations == (0.5,)
    assert found["no-window"].config.interpolation.window == 0
    overlaps = [min((out / "one-stage-0" / f"clips-{each}").glob("*.npz")) for each in (1, 2)]
    assert overlaps[0].name == overlaps[1].name
    assert (np.load(overlaps[0])["clip"] != np.load(overlaps[1])["clip"]).any()
    content = json.loads((out / "ablation.json").read_text())
    rows = content["figures"]["clips"]["all right"]
    assert len(rows) == 8
    assert rows["real clips through the tokenizer"]["differences"] == {}
    assert rows["one stage, overlap 2"]["differences"].keys() == {"0"}
    losses = content["figures"]["equal samples"]
    assert losses.keys() == {
        "sequential, 1 fps",
        "sequential, 8 fps",
        *(f"interpolation, {each} fps" for each in (2, 4, 8)),
    }
    page = (out / "ablation.html").read_text()
    for title in (*rows, "Equal time", "Held-out loss, interpolation, 4 fps, over seconds"):
        assert title in page
    assert page.count("data:image/webp;base64,") == 7
    assert main(arguments) == 0
    assert "runs to do" not in capsys.readouterr().out
    assert main([*arguments, "--batch", "3"]) == 2
    assert "settings.batch was 2 and is 3" in capsys.readouterr().err
