"""Training of a stage: from options to a run, and from the run to a bundle."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import cogvideo
from cogvideo.bundle.model import CogVideo
from cogvideo.config import CogVideoConfig, InputError, require
from cogvideo.data.loader import ClipStream, Loader
from cogvideo.devices import is_out_of_memory, usable
from cogvideo.files import alone_in
from cogvideo.planning.training import training
from cogvideo.runs import TYPED, RunFolder
from cogvideo.training.export import (
    ExportTarget,
    check_codes,
    check_target,
    deliver,
    delivered,
    left_out,
    modules,
    report_of,
)
from cogvideo.training.held_out import HeldOut, held_out, judged
from cogvideo.training.loop import learn
from cogvideo.training.objectives.task import Objective
from cogvideo.training.parallel import ParallelSettings, Ranks, any_rank, full_state, process_group
from cogvideo.training.preview import Preview
from cogvideo.training.session import Clips, Options, Session
from cogvideo.training.stages import (
    STAGES,
    Choice,
    StageName,
    build,
    configured,
    continued,
    own,
    parents,
)
from cogvideo.training.step import Trainer


class StageRun(NamedTuple):
    """A stage to be trained."""

    stage: StageName
    choice: Choice
    options: Options
    task: Mapping[str, Any]
    """Settings of what it learns."""
    sampling: Mapping[str, Any]
    """Settings of sampling that this stage alone has."""

    @property
    def name(self) -> str:
        """Bundle to start from."""
        return str(self.options.out if self.options.init is None else self.options.init)

    def source(self) -> CogVideo:
        """The bundle to start from.

        Raises:
            ValueError: there is none.
        """
        try:
            return CogVideo.from_pretrained(self.name)
        except InputError as error:
            hint = "; --init names a bundle to start from, and `train tokenizer` makes one"
            raise InputError(f"{error}{hint if self.options.init is None else ''}") from error


def train(
    stage: StageName,
    choice: Choice,
    options: Options,
    task: Mapping[str, Any] = MappingProxyType({}),
    sampling: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Train a stage, or the rest of it, and put it into the bundle.

    Args:
        stage: which one.
        choice: what it begins with.
        options: of all stages.
        task: settings of what it learns.
        sampling: settings of sampling that this stage alone has.

    Raises:
        ValueError: data, bundle or a setting cannot be used, another run began in the folder, or training diverged.
        OSError: something cannot be written.
    """
    require(len(options.clips.data) > 0, "there is no data, expected a folder of `cogvideo data prepare` with --data")
    shown = STAGES[stage].is_prompted or not options.logging.prompts
    require(shown, f"--prompts says nothing to {stage}, which starts from frames: its samples are held-out clips")
    is_whole = options.parallel == ParallelSettings()
    is_adamw = options.optimization.optimizer == "adamw"
    require(is_whole or is_adamw, "muon needs whole matrices on every rank: use adamw here")
    run = StageRun(stage, choice, options, task, sampling)
    with process_group(usable(options.device), options.parallel) as ranks:
        try:
            _train(run, ranks)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(_too_large(run, ranks)) from error


def _train(run: StageRun, ranks: Ranks) -> None:
    stage, choice, options, settings = run.stage, run.choice, run.options, run.options.optimization
    source = run.source()
    config = configured(source.config, stage, choice)
    named = parents(stage, choice, source)
    stream, entries = _data(run, source, config)
    folder = RunFolder(options.out / f".{stage}-run")
    target = ExportTarget(options.out, source, config, stage, choice)
    check_codes(target, (*named, *continued(stage, choice)), stream.tokenizer_sha256)
    identity = _identity(run, target, named, stream)
    with ExitStack() as locks:
        if any_rank(ranks.rank == 0 and _begin(run, target, folder, identity, locks)):
            task = STAGES[stage].task(STAGES[stage].layout(config), source.text, **run.task)
            model = build(stage, choice, source, config, settings.dtype, settings.seed)
            objective = Objective(model, task).to(ranks.device)
            trainer = Trainer(objective, settings, options.execution, options.parallel, ranks)
            seen = entries[0].stream if entries else stream
            preview = Preview(target, trainer, seen, options.logging.prompts, folder.path / "samples")

            def batches(step: int) -> Iterable[Any]:
                return Loader(
                    stream,
                    settings.batch,
                    rank=ranks.data_rank,
                    world_size=ranks.data_size,
                    position=step * settings.batch,
                    num_workers=options.execution.workers(ranks.device),
                    collate=task.collate,
                    pin_memory=ranks.device.type == "cuda",
                )

            if ranks.rank == 0:
                folder.describe(_about(trainer, stream, entries))
                for line in _notes(run, target, stream, entries, preview.problem):
                    print(line, file=sys.stderr)
            judge = judged(trainer, entries)
            every = options.logging.sample_every
            learn(Session(folder, trainer, batches, options.logging, judge, identity, preview, every))
            _finish(target, folder, trainer)
    if ranks.rank == 0:
        assert folder.summary is not None
        print(f"{options.out}: {stage} after {settings.steps:,} steps: {_words(folder.summary)}")


