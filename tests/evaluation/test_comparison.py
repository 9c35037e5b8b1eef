"""`cogvideo evaluate distribution`: from clips to figures that state everything they depend on."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.cli import main
from cogvideo.commands.evaluate_distribution import warnings
from cogvideo.data.engines import Machines
from cogvideo.evaluation import features as module
from cogvideo.evaluation.comparison import Comparison, ComparisonRun, Networks
from cogvideo.evaluation.features import ExcerptPixels, Judge
from cogvideo.evaluation.footage import Reading, Tokenizer, draw
from cogvideo.evaluation.protocols import PROTOCOLS
from cogvideo.media.video import write_video
from workshop import GRID, make_bundle, make_data

PROTOCOL = replace(PROTOCOLS["tfhub"], clips=8, frames=9)


def means(device: str) -> Callable[[ExcerptPixels], Tensor]:
    """A cheap network: mean colors of the clip and of its first frame."""
    return lambda clips: torch.stack([_means(frames) for (frames,) in clips])


def _means(frames: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(frames).float()
    return torch.cat([pixels.mean((0, 1, 2)), pixels[0].mean((0, 1))])


def differences(device: str) -> Callable[[ExcerptPixels], Tensor]:
    """A cheap stand-in for LPIPS."""
    return lambda clips: torch.tensor([[np.abs(a.astype(float) - b).mean()] for a, b in clips]).float()


NETWORKS = Networks(Judge(("means", "0123456789"), means), proven=True)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGVIDEO_CACHE", str(tmp_path / "cache"))


def clips(folder: Path, number: int, seed: int, frames: int = 12, size: int = 16, fps: float = 8, dark: int = 1) -> str:
    """A folder of clips of colored noise."""
    folder.mkdir()
    state = np.random.default_rng(seed)
    for each in range(number):
        write_video(folder / f"{each:02}.webp", noise(state, frames, size) // dark, fps)
    return str(folder)


def noise(state: np.random.Generator, frames: int, size: int = 16) -> np.ndarray:
    """Squares of random colors."""
    return state.integers(0, 256, (frames, size // 4, size // 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)


def compare(real: str, generated: str, workers: int = 1, networks: Networks = NETWORKS, **reading: Any) -> Comparison:
    settings = Reading(**({"protocol": PROTOCOL} | reading))
    return ComparisonRun(settings, networks, Machines("cpu", workers=workers), 0).compare(real, generated)


def test_a_comparison_says_all_that_it_depends_on(tmp_path: Path) -> None:
    """Checks what is reported with a figure: counts, codec, size, rate, floor, interval, and no limit for few clips."""
    real, dark = clips(tmp_path / "real", 20, 0), clips(tmp_path / "dark", 10, 1, dark=3)
    result = compare(real, dark)
    assert str(result.real) == "8 clips of 20, 8 frames per second, 16 x 16, webp"
    assert str(result.generated) == "8 clips of 10, 8 frames per second, 16 x 16, webp"
    fvd, kvd = result.figures
    assert (fvd.name, fvd.of, fvd.clips, fvd.real_clips) == ("FVD", "real / generated", 8, 8)
    assert kvd.name == "KVD"
    assert fvd.real is not None
    assert fvd.real * 10 < fvd.interval[0] < fvd.value < fvd.interval[1]
    assert fvd.limit is None  # too few clips
    again = clips(tmp_path / "again", 10, 2)
    assert compare(real, again).figures[0].value < fvd.value / 10
    assert result.num_shared == 0
    (tmp_path / "again/00.webp").write_bytes((tmp_path / "real/00.webp").read_bytes())
    assert compare(str(tmp_path / "real"), again).num_shared <= 1
    assert compare(real, real).num_shared == 8


def test_parts_of_a_few_videos_are_called_so(tmp_path: Path) -> None:
    """Prevents overlapping parts of two videos from passing for ten clips."""
    real, other = clips(tmp_path / "real", 2, 0, frames=30), clips(tmp_path / "other", 8, 1)
    result = compare(real, other, protocol=replace(PROTOCOL, real="anywhere"))
    assert str(result.real).startswith("8 parts of 2 clips of 2, ")
    told = list(warnings(result))
    assert "the 8 real clips are parts of 2 videos: the interval is too narrow" in told


def test_processes_and_interruptions_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards long evaluations: after a kill, features are kept, and two processes finish with bit-identical results."""
    real, dark = clips(tmp_path / "real", 16, 0), clips(tmp_path / "dark", 8, 1, dark=3)
    whole = compare(real, dark)
    files = {file.name: file.read_bytes() for file in (tmp_path / "cache").rglob("*.npy")}
    assert len(files) == 24
    monkeypatch.setenv("COGVIDEO_CACHE", str(tmp_path / "other"))

    def killed(device: str) -> Callable[[ExcerptPixels], Tensor]:
        made = iter(range(5))
        return lambda clips: means(device)(clips) if next(made, None) is not None else _interrupt()

    with pytest.raises(KeyboardInterrupt):
        compare(real, dark, networks=replace(NETWORKS, i3d=replace(NETWORKS.i3d, load=killed)))
    left = list((tmp_path / "other").rglob("*.npy"))
    assert len(left) == 5
    left[0].write_bytes(left[0].read_bytes()[:50])  # damaged, so it is recomputed
    monkeypatch.setattr(module, "JOB_BATCHES", 4)
    assert compare(real, dark, workers=2) == whole
    assert {file.name: file.read_bytes() for file in (tmp_path / "other").rglob("*.npy")} == files


