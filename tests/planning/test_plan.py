"""`cogvideo plan` compared with real ranks, `cogvideo info` and hand calculations."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import parse_args

from cogvideo import cli
from cogvideo.commands import plan
from cogvideo.commands import train as commands
from cogvideo.config import AutoencoderConfig, CogVideoConfig, StageConfig, UpscalerConfig, preset
from cogvideo.planning.costs import STAGES, Stage, layout_of
from cogvideo.planning.plan import BY_COLUMNS, BY_ROWS, Cluster, StagePlan, Strategy, held, stage_plan
from cogvideo.planning.training import training, training_states
from cogvideo.training import parallel
from cogvideo.training.session import Options
from parallel_worker import CODES, SETTINGS, TEXT, make_sizes, run_ranks

GIB, DAY = 2**30, 86_400
SIZES, LAYOUT = make_sizes()
SMALL = CogVideoConfig(
    SIZES,
    LAYOUT,
    StageConfig(2),
    StageConfig(2),
    UpscalerConfig(text_slots=TEXT, low_position=TEXT),
    replace(AutoencoderConfig(), num_codes=CODES),
)
PAPER, TINY = preset("cogvideo"), preset("tiny")


def memory_for(config: CogVideoConfig, stage: Stage, **options: Any) -> float:
    """GiB in which a stage just fits without a reserve, with the strategy that needs the least."""
    strategies = stage_plan(config, stage, Cluster(gpu_memory=1e-9, reserve=0, **options)).strategies
    return min(strategy.needs for strategy in strategies) / GIB


# Memory per rank


def test_bytes_are_those_of_real_ranks(tmp_path: Path) -> None:
    """Catches shards without their padding, a missing optimizer state or average, and 2 bytes counted for 4."""
    run_ranks(("weigh", tmp_path), world_size=3)
    real = [torch.load(tmp_path / f"weigh-{rank}.pt", weights_only=True) for rank in range(3)]
    found = held(SMALL, "sequential", "sharded", groups=3, tensor=1, ema=SETTINGS.ema)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(found, name) == real[0][name] == max(each[name] for each in real)
    padded = [-(-rows // 3) * 3 * (other[0] if other else 1) for _, (rows, *other) in real[0]["kept"]]
    assert {kind for kind, _ in real[0]["kept"]} == {torch.float32}
    assert found.accumulated == 4 * sum(padded)
    (root, root_trained), *blocks = real[0]["units"]
    layer, layer_trained = (sum(sizes) // SIZES.num_layers for sizes in zip(*blocks, strict=True))
    assert found.gathered == max(2 * (root + 2 * layer) + 4 * max(root_trained, layer_trained), 2 * 2 * root)


@pytest.mark.parametrize("stage", STAGES)
def test_one_gpu_is_what_info_says(stage: Stage) -> None:
    """Keeps `plan` and `info` consistent, to the byte: for a single GPU, and for a shard that is the whole model."""
    states = training_states(PAPER if stage == "sequential" else TINY, stage)
    config = PAPER if stage == "sequential" else TINY
    for found in (held(config, stage, "replicated", 9, 1), held(config, stage, "sharded", 1, 1)):
        assert found.weights == found.start == states["frozen weights"] + states["master weights"]
        assert (found.gradients, found.optimizer) == (states["gradients"], states["moments"])
    whole = held(config, stage, "replicated", 1, 1)
    assert whole.gathered == states["working copy"]
    assert sum(whole[:4]) == sum(states.values())
    if config is PAPER:
        assert round(sum(whole[:4]) / GIB, 1) == 41.5


def test_many_gpus_hold_their_share() -> None:
    """Guards the paper's 13 x 8 GPUs: each holds about 1% of one GPU's states, with at most 1% of padding."""
    one, many = (held(PAPER, "sequential", "sharded", groups, 1) for groups in (1, 104))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(one, name) <= 104 * getattr(many, name) <= 1.01 * getattr(one, name)
    assert many.start == one.start


def test_tensor_parallel_ranks_share_the_products_of_blocks() -> None:
    """Catches weights counted as split that every rank holds whole: embeddings, norms, gates, biases after a sum."""
    hidden, layers, codes = SIZES.hidden, SIZES.num_layers, SIZES.vocab_size + SIZES.num_positions
    qkv, out, mlp = 3 * hidden**2, hidden**2, 8 * hidden**2
    frozen_vectors = layers * (4 * 2 * hidden + 3 * hidden // 2 + hidden + 4 * hidden // 2 + hidden) + 2 * hidden
    frozen_matrices = layers * (qkv + out + mlp) // 2 + codes * hidden
    added = layers * ((qkv + out) // 2 + 3 * hidden // 2 + hidden + hidden) + 5 * 16 * hidden
    found = held(SMALL, "sequential", "replicated", groups=1, tensor=2)
    assert found.weights == 4 * (frozen_vectors + added) + 2 * frozen_matrices
    assert (found.gradients, found.optimizer, found.gathered) == (4 * added, 8 * added, 2 * added)


# Strategies


def test_as_many_samples_as_fit() -> None:
    """Guards the micro-batch: it fits if the plan says so, and one more sample would not."""
    needs = [memory_for(SMALL, "sequential", gpus=gpus) for gpus in (4, 8)]
    for memory in (each * factor for each in needs for factor in (1, 1.5, 2, 4)):
        machines = Cluster(gpus=8, gpu_memory=memory, reserve=0)
        for strategy in stage_plan(SMALL, "sequential", machines).strategies:
            assert strategy.fits == (strategy.needs <= memory * GIB)
            assert strategy.needs == max(strategy.peaks.values())
            assert strategy.peaks["in a pass"] == sum(strategy.memory.values())
            assert strategy.passes == -(-52 // strategy.micro_batch)
            if strategy.fits and strategy.micro_batch < 52:
                assert _needs_with(strategy, strategy.micro_batch + 1) > memory * GIB


def _needs_with(strategy: Strategy, samples: int) -> int:
    """Bytes for the same strategy with another micro-batch, for the small sequential stage on 8 GPUs."""
    rank = held(SMALL, "sequential", strategy.sharding, 8, 1)
    step = training(SMALL, "sequential", samples, autocast=True)
    activations = step.activations_checkpointed if strategy.checkpointing else step.activations
    kept = rank.accumulated if samples < 52 else 0
    return rank.weights + rank.gradients + rank.optimizer + rank.gathered + activations + kept


@pytest.mark.parametrize("stage", STAGES)
def test_activations_grow_evenly_with_the_samples(stage: Stage) -> None:
    """Guards activation memory, which grows linearly with the number of samples."""
    steps = [training(TINY, stage, samples, autocast=True) for samples in (1, 2, 7)]
    for name in ("activations", "activations_checkpointed"):
        one, two, seven = (getattr(each, name) for each in steps)
        assert one + 6 * (two - one) == pytest.approx(seven, rel=0.04)  # masks are stored once


def test_autocast_has_wide_norms() -> None:
    """Guards what GPUs add to `info`'s figures: inputs of blocks, and each block's four norms, take four bytes."""
    narrow, wide = (training(PAPER, "sequential", 1, autocast=autocast) for autocast in (False, True))
    values = layout_of(PAPER, "sequential").length * PAPER.transformer.hidden
    assert wide.activations_checkpointed - narrow.activations_checkpointed == pytest.approx(47 * 2 * values, rel=0.15)
    assert wide.activations - narrow.activations == pytest.approx(48 * 4 * 2 * values, rel=0.15)
    assert wide.states == narrow.states


def test_what_is_chosen() -> None:
    """Guards the choice: whole models if they fit, else the fewest passes, since each gathers all weights."""
    least = memory_for(SMALL, "sequential", gpus=8)
    seen = []
    for factor in (100, 1.02, 0.98):
        found = stage_plan(SMALL, "sequential", Cluster(gpus=8, gpu_memory=least * factor, reserve=0))
        seen.append(None if found.best is None else (found.best.sharding, found.best.checkpointing))
        if found.best is not None and found.best.sharding == "sharded":
            others = [strategy for strategy in found.strategies if strategy.fits and strategy.sharding == "sharded"]
            assert found.best.passes == min(strategy.passes for strategy in others)
    assert seen[0] == ("replicated", False)
    assert seen[2] is None


@pytest.mark.parametrize(
    ("gpus", "tensor", "expected"),
    [(1, 1, ["replicated"]), (2, 2, ["replicated"]), (4, 2, ["sharded"]), (4, 1, ["replicated", "sharded"])],
)
def test_strategies_are_those_that_training_accepts(gpus: int, tensor: int, expected: list[str]) -> None:
    """Prevents a command that `cogvideo train` refuses."""
    found = stage_plan(SMALL, "sequential", Cluster(gpus=gpus, gpu_memory=1, tensor_parallel=tensor))
    assert [strategy.sharding for strategy in found.strategies] == [name for name in expected for _ in range(2)]
    assert [strategy.checkpointing for strategy in found.strategies] == [False, True] * len(expected)


# Time


def test_days_of_the_authors() -> None:
    """Checks speed and days by hand: 104 A100s at 5% process 478 positions per second each, and take 16.5 days."""
    machines = Cluster(gpus=104, gpu_memory=40, tflops=312, utilization=0.05)
    matrices = 48 * 12 * 3072**2 * 4 + 48 * 4 * 3072**2 * 6 + 20_000 * 3072 * 4
    days = []
    for stage, steps, batch in (("sequential", 76_000, 416), ("interpolation", 15_000, 160)):
        found = stage_plan(PAPER, stage, machines)
        assert found.flops_per_position == matrices
        assert found.tokens_per_second == pytest.approx(104 * 312e12 * 0.05 / matrices)
        assert found.days == pytest.approx(steps * batch * 2064 * matrices / (104 * 312e12 * 0.05) / DAY)
        days.append(found.days)
    assert found.tokens_per_second / 104 == pytest.approx(478, rel=0.02)
    assert sum(days) == pytest.approx(16.5, rel=0.02)


def test_no_schedule_for_the_image_model() -> None:
    """Prevents an estimate in days when the paper has no schedule."""
    found = stage_plan(SMALL, "image", Cluster(gpus=2, gpu_memory=1))
    assert found.days is None
    assert found.steps is None
    assert found.command is not None
    assert "--steps" not in found.command


@pytest.mark.parametrize(("gpus", "batch"), [(64, 384), (104, 416), (1000, 1000), (32, 416)])
def test_batches_that_ranks_can_share(gpus: int, batch: int) -> None:
    """Prevents a batch that the loader refuses, and a schedule with too few or too many samples."""
    found = stage_plan(SMALL, "sequential", Cluster(gpus=gpus, gpu_memory=1))
    assert found.batch == batch
    assert found.batch % gpus == 0
    assert found.steps is not None
    assert 0 <= found.steps * found.batch - 76_000 * 416 < found.batch


# The command


def chosen(found: StagePlan) -> Strategy:
    """The strategy that the command is to run."""
    assert found.best is not None
    return found.best


@pytest.mark.parametrize(
    ("machines", "launcher"),
    [
        (Cluster(1, 80), []),
        (Cluster(8, 1), ["torchrun", "--nproc-per-node", "8", "-m", "--"]),
        (
            Cluster(20, 1e-3, tensor_parallel=2),
            shlex.split("torchrun --nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --nproc-per-node 5 -m --"),
        ),
    ],
)
def test_the_command_runs_what_was_planned(
    machines: Cluster, launcher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches options that do not exist, or that run a strategy other than the planned one."""
    started: list[tuple[str, Options]] = []
    monkeypatch.setattr(commands, "train", lambda stage, choice, options, *_: started.append((stage, options)))
    for found in (stage_plan(SMALL, stage, machines, ema=0.5) for stage in STAGES):
        strategy, words = chosen(found), shlex.split(str(found.command))
        assert words[: len(launcher) + 1] == [*launcher, "cogvideo"]
        assert cli.main(words[len(launcher) + 1 :]) == 0
        stage, options = started.pop()
        assert stage == found.stage
        assert options.parallel == parallel.ParallelSettings(strategy.sharding, machines.tensor_parallel)
        assert options.execution.checkpointing == strategy.checkpointing
        assert options.execution.micro_batch == strategy.micro_batch
        settings = options.optimization
        assert (settings.batch, settings.ema, settings.precision) == (found.batch, 0.5, "bfloat16")
        assert found.steps in (None, settings.steps)


