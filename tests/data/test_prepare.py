"""Data preparation as users run it: real video files, processes that really get killed, every engine, full disks."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cogvideo.bundle import model as bundle
from cogvideo.bundle.model import CogVideo
from cogvideo.cli import main
from cogvideo.config import AutoencoderConfig, CogVideoConfig
from cogvideo.data import engines
from cogvideo.data.dataset import Dataset
from cogvideo.data.encoding import PrepareSettings, ahead, encode_clips
from cogvideo.data.engines import Machines
from cogvideo.data.frames import BACKGROUNDS, FrameSettings, read_item
from cogvideo.data.prepare import NO_SPLIT, prepare
from cogvideo.data.sources import SourceOptions, list_source
from cogvideo.files import exclusive_lock
from cogvideo.media.video import write_video
from cogvideo.models.autoencoder import Autoencoder
from killing import full_disk

SMALL = AutoencoderConfig(
    channels=8, groups=4, encoder_multipliers=(1, 1, 2), decoder_multipliers=((1, 1, 1, 2),), embedding_dim=16
)
ALONE = Machines(workers=1)
SETTINGS = PrepareSettings(FrameSettings(fps=8), batch=16, shard_clips=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle with a small, randomly initialized image tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    bundle.update(folder, replace(CogVideoConfig(), autoencoder=SMALL), image_tokenizer=Autoencoder(SMALL))
    return str(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of seven captioned videos of 5 to 17 frames; one of them has two captions."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for number in range(7):
        small = random.integers(0, 256, (5 + 2 * number, 6, 5, 3), dtype=np.uint8)
        write_video(folder / f"clip{number}.mp4", small.repeat(16, 1).repeat(16, 2), 8)
        (folder / f"clip{number}.txt").write_text(f"caption of {number}\n" + "another one\n" * (number == 3))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Names and contents of all files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cogvideo", "data", "prepare", *map(str, arguments)]


def test_rows_hold_the_codes_of_their_clips(clips: Path, tokenizer: str, tmp_path: Path) -> None:
    """Checks preparation end to end: order, captions, lengths, and codes that match those encoded directly."""
    assert prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE) == 0
    dataset = Dataset(tmp_path)
    items = list_source(str(clips), SourceOptions()).items
    assert len(dataset) == len(items) == 7
    encode = CogVideo.from_pretrained(tokenizer).autoencoder.encode
    for first in range(0, 7, 3):
        frames = [read_item(item, replace(SETTINGS.frames, size=64)).frames for item in items[first : first + 3]]
        pixels = torch.from_numpy(np.concatenate(frames)).movedim(-1, 1) / 255
        expected = torch.cat([encode(pixels[start : start + 16]) for start in range(0, len(pixels), 16)]).numpy()
        got = np.concatenate([dataset.row(row).codes for row in range(first, min(first + 3, 7))])
        assert got.shape == expected.shape
        assert (got == expected).mean() > 0.999  # another memory layout may switch codes between equal codebook rows
        for row, item, clip in zip(range(first, 7), items[first:], frames, strict=False):
            assert dataset.row(row).captions == item.captions
            assert len(dataset.row(row).codes) == len(clip)
    assert [len(dataset.row(row).captions) for row in range(7)] == [1, 1, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tokenizer_of_half_precision(
    clips: Path, tokenizer: str, tmp_path: Path, precision: Literal["float32", "bfloat16"]
) -> None:
    """Guards bundles stored in float16, like the one that ships: codes match those of float32 weights."""
    CogVideo.from_pretrained(tokenizer, torch.float16).save_pretrained(tmp_path / "half")
    for name, bundle_path in (("whole", tokenizer), ("halved", tmp_path / "half")):
        prepare(
            str(clips),
            tmp_path / name,
            str(bundle_path),
            replace(SETTINGS, precision=precision),
            machines=ALONE,
        )
    whole, halved = Dataset(tmp_path / "whole"), Dataset(tmp_path / "halved")
    equal = [(whole.row(row).codes == halved.row(row).codes).mean() for row in range(len(whole))]
    assert np.mean(equal) > 0.9


def test_still_images_are_clips_of_one_frame(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks that only --images includes stills, and that a missing validation split is reported unless unwanted."""
    source = tmp_path / "pictures"
    source.mkdir()
    Image.new("RGB", (64, 64), "red").save(source / "a.png")
    (source / "a.txt").write_text("all red")
    options = SourceOptions(images=True)
    assert prepare(str(source), tmp_path / "out", tokenizer, options=options, machines=ALONE) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"the only split is train ({NO_SPLIT}): stages trained on it hold nothing out"
    options = SourceOptions(images=True, validation=0.0)  # no validation wanted, so nothing to report
    assert prepare(str(source), tmp_path / "none", tokenizer, options=options, machines=ALONE) == 0
    assert "only split" not in capsys.readouterr().out
    dataset = Dataset(tmp_path / "out")
    assert [(row.captions, len(row.codes)) for row in map(dataset.row, range(len(dataset)))] == [(("all red",), 1)]
    with pytest.raises(ValueError, match="has no clips"):
        prepare(str(source), tmp_path / "none", tokenizer)


