"""The ranks of the multi-rank tests, as a program: `python parallel_worker.py WORLD_SIZE JOB FOLDER PORT ...`.

It imports PyTorch once, then forks one process per rank, with torchrun's environment. Of four ranks, the last two are
only for the job `crossed`. Each job writes the results that the tests check to its folder.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cogvideo.config import AutoencoderConfig, LayoutConfig, StageConfig, TransformerConfig, UpscalerConfig
from cogvideo.layout import SequenceLayout
from cogvideo.models.adapters import adapt
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.models.upscaler import UpscaleChannel, Upscaler
from cogvideo.text import PaddedText, TextTokenizer
from cogvideo.training.checkpoints import Checkpoints, restore, training_state
from cogvideo.training.objectives.superres import SuperresBatch, SuperresTask
from cogvideo.training.objectives.task import Objective
from cogvideo.training.objectives.tokenizer import FrameStream, TokenizerObjective, TokenizerSettings
from cogvideo.training.objectives.video import VideoBatch, VideoTask
from cogvideo.training.optim import Average, StageOptimization, adamw, trained
from cogvideo.training.parallel import (
    ParallelSettings,
    Ranks,
    accumulating,
    any_rank,
    clip_gradients,
    distribute,
    full_state,
    mean_over_ranks,
    process_group,
)
from cogvideo.training.step import Trainer, cut

BATCH, STEPS, CLIP = 8, 2, 0.5
TEXT, GRID, CODES, START, VOCABULARY = 4, 4, 24, 37, 40
SETTINGS = StageOptimization(learning_rate=1e-2, ema=0.9)
SHARDED, REPLICATED = ParallelSettings("sharded"), ParallelSettings("replicated")
VARIANTS = (("sequential", "frozen"), ("sequential", "trained"), ("superres", "frozen"), ("superres", "trained"))
WAYS = {
    "replicated": REPLICATED,
    "sharded": SHARDED,
    "tensor": ParallelSettings(tensor_parallel=2),
    "crossed": ParallelSettings("sharded", tensor_parallel=2),
}
CASES = [
    (way, *variant)
    for way in WAYS
    for variant in VARIANTS
    if way in ("replicated", "sharded") or variant in (("sequential", "trained"), ("superres", "frozen"))
]
CASES += [(way, "sequential", "adapted") for way in ("replicated", "sharded")]
"""Variants to compare; fewer with tensor parallelism, where each takes long."""


def make_sizes(hidden: int = 16) -> tuple[TransformerConfig, LayoutConfig]:
    """Return the sizes of a small stage."""
    config = TransformerConfig(2, hidden, 2, VOCABULARY, CODES, START, CODES, TEXT + GRID**2)
    return config, LayoutConfig(GRID, 5, TEXT, TEXT, TEXT)


def make_objective(stage: str, base: str, seed: int = 0, hidden: int = 16) -> Objective:
    """Create a small stage with random weights, so large that all of them matter."""
    config, sizes = make_sizes(hidden)
    text = object.__new__(TextTokenizer)  # batches already hold tokens, so no text model is needed
    text.start_of_image = START
    shared = Base(config).requires_grad_(base == "trained")
    objective = (
        Objective(
            Transformer(shared, TemporalChannel(config, sizes, StageConfig(2))),
            VideoTask(SequenceLayout.sequential(sizes), text),
        )
        if stage == "sequential"
        else _superres(shared, config, sizes, text)
    )
    if base == "adapted":
        adapt(objective.model.channel, 2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in objective.named_parameters():
            each.normal_(float("norm" in name and name.endswith("weight")), 0.2, generator=generator)
    return objective


def _superres(base: Base, config: TransformerConfig, sizes: LayoutConfig, text: TextTokenizer) -> Objective:
    channel = UpscaleChannel(config, sizes, UpscalerConfig(ratio=2, text_slots=TEXT, low_position=TEXT))
    return Objective(Upscaler(base, channel), SuperresTask(channel.layout, text))


def make_batch(objective: Objective, number: int = 0, size: int = BATCH) -> Any:
    """Create the batch of a step, the same on every rank, with prompts of all lengths."""
    generator = torch.Generator().manual_seed(100 + number)
    words = torch.randint(CODES, START, (size, TEXT), generator=generator)
    mask = torch.arange(TEXT) >= torch.arange(size)[:, None] % TEXT
    text = PaddedText(words, mask)
    slots = objective.task.layout.high_slots if isinstance(objective.task, SuperresTask) else 5 * GRID**2
    codes = torch.randint(CODES, (size, slots), generator=generator)
    if isinstance(objective.task, SuperresTask):
        return SuperresBatch(text, codes[:, : GRID**2].view(size, GRID, GRID), codes)
    return VideoBatch(text, codes.view(size, 5, GRID, GRID))


def share_of(batch: Any, ranks: Ranks) -> Any:
    """Return a rank's share of a batch."""
    size = BATCH // ranks.data_size
    return list(cut(batch, size))[ranks.data_rank]


