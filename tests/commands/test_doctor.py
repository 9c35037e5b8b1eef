"""`cogvideo doctor`: a plain-language report on devices and memory, and detection of changed files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogvideo import devices
from cogvideo.cli import main
from cogvideo.commands.doctor import GIB
from cogvideo.config import preset
from cogvideo.generation.request import GenerationSettings
from cogvideo.planning.costs import clip, resident
from cogvideo.planning.memory import needed_memory
from gallery import make_model


@pytest.fixture
def model(train_text_model: Callable[..., bytes], tmp_path: Path) -> Path:
    """The folder of a complete model."""
    make_model(tmp_path / "model", train_text_model())
    return tmp_path / "model"


def test_it_says_what_fits(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks the table: depending on free memory, a model fits as is, with options, or not at all."""
    config = preset("small")
    phases = clip(config, GenerationSettings())
    cpu, wide, narrow = torch.device("cpu"), torch.float32, torch.bfloat16
    need = needed_memory(config, phases, wide, cpu)
    assert need == resident(config, phases, "cpu_float32")
    half = needed_memory(config, phases, narrow, cpu)
    least = needed_memory(config, phases, narrow, cpu, offload=True)
    assert least < half < need
    for free, expected in (
        (need, f"fits: {need / GIB:.2f} GiB"),
        (need - 1, f"fits with --dtype bfloat16: {half / GIB:.2f} GiB"),
        (half - 1, f"fits with --dtype bfloat16 --offload: {least / GIB:.2f} GiB"),
        (least - 1, f"too large: {least / GIB:.1f} GiB"),
    ):
        monkeypatch.setattr("cogvideo.commands.doctor.free_memory", lambda _, free=free: free)
        monkeypatch.setattr("cogvideo.commands.doctor.PRESETS", {"small": {}})
        assert main(["doctor", str(model)]) == 0
        told = capsys.readouterr().out
        row = next(line for line in told.splitlines() if line.strip().startswith("small"))
        assert " ".join(row.split()) == f"small {expected}"
        assert f"PyTorch {torch.__version__}" in told
        assert f"{model}: all files match their hashes" in told


def test_it_finds_changed_files(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks the hashes: a changed byte and a missing file are reported separately, in one run, with status 1."""
    monkeypatch.setattr("cogvideo.commands.doctor.PRESETS", {})
    path = model / "base.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (model / "superres.safetensors").unlink()
    model = model.rename(model.with_name("model[v2] [b]"))
    assert main(["doctor", str(model)]) == 1
    told = capsys.readouterr().out
    assert "base.safetensors has the sha256" in told
    assert f"there is no file {model}" in told
    assert "all files match their hashes" not in told


def test_an_unknown_model_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a one-line error from getting lost below a table."""
    for name, message in (("nowhere", "there is no folder nowhere"), (tmp_path, f"cannot use {tmp_path}/bundle.json")):
        assert main(["doctor", str(name)]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert message in told.err


def test_clips_at_once_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the estimate that a refusal states: weights count once, everything else once per clip."""
    config = preset("tiny")
    phases = clip(config, GenerationSettings(rounds=1))
    cpu = torch.device("cpu")
    one, two, three = (needed_memory(config, phases, torch.float32, cpu, batch) for batch in (1, 2, 3))
    assert two - one == three - two > 0
    assert devices.free_memory(cpu) > 1 << 20