@pytest.mark.parametrize("engine", ["processes", pytest.param("ray", marks=pytest.mark.soak)])
def test_every_engine_gives_the_same_bytes(clips: Path, tokenizer: str, tmp_path: Path, engine: str) -> None:
    """Guards the promise that one process, several processes, and Ray produce identical bytes."""
    prepare(str(clips), tmp_path / "one", tokenizer, SETTINGS, machines=ALONE)
    options: tuple[object, ...] = ("--engine", "ray") if engine == "ray" else ("--device", "cpu")
    options = (*options, "--workers", 2, "--batch", 16, "--shard-clips", 3)
    arguments = command(clips, "--out", tmp_path / "two", "--tokenizer", tokenizer, *options)
    if engine == "ray":
        done = subprocess.run(arguments, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        assert main(arguments[3:]) == 0
    assert files(tmp_path / "two") == files(tmp_path / "one")


class InThisProcess:
    """A stand-in for Ray Data: records its options, and makes the rows in this process."""

    def __init__(self, rows: list[Any], asked: dict[str, Any], override_num_blocks: int) -> None:
        self.rows, self.asked = rows, asked
        asked["blocks"] = override_num_blocks

    def map(self, maker: Any, fn_constructor_args: tuple[Any, ...], **resources: Any) -> InThisProcess:
        self.asked |= resources
        self.rows = list(map(maker(*fn_constructor_args), self.rows))
        return self

    def iter_rows(self) -> Iterator[Any]:
        return iter(self.rows)


def test_what_is_asked_of_ray(clips: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks our side of the Ray engine without Ray, which takes half a minute: bytes, number of actors, shutdown."""
    asked: dict[str, Any] = {}
    ray = Mock(cluster_resources=lambda: {"CPU": 8.0})
    data = Mock(from_items=lambda rows, **options: InThisProcess(rows, asked, **options))
    for name, module in (("ray", ray), ("ray.data", data), ("ray.exceptions", Mock(RayTaskError=RuntimeError))):
        monkeypatch.setitem(sys.modules, name, module)
    prepare(str(clips), tmp_path / "ray", tokenizer, SETTINGS, machines=Machines("auto", "ray", 2))
    assert asked == {"blocks": 3, "concurrency": 2, "num_gpus": 0, "num_cpus": 1}
    ray.shutdown.assert_called_once()
    prepare(str(clips), tmp_path / "one", tokenizer, SETTINGS, machines=ALONE)
    assert files(tmp_path / "ray") == files(tmp_path / "one")


def test_killed_runs_continue_to_the_same_bytes(tokenizer: str, tmp_path: Path) -> None:
    """Guards days of work: a killed run resumes to the bytes of an uninterrupted one, without redoing shards.

    Also catches processes that outlive the killed one.
    """
    options = ["world:24", "--tokenizer", tokenizer, "--shard-clips", "2", "--device", "cpu", "--workers"]
    out = tmp_path / "killed"
    process = subprocess.Popen(command(*options, 2, "--out", out), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(list(out.glob("shard-*.arrow"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline, "processes outlive the one that was killed"
        time.sleep(0.05)
    assert not (out / "dataset.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.arrow")}
    for folder in (out, tmp_path / "whole"):
        assert main(["data", "prepare", *options, "1", "--out", str(folder)]) == 0
    assert files(out) == files(tmp_path / "whole")
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}


def test_whole_run_is_not_repeated(clips: Path, tokenizer: str, tmp_path: Path) -> None:
    """A finished command that is run again must not rewrite any shard."""
    prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE)
    before = {path.name: path.stat().st_ino for path in tmp_path.glob("shard-*")}
    assert prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE) == 0
    assert {path.name: path.stat().st_ino for path in tmp_path.glob("shard-*")} == before


def test_bad_clips_are_counted_with_their_reasons(
    clips: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents clips from vanishing: each is in a shard or in rejected.csv, and rejections set the exit status."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("clip5.mp4", "clip5.txt"):
        (source / name).write_bytes((clips / name).read_bytes())
    whole = (clips / "clip6.mp4").read_bytes()
    write_video(source / "short.mp4", np.zeros((1, 16, 16, 3), np.uint8), 8)
    (source / "empty.mp4").touch()
    (source / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (source / "words.mp4").write_text("this is no video")
    (source / "uncaptioned.mp4").write_bytes(whole)
    (source / "blank.mp4").write_bytes(whole)
    (source / "blank.txt").write_text(" \n\n")
    for name in ("short", "empty", "cut", "words"):
        (source / f"{name}.txt").write_text("a caption")
    assert prepare(str(source), tmp_path / "out", tokenizer, SETTINGS, machines=ALONE) == 1
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        rejected = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert rejected.keys() == {f"{name}.mp4" for name in ("short", "empty", "cut", "words", "uncaptioned", "blank")}
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert sum(card["rejected"].values()) == 6
    assert sum(card["splits"].values()) == 1
    assert rejected["short.mp4"] == "too short"
    assert rejected["empty.mp4"] == "empty file"
    assert "rejected: 6" in capsys.readouterr().out
    assert prepare(str(source), tmp_path / "out", tokenizer, SETTINGS, machines=ALONE, max_rejected=6) == 0


def test_a_missing_device_is_refused_before_any_work(tokenizer: str, tmp_path: Path) -> None:
    """Rejects a nonexistent device before the folder is created and minutes are spent on listing sources."""
    with pytest.raises(ValueError, match="cuda:99"):
        prepare("world:4", tmp_path / "out", tokenizer, SETTINGS, machines=Machines("cuda:99"))
    assert not (tmp_path / "out").exists()


def test_source_without_any_good_clip_is_refused(tokenizer: str, tmp_path: Path) -> None:
    """Prevents an empty dataset that looks like success; the reasons are still written."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"no clip in .* can be used: a.mp4: missing caption$"):
        prepare(str(tmp_path / "source"), tmp_path / "out", tokenizer, SETTINGS, machines=ALONE)
    assert "a.mp4" in (tmp_path / "out" / "rejected.csv").read_text()
    (tmp_path / "table.csv").write_text("file,caption\nsource/a.mp4,a cat\nnowhere.mp4,a dog\n")
    message = "no clip in .* can be used: nowhere.mp4: file is missing, and 1 more in .*rejected.csv$"
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / "table.csv"), tmp_path / "other", tokenizer, SETTINGS, machines=ALONE)
    assert "source/a.mp4,no readable video" in (tmp_path / "other" / "rejected.csv").read_text()
    assert not (tmp_path / "other" / "dataset.json").exists()


