"""Whole runs of `cogvideo train STAGE`, some in separate processes: chains, kills, ranks, variants, mistakes."""

from __future__ import annotations

import contextlib
import hashlib
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
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from cogvideo.bundle import model as bundle
from cogvideo.bundle.adapters import WEIGHTS
from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import CogVideo
from cogvideo.cli import main
from cogvideo.config import require
from cogvideo.files import exclusive_lock
from cogvideo.models.transformer import Base
from cogvideo.training.checkpoints import Checkpoints, read_weights
from cogvideo.training.held_out import mean_loss
from cogvideo.training.step import StepMetrics, Trainer
from gallery import loud
from killing import kill, paused
from workshop import make_bundle, make_data

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
RATE = 1e-3
PATIENCE = 300
"""Seconds after which a process counts as hung, even on a busy machine."""


TWICE = """
import os, sys
from cogvideo.cli import main

for sharding in ("replicated", "sharded"):
    if status := main([*sys.argv[2:], "--sharding", sharding, "--out", f"ranks-{sharding}"]):
        sys.exit(status)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}  # torchrun's store has the keys of one group
"""
"""Arguments: the port of a second store, then those of `cogvideo`. Ranks import PyTorch once for both shardings."""


class Place:
    """A folder with a bundle and data, and methods that run commands in it."""

    def __init__(self, folder: Path, text_model: bytes, base: bool = True) -> None:
        self.folder = folder
        make_bundle(folder / "model", text_model, base)
        make_data(folder / "data", folder / "model")

    def command(self, stage: str, *options: str, out: str = "model") -> list[str]:
        """Command line of a run of a few small steps; later options override earlier ones."""
        return [sys.executable, "-m", "cogvideo", "train", stage, "--data", "data", "--out", out,
            "--steps", "8", "--batch", "4", "--warmup", "2", "--learning-rate", str(RATE), "--report-every", "1",
            "--evaluate-every", "4", "--checkpoint-every", "2", "--sample-every", "0", *options]  # fmt: skip

    def here(self, stage: str, *options: str, out: str) -> tuple[int, str]:
        """Exit status and stderr of a run in this process, which saves seconds; unexpected errors are raised."""
        command = self.command(stage, *options, out=out)
        return self.call(*command[command.index("train") :])

    def call(self, *arguments: str) -> tuple[int, str]:
        """Like `here`, for any command."""
        said = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stderr(said):
            return main(list(arguments)), said.getvalue()

    def succeed(self, stage: str, *options: str, out: str = "model") -> None:
        status, said = self.here(stage, *options, out=out)
        assert status == 0, said[-3000:]

    def fails(self, message: str, stage: str, *options: str, out: str = "model") -> None:
        status, said = self.here(stage, *options, out=out)
        assert status == 2, said[-3000:]
        assert re.search(message, said), said
        assert len(said.strip().splitlines()) == 1, said

    def paused(self, step: int, *options: str, out: str) -> subprocess.Popen[str]:
        """A run of the sequential stage that has completed a step and waits to be killed."""
        command = self.command("sequential", *options, out=out)
        return paused(step, command[command.index("train") :], cwd=self.folder, env=ENVIRONMENT)

    def checkpoints(self, out: str) -> Path:
        return self.folder / out / ".sequential-run" / "checkpoints"

    def weights(self, component: str, out: str = "model") -> dict[str, torch.Tensor]:
        return load_file(self.folder / out / Manifest.read(self.folder / out).components[component].file)

    def trained(self, out: str) -> dict[str, torch.Tensor]:
        """Final weights of the sequential stage, before they are rounded for the bundle."""
        return read_weights(self.checkpoints(out) / "step-00000008", averaged=False)

    def rows(self, stage: str, out: str = "model") -> list[dict[str, object]]:
        lines = (self.folder / out / f".{stage}-run" / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def measured(self, out: str) -> dict[object, float | None]:
        """Mean held-out loss of the sequential stage by step; None if nothing is held out."""
        rows = {row["step"]: row["held_out"] for row in self.rows("sequential", out) if "held_out" in row}
        return {step: mean_loss(held) for step, held in rows.items()}  # type: ignore[arg-type]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Check that weights of two runs match up to rounding: the RMS difference is below 1% of the learning rate.

    A single weight may differ more: if its gradient is little more than rounding error, Adam still moves it by a whole
    learning rate.
    """
    assert one.keys() == other.keys()
    apart = torch.cat([(one[name] - other[name]).flatten() for name in one])
    assert apart.square().mean().sqrt() < 0.01 * RATE


@pytest.fixture(scope="module")
def place(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place with a sequential stage trained by one process without interruption."""
    made = Place(tmp_path_factory.mktemp("launch"), train_text_model())
    made.succeed("sequential", "--init", "model", out="whole")
    return made


def test_the_chain_becomes_a_bundle_that_generates(train_text_model: Callable[..., bytes], tmp_path: Path) -> None:
    """Guards the chain from tokenizers to a clip: each stage finds what it needs and leaves what the next one needs."""
    place = Place(tmp_path, train_text_model(), base=False)
    for stage in ("image", "sequential", "interpolation", "superres"):
        place.succeed(stage, "--sample-every", "8")
        run = tmp_path / "model" / f".{stage}-run"
        assert (run / "samples" / "step-00000008.png").exists()
        assert [row["step"] for row in place.rows(stage) if "loss" in row] == list(range(1, 9))
        assert [row["step"] for row in place.rows(stage) if "held_out" in row] == [4, 8]
    model = CogVideo.from_pretrained(tmp_path / "model")
    assert {"base", "sequential", "interpolation", "superres"} <= set(model.components)
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(f"## Training: {name}" in card for name in ("base", "sequential", "interpolation", "superres"))
    options = ("--model", "model", "--output", "a.mp4", "--rounds", "1", "--seed", "3", "--clusters", "4")
    assert place.call("generate", "clip 1 moves", *options) == (0, "")
    assert (tmp_path / "a.mp4").stat().st_size > 0


def test_a_killed_run_continues_to_the_same_bits(place: Place) -> None:
    """Guards resuming: after SIGKILL, the same command gives the weights of an uninterrupted run."""
    kill(place.paused(5, "--init", "model", out="killed"))
    assert not (place.folder / "killed" / "sequential.safetensors").exists()
    status, said = place.here("sequential", "--init", "model", out="killed")
    assert status == 0, said
    assert re.search(r"^Continuing after step [24] of 8\.$", said, re.MULTILINE), said
    assert equal(place.weights("sequential", "killed"), place.weights("sequential", "whole"))
    assert [row["step"] for row in place.rows("sequential", "killed") if "loss" in row] == list(range(1, 9))
    ours, theirs = (
        [(row["step"], row["loss"]) for row in place.rows("sequential", out) if "loss" in row]
        for out in ("killed", "whole")
    )
    assert ours == theirs


def test_a_run_that_is_asked_to_stop_saves_first(place: Place) -> None:
    """Guards preemption: SIGTERM saves the steps since the last regular checkpoint. Also guards the choice of the best:
    a checkpoint records the held-out loss of its own step, never that of an earlier one."""
    options = ("--init", "model", "--checkpoint-every", "100000", "--steps", "100000", "--evaluate-every", "3")
    command = place.command("sequential", *options, out="asked")
    metrics = place.folder / "asked" / ".sequential-run" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=place.folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (metrics.exists() and place.measured("asked")):
        time.sleep(0.002)
    process.terminate()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, said
    last = max(int(row["step"]) for row in place.rows("sequential", "asked"))  # type: ignore[call-overload]
    (saved,) = place.checkpoints("asked").iterdir()
    assert saved.name == f"step-{last:08}"
    assert json.loads((saved / "state.json").read_text())["held_out"] == place.measured("asked").get(last)
    assert "run the same command to continue" in said


def test_a_second_run_in_the_folder_is_refused(place: Place) -> None:
    """Prevents two runs from overwriting each other's checkpoints: the second exits at once; the first continues, and
    saves its work on Ctrl-C."""
    options = ("--init", "model", "--steps", "100000", "--num-workers", "1")
    command = place.command("sequential", *options, out="twice")
    process = subprocess.Popen(command, cwd=place.folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(place.checkpoints("twice").glob("step-*")):
        time.sleep(0.002)
    place.fails(r"another process is writing to twice/\.sequential-run: wait", "sequential", *options, out="twice")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    steps = [row["step"] for row in place.rows("sequential", "twice") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert (place.checkpoints("twice") / f"step-{len(steps):08}").exists()


def test_a_run_continues_wherever_it_lies(place: Place) -> None:
    """Guards models that are moved during training: what a run starts from counts, not its path. Also guards the lock
    of a killed run, which is free at once although its loader processes outlive it by seconds."""
    shutil.copytree(place.folder / "model", place.folder / "home", ignore=shutil.ignore_patterns(".*"))
    process = place.paused(3, "--num-workers", "2", out="home")
    loader, *_ = _children(process.pid)
    kill(process)
    os.kill(loader, 0)  # still running
    with exclusive_lock(place.folder / "home" / ".sequential-run"):
        pass
    (place.folder / "home").rename(place.folder / "away")
    assert main(["train", "export", str(place.folder / "away/.sequential-run"), "--out", str(place.folder / "x")]) == 0
    place.succeed("sequential", out="away")
    assert equal(place.weights("sequential", "away"), place.weights("sequential", "whole"))
    written = (place.folder / "away" / "sequential.safetensors").stat().st_mtime_ns
    place.succeed("sequential", "--init", "model", out="away")
    assert (place.folder / "away" / "sequential.safetensors").stat().st_mtime_ns == written
    shutil.copytree(place.folder / "model", place.folder / "other", ignore=shutil.ignore_patterns(".*"))
    config = CogVideo.from_pretrained(place.folder / "other").config
    bundle.update(place.folder / "other", config, base=loud(Base(config.transformer), 5))
    place.fails("different components base: choose another --out", "sequential", "--init", "other", out="away")
    (place.folder / "away" / ".sequential-run" / "report.json").unlink()
    place.fails(r"another run began in .*: parents\.base was", "sequential", "--init", "other", out="away")


def test_what_is_trained_on_is_a_parent(place: Place) -> None:
    """Guards --start continue: the channel is a parent, so a channel from another bundle makes a different run."""
    options, run = ("--start", "continue", "--steps", "1"), place.folder / "on" / ".sequential-run" / "run.json"
    place.succeed("sequential", "--init", "whole", *options, out="on")
    manifest = Manifest.read(place.folder / "whole").components
    assert json.loads(run.read_text())["parents"] == {
        name: manifest[name].sha256 for name in ("base", "sequential", "text")
    }


def _children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(each) for each in text.split()]


def test_two_ranks_train_as_one(place: Place) -> None:
    """Guards splitting a batch among ranks, and resuming with a different number: two processes give the weights of
    one, with DDP from the first step, with FSDP2 from a checkpoint of one process."""
    whole, sharded = (place.folder / name / ".sequential-run" for name in ("whole", "ranks-sharded"))
    run = shutil.copytree(whole, sharded)
    (run / "report.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    (place.folder / "twice.py").write_text(TWICE)
    words = place.command("sequential", "--init", "model")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "twice.py"]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    done = subprocess.run(
        [sys.executable, *launcher, str(store.port), *words[words.index("train") :]],
        cwd=place.folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for out in ("ranks-replicated", "ranks-sharded"):
        assert_close(place.trained(out), place.trained("whole"))
        assert place.weights("base", out).keys() == place.weights("base").keys()
        assert equal(place.weights("base", out), place.weights("base"))


def test_ways_to_compute_give_the_same_weights(place: Place) -> None:
    """Guards options that must not change weights: micro-batches, checkpointing, loaders, asynchronous saving."""
    options = ("--micro-batch", "1", "--checkpointing", "--num-workers", "1", "--asynchronous")
    place.succeed("sequential", "--init", "model", *options, out="frugal")
    assert_close(place.trained("frugal"), place.trained("whole"))


def test_variants_for_comparison(place: Place) -> None:
    """Guards the ablation variants: each can be trained, and a trained base becomes the stage's own."""
    place.succeed("sequential", "--init", "model", "--base", "random", "--start", "random", out="random")
    model = CogVideo.from_pretrained(place.folder / "random")
    assert not torch.equal(model.sequential.base.words.weight, model.base.words.weight)
    assert equal(place.weights("base", "random"), place.weights("base"))
    place.succeed("interpolation", "--init", "whole", "--fixed-rate", "8", "--window", "4", out="one-rate")
    assert [row["held_out"].keys() for row in place.rows("interpolation", "one-rate") if "held_out" in row] == [
        {"8 fps"}
    ] * 2  # type: ignore[attr-defined]
    assert CogVideo.from_pretrained(place.folder / "one-rate").config.interpolation.window == 4
    place.succeed("sequential", "--init", "whole", "--start", "continue", "--precision", "bfloat16", out="more")
    assert equal(place.weights("base", "more"), place.weights("base"))


def test_a_checkpoint_becomes_a_bundle(place: Place) -> None:
    """Guards exports on demand: the last checkpoint equals what the run delivered, an earlier one does not."""
    run = str(place.folder / "whole" / ".sequential-run")
    for out, options in (("last", ()), ("best", ("--best",)), ("early", ("--step", "6"))):
        assert place.call("train", "export", run, "--out", out, *options) == (0, "")
    assert equal(place.weights("sequential", "last"), place.weights("sequential", "whole"))
    assert not equal(place.weights("sequential", "early"), place.weights("sequential", "whole"))
    assert CogVideo.from_pretrained(place.folder / "early").components == (
        CogVideo.from_pretrained(place.folder / "whole").components
    )


def test_the_average_is_exported(place: Place) -> None:
    """Checks that the bundle gets the running average rather than the last weights."""
    place.succeed("sequential", "--init", "model", "--ema", "0.9", out="average")
    assert not equal(place.weights("sequential", "average"), place.weights("sequential", "whole"))


def test_a_finished_run_is_left_alone(place: Place) -> None:
    """Prevents retraining or replacing a stage by mistake."""
    before = (place.folder / "whole" / "sequential.safetensors").stat().st_mtime_ns
    place.succeed("sequential", "--init", "model", out="whole")
    assert (place.folder / "whole" / "sequential.safetensors").stat().st_mtime_ns == before
    message = r"another run ended in .*: optimization.steps was 8 and is 9; pass --overwrite"
    place.fails(message, "sequential", "--init", "model", "--steps", "9", out="whole")
    copy = place.folder / "copy"
    shutil.copytree(place.folder / "whole", copy, ignore=shutil.ignore_patterns(".*"))
    place.fails("already has sequential: pass --overwrite to replace it, or another --out", "sequential", out="copy")
    place.succeed("sequential", "--overwrite", "--steps", "2", out="copy")


def test_what_the_messages_advise_works(place: Place) -> None:
    """Checks that the advice in messages works after a finished run: --overwrite starts a new one and keeps the old
    folder; other windows need another bundle; an unfinished run is never replaced."""
    whole, runs = place.folder / "whole", lambda: sorted(each.name for each in (place.folder / "next").glob(".*-run*"))
    shutil.copytree(whole, place.folder / "next")
    options = ("--start", "continue", "--steps", "2", "--checkpoint-every", "1")
    place.fails("another run ended .* pass --overwrite", "sequential", *options, out="next")
    place.fails("a different configuration .* --out, and pass --init next", "sequential", "--window", "4", out="next")
    place.succeed("sequential", *options, "--overwrite", out="next")
    assert runs() == [".sequential-run", ".sequential-run-1"]
    assert not equal(place.weights("sequential", "next"), place.weights("sequential", "whole"))
    written = (place.folder / "next" / "bundle.json").stat().st_mtime_ns
    place.succeed("sequential", *options, "--overwrite", out="next")
    assert (place.folder / "next" / "bundle.json").stat().st_mtime_ns == written, "the same run is over"
    (place.folder / "next" / ".sequential-run" / "report.json").unlink()
    place.fails("another run began in .*: choice.start", "sequential", "--overwrite", out="next")
    assert runs() == [".sequential-run", ".sequential-run-1"]
    place.succeed("sequential", "--init", "next", "--window", "4", "--steps", "2", out="windows")


def test_a_run_that_ended_is_delivered_again(place: Place) -> None:
    """A bundle that was partly or completely removed must be exported again if the run's folder remains."""
    shutil.copytree(place.folder / "whole", place.folder / "again")
    for names in (["sequential.safetensors"], ["bundle.json", "base.safetensors", "sequential.safetensors"]):
        for name in names:
            (place.folder / "again" / name).unlink()
        place.succeed("sequential", "--init", "model", out="again")
        assert equal(place.weights("sequential", "again"), place.weights("sequential", "whole"))
        assert CogVideo.from_pretrained(place.folder / "again").sha256("base")
    assert [row["step"] for row in place.rows("sequential", "again") if "loss" in row] == list(range(1, 9))


def test_divergence_keeps_the_last_good_checkpoint(place: Place) -> None:
    """Guards long runs: a loss that is not finite ends the run, the error names the step, and no checkpoint has it."""
    options = ("--init", "model", "--learning-rate", "1e30", "--clip", "1e30", "--warmup", "0")
    for steps in (("--steps", "1"), ("--checkpoint-every", "1")):
        status, said = place.here("sequential", *options, *steps, out=f"update{steps[0]}")
        assert status == 2, said
        assert re.search(r"training diverged: (a weight|the loss) is nan after step 1;", said)
        assert not list(place.checkpoints(f"update{steps[0]}").glob("step-*"))
        assert not (place.folder / f"update{steps[0]}" / "sequential.safetensors").exists()
    status, said = place.here("sequential", *options, out="explodes")
    assert status == 2, said
    assert re.search(r"training diverged: the (loss|norm of the gradient) is \w+ at step \d+", said)
    step = int(re.search(r"at step (\d+)", said)[1])  # type: ignore[index]
    folder = place.folder / "explodes" / ".sequential-run" / "checkpoints"
    assert all(int(each.name[5:]) < step for each in folder.glob("step-*"))


def test_a_run_goes_on_from_the_newest_whole_checkpoint(place: Place) -> None:
    """Guards runs with disk faults: a damaged checkpoint is reported and set aside, and the weights stay the same."""
    run = place.folder / "failing" / ".sequential-run"
    shutil.copytree(place.folder / "whole" / ".sequential-run", run)
    (run / "report.json").unlink()
    (run / "checkpoints" / "step-00000008" / "__0_0.distcp").write_bytes(b"no tensors")
    status, said = place.here("sequential", "--init", "model", out="failing")
    assert status == 0, said
    told = r"step-00000008 is damaged \(its content is cut short or was changed\): an earlier one is used.\n"
    assert re.search(told, said)
    assert equal(place.weights("sequential", "failing"), place.weights("sequential", "whole"))
    assert sorted(each.name for each in (run / "checkpoints").iterdir())[0] == "damaged-step-00000008"
    for each in (run / "checkpoints").glob("step-*/.metadata"):
        each.unlink()
    (run / "report.json").unlink()
    status, said = place.here("sequential", "--init", "model", out="failing")
    assert status == 2, said
    assert re.search(r"error: .*step-\d+ is damaged \(No such file or directory\); remove it", said)


def test_divergence_publishes_the_checkpoint_that_is_being_written(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards asynchronous checkpoints: one that is still being written when the run diverges must not be lost."""
    figures = Trainer.figures

    def diverging(trainer: Trainer, done: int) -> StepMetrics:
        require(done < 4, "training diverged: the loss is nan")
        return figures(trainer, done)

    monkeypatch.setattr(Trainer, "figures", diverging)
    monkeypatch.setattr(Checkpoints, "settle", lambda checkpoints: None)  # a disk slower than two steps
    monkeypatch.chdir(place.folder)
    command = place.command("sequential", "--init", "model", "--asynchronous", out="unsettled")
    assert main(command[command.index("train") :]) == 2
    assert "training diverged" in capsys.readouterr().err
    checkpoints = Checkpoints(place.folder / "unsettled" / ".sequential-run" / "checkpoints", keep=0)
    assert checkpoints.steps() == [2]


LIMITED = """
import resource, sys
from pathlib import Path

import torch

from cogvideo.cli import main

size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()  # builds for CUDA: several GB
resource.setrlimit(resource.RLIMIT_AS, (size + 800_000_000,) * 2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_out_of_memory_says_what_helps(place: Place) -> None:
    """Guards the most common failure: one line gives the expected memory and options that help; the run is kept."""
    command = place.command("sequential", "--init", "model", "--batch", "3000", "--micro-batch", "1500", out="large")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *command[command.index("train") :]],
        cwd=place.folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]  # earlier lines: there are fewer clips than a batch
    assert re.search(
        r"out of memory with 1500 samples per pass; `cogvideo info` expects [\d.]+ GiB with --precision bfloat16, and "
        r"[\d.]+ GiB with --checkpointing too\. What helps: a smaller --micro-batch, --checkpointing",
        line,
    ), line
    assert (place.folder / "large" / ".sequential-run" / "run.json").exists()


def test_mistakes_are_one_line(place: Place, train_text_model: Callable[..., bytes], tmp_path: Path) -> None:
    """Checks the one-line errors for training on the wrong thing."""
    other = Place(tmp_path, train_text_model())
    torch.manual_seed(5)
    for number, (message, stage, options) in enumerate(
        [
            ("there is no folder .*nowhere", "sequential", ("--init", "nowhere")),
            ("there is no folder .*nothing", "sequential", ("--data", "nothing")),
            ("has no sequential", "interpolation", ()),
            ("no clip is long enough for the mode sequential", "sequential", ("--data", str(tmp_path / "short"))),
            ("codes of another image tokenizer", "sequential", ("--data", str(tmp_path / "foreign"))),
            ("is not divisible by the sequential window", "sequential", ("--window", "6")),
            ("no codes of super-resolution", "superres", ("--data", str(tmp_path / "low"))),
            (
                "held_out_split is 'validaton', expected one that the data has: train, validation",
                "sequential",
                ("--held-out-split", "validaton"),
            ),
            ("--prompts has no effect on superres", "superres", ("--prompts", "a ball")),
            ("tensor_parallel is 2 for 1 ranks", "sequential", ("--tensor-parallel", "2")),
            ("cannot use the device 'cuda:7'|cannot use the device", "sequential", ("--device", "cuda:7")),
        ]
    ):
        if number == 0:
            make_data(tmp_path / "short", tmp_path / "model", num_frames=4)
            make_data(tmp_path / "low", tmp_path / "model", high=False)
            make_bundle(tmp_path / "stranger", train_text_model())
            foreign = make_data(tmp_path / "foreign", tmp_path / "model")
            _disguise(foreign)
        other.fails(message, stage, "--init", "model", *options, out=f"out-{number}")


def test_adapters_are_trained_next_to_the_weights(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `train STAGE --lora`: weights stay unchanged, key frames train on the adapted base, and a stopped run
    resumes to the same bits."""
    shutil.copytree(place.folder / "whole", place.folder / "adapted", ignore=shutil.ignore_patterns(".*"))
    figures, names = Trainer.figures, ("base", "sequential")
    before = {name: Manifest.read(place.folder / "adapted").components[name].sha256 for name in names}

    def stopping(trainer: Trainer, done: int) -> StepMetrics:
        require(done != 5, "stopped")
        return figures(trainer, done)

    for name in ("lora", "again"):
        given = ("--lora", "2", "--adapter", name, "--init", "adapted")
        place.succeed("image", *given, "--sample-every", "8", out="adapted")
        if name == "again":
            monkeypatch.setattr(Trainer, "figures", stopping)
            status, said = place.here("sequential", *given, out="adapted")
            assert (status, said.endswith("error: stopped\n")) == (2, True)
            monkeypatch.undo()
        place.succeed("sequential", *given, out="adapted")
    assert {name: Manifest.read(place.folder / "adapted").components[name].sha256 for name in names} == before
    lora, again = (place.folder / "adapted" / "adapters" / name for name in ("lora", "again"))
    assert (lora / ".image-run" / "samples" / "step-00000008.png").exists()
    for name in names:
        assert (lora / name / WEIGHTS).read_bytes() == (again / name / WEIGHTS).read_bytes()
        assert max(float(each.abs().max()) for key, each in load_file(lora / name / WEIGHTS).items() if "_B" in key) > 0
    started = json.loads((lora / ".sequential-run" / "run.json").read_text())["parents"]
    assert started["base"] == before["base"]
    assert started["adapter of base"] == hashlib.sha256((lora / "base" / WEIGHTS).read_bytes()).hexdigest()
    given = ("--lora", "2", "--adapter", "lora")
    assert "This run is finished" in place.here("sequential", *given, "--init", "adapted", out="adapted")[1]
    place.fails("lora is 99, expected a rank of 1 to 32", "image", "--lora", "99", out="adapted")
    place.fails("lora is 0, expected a rank of 1 to 32", "sequential", "--lora", "0", out="adapted")
    place.fails("got --lora with --base or --window", "sequential", "--lora", "2", "--window", "2", out="adapted")
    place.fails("adapter is '../x', expected letters", "image", "--lora", "2", "--adapter", "../x", out="adapted")
    place.fails(
        "sequential, adapters/again, adapters/lora in .* rely on its base", "image", "--overwrite", out="adapted"
    )


def test_channels_of_one_base(place: Place) -> None:
    """Guards `train STAGE --channel`: a bundle holds several video channels on one base, which is stored once;
    replacing that base is detected."""
    model, storm = place.folder / "many", place.folder / "many" / "channels" / "storm"
    shutil.copytree(place.folder / "whole", model, ignore=shutil.ignore_patterns(".*"))
    for stage in ("sequential", "interpolation"):
        place.succeed(stage, "--channel", "storm", "--seed", "1", out="many")
    assert sorted(each.name for each in storm.glob("*.safetensors")) == [
        "interpolation.safetensors",
        "sequential-2.safetensors",
    ]
    own, other = CogVideo.from_pretrained(model), CogVideo.from_pretrained(model, channel="storm")
    assert set(other.components) == {*own.components, "interpolation"}
    for name in ("base", "text", "image_tokenizer"):
        assert other.sha256(name) == own.sha256(name)
    assert other.sha256("sequential") != own.sha256("sequential")
    started = json.loads((storm / ".interpolation-run" / "run.json").read_text())["parents"]
    assert started["sequential"] == other.sha256("sequential")
    assert "This run is finished" in place.here("interpolation", "--channel", "storm", "--seed", "1", out="many")[1]
    shutil.rmtree(storm / ".sequential-run")
    place.fails("storm already has sequential: pass --overwrite", "sequential", "--channel", "storm", out="many")
    place.fails("sequential, channels/storm in the bundle many rely", "image", "--overwrite", out="many")
    clip = ("clip 1 moves", "--model", "many", "--rounds", "1", "--seed", "3", "--output", "storm.mp4")
    assert place.call("generate", *clip, "--channel", "storm")[0] == 0
    status, said = place.call("generate", *clip, "--channel", "rain")
    assert (status, "there is no channel 'rain': many has storm" in said) == (2, True)
    other.save_pretrained(place.folder / "alone")
    assert CogVideo.from_pretrained(place.folder / "alone").fingerprint == other.fingerprint
    bundle.update(model, own.config, base=loud(Base(own.config.transformer), 7))
    status, said = place.call("generate", *clip, "--channel", "storm")
    assert (status, "storm was trained on a base that" in said) == (2, True)


def test_data_that_holds_nothing_out(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards small datasets: without the default validation split, the run prints a notice and trains anyway."""
    make_data(place.folder / "all", place.folder / "model", held_out=0)
    options = ("--init", "model", "--data", "all", "--steps", "2", "--batch", "99")
    status, told = place.here("sequential", *options, out="unjudged")
    assert status == 0, told
    said = "Nothing is held out: no clip of the split validation is there and long enough."
    assert told.splitlines().count(said) == 1
    assert re.search(r"^A batch of 99 is larger than the \d\d? clips: it repeats them\.$", told, re.MULTILINE)
    assert "held out: nothing" in capsys.readouterr().out
    assert place.measured("unjudged") == {2: None}


def _disguise(data: Path) -> None:
    """Rewrite the shards as if another tokenizer had encoded them."""
    from cogvideo.data.dataset import Dataset, make_card, write_card
    from cogvideo.data.shards import digest, write_shard

    dataset = Dataset(data)
    rows, shard = [dataset.row(number) for number in range(len(dataset))], dataset.card.shards[0].file
    from dataclasses import replace

    info = replace(dataset.shard(0).info, tokenizer_sha256="0" * 64, settings_sha256=digest({}))
    write_shard(data / shard, rows, info)
    write_card(data, make_card(data, [shard], source="", tokenizer="elsewhere", settings={}))