@pytest.mark.soak
def test_ray_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards distributed runs: two actors of a local cluster give the same figures and features as one process."""
    real, dark = clips(tmp_path / "real", 16, 0), clips(tmp_path / "dark", 8, 1, dark=3)
    whole = compare(real, dark)
    files = {file.name: file.read_bytes() for file in (tmp_path / "cache").rglob("*.npy")}
    monkeypatch.setenv("COGVIDEO_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # so that actors can import the network
    monkeypatch.setattr(module, "JOB_BATCHES", 4)
    comparing = ComparisonRun(Reading(PROTOCOL), NETWORKS, Machines("cpu", "ray", workers=2), 0)
    assert comparing.compare(real, dark) == whole
    assert {file.name: file.read_bytes() for file in (tmp_path / "other").rglob("*.npy")} == files


def _interrupt() -> Tensor:
    raise KeyboardInterrupt


def test_features_are_found_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the cache: a renamed clip is found in it, an old name with new content is not."""
    real, dark = clips(tmp_path / "real", 8, 0, frames=9), clips(tmp_path / "dark", 8, 1, frames=9, dark=3)
    before = compare(real, dark)
    made: list[int] = []

    def counted(device: str) -> Callable[[ExcerptPixels], Tensor]:
        return lambda clips: made.extend([len(clips)]) or means(device)(clips)

    networks = replace(NETWORKS, i3d=replace(NETWORKS.i3d, load=counted))
    (tmp_path / "real/00.webp").rename(tmp_path / "real/x.webp")
    compare(real, dark, networks=networks)
    assert not made
    (tmp_path / "dark/00.webp").write_bytes((tmp_path / "real/x.webp").read_bytes())
    assert compare(real, dark, networks=networks).figures[0].value < before.figures[0].value
    write_video(tmp_path / "dark/01.webp", noise(np.random.default_rng(9), 9), 8)
    compare(real, dark, networks=networks)
    assert made == [1]


def test_windows_are_drawn_as_the_protocol_says(tmp_path: Path) -> None:
    """Checks window sampling: each video's first, a random one, or any of all windows, so long videos count more."""
    folder = tmp_path / "real"
    clips(folder, 6, 0, frames=10)
    write_video(folder / "long.webp", noise(np.random.default_rng(8), 40), 8)
    write_video(folder / "short.webp", noise(np.random.default_rng(9), 8), 8)
    reading = Reading(PROTOCOL)
    chosen = draw(str(folder), reading, "random", 99, 0)
    assert (len(chosen.excerpts), chosen.num_clips, chosen.num_short) == (7, 8, 1)
    assert len({each.footage.id for each in chosen.excerpts}) == 7
    assert any(each.first > 1 for each in chosen.excerpts)
    assert {each.first for each in draw(str(folder), reading, "start", 99, 0).excerpts} == {0}
    everywhere = draw(str(folder), reading, "anywhere", 999, 0).excerpts
    assert len({(each.footage.id, each.first) for each in everywhere}) == len(everywhere) == 6 * 2 + 32
    assert sum(each.footage.id == "long.webp" for each in everywhere) == 32
    ordered = Reading(replace(PROTOCOL, order="sorted"))
    assert [each.footage.id for each in draw(str(folder), ordered, "random", 2, 0).excerpts] == ["00.webp", "01.webp"]
    other = draw(str(folder), reading, "random", 99, 1).excerpts
    assert [each.footage.id for each in other] != [each.footage.id for each in chosen.excerpts]