def test_paths_that_are_no_text(clips: Path, tokenizer: str, tmp_path: Path) -> None:
    """Guards days of work against non-Unicode folder and file names, in the card, a shard, and the rejections."""
    source = tmp_path / os.fsdecode(b"source\xff")
    source.mkdir()
    shutil.copy(clips / "clip0.mp4", source)
    (source / "clip0.txt").write_text("a cat")
    (source / os.fsdecode(b"bad\xfe.mp4")).write_text("no video")
    (source / os.fsdecode(b"bad\xfe.txt")).write_text("a dog")
    table = source / os.fsdecode(b"t\xfd.csv")
    table.write_bytes(b"file,caption\nclip0.mp4,a cat\n,a dog\n")
    for name, each in (("table", table), ("folder", source)):
        assert prepare(str(each), tmp_path / name, tokenizer, SETTINGS, machines=ALONE) == 1
        assert Dataset(tmp_path / name).card.source == str(each)
    assert '"t\\udcfd.csv, line 3",missing file name' in (tmp_path / "table" / "rejected.csv").read_text()
    assert r"bad\udcfe.mp4,no readable video" in (tmp_path / "folder" / "rejected.csv").read_text()


@pytest.mark.parametrize("change", ["settings", "clips", "tokenizer"])
def test_other_data_in_the_folder_is_refused(clips: Path, tokenizer: str, tmp_path: Path, change: str) -> None:
    """Prevents mixed datasets: a run never continues one with other settings, other clips, or another tokenizer."""
    prepare(str(clips), tmp_path / "out", tokenizer, SETTINGS, machines=ALONE)
    source, other = clips, SETTINGS
    if change == "settings":
        other = replace(SETTINGS, frames=replace(SETTINGS.frames, fps=4))
    elif change == "clips":
        source = tmp_path / "fewer"
        source.mkdir()
        for name in ("clip5.mp4", "clip5.txt"):
            (source / name).write_bytes((clips / name).read_bytes())
    else:
        torch.manual_seed(1)
        tokenizer = str(tmp_path / "bundle")
        bundle.update(tokenizer, replace(CogVideoConfig(), autoencoder=SMALL), image_tokenizer=Autoencoder(SMALL))
    before = files(tmp_path / "out")
    how = {"settings": "with other settings", "clips": "from other clips", "tokenizer": "with another tokenizer"}
    with pytest.raises(ValueError, match=rf"shard-00000.arrow was made {how[change]}: give this run another folder"):
        prepare(str(source), tmp_path / "out", tokenizer, other, machines=ALONE)
    assert files(tmp_path / "out") == before


