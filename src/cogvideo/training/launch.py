"""Training of a stage: from options to a run, and from the run to a bundle."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import cogvideo
from cogvideo.bundle.adapters import adapters_in
from cogvideo.bundle.model import CogVideo
from cogvideo.config import InputError, both, require, times
from cogvideo.data.dataset import read_card
from cogvideo.data.loader import ClipStream, Loader
from cogvideo.devices import is_out_of_memory, usable
from cogvideo.files import exclusive_lock
from cogvideo.planning.training import training
from cogvideo.runs import TYPED, RunFolder
from cogvideo.training.card import report_of
from cogvideo.training.export import check_codes, check_target, deliver_state, delivered, left_out
from cogvideo.training.held_out import HeldOut, held_out, judged
from cogvideo.training.loop import learn
from cogvideo.training.objectives.image import ImageMixture
from cogvideo.training.objectives.task import Objective
from cogvideo.training.parallel import ParallelSettings, Ranks, any_rank, full_state, process_group
from cogvideo.training.samples import Preview
from cogvideo.training.session import DataOptions, Options, Session
from cogvideo.training.stages import STAGES, Choice, StageName, Target, configured
from cogvideo.training.step import Trainer


def train(
    stage: StageName,
    choice: Choice,
    options: Options,
    task: Mapping[str, Any] = MappingProxyType({}),
    sampling: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Train a stage, or resume its training, and put it into the bundle.

    `task` and `sampling` are settings that only this stage has.
    """
    require(len(options.clips.data) > 0, "there is no data, expected a folder of `cogvideo data prepare` with --data")
    shown = STAGES[stage].is_prompted or not options.logging.prompts
    require(shown, f"--prompts has no effect on {stage}, which starts from frames: its samples are held-out clips")
    is_whole = options.parallel == ParallelSettings()
    is_adamw = options.optimization.optimizer == "adamw"
    require(is_whole or is_adamw, "muon needs whole matrices on every rank: use adamw here")
    is_adapter, num_parts = choice.lora is not None, options.parallel.tensor_parallel
    require(num_parts == 1 or not is_adapter, f"tensor_parallel is {num_parts}, expected 1: adapters cannot be split")
    with process_group(usable(options.device), options.parallel) as ranks:
        target = _target(stage, choice, options)
        try:
            _train(target, options, task, sampling, ranks)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(_too_large(target, options, ranks)) from error


def seconds_per_step(
    stage: StageName,
    choice: Choice,
    options: Options,
    task: Mapping[str, Any] = MappingProxyType({}),
    sampling: Mapping[str, Any] = MappingProxyType({}),
    steps: int = 3,
) -> float:
    """Measured time of a step of `train`, over a few steps after the first; their results are discarded."""
    with process_group(usable(options.device), options.parallel) as ranks:
        target = _target(stage, choice, options)
        stream, _ = _data(target, options, sampling)
        trainer, batches = _start(target, options, task, stream, ranks)
        times = []
        for number, batch in zip(range(steps), batches(0), strict=False):
            trainer.step(number, batch)
            trainer.figures(number + 1)  # synchronizes with a GPU
            times.append(time.monotonic())
    return (times[-1] - times[0]) / (steps - 1)


def _target(stage: StageName, choice: Choice, options: Options) -> Target:
    """The stage with the bundle that it starts from, for frames of the shape of the first dataset.

    A video stage's adapter is trained on a base with the adapter of that name.
    """
    try:
        source = CogVideo.from_pretrained(_typed(options))
    except InputError as error:
        hint = "; --init names a bundle to start from, and `train tokenizer` makes one"
        raise InputError(f"{error}{hint if options.init is None else ''}") from error
    if choice.lora is not None and not STAGES[stage].is_base:
        source.add([each for each in adapters_in(options.out) if each.component == "base"])
    config = configured(source.config, stage, choice).shaped(read_card(options.clips.data[0]).grid)
    return Target(options.out, source, config, stage, choice)


def _typed(options: Options) -> str:
    """Name of the bundle to start from, as the user gave it."""
    return str(options.out if options.init is None else options.init)