def _too_large(run: StageRun, ranks: Ranks) -> str:
    """A message with the memory that was expected, and switches that help."""
    options = run.options
    is_narrow = options.optimization.precision == "bfloat16"
    share = options.optimization.batch // ranks.data_size
    samples_a_pass = min(options.execution.micro_batch or share, share)
    switches = ["a smaller --micro-batch"] if samples_a_pass > 1 else []
    switches += [] if options.execution.checkpointing else ["--checkpointing"]
    switches += [] if is_narrow else ["--precision bfloat16"]
    switches += [] if options.parallel.sharding == "sharded" else ["--sharding sharded with torchrun on more GPUs"]
    expected = ""
    if run.stage != "superres":  # `costs` does not know its activations
        need = training(configured(run.source().config, run.stage, run.choice), run.stage, samples_a_pass)
        expected = (
            f"; `cogvideo info` expects {need.total / 2**30:.1f} GiB{'' if is_narrow else ' with --precision bfloat16'}"
            f", and {need.total_checkpointed / 2**30:.1f} GiB with --checkpointing too"
        )
    helps = ", ".join(switches) or "a smaller model"
    got = f"out of memory with {samples_a_pass} samples a pass{expected}"
    return f"{got}. What helps: {helps}. The last checkpoint is kept"


def _begin(
    run: StageRun, target: ExportTarget, folder: RunFolder, identity: Mapping[str, Any], locks: ExitStack
) -> bool:
    """Lock the folder and make it that of this run; whether there is anything to do.

    A run that ended is over as long as the bundle has its stage, else it is delivered again. If it was another one, and
    its stage may be replaced, its folder is set aside.
    """
    locks.enter_context(alone_in(folder.path))
    assert target.source.folder is not None
    facts = {"from": ".." if target.in_place else str(target.source.folder.resolve()), TYPED: run.name}
    changes = folder.changes(identity, facts)
    ended = folder.summary is not None
    if ended and not changes and delivered(target):
        advice = "With --overwrite, and other settings such as --seed, a new one begins."
        print(f"This run is over. {advice}", file=sys.stderr)
        return False
    if ended or not folder.began:
        goes_on = target.in_place and target.choice.start == "continue"
        check_target(target, ended or run.options.overwrite or goes_on)
    if ended and changes:
        advice = "pass --overwrite to replace its stage, or another --out, with --init for the bundle to start from"
        require(run.options.overwrite, f"another run ended in {folder.path}: {changes}; {advice}")
        print(f"The run that ended in {folder.path} is now in {folder.set_aside()}.", file=sys.stderr)
        locks.enter_context(alone_in(folder.path))  # the other lock went with the other folder
    folder.claim(identity, facts)
    return True


def _notes(
    run: StageRun, target: ExportTarget, stream: ClipStream, entries: Sequence[HeldOut], problem: str
) -> Iterator[str]:
    """Lines about what the run goes without, and what may surprise."""
    options = run.options
    if line := left_out(target):
        yield line
    if "image_tokenizer" not in target.source.components:
        card = stream.datasets[0].card
        yield (
            f"The bundle has no image tokenizer: {run.stage} learns the codes of {card.tokenizer} "
            f"(sha256 {card.tokenizer_sha256:.12}), and needs it to be drawn."
        )
    if options.optimization.batch > len(stream):
        yield f"A batch of {options.optimization.batch:,} is larger than the {len(stream):,} clips: it repeats them."
    if not entries:
        yield f"Nothing is held out: no clip of the split {options.clips.held_out_split} is there and long enough."
    if problem and options.logging.sample_every:
        yield problem