def test_damaged_shard_is_never_taken_for_whole(clips: Path, tokenizer: str, tmp_path: Path) -> None:
    """A truncated shard is rejected by name, not accepted as complete."""
    prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE)
    shard = tmp_path / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot use the shard .*shard-00001.arrow"):
        prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE)


def test_two_runs_in_one_folder_are_refused(clips: Path, tokenizer: str, tmp_path: Path) -> None:
    """Prevents a run from removing what another one is writing: it is refused until the other has finished."""
    with exclusive_lock(tmp_path), pytest.raises(ValueError, match="another process is writing to"):
        prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE)
    assert prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE) == 0


def test_locks_of_a_process_have_one_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a new fork hook for every lock: hooks are permanent, so they would pile up in long processes."""
    hooks: list[object] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **each: hooks.append(each))
    for _ in range(3):
        with exclusive_lock(tmp_path):
            pass
    assert len(hooks) <= 1


def test_changed_shard_is_refused(clips: Path, tokenizer: str, tmp_path: Path) -> None:
    """Catches a second run that accepts a corrupt shard and gives it a new hash."""
    prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE)
    shard, whole = tmp_path / "shard-00001.arrow", (tmp_path / "shard-00001.arrow").read_bytes()
    codes = Dataset(tmp_path).row(3).codes.tobytes()
    place = whole.index(codes) + len(codes) // 2
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"shard-00001.arrow has changed since it was prepared"):
        prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE)
    shard.unlink()
    prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE)
    assert shard.read_bytes() == whole


def test_shards_do_not_depend_on_where_the_source_lies(clips: Path, tokenizer: str, tmp_path: Path) -> None:
    """Keeps private paths out of shards: the same clips elsewhere, one of them broken, give the same bytes."""
    for place in ("here", "there/deep"):
        shutil.copytree(clips, tmp_path / place)
        (tmp_path / place / "clip0.mp4").write_text("broken")
        prepare(str(tmp_path / place), tmp_path / f"of-{place[0]}", tokenizer, SETTINGS, machines=ALONE)
    here, there = files(tmp_path / "of-h"), files(tmp_path / "of-t")
    assert here.keys() == there.keys()
    assert {name for name in here if here[name] != there[name]} == {"dataset.json"}
    assert str(tmp_path).encode() not in here["shard-00000.arrow"]


def test_failures_of_the_system_are_no_rejections(
    clips: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents clips from being rejected for a transient I/O error: the run stops, and the next one has them all."""
    real = Path.open

    def fails(path: Path, *arguments: str, **options: object) -> IO[Any]:
        if path.name == "clip4.mp4":
            raise OSError(5, "Input/output error", str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "open", fails)
        with pytest.raises(OSError, match="Input/output error"):
            prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE)
    assert prepare(str(clips), tmp_path, tokenizer, SETTINGS, machines=ALONE) == 0