def test_windows_of_a_comparison(tmp_path: Path) -> None:
    """Checks which windows are compared: generated clips from frame 0, real ones from anywhere, each with its own
    features. The two halves for the floor share no video."""
    state = np.random.default_rng(0)
    for folder in ("real", "made"):
        (tmp_path / folder).mkdir()
    for name, level in {"a": 40, "b": 200}.items():
        write_video(tmp_path / "real" / f"{name}.webp", level + noise(state, 30) // 32, 8)
    for number in range(8):
        frames = np.concatenate([90 + noise(state, 9) // 32, np.full((20, 16, 16, 3), 250, np.uint8)])
        write_video(tmp_path / "made" / f"{number}.webp", frames, 8)
    brightest: list[int] = []

    def watched(device: str) -> Callable[[ExcerptPixels], Tensor]:
        return lambda clips: brightest.extend(int(frames.max()) for (frames,) in clips) or means(device)(clips)

    networks = replace(NETWORKS, i3d=replace(NETWORKS.i3d, load=watched))
    protocol = replace(PROTOCOL, real="anywhere")
    fvd = compare(str(tmp_path / "real"), str(tmp_path / "made"), networks=networks, protocol=protocol).figures[0]
    assert max(brightest) < 210
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 16 + 8
    assert fvd.real == pytest.approx(6 * 160**2, rel=0.02)  # one video in each half


def test_frames_are_every_nth_from_the_first(tmp_path: Path) -> None:
    """Checks the step: from frame 2 on, every second frame is read, not consecutive frames at another rate."""
    levels = np.arange(20, dtype=np.uint8)[:, None, None, None]
    (tmp_path / "real").mkdir()
    write_video(tmp_path / "real/a.webp", (10 * levels).repeat(4, 1).repeat(4, 2).repeat(3, 3), 8)
    write_video(tmp_path / "real/b.webp", (10 * levels).repeat(4, 1).repeat(4, 2).repeat(3, 3), 8)
    reading = Reading(replace(PROTOCOL, step=2))
    excerpt = replace(draw(str(tmp_path / "real"), reading, "start", 2, 0).excerpts[0], first=2)
    assert reading.read(excerpt, None)[:, 0, 0, 0].tolist() == list(range(20, 200, 20))


def test_prepared_data_and_reconstructions(tmp_path: Path, train_text_model: Callable[..., bytes]) -> None:
    """Checks prepared data: codes are decoded, and the distance due to the tokenizer alone is reported as well."""
    make_bundle(tmp_path / "bundle", train_text_model(), base=False)
    data = make_data(tmp_path / "data", tmp_path / "bundle", num_clips=4)
    tokenizer = Tokenizer.of(str(tmp_path / "bundle"))
    real = clips(tmp_path / "real", 8, 0)
    result = compare(real, str(data), tokenizer=tokenizer)
    assert result.generated.codecs == {"codes": 4}
    assert result.generated.resolutions == {f"{4 * GRID} x {4 * GRID}": 4}
    assert [each.of for each in result.figures[::2]] == [
        "real / generated",
        "reconstructed / generated",
        "real / reconstructed",
    ]
    assert result.figures[2].value != result.figures[0].value
    with pytest.raises(ValueError, match="is prepared data, expected the bundle that decodes it: pass --model"):
        compare(real, str(data))
    with pytest.raises(ValueError, match="8 frames per second, expected 4"):
        compare(str(data), real, tokenizer=tokenizer, fps=4)


def test_pairs_are_compared_by_name(tmp_path: Path) -> None:
    """Checks LPIPS: clips are paired by name, and sources without common names are refused."""
    real, other = clips(tmp_path / "real", 4, 0), clips(tmp_path / "other", 3, 0)
    networks = replace(NETWORKS, lpips=Judge(("lpips", "vgg"), differences))
    lpips = compare(real, other, networks=networks).figures[-1]
    assert (lpips.name, lpips.clips, lpips.value) == ("LPIPS (vgg)", 3, 0)
    for file in (tmp_path / "other").iterdir():
        file.rename(file.with_name(f"x{file.name}"))
    with pytest.raises(ValueError, match="no clip of the same name"):
        compare(real, other, networks=networks)
    (tmp_path / "real/00.gif").write_bytes((tmp_path / "real/00.webp").read_bytes())
    with pytest.raises(ValueError, match="real has two clips with the name 00, expected one for each pair"):
        compare(real, other, networks=networks)


def test_clips_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    """Refuses clips that would give meaningless figures, with a message that says what to do."""
    real = clips(tmp_path / "real", 4, 0)
    one = clips(tmp_path / "one", 1, 1)
    short = clips(tmp_path / "short", 3, 1, frames=5)
    fast = clips(tmp_path / "fast", 3, 1, fps=25)
    large = clips(tmp_path / "large", 3, 1, size=32)
    broken = clips(tmp_path / "broken", 3, 1)
    (tmp_path / "broken/01.webp").write_bytes((tmp_path / "broken/01.webp").read_bytes()[:100])
    for source, message in {
        one: "has 1 clip of 9 frames or more among 1, the longest has 12; expected at least 2",
        short: "has 0 clips of 9 frames or more among 3, the longest has 5",
        fast: r"has 8 frames per second and .* 25, expected one rate: pass --fps",
        large: r"has 16 x 16 pixels and .* 32 x 32, expected one size: pass --size",
        broken: r"01.webp",
        str(tmp_path / "nowhere"): "there is no .*nowhere",
        "world:5": "world:5 is not a file",
    }.items():
        with pytest.raises(ValueError, match=message):
            compare(real, source)
    assert compare(real, large, protocol=replace(PROTOCOL, size=8)).figures[0].clips == 3
    for fps in (0, -3, math.nan, math.inf, 1e9):
        with pytest.raises(ValueError, match=r"fps is .*, expected a number of frames per second in"):
            compare(real, large, fps=fps)
    with pytest.raises(ValueError, match="seed is -1, expected 0 or more"):
        ComparisonRun(Reading(PROTOCOL), NETWORKS, Machines("cpu"), -1)


def test_other_networks_are_no_fvd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reserves the name FVD: unverified networks are refused, never executed, and named differently with --unproven."""
    real, dark = clips(tmp_path / "real", 4, 0), clips(tmp_path / "dark", 4, 1)
    command = ["evaluate", "distribution", real, dark]
    for place, told in (
        (tmp_path, "is a folder, expected the file of the figures"),
        (tmp_path / "no" / "x", "no folder"),
    ):
        assert main([*command, "--json", str(place)]) == 2
        assert told in capsys.readouterr().err
    assert main(command) == 2
    assert "expected the weights that `cogvideo fetch i3d` puts there" in capsys.readouterr().err
    trap = tmp_path / "trap"
    (tmp_path / "foreign.pkl").write_bytes(pickle.dumps(Trap(trap)))
    assert main([*command, "--network", str(tmp_path / "foreign.pkl")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not trap.exists()
    monkeypatch.setattr(module, "load_i3d", lambda *_, **__: torch.nn.Identity())
    (tmp_path / "network").write_bytes(b"any")
    monkeypatch.setattr(module, "_load_i3d", lambda path, protocol, proven, device: means(device))
    options = ["--network", str(tmp_path / "network"), "--unproven", "--json", str(tmp_path / "told.json")]
    assert main([*command, *options, "--workers", "1", "--frames", "9", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "FVD" not in out.replace("FVD is mostly bias", "")
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["figures"][0]["name"].startswith("Frechet distance (unproven I3D ")
    assert told["protocol"]["name"] == "tats"
    assert told["warnings"]


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))