def _train(
    target: Target, options: Options, task: Mapping[str, Any], sampling: Mapping[str, Any], ranks: Ranks
) -> None:
    stage, settings = target.stage, options.optimization
    named = target.parents()
    stream, entries = _data(target, options, sampling)
    folder = RunFolder(options.out / f".{stage}-run")
    check_codes(target, named, stream.tokenizer_sha256)
    identity = _identity(target, options, {**sampling, **task}, (*named, "text"), stream)
    with ExitStack() as locks:
        if any_rank(ranks.rank == 0 and _begin(target, options, folder, identity, locks)):
            trainer, batches = _start(target, options, task, stream, ranks)
            seen = entries[0].stream if entries else stream
            samples = folder.path / "samples"
            preview = Preview(target, trainer, seen, options.logging.prompts, samples, settings.seed)
            if ranks.rank == 0:
                folder.describe(_about(trainer, stream, entries))
                for line in _notes(target, options, stream, entries, preview.problem):
                    print(line, file=sys.stderr)
            judge = judged(trainer, entries)
            every = options.logging.sample_every
            learn(Session(folder, trainer, batches, options.logging, judge, identity, preview, every))
            _finish(target, folder, trainer)
    if ranks.rank == 0:
        summary = folder.summary
        assert summary is not None
        held = [f"{name} {measured['loss']:.3f}" for name, measured in summary.get("held_out", {}).items()]
        words = f"loss {summary['loss']:.3f}; held out: {', '.join(held) or 'nothing'}"
        print(f"{options.out}: {stage} after {settings.steps:,} steps: {words}")


def _start(
    target: Target, options: Options, task: Mapping[str, Any], stream: ClipStream, ranks: Ranks
) -> tuple[Trainer, Callable[[int], Iterable[Any]]]:
    """Initial trainer of a stage, and a function that gives its batches from a step on."""
    settings, row = options.optimization, target.row
    learned = row.task(row.layout(target.config), target.source.text, **task)
    objective = Objective(target.build(settings.dtype, settings.seed), learned).to(ranks.device)
    trainer = Trainer(objective, settings, options.execution, options.parallel, ranks)

    def batches(step: int) -> Iterable[Any]:
        return Loader(
            stream,
            settings.batch,
            rank=ranks.data_rank,
            world_size=ranks.data_size,
            position=step * settings.batch,
            num_workers=options.execution.workers(ranks.device),
            collate=learned.collate,
            pin_memory=ranks.device.type == "cuda",
        )

    return trainer, batches


def _too_large(target: Target, options: Options, ranks: Ranks) -> str:
    """Error message with the expected memory, and options that help."""
    is_narrow = options.optimization.precision == "bfloat16"
    share = options.optimization.batch // ranks.data_size
    samples_a_pass = min(options.execution.micro_batch or share, share)
    switches = {
        "a smaller --micro-batch": samples_a_pass > 1,
        "--checkpointing": not options.execution.checkpointing,
        "--precision bfloat16": not is_narrow,
        "--sharding sharded with torchrun on more GPUs": options.parallel.sharding != "sharded",
    }
    expected = ""
    if target.stage != "superres":  # `costs` has no formula for its activations
        need = training(target.config, target.stage, samples_a_pass)
        expected = (
            f"; `cogvideo info` expects {need.total / 2**30:.1f} GiB{'' if is_narrow else ' with --precision bfloat16'}"
            f", and {need.total_checkpointed / 2**30:.1f} GiB with --checkpointing too"
        )
    helps = ", ".join(name for name, is_off in switches.items() if is_off) or "a smaller model"
    got = f"out of memory with {samples_a_pass} samples per pass{expected}"
    return f"{got}. What helps: {helps}. The last checkpoint is kept"


def _begin(target: Target, options: Options, folder: RunFolder, identity: Mapping[str, Any], locks: ExitStack) -> bool:
    """Lock the folder and claim it for this run; returns whether there is anything to do.

    A finished run needs nothing as long as the bundle has its stage, else the stage is exported again. The folder of
    another run is set aside if its stage may be replaced.
    """
    locks.enter_context(exclusive_lock(folder.path))
    assert target.source.folder is not None
    facts = {"from": ".." if target.in_place else str(target.source.folder.resolve()), TYPED: _typed(options)}
    changes = folder.changes(identity, facts)
    ended = folder.summary is not None
    if ended and not changes and delivered(target):
        advice = "To begin a new one, pass --overwrite and other settings, such as --seed."
        print(f"This run is finished. {advice}", file=sys.stderr)
        return False
    if ended or not folder.began:
        goes_on = target.in_place and target.choice.start == "continue"
        check_target(target, ended or options.overwrite or goes_on)
    if ended and changes:
        advice = "pass --overwrite to replace its stage, or another --out, with --init for the bundle to start from"
        require(options.overwrite, f"another run ended in {folder.path}: {changes}; {advice}")
        print(f"The finished run in {folder.path} was moved to {folder.set_aside()}.", file=sys.stderr)
        locks.enter_context(exclusive_lock(folder.path))  # the first lock moved with the first folder
    folder.claim(identity, facts)
    return True