def test_source_is_no_place_for_shards(clips: Path, tokenizer: str) -> None:
    """Keeps shards out of the folder of a user's clips."""
    with pytest.raises(ValueError, match="is the source: pass another one with --out"):
        prepare(str(clips), clips, tokenizer, SETTINGS, machines=ALONE)


def test_full_disk_is_one_line_and_nothing_is_lost(clips: Path, tokenizer: str, tmp_path: Path) -> None:
    """Simulates a full disk with a small tmpfs in a private mount namespace: one error, and whole shards remain."""
    out = tmp_path / "small disk"
    out.mkdir()
    script = 'mount -t tmpfs -o size=64k tmpfs "$0" && "$@"; status=$?; ls -A "$0"; exit $status'
    arguments = command("world:400", "--out", out, "--tokenizer", tokenizer, "--workers", 1, "--shard-clips", 4)
    isolated = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*isolated, 'mount -t tmpfs tmpfs "$0"', str(out)], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mounts in a namespace")
    done = subprocess.run([*isolated, script, str(out), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    left = done.stdout.split()
    assert left
    assert all(name == ".lock" or (name.startswith("shard-") and name.endswith(".arrow")) for name in left)
    assert len(left) > 1


def test_unwritable_output_is_one_line(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks writes that fail midway, at a limit on file sizes: one error, and no partial shard."""
    arguments = command("world:4", "--out", tmp_path / "out", "--tokenizer", tokenizer, "--workers", 1)
    with full_disk(2000):
        assert main(arguments[3:]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("cogvideo: error: File too large: ")
    assert files(tmp_path / "out") == {".lock": b""}


def test_dead_worker_process_is_said(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a hang or a traceback when the system kills a worker, as it does when memory runs out."""
    is_over = threading.Event()

    def kill() -> None:
        while not any(tmp_path.glob("shard-*")) and not is_over.wait(0.05):
            pass
        os.kill(workers_of(os.getpid())[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    arguments = command("world:20000", "--out", tmp_path, "--tokenizer", tokenizer, "--workers", 2, "--device", "cpu")
    status = main([*arguments[3:], "--shard-clips", "4"])
    is_over.set()
    killer.join()
    errors = capsys.readouterr().err
    assert status == 2
    assert "a worker process died" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("has_begun", [False, True])
def test_interrupt_is_quiet_and_quick(tokenizer: str, tmp_path: Path, has_begun: bool) -> None:
    """Checks Ctrl-C: all processes, even those still starting, end at once without tracebacks; whole shards remain."""
    arguments = command("world:20000", "--out", tmp_path, "--tokenizer", tokenizer, "--workers", 2, "--device", "cpu")
    process = subprocess.Popen(
        [*arguments, "--shard-clips", "4"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not (any(tmp_path.glob("shard-*")) if has_begun else workers_of(process.pid)):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert any(tmp_path.glob("shard-*.arrow")) == has_begun


def test_interrupt_waits_until_workers_have_started() -> None:
    """Guards workers that read their task from a pipe: no thread may raise Ctrl-C while it is being written."""
    is_over, has_started = threading.Event(), threading.Event()

    def start_workers() -> None:
        with engines._uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            is_over.wait(0.1)
            has_started.set()

    other = threading.Thread(target=is_over.wait)
    other.start()  # does not block SIGINT
    with pytest.raises(KeyboardInterrupt):
        start_workers()
    is_over.set()
    other.join()
    assert has_started.is_set()


def workers_of(process: int) -> list[int]:
    """PIDs of the worker processes, including those still starting."""
    command = ["pgrep", "-P", str(process), "-f", "spawn_main"]
    return [int(each) for each in subprocess.run(command, capture_output=True, check=False).stdout.split()]


def test_pairs_for_super_resolution(clips: Path, tokenizer: str, tmp_path: Path) -> None:
    """Guards training data of super-resolution: high codes are of the same frames at three times the size."""
    paired = replace(SETTINGS, superres=True)
    prepare(str(clips), tmp_path, tokenizer, paired, machines=ALONE)
    dataset, item = Dataset(tmp_path), list_source(str(clips), SourceOptions()).items[4]
    high = read_item(item, replace(SETTINGS.frames, size=192)).frames
    low = np.zeros((len(high), 64, 64, 3))
    for row, column in np.ndindex(64, 64):
        low[:, row, column] = high[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].mean((1, 2))
    encode = CogVideo.from_pretrained(tokenizer).autoencoder.encode
    for codes, frames in ((dataset.row(4).codes, low.round()), (dataset.row(4).high_codes, high)):
        expected = encode(torch.from_numpy(frames).movedim(-1, 1).float() / 255).numpy()
        assert codes is not None
        assert codes.shape == expected.shape
        assert (codes == expected).mean() > 0.999


def test_copies_of_a_clip_with_alpha_lie_on_backgrounds_that_captions_name(tokenizer: str, tmp_path: Path) -> None:
    """Catches captions that name the wrong background color."""
    frames = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(4)]
    for number, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (12 + number, 12, 20 + number, 20))
    (tmp_path / "clips").mkdir()
    frames[0].save(tmp_path / "clips" / "a.webp", save_all=True, append_images=frames[1:], duration=125, lossless=True)
    (tmp_path / "clips" / "a.txt").write_text("a red square moves")
    template = "{caption}, on {article} {background} background"
    random = FrameSettings(size=64, background="random", background_template=template)
    prepare(
        str(tmp_path / "clips"), tmp_path / "out", tokenizer, replace(SETTINGS, frames=random),
        SourceOptions(copies=12), machines=ALONE,
    )  # fmt: skip
    dataset = Dataset(tmp_path / "out")
    items = list_source(str(tmp_path / "clips"), SourceOptions(copies=12)).items
    seen = set()
    for number, item in enumerate(items):
        row, pictures = dataset.row(number), read_item(item, random)
        name = row.attributes["background"]
        article = "an" if name == "orange" else "a"
        assert row.captions == (f"a red square moves, on {article} {name} background",)
        assert np.abs(pictures.frames[:, 0, 0].astype(int) - BACKGROUNDS[name]).max() <= 2
        seen.add(name)
    assert len(seen) == 12
    assert len({row.id for row in map(dataset.row, range(12))}) == 12


def test_placed_and_mirrored_copies_of_a_clip_with_alpha(tmp_path: Path) -> None:
    """Catches captions that name the wrong side, cropped objects, and clips without alpha that are moved anyway."""
    frame = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    frame.paste((255, 0, 0, 255), (0, 0, 16, 64))
    frame.paste((0, 255, 0, 255), (48, 0, 64, 64))
    for name, each in (("a", frame), ("b", frame.convert("RGB"))):
        each.save(tmp_path / f"{name}.webp", save_all=True, append_images=[each], duration=125, lossless=True)
        (tmp_path / f"{name}.txt").write_text("red on the left, leftwards of what is left over")
    settings = FrameSettings(size=64, background="blue", smallest=0.5, mirror=True, min_frames=1)
    places = set()
    for item in list_source(str(tmp_path), SourceOptions(copies=8)).items:
        frames, captions, _ = read_item(item, settings)
        if item.id.startswith("b"):
            assert (frames == read_item(item, FrameSettings(size=64, min_frames=1)).frames).all()
            assert captions == item.captions
            continue
        picture = frames[0].astype(int)
        red, green = (np.nonzero(picture[:, :, place] - picture.sum(-1) / 3 > 60) for place in (0, 1))
        side = np.ptp(red[0]) + 1
        assert 31 <= side <= 64
        assert abs(np.ptp(np.concatenate([red[1], green[1]])) + 1 - side) <= 2  # nothing is cropped
        assert (red[1].mean() < green[1].mean()) == (item.copy % 2 == 0)
        assert captions == (
            item.captions if item.copy % 2 == 0 else ("red on the right, rightwards of what is right over",)
        )
        places.add((side, red[0].min(), red[1].min()))
    assert len(places) == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"smallest": 0.0}, "smallest is 0.0, expected a share in"),
        ({"fps": 0}, "fps is 0, expected a positive number"),
        ({"background": "mauve"}, "background is 'mauve', expected random or one of red"),
        ({"fps": float("inf")}, "fps is inf, expected a positive number"),
        ({"fps": 600}, "fps is 600, expected at most 500"),
        ({"max_seconds": float("inf")}, "max_seconds is inf, expected a positive number"),
        ({"background_template": "{capton}"}, "expected {caption}"),
        ({"background_template": "{caption.x}"}, "expected {caption}"),
        ({"background_template": "plain"}, "expected {caption}"),
        ({"loop_to": -1.0}, "loop_to is -1.0, expected 0 or more seconds"),
    ],
)
def test_bad_frame_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    """Rejects settings that would fail hours later or are meaningless."""
    with pytest.raises(ValueError, match=re.escape(message)):
        FrameSettings(**wrong)


def test_size_must_fit_the_tokenizer(clips: Path, tokenizer: str, tmp_path: Path) -> None:
    """Prevents a failure in the encoder: the size is checked before anything is read or written."""
    odd = replace(SETTINGS, frames=FrameSettings(size=60))
    with pytest.raises(ValueError, match="size is 60x60, expected multiples of 8"):
        prepare(str(clips), tmp_path / "out", tokenizer, odd, machines=ALONE)
    with pytest.raises(ValueError, match="caption_columns is empty, expected one column or more"):
        prepare(str(clips), tmp_path / "out", tokenizer, SETTINGS, SourceOptions(caption_columns=()))
    assert not (tmp_path / "out").exists()


def test_bundle_without_tokenizer_is_refused(clips: Path, tmp_path: Path) -> None:
    """Checks the message for a bundle that cannot encode."""
    CogVideo(CogVideoConfig()).save_pretrained(tmp_path / "bundle")
    with pytest.raises(ValueError, match="the bundle has no image_tokenizer, it has: nothing"):
        prepare(str(clips), tmp_path / "out", str(tmp_path / "bundle"), SETTINGS, machines=ALONE)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 10))
