"""A training step against plain autograd: same metrics and weights however a batch is cut; frozen weights stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo.bundle.model import CogVideo
from cogvideo.data.clips import ClipSampling, FrameRates
from cogvideo.data.loader import ClipStream
from cogvideo.training.optim import StageOptimization, adamw, trained
from cogvideo.training.stages import StageName
from cogvideo.training.step import Execution, Trainer, cut
from gallery import make_model, make_trainer
from workshop import make_data

BATCH = 5
SETTINGS = StageOptimization(steps=4, batch=BATCH, learning_rate=1e-2, warmup=2, clip=0.5, weight_decay=0.1)
STAGES: tuple[StageName, ...] = ("image", "sequential", "interpolation", "superres")


@pytest.fixture(scope="module")
def place(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    make_model(folder / "model", train_text_model())
    make_data(folder / "data", folder / "model")
    return folder


@pytest.fixture(scope="module")
def source(place: Path) -> CogVideo:
    return CogVideo.from_pretrained(place / "model")


def batch_of(trainer: Trainer, stage: StageName, place: Path, step: int = 0) -> Any:
    """The collated batch of a step."""
    mode = "image" if stage in ("image", "superres") else stage
    sampling = ClipSampling(mode, FrameRates(), None, True, 0.2, stage == "superres")  # type: ignore[arg-type]
    stream = ClipStream([place / "data"], "train", sampling)
    return trainer.objective.task.collate([stream[BATCH * step + each] for each in range(BATCH)])


class Plain:
    """Reference training in a few lines, with the whole batch at once."""

    def __init__(self, trainer: Trainer) -> None:
        self.objective = trainer.objective
        self.trained = [each for each in self.objective.parameters() if each.requires_grad]
        vectors = [each for each in self.trained if each.ndim == 1]
        matrices = [each for each in self.trained if each.ndim > 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def step(self, number: int, batch: Any) -> tuple[float, float, Tensor]:
        """Run a step; returns the loss, the gradient norm, and the loss parts of each sample."""
        loss, parts = self.objective(batch)
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 0.5)
        for group in self.optimizer.param_groups:
            group["lr"] = SETTINGS.rate_at(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach().mean()), float(norm), parts


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3, 99])
def test_pieces_add_up_to_the_batch(stage: StageName, micro_batch: int, place: Path, source: CogVideo) -> None:
    """Guards gradient accumulation, even with uneven micro-batches: weights and metrics match the whole batch."""
    trainer = make_trainer(stage, source, SETTINGS, Execution(micro_batch), wide=True)
    plain = Plain(make_trainer(stage, source, SETTINGS, wide=True))
    rows = []
    for step in range(3):
        batch = batch_of(trainer, stage, place, step)
        trainer.step(step, batch)
        rows.append(plain.step(step, batch))
    for (name, mine), theirs in zip(trainer.objective.named_parameters(), plain.objective.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=name)
    figures = trainer.figures(3)
    assert figures.loss == pytest.approx(sum(row[0] for row in rows) / 3, rel=1e-5)
    assert figures.gradient_norm == pytest.approx(sum(row[1] for row in rows) / 3, rel=1e-5)
    assert max(row[1] for row in rows) > 0.5, "nothing was clipped"
    parts = torch.cat([row[2] for row in rows])
    means = {name: float(column.nanmean()) for name, column in zip(trainer.objective.task.parts, parts.T, strict=True)}
    expected = {name: mean for name, mean in means.items() if not math.isnan(mean)}
    assert figures.parts == pytest.approx(expected, rel=1e-5)


def test_figures_are_of_the_steps_since_the_last_ones(place: Path, source: CogVideo) -> None:
    """Prevents a line of metrics from including steps that the previous line covered."""
    trainer = make_trainer("sequential", source, SETTINGS)
    plain = Plain(make_trainer("sequential", source, SETTINGS))
    losses, found = [], []
    for step in range(3):
        batch = batch_of(trainer, "sequential", place, step)
        trainer.step(step, batch)
        losses.append(plain.step(step, batch)[0])
        if step > 0:
            found.append(trainer.figures(step + 1).loss)
    assert found == pytest.approx([(losses[0] + losses[1]) / 2, losses[2]], rel=1e-4)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("none", ""),
        ("weights", "training diverged: a weight is nan after step 1;"),
        ("average", "training diverged: a weight is nan after step 1;"),
        ("update", "training diverged: the loss is nan after step 1; the last checkpoint is from before"),
    ],
)
def test_weights_that_an_update_broke_are_refused(broken: str, message: str, place: Path, source: CogVideo) -> None:
    """Keeps broken weights out of checkpoints and bundles: a step's loss is computed before its update."""
    rate = 1e30 if broken == "update" else 1e-3
    trainer = make_trainer("sequential", source, StageOptimization(batch=BATCH, learning_rate=rate, warmup=0, ema=0.5))
    batch = batch_of(trainer, "sequential", place)
    trainer.step(0, batch)
    assert math.isfinite(trainer.figures(1).loss)
    assert trainer.average is not None
    values = {"weights": trained(trainer.objective), "average": trainer.average.state.values()}.get(broken, [])
    with torch.no_grad():
        for each in values:
            each.view(-1)[0] = math.inf
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        trainer.check(1, batch)


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_activations_change_nothing(stage: StageName, place: Path, source: CogVideo) -> None:
    """Activation checkpointing must not change the weights, for any kind of block."""
    plain, frugal = (
        make_trainer(stage, source, SETTINGS, Execution(2, checkpointing), wide=True) for checkpointing in (False, True)
    )
    for step in range(2):
        for trainer in (plain, frugal):
            trainer.step(step, batch_of(trainer, stage, place, step))
    for mine, theirs in zip(frugal.objective.parameters(), plain.objective.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stage", ["sequential", "interpolation", "superres"])
def test_the_frozen_base_costs_nothing(stage: StageName, place: Path, source: CogVideo) -> None:
    """Guards the cost of a frozen base: no gradient, optimizer state or running average, and unchanged bits."""
    trainer = make_trainer(stage, source, StageOptimization(batch=BATCH, learning_rate=1e-2, ema=0.9))
    before = {name: each.detach().clone() for name, each in trainer.objective.named_parameters()}
    for step in range(2):
        trainer.step(step, batch_of(trainer, stage, place, step))
    assert trainer.average is not None
    for name, each in trainer.objective.named_parameters():
        frozen = name.startswith("model.base.")
        assert each.requires_grad != frozen
        assert frozen == (each not in trainer.optimizers[0].state)
        assert frozen == (name not in trainer.average.state)
        if frozen:
            assert each.grad is None
            assert torch.equal(each, before[name])
        else:
            assert not torch.equal(each, before[name]), name


@pytest.mark.parametrize(
    ("name", "told"), [("weight", "the loss is nan"), ("gradient", "the norm of the gradient is inf")]
)
def test_divergence_names_its_step(name: str, told: str, place: Path, source: CogVideo) -> None:
    """A diverged run must name the first bad step, what went wrong in it, and what to try."""
    trainer = make_trainer("sequential", source, StageOptimization(batch=BATCH, learning_rate=1e-30, warmup=0))
    gate = trainer.objective.model.channel.blocks[0].gate
    for step in range(12):
        if step == 9 and name == "weight":
            gate.data.fill_(math.nan)
        if step == 9 and name == "gradient":
            gate.register_hook(lambda gradient: gradient * math.inf)
        trainer.step(step, batch_of(trainer, "sequential", place))
        if step == 5:
            trainer.figures(6)
    with pytest.raises(ValueError, match=rf"training diverged: {told} at step 10; .*smaller --learning-rate"):
        trainer.figures(12)


def test_the_average_comes_and_goes_without_a_trace(place: Path, source: CogVideo) -> None:
    """Guards the running average, which is exported, and the weights that training continues with: applying the average
    and reverting it leaves the same bits, even after an exception."""
    trainer = make_trainer("sequential", source, StageOptimization(batch=BATCH, learning_rate=1e-2, ema=0.2))
    assert trainer.average is not None
    expected = {name: each.clone() for name, each in trainer.average.state.items()}
    for step in range(3):
        trainer.step(step, batch_of(trainer, "sequential", place, step))
        weights, keep = dict(trainer.objective.named_parameters()), min(0.2, (2 + step) / (11 + step))
        expected = {name: keep * each + (1 - keep) * weights[name].detach() for name, each in expected.items()}
    for name, each in trainer.average.state.items():
        torch.testing.assert_close(each, expected[name])

    def everything() -> list[Tensor]:
        return [each.detach().clone() for each in (*trainer.objective.parameters(), *trainer.average.state.values())]  # type: ignore[union-attr]

    before, average = everything(), {name: each.clone() for name, each in trainer.average.state.items()}
    with trainer.averaged():
        applied = {name: each.detach().clone() for name, each in trainer.objective.named_parameters()}
    assert all(torch.equal(applied[name], each) for name, each in average.items())
    assert all(torch.equal(*pair) for pair in zip(before, everything(), strict=True))
    with pytest.raises(ZeroDivisionError), trainer.averaged():
        raise ZeroDivisionError
    assert all(torch.equal(*pair) for pair in zip(before, everything(), strict=True))
    plain = make_trainer("sequential", source, SETTINGS)
    start = [each.detach().clone() for each in plain.objective.parameters()]
    with plain.averaged():
        assert all(torch.equal(*pair) for pair in zip(start, plain.objective.parameters(), strict=True))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_a_batch_is_cut_without_loss(stage: StageName, size: int, place: Path, source: CogVideo) -> None:
    """Guards micro-batches: every tensor of a sample stays with it, in order, and all pieces but the last are full."""
    trainer = make_trainer(stage, source, SETTINGS)
    batch = batch_of(trainer, stage, place)
    pieces = list(cut(batch, size))
    assert [len(leaves(piece)[0]) for piece in pieces] == [min(size, BATCH - start) for start in range(0, BATCH, size)]
    for whole, *parts in zip(leaves(batch), *map(leaves, pieces), strict=True):
        assert torch.equal(torch.cat(parts), whole)
    assert all(type(piece) is type(batch) for piece in pieces)


def leaves(batch: Any) -> list[Tensor]:
    """All tensors of a batch."""
    return [batch] if isinstance(batch, Tensor) else [leaf for part in batch for leaf in leaves(part)]


def test_products_are_in_the_precision_of_the_settings(place: Path, source: CogVideo) -> None:
    """Guards bfloat16: it is used if requested, while trained weights and optimizer state stay in float32."""
    losses = []
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer("sequential", source, StageOptimization(batch=BATCH, precision=precision))  # type: ignore[arg-type]
        for step in range(2):
            trainer.step(step, batch_of(trainer, "sequential", place, step))
        assert all(each.dtype == torch.float32 for each in trainer.objective.parameters() if each.requires_grad)
        assert all(
            value.dtype == torch.float32 for state in trainer.optimizers[0].state.values() for value in state.values()
        )
        losses.append(trainer.figures(2).loss)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("name", ["micro_batch", "num_workers"])
def test_bad_settings_are_refused(name: str) -> None:
    """Checks that the error names the option, its value and what is allowed."""
    with pytest.raises(ValueError, match=f"{name} is -1, expected 0 or more"):
        Execution(**{name: -1})


def test_samples_are_loaded_ahead_where_a_gpu_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards default loader processes: none on a CPU, whose cores train; a few on a GPU, fewer if ranks share cores."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert (Execution().workers(cpu), Execution().workers(gpu)) == (0, 4)
    assert (Execution(num_workers=0).workers(gpu), Execution(num_workers=3).workers(cpu)) == (0, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Execution().workers(gpu) == 2


def test_adam_is_fused_on_a_gpu_alone() -> None:
    """Guards the exact results of CPU runs: the fused CPU kernel rounds differently."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        modules = {device: torch.nn.ParameterList([torch.empty(2, 2, device=device)]) for device in ("cpu", "cuda")}
    fused = {device: adamw(list(each), StageOptimization()).defaults["fused"] for device, each in modules.items()}
    assert fused == {"cpu": None, "cuda": True}