def _data(run: StageRun, source: CogVideo, config: CogVideoConfig) -> tuple[ClipStream, list[HeldOut]]:
    """Clips to learn from, and clips to validate on."""
    options, row = run.options, STAGES[run.stage]
    clips, grid = options.clips, config.layout.grid
    special = {"high_codes": row.has_high_codes, **run.sampling}
    sampling = clips.sampling(row.mode, options.optimization.seed, config.layout.num_frames, **special)
    tokenizer = source.sha256("image_tokenizer") if "image_tokenizer" in source.components else None
    stream = ClipStream(clips.data, clips.split, sampling, tokenizer, grid)
    if row.has_high_codes:
        side = grid * config.upscaler.ratio
        got = stream.datasets[0].card.high_grid
        require(got == side, f"{clips.data[0]} has high codes of side {got}, expected {side}")
    split = clips.held_out_split
    known = sorted({name for each in stream.datasets for name in each.card.splits})
    absent = f"held_out_split is {split!r}, expected one that the data has: {', '.join(known)}"
    require(split in known or split == Clips.held_out_split, absent)
    return stream, held_out(stream, split, options.logging.evaluate_samples)


def _identity(run: StageRun, target: ExportTarget, named: tuple[str, ...], stream: ClipStream) -> dict[str, Any]:
    """All that decides the weights, wherever it lies."""
    replaced = own(run.stage, run.choice) if target.in_place else ()
    starts = (*named, *continued(run.stage, run.choice), "text")
    task = dict(run.sampling)
    for name, value in run.task.items():
        task |= asdict(value) if is_dataclass(value) and not isinstance(value, type) else {name: value}
    return {
        "stage": run.stage,
        "choice": asdict(run.choice),
        "task": task,
        "config": asdict(target.config),
        "parents": {name: target.source.sha256(name) for name in starts if name not in replaced},
        "optimization": asdict(run.options.optimization),
        "clips": run.options.clips.settings,
        "data": stream.identity,
    }


def _finish(target: ExportTarget, folder: RunFolder, trainer: Trainer) -> None:
    """The stage into the bundle; the report goes last, as a sign that all is there."""
    with trainer.averaged():
        state = full_state(trainer.module)
    if trainer.ranks.rank > 0:
        return
    report = report_of(folder, trainer.settings.steps)
    deliver(target, modules(target.stage, target.choice, target.config, state), report)
    folder.finish(report)


def _about(trainer: Trainer, stream: ClipStream, entries: Sequence[HeldOut]) -> dict[str, Any]:
    """Facts for the card that settings do not say. Folders have their names alone: cards are published."""
    count = {True: 0, False: 0}
    for parameter in trainer.objective.parameters():
        count[parameter.requires_grad] += parameter.numel()
    held: Counter[Path] = Counter()
    for entry in entries:  # a rate has all clips that fill it
        here = {each.folder: clips for each, clips in zip(entry.stream.datasets, entry.stream.num_clips, strict=True)}
        held |= Counter(here)
    return {
        "parameters": {"trained": count[True], "frozen": count[False]},
        "data": {
            each.folder.resolve().name: {
                "trained_on": clips,
                "held_out": held[each.folder],
                "source": Path(each.card.source).name,
            }
            for each, clips in zip(stream.datasets, stream.num_clips, strict=True)
        },
        "samples_an_epoch": len(stream),
        "tokenizer": stream.tokenizer_sha256,
        "ranks": trainer.ranks.world_size,
        "torch": torch.__version__,
        "cogvideo": cogvideo.__version__,
    }


def _words(summary: dict[str, Any]) -> str:
    held = ", ".join(f"{name} {row['loss']:.3f}" for name, row in summary.get("held_out", {}).items())
    return f"loss {summary['loss']:.3f}; held out: {held or 'nothing'}"