def test_frames_of_all_clips_share_batches(lengths: list[int], batch: int) -> None:
    """Checks batches across clips: codes return to their own clips, and every batch but the last is full."""
    numbers = iter(range(10**6))
    clips = [np.array([[[[next(numbers)] * 3]] for _ in range(length)], np.uint8) for length in lengths]
    sizes = []

    def encode(frames: np.ndarray) -> np.ndarray:
        sizes.append(len(frames))
        return frames[..., 0].astype(np.uint16)

    codes = list(encode_clips(clips, encode, batch))
    assert [each.tolist() for each in codes] == [clip[..., 0].tolist() for clip in clips]
    full, rest = divmod(sum(lengths), batch)
    assert sizes == [batch] * full + [rest] * (rest > 0)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_reading_ahead_keeps_order_and_bounds(threads: int) -> None:
    """Guards order and memory: results come in the order of their values, and few are read ahead."""
    begun = []

    def double(value: int) -> int:
        begun.append(value)
        time.sleep(0.001 * (value % 3))
        return 2 * value

    results = ahead(double, range(100), threads)
    assert next(results) == (0, 0)
    time.sleep(0.05)
    assert len(begun) <= 1 + 2 * threads
    assert list(results) == [(value, 2 * value) for value in range(1, 100)]