def test_torchrun_takes_no_option_of_ours() -> None:
    """Guards options such as `--start`, which torchrun finds ambiguous unless `--` ends its own."""
    launcher, _, command = str(stage_plan(SMALL, "sequential", Cluster(8, 1)).command).partition(" cogvideo ")
    ours = [*shlex.split(command), "--start", "continue", "--no-checkpointing", "--log", "1", "--run", "2"]
    given = parse_args([*shlex.split(launcher)[1:], "cogvideo", *ours])
    assert given.training_script_args == ours
    assert (given.training_script, given.module, given.nproc_per_node) == ("cogvideo", True, "8")


def test_in_a_process() -> None:
    """Guards the printed plan: every stage with its speed and command, no PyTorch warning, nothing cut off."""
    command = [sys.executable, "-m", "cogvideo", "plan", "tiny", "--gpus", "4", "--gpu-memory", "16"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for stage in STAGES:
        assert f"train {stage} --data DATA --out MODEL" in done.stdout
    for words in (
        "gathered",
        "activations",
        "chosen",
        "tokens/s",
        "the paper's 76,000 steps",
        "Assumed: a peak of 989 TFLOP/s",
    ):
        assert words in done.stdout
    assert "…" not in done.stdout


def test_nothing_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that insufficient memory is not an error: the plan gives the minimum needed and what would help."""
    monkeypatch.setattr(plan, "STAGES", ("sequential",))
    plan.plan("tiny", machines=Cluster(2, 1e-4))
    printed = capsys.readouterr().out
    least = memory_for(TINY, "sequential", gpus=2)
    assert f"Nothing fits: sharded with --checkpointing takes the least, {least:#.3g} of 9.00e-05 GiB." in printed
    assert "What helps: more or larger GPUs" in printed
    assert "train sequential" not in printed
    assert "tokens/s" not in printed
    assert "days" not in printed
    assert printed.endswith("Super-resolution is not planned.\n")


def test_a_gpu_must_hold_the_model_once() -> None:
    """Guards many small GPUs: a rank loads all weights before sharding them, so more GPUs do not help."""
    strategies = stage_plan(PAPER, "sequential", Cluster(512, 16)).strategies
    assert not any(strategy.fits for strategy in strategies)
    assert min(strategy.needs for strategy in strategies) == held(PAPER, "sequential", "sharded", 1, 1).weights
    assert min(strategy.peaks["in a pass"] for strategy in strategies) < 16 * 0.9 * GIB


def test_json_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the JSON for programs."""
    machines = Cluster(4, 16, utilization=0.3)
    plan.plan("tiny", machines=machines, json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["machines"]["utilization"] == 0.3
    expected = [stage_plan(TINY, stage, machines) for stage in STAGES]
    assert [each["days"] for each in printed["stages"]] == [each.days for each in expected]
    assert [each["memory"] for each in printed["stages"][1]["strategies"]] == [
        strategy.memory for strategy in expected[1].strategies
    ]


def test_shown_output_is_real(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the memory and the days shown in docs/training.md up to date."""
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    session = page.split("$ cogvideo plan cogvideo --gpus 64 --gpu-memory 80\n")[1].split("```")[0]
    lines = [line.strip() for line in session.splitlines() if line.strip() not in ("", "...")]
    assert len(lines) > 15
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(plan, "STAGES", ("sequential",))
    plan.plan(machines=Cluster(64, 80))
    real = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert [line for line in lines if line not in real] == []


def test_widths_that_ranks_cannot_share() -> None:
    """Prevents a plan that `cogvideo train` refuses: both split the same layers, and uneven widths are an error."""
    assert {*BY_ROWS, *BY_COLUMNS} == parallel.SHARED_PRODUCTS.keys()
    with pytest.raises(ValueError, match="tensor_parallel is 3, expected a divisor of the width"):
        stage_plan(SMALL, "sequential", Cluster(3, 1, tensor_parallel=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "gpus is 0, expected a positive number"),
        ({"gpu_memory": 0.0}, r"gpu_memory is 0\.0, expected a positive number"),
        ({"gpu_memory": float("nan")}, "gpu_memory is nan"),
        ({"gpus_per_machine": 0}, "gpus_per_machine is 0"),
        ({"tensor_parallel": 3}, "tensor_parallel is 3 for 8 GPUs, expected a divisor"),
        ({"reserve": 1.0}, r"reserve is 1\.0, expected a share"),
        ({"utilization": 40.0}, r"utilization is 40\.0, expected a share"),
        ({"tflops": -1.0}, r"tflops is -1\.0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    """Prevents a plan for machines that cannot exist."""
    with pytest.raises(ValueError, match=message):
        Cluster(**{"gpus": 8, "gpu_memory": 80.0} | options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pokcet --gpus 8", r"got 'pokcet', expected a preset \(tiny, pocket, small, cogvideo\)"),
        ("tiny --gpus 0", "gpus is 0, expected a positive number"),
    ],
)
def test_refusals_of_the_command(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the exit status of mistakes, and their one-line errors."""
    assert cli.main(["plan", *arguments.split(), "--gpu-memory", "80"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(rf"cogvideo: error: .*{message}.*\n", told.err)
