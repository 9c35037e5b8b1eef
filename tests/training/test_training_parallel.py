"""Many ranks match one: real processes that communicate through gloo, against plain autograd in this process."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo.training.checkpoints import Checkpoints, read_weights
from cogvideo.training.parallel import ALONE
from parallel_worker import (
    CASES,
    CLIP,
    REPLICATED,
    SETTINGS,
    SHARDED,
    STEPS,
    WAYS,
    frames,
    make_batch,
    make_objective,
    resume,
    run_ranks,
    save,
    started,
)
from reference import relative_error

BEFORE = ("save", "save-replicated", "alone")
AFTER = {
    "resume": "resumed-2-sharded.pt",
    "resume-replicated": "resumed-2-replicated.pt",
    "alone": "resumed-1-sharded.pt",
}
"""Jobs that resume from a checkpoint, and the files with their results."""


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the output of all ranks. The same processes run all jobs."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in (*BEFORE, "background"):
        (folder / name).mkdir()
    save(folder / "alone", ALONE, SHARDED)
    equalities = [(way, folder) for way in reversed(WAYS)]  # four ranks first, two of which then exit
    checkpoints = [(job, folder / job) for job in ("save", "save-replicated", "background")]
    resumed = [(job, folder / before) for before in BEFORE for job in AFTER if job != "alone"]
    frames(folder, ALONE, REPLICATED)
    others = ("talk", folder), ("frames-replicated", folder), *checkpoints, *resumed
    run_ranks(*equalities, *others, world_size=4)
    return folder


def equal(one: Any, other: Any) -> bool:
    """True if two nested states are bit-identical."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(each, other[name]) for name, each in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@lru_cache
def alone(stage: str, base: str) -> dict[str, Any]:
    """Reference training with the whole batch at once, without any of the code under test."""
    objective = make_objective(stage, base)
    trained = {name: each for name, each in objective.named_parameters() if each.requires_grad}
    objective(make_batch(objective, 0)).loss.mean().backward()
    used = {name: each.grad.clone() for name, each in trained.items() if each.grad is not None}
    figures: dict[str, Any] = {"gradients": used, "steps": [], "held_out": []}
    groups = [
        {"params": [each for each in trained.values() if each.ndim > 1], "weight_decay": SETTINGS.weight_decay},
        {"params": [each for each in trained.values() if each.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.learning_rate, betas=(0.9, 0.95))
    average = {name: each.detach().clone() for name, each in trained.items()}
    for number in range(STEPS):
        objective.zero_grad()
        loss = objective(make_batch(objective, number)).loss.mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        figures["steps"].append((float(loss.detach()), float(norm)))
        optimizer.step()
        keep = min(SETTINGS.ema, (2 + number) / (11 + number))
        average = {name: each.lerp(trained[name].detach(), 1 - keep) for name, each in average.items()}
        with torch.no_grad():
            measured = torch.func.functional_call(objective, average, (make_batch(objective, 99),))
        figures["held_out"].append(float(measured.loss.mean()))
    return figures


@pytest.mark.parametrize(("way", "stage", "base"), CASES)
class TestEquality:
    """DDP, FSDP2, tensor parallelism and FSDP2 with tensor parallelism; frozen and trained bases, and adapters."""

    def figures(self, results: Path, way: str, stage: str, base: str) -> dict[str, Any]:
        return torch.load(results / f"{way}-{stage}-{base}.pt", weights_only=True)

    def test_gradients(self, results: Path, way: str, stage: str, base: str) -> None:
        """Catches ranks or micro-batches weighted wrongly, and gradients that are exchanged twice or not at all."""
        found, expected = self.figures(results, way, stage, base)["gradients"], alone(stage, base)["gradients"]
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative_error(found[name], gradient) < 1e-5, name

    def test_steps(self, results: Path, way: str, stage: str, base: str) -> None:
        """Catches a norm over one rank's part only, weights that lag behind, and evaluation with outdated weights."""
        found, expected = self.figures(results, way, stage, base), alone(stage, base)
        for name in ("steps", "held_out"):
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected[name]), atol=1e-5, rtol=1e-5)

    def test_frozen(self, results: Path, way: str, stage: str, base: str) -> None:
        """Catches wrapping that gives frozen weights a gradient, optimizer state, or different bits."""
        figures = self.figures(results, way, stage, base)
        assert figures["changed"] == figures["odd"] == figures["unfrozen"] == []
        assert figures["states"] == len(alone(stage, base)["gradients"])
        trained = {name for name, each in make_objective(stage, base).named_parameters() if each.requires_grad}
        assert figures["weights"].keys() == trained


def test_ranks_agree(results: Path) -> None:
    """Catches a rank that continues while another stops, and metrics of one rank in place of all."""
    for rank in range(2):
        found = torch.load(results / f"talk-{rank}.pt", weights_only=True)
        assert found["any"] == [False, True, True]
        torch.testing.assert_close(found["mean"], torch.tensor([0.5, 1.0]))


def test_ranks_share_the_frames_of_the_tokenizer(results: Path) -> None:
    """Guards gradients, codebook and k-means on two ranks, which match those on one up to rounding, and keeps ranks
    from drifting apart once the adversary sees only its own rank's frames."""
    one, two, other = (
        torch.load(results / f"frames-{name}.pt", weights_only=True) for name in ("0-of-1", "0-of-2", "1-of-2")
    )
    assert one[0].keys() == two[0].keys()
    for name, each in one[0].items():
        torch.testing.assert_close(two[0][name], each, atol=1e-4, rtol=1e-3, msg=name)
    assert equal(two[1], other[1])
    assert not equal(two[0], two[1])


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("after", AFTER)
def test_any_change_of_ranks_on_resume(before: str, after: str, results: Path) -> None:
    """Guards checkpoints: one rank loads what two wrote, and vice versa, bit for bit; the next step matches too."""
    folder = results / before
    if after == "alone":
        resume(folder, ALONE, SHARDED)
    saved, expected = torch.load(folder / "saved.pt", weights_only=True)
    loaded, step = torch.load(folder / AFTER[after], weights_only=True)
    assert equal(saved, loaded)
    torch.testing.assert_close(torch.tensor(step), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_checkpoints_in_the_background_are_of_their_moment(results: Path) -> None:
    """Catches state that changes while it is written, and messages of writing that collide with those of training."""
    folder = results / "background"
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == list(range(1, 7))
    for step in checkpoints.steps():
        moment = torch.load(folder / f"moment-{step}.pt", weights_only=True)
        assert equal(read_weights(checkpoints.path(step), averaged=False), moment["weights"])
        assert equal(read_weights(checkpoints.path(step), averaged=True), moment["average"])


def test_ranks_that_are_killed_leave_whole_checkpoints(tmp_path: Path) -> None:
    """Guards the atomic rename: whenever two writing ranks die, every checkpoint with a final name can be loaded."""
    with started(("endless", tmp_path)) as ranks:
        while not list(tmp_path.glob("step-*")) and ranks.poll() is None:
            time.sleep(0.01)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps()
    for step in checkpoints.steps():
        read_weights(checkpoints.path(step), averaged=True)
    assert not list(tmp_path.glob(".step-*"))