class Run:
    """A bare training loop for a stage, without trainer or data."""

    def __init__(self, objective: Objective, settings: ParallelSettings, ranks: Ranks, **options: Any) -> None:
        self.objective, self.ranks = objective, ranks
        self.module = distribute(objective, settings, ranks, **options)
        self.optimizer = adamw(trained(objective), SETTINGS)
        self.average = Average(objective, SETTINGS.ema)

    def gradients(self, number: int, pieces: int = 2) -> list[Tensor]:
        """Run forward and backward passes of a step in micro-batches; return the rank's losses."""
        share = share_of(make_batch(self.objective, number), self.ranks)
        size = BATCH // self.ranks.data_size
        losses = []
        for place, piece in enumerate(cut(share, size // pieces)):
            with accumulating(self.module, place == pieces - 1):
                loss = self.module(piece).loss
                (loss.sum() / size).backward()
            losses.append(loss.detach())
        return losses

    def step(self, number: int) -> tuple[float, float]:
        """Make one update; return the mean loss and gradient norm of the whole batch."""
        losses = self.gradients(number)
        norm = clip_gradients(trained(self.objective), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(number + 1)
        return float(mean_over_ranks(torch.cat(losses).mean())), float(norm)

    def held_out(self) -> float:
        """Return the loss of a different batch, with the running average as weights."""
        with self.average.applied(), torch.no_grad():
            loss = self.module(share_of(make_batch(self.objective, 99), self.ranks)).loss
        return float(mean_over_ranks(loss.mean()))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return training_state(self.module, [self.optimizer], self.average.state)


def whole(tensor: Tensor) -> Tensor:
    """Copy a tensor, gathered from all ranks if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def everything(state: Any) -> Any:
    """Return a state in which all tensors are gathered."""
    if isinstance(state, dict):
        return {name: everything(each) for name, each in state.items()}
    if isinstance(state, list):
        return [everything(each) for each in state]
    return whole(state) if isinstance(state, Tensor) else state


def describe(run: Run) -> dict[str, Any]:
    """Record the gradients of a step, then the results of alternating updates and held-out measurements."""
    objective = run.objective
    before = {name: whole(each) for name, each in objective.named_parameters() if not each.requires_grad}
    losses = run.gradients(0)
    figures: dict[str, Any] = {
        "gradients": {name: whole(each.grad) for name, each in objective.named_parameters() if each.grad is not None},
        "loss": float(mean_over_ranks(torch.cat(losses).mean())),
        "held": sum(_local(each).numel() for each in objective.parameters()),
        "unfrozen": [name for name, each in objective.named_parameters() if name in before and each.requires_grad],
    }
    run.optimizer.zero_grad(set_to_none=True)
    figures["steps"], figures["held_out"] = [], []
    for number in range(STEPS):
        figures["steps"].append(run.step(number))
        figures["held_out"].append(run.held_out())
    figures["weights"] = full_state(run.module)
    now = dict(objective.named_parameters())
    figures["changed"] = [name for name, each in before.items() if not torch.equal(whole(now[name]), each)]
    figures["odd"] = [
        name for name, each in now.items() if not each.requires_grad and (each in run.optimizer.state or each.grad)
    ]
    figures["states"] = len(run.optimizer.state)
    return figures


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def equality(folder: Path, ranks: Ranks, settings: ParallelSettings, way: str) -> None:
    """Train every variant with one kind of parallelism."""
    for _, stage, base in (each for each in CASES if each[0] == way):
        figures = describe(Run(make_objective(stage, base), settings, ranks))
        if ranks.rank == 0:
            torch.save(figures, folder / f"{way}-{stage}-{base}.pt")


def talk(folder: Path, ranks: Ranks, _: ParallelSettings) -> None:
    """Record what ranks receive from each other."""
    figures = {
        "any": [any_rank(False), any_rank(ranks.rank == 1), any_rank(True)],
        "mean": mean_over_ranks(torch.tensor([1.0, 2.0]) * ranks.rank),
    }
    torch.save(figures, folder / f"talk-{ranks.rank}.pt")


def save(folder: Path, ranks: Ranks, settings: ParallelSettings = SHARDED) -> None:
    """Take two steps and save a checkpoint, then take a third step."""
    run = Run(make_objective("sequential", "frozen"), settings, ranks)
    for number in range(2):
        run.step(number)
    state = run.state()
    saved = everything(state)
    Checkpoints(folder).save(2, state)
    after = run.step(2)
    if ranks.rank == 0:
        torch.save((saved, after), folder / "saved.pt")


def resume(folder: Path, ranks: Ranks, settings: ParallelSettings = SHARDED) -> None:
    """Restore a checkpoint over different weights and take a step; record both."""
    run = Run(make_objective("sequential", "frozen"), settings, ranks)
    with torch.no_grad():
        for each in trained(run.objective):
            each.add_(1.0)
    restore(run.module, [run.optimizer], Checkpoints(folder).load(2, run.state()))
    loaded = everything(run.state())
    after = run.step(2)
    if ranks.rank == 0:
        torch.save((loaded, after), folder / f"resumed-{ranks.world_size}-{settings.sharding}.pt")


def background(folder: Path, ranks: Ranks, settings: ParallelSettings) -> None:
    """Write checkpoints in the background while training and communicating; record what each should hold."""
    run, checkpoints = Run(make_objective("sequential", "frozen"), settings, ranks), Checkpoints(folder, 9, True)
    for number in range(6):
        run.step(number)
        state = run.state()
        moment = everything(state)
        checkpoints.save(number + 1, state)
        for _ in range(30):
            assert any_rank(True)
        if ranks.rank == 0:
            torch.save(moment, folder / f"moment-{number + 1}.pt")
    checkpoints.wait()


def endless(folder: Path, ranks: Ranks, settings: ParallelSettings) -> None:
    """Save checkpoints in an endless loop, to be killed."""
    run, checkpoints = Run(make_objective("sequential", "frozen", hidden=128), settings, ranks), Checkpoints(folder)
    for number in range(10**6):
        run.step(number)
        checkpoints.save(number + 1, run.state())


def weigh(folder: Path, ranks: Ranks, settings: ParallelSettings) -> None:
    """Record a rank's memory after a step, the gradients it keeps between passes, and what each unit gathers."""
    objective = make_objective("sequential", "frozen")
    for each in objective.parameters():
        if not each.requires_grad and each.ndim > 1:
            each.data = each.data.bfloat16()
    run, kept = Run(objective, settings, ranks), []
    with torch.autocast("cpu", torch.bfloat16):
        for place, piece in enumerate(cut(share_of(make_batch(objective), ranks), 1)):
            with accumulating(run.module, place == 1):
                run.module(piece).loss.sum().backward()
            if place == 0:
                kept = [each for each in gc.get_objects() if type(each) is nn.Parameter and each.grad is not None]
                kept = [(each.grad.dtype, tuple(each.grad.shape)) for each in kept]
    own = trained(objective)
    figures = {"gradients": _storage_bytes(each.grad for each in own), "kept": kept}
    run.optimizer.step()
    moments = [each for state in run.optimizer.state.values() for name, each in state.items() if name != "step"]
    figures |= {
        "weights": _storage_bytes(objective.parameters()),
        "optimizer": _storage_bytes([*moments, *run.average.state.values()]),
        "units": [_whole_unit(each) for each in objective.modules() if isinstance(each, FSDPModule)],
    }
    torch.save(figures, folder / f"weigh-{ranks.rank}.pt")


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Count bytes including padding; tensors that share a storage count once."""
    storages = [_local(each).untyped_storage() for each in tensors]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def _whole_unit(unit: nn.Module) -> tuple[int, int]:
    """Count the values that FSDP2 gathers for a unit, including padding, and how many of them are trained."""
    unit.unshard()
    own = [each for each in unit.parameters() if not isinstance(each, DTensor)]
    sizes = [(each.untyped_storage().nbytes() // each.element_size(), each.requires_grad) for each in own]
    unit.reshard()
    return sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)


def frames(folder: Path, ranks: Ranks, settings: ParallelSettings) -> None:
    """Train the image tokenizer, with frames split among ranks; record it before and after the adversary starts."""
    sizes = AutoencoderConfig(8, (1, 2), 1, ((1, 1, 2), (1, 2)), 1, 8, 40, rate=4, groups=4)
    recipe = TokenizerSettings(
        steps=6,
        batch=4,
        optimizer="muon",
        learning_rate=1e-3,
        warmup=1,
        plain_steps=1,
        start_vectors=2,
        adversary_start=4,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 24, 3), np.uint8)
    stream = FrameStream(pixels, recipe.batch, 0, ranks)
    objective = TokenizerObjective(sizes, recipe, 0, stream)
    trainer = Trainer(objective, recipe, parallel=settings, ranks=ranks)
    states = []
    for step in range(recipe.steps):
        trainer.step(step, stream[step])
        states.append({name: each.clone() for name, each in objective.state_dict().items()})
    torch.save((states[3], states[5]), folder / f"frames-{ranks.rank}-of-{ranks.world_size}.pt")


JOBS = {
    "frames": frames,
    "talk": talk,
    "save": save,
    "resume": resume,
    "background": background,
    "endless": endless,
    "weigh": weigh,
}


@contextmanager
def started(*jobs: tuple[str, Path], world_size: int = 2) -> Iterator[subprocess.Popen[str]]:
    """Start ranks in one process group to do jobs one after another; those still running at the end are killed."""
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in jobs]  # they reserve the ports
    words = [str(each) for job, store in zip(jobs, stores, strict=True) for each in (*job, store.port)]
    common = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", __file__, str(world_size), *words],
        env=os.environ | common,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as ranks:
        try:
            yield ranks
        finally:
            with suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
            if ranks.stderr is not None and not ranks.stderr.closed:
                ranks.stderr.read()  # returns when all ranks have ended


def run_ranks(*jobs: tuple[str, Path], world_size: int = 2) -> None:
    """Run jobs to completion; a rank that fails shows its traceback."""
    with started(*jobs, world_size=world_size) as ranks:
        _, errors = ranks.communicate(timeout=1200)
        assert ranks.returncode == 0, errors


def main() -> None:
    """Run all ranks: this process is the first one, and forks the others."""
    importlib.import_module("torch._dynamo")  # before forking: wrapping a model imports it
    others = []
    for rank in range(1, int(sys.argv[1])):
        if not (process := os.fork()):
            work(rank)
            return
        others.append(process)
    work(0)
    sys.exit(any(os.waitpid(each, 0)[1] for each in others))


def work(rank: int) -> None:
    """Do the jobs of a rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    for job, folder, port in zip(sys.argv[2::3], sys.argv[3::3], sys.argv[4::3], strict=True):
        world_size = int(sys.argv[1])
        if world_size == 4 and job != "crossed":
            world_size = 2
        if rank < world_size:
            os.environ |= {"MASTER_PORT": port, "WORLD_SIZE": str(world_size)}
            perform(job, Path(folder))


def perform(job: str, folder: Path) -> None:
    """Do one job, with the ranks in a new process group."""
    cpu = torch.device("cpu")
    if job in WAYS:
        with process_group(cpu, WAYS[job]) as ranks:
            equality(folder, ranks, WAYS[job], job)
    else:
        settings = REPLICATED if job.endswith("-replicated") else SHARDED
        with process_group(cpu, settings) as ranks:
            JOBS[job.removesuffix("-replicated")](folder, ranks, settings)


if __name__ == "__main__":
    main()