def _notes(
    target: Target, options: Options, stream: ClipStream, entries: Sequence[HeldOut], problem: str
) -> Iterator[str]:
    """Messages about what the run lacks, and what may surprise."""
    if line := left_out(target):
        yield line
    if "image_tokenizer" not in target.source.components:
        card = stream.datasets[0].card
        yield (
            f"The bundle has no image tokenizer: {target.stage} learns the codes of {card.tokenizer} "
            f"(sha256 {card.tokenizer_sha256:.12}), and needs it to generate pictures."
        )
    if options.optimization.batch > len(stream):
        yield f"A batch of {options.optimization.batch:,} is larger than the {len(stream):,} clips: it repeats them."
    if not entries:
        yield f"Nothing is held out: no clip of the split {options.clips.held_out_split} is there and long enough."
    if problem and options.logging.sample_every:
        yield problem


def _data(target: Target, options: Options, special: Mapping[str, Any]) -> tuple[ClipStream, list[HeldOut]]:
    """Training clips, and clips to validate on."""
    row, config, source = target.row, target.config, target.source
    clips, grid, seed = options.clips, config.layout.grid, options.optimization.seed
    num_frames = config.layout.num_frames
    sampling = clips.sampling(row.mode, seed, num_frames, high_codes=row.has_high_codes, **special)
    tokenizer, batch = source.sha256("image_tokenizer"), options.optimization.batch
    stream = ClipStream(clips.data, clips.split, sampling, tokenizer, grid, batch)
    if row.has_high_codes:
        card = stream.datasets[0].card
        expected = times(card.grid, config.upscaler.ratio)
        require(card.high_grid == expected, f"{clips.data[0]} has high codes {card.high_grid}, expected {expected}")
    split = clips.held_out_split
    known = sorted({name for each in stream.datasets for name in each.card.splits})
    absent = f"held_out_split is {split!r}, expected one that the data has: {', '.join(known)}"
    require(split in known or split == DataOptions.held_out_split, absent)
    return stream, held_out(stream, split, options.logging.evaluate_samples)


def _identity(
    target: Target, options: Options, special: Mapping[str, Any], starts: Sequence[str], stream: ClipStream
) -> dict[str, Any]:
    """Everything that determines the weights, regardless of its location."""
    replaced = target.own if target.in_place else ()
    task: dict[str, Any] = {}
    for name, value in special.items():
        task |= asdict(value) if isinstance(value, ImageMixture) else {name: value}
    added = {f"adapter of {each.component}": each.sha256 for each in target.source.adapters}
    return {
        "stage": target.stage,
        "choice": asdict(target.choice),
        "task": task,
        "config": asdict(target.config.sizes),
        "parents": {name: target.source.sha256(name) for name in starts if name not in replaced} | added,
        "optimization": asdict(options.optimization),
        "clips": {name: value for name, value in asdict(options.clips).items() if name != "data"},
        "data": stream.identity,
    }


def _finish(target: Target, folder: RunFolder, trainer: Trainer) -> None:
    """Put the stage into the bundle; the report is written last, to mark completion."""
    with trainer.averaged():
        state = full_state(trainer.module)
    if trainer.ranks.rank > 0:
        return
    report = report_of(folder, trainer.settings.steps)
    deliver_state(target, state, report)
    folder.finish(report)


def _about(trainer: Trainer, stream: ClipStream, entries: Sequence[HeldOut]) -> dict[str, Any]:
    """Facts for the card beyond the settings. Folders appear by name only, since cards are published."""
    sizes = Counter[bool]()
    for parameter in trainer.objective.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    held = Counter[Path]()
    for entry in entries:  # each rate uses all clips that fill it
        counts = zip(entry.stream.datasets, entry.stream.num_clips, strict=True)
        held |= Counter({each.folder: clips for each, clips in counts})
    data = {}
    for each, clips in zip(stream.datasets, stream.num_clips, strict=True):
        facts = {"trained_on": clips, "held_out": held[each.folder], "source": Path(each.card.source).name}
        data[each.folder.resolve().name] = facts
    gaps = stream.sampling.rates.num_frames - 1
    spanned = {"durations": [gaps / rate for rate in stream.rates]} if stream.rates else {}
    return {
        "parameters": {"trained": sizes[True], "frozen": sizes[False]},
        "data": data,
        **spanned,
        "shape": both(stream.datasets[0].card.grid),
        "samples_an_epoch": len(stream),
        "tokenizer": stream.tokenizer_sha256,
        "ranks": trainer.ranks.world_size,
        "torch": torch.__version__,
        "cogvideo": cogvideo.__version__,
    }
