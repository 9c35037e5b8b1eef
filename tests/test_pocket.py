"""The model in the box: small, complete, in half precision, and trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import POCKET, locate
from cogvideo.commands.doctor import doctor
from cogvideo.generation.request import GenerationSettings
from cogvideo.pipeline import CogVideoPipeline

MIB = 1 << 20
CONFIG = Manifest.read(locate(POCKET)).config
SIDE = CONFIG.frame_size


def test_it_is_small_and_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the package: every component a clip needs, each file intact, in half precision, small enough to ship."""
    manifest = Manifest.read(locate(POCKET))
    parts = {"base", "sequential", "interpolation", "image_tokenizer", "cluster_labels", "text"}
    assert set(manifest.components) == parts
    sizes = [entry.num_bytes for entry in manifest.components.values()]
    assert max(sizes) < 20 * MIB
    assert sum(sizes) < 40 * MIB
    for entry in manifest.components.values():
        if entry.file.endswith(".safetensors") and entry.file != "cluster_labels.safetensors":
            with safe_open(locate(POCKET) / entry.file, framework="pt") as file:
                assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}, entry.file  # noqa: SIM118
    monkeypatch.setattr("cogvideo.commands.doctor.PRESETS", {})
    assert doctor() == 0
    assert "pocket: all files match their hashes" in capsys.readouterr().out


def test_its_name_is_not_that_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards users who have a folder of that name: `pocket` is the model in the box, and ./pocket is a path."""
    (tmp_path / POCKET).mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate(POCKET) == Path(__file__).parents[1] / "src" / "cogvideo" / POCKET
    assert locate(tmp_path / POCKET) == tmp_path / POCKET
    assert locate("./pocket") == Path("./pocket")


def test_it_tells_backgrounds_apart() -> None:
    """Guards against untrained weights: the background has the color that the prompt names."""
    pipeline = CogVideoPipeline.from_pretrained(POCKET)
    prompts = [f"a red heart beats, on a {colour} background" for colour in ("white", "black")]
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    first = next(pipeline.stream(prompts, seeds, GenerationSettings(rounds=0))).pixels.astype(float)
    white, black = first[:, :4].mean((1, 2, 3))
    assert first.shape == (2, SIDE, SIDE, 3)
    assert white > 200
    assert black < 60
