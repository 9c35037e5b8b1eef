"""From the options of a stage to its run, and from the run to a bundle."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import cogvideo
from cogvideo.bundle.model import CogVideo
from cogvideo.config import CogVideoConfig, InputError, require
from cogvideo.data.clips import ClipSampling, FrameRates, Mode
from cogvideo.data.dataset import read_card
from cogvideo.data.loader import ClipStream
from cogvideo.devices import is_out_of_memory, usable
from cogvideo.files import alone_in
from cogvideo.planning.costs import training
from cogvideo.runs import TYPED, RunFolder
from cogvideo.text import TextTokenizer
from cogvideo.training.checkpoints import Checkpoints
from cogvideo.training.export import (
    Delivery,
    check_codes,
    check_target,
    deliver,
    delivered,
    left_out,
    modules,
    report_of,
)
from cogvideo.training.held_out import HeldOut, held_out
from cogvideo.training.objectives.task import Objective, Task
from cogvideo.training.optim import Optimization
from cogvideo.training.parallel import ParallelSettings, Ranks, any_rank, full_state, process_group
from cogvideo.training.preview import PROMPTED, Preview
from cogvideo.training.recorder import Recorder
from cogvideo.training.run import Job, Watching, learn
from cogvideo.training.start import Choice, StageName, build, configured, continued, own, parents
from cogvideo.training.step import Execution, Trainer


@dataclass(frozen=True)
class Clips:
    """How clips become samples."""

    data: tuple[Path, ...]
    """Folders of `cogvideo data prepare`."""
    split: str = "train"
    """That is learnt from."""
    held_out_split: str = "validation"
    """That the run is judged by; data without any `validation` is judged by nothing."""
    rates: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Frames a second that a sequence can have, lowest first: that of key frames, then of the rounds."""
    fixed_rate: float | None = None
    """One rate for all clips, as one stage in place of the hierarchy; for comparison."""
    random_offset: bool = True
    """Start anywhere in a clip that a sequence fits, else at its first frame."""
    caption_dropout: float = 0.1
    """Share of samples with the unconditional text, which guidance needs."""

    @property
    def settings(self) -> dict[str, Any]:
        """All but where the data is, which decides nothing."""
        return {name: value for name, value in asdict(self).items() if name != "data"}

    def sampling(self, mode: Mode, seed: int, num_frames: int, **special: Any) -> ClipSampling:
        """The same as the loader takes it, which has some more settings for some stages."""
        rates = FrameRates(read_card(self.data[0]).fps, self.rates, num_frames)
        fixed, offset, dropout = self.fixed_rate, self.random_offset, self.caption_dropout
        return ClipSampling(mode, rates, fixed, offset, dropout, seed=seed, **special)


@dataclass(frozen=True)
class Options:
    """What all stages have."""

    clips: Clips
    out: Path
    """The bundle that gets the stage. A run that is killed continues with the same command."""
    init: str | None = None
    """The bundle to start from: a folder, or an id on the Hugging Face Hub; `out` unless given."""
    recipe: Path | None = None
    """A TOML file with a table for this command: options as they stand here. Those given here win."""
    device: str = "auto"
    """cpu, cuda, cuda:0, or auto."""
    overwrite: bool = False
    """Replace the stage where the bundle has it."""
    optimization: Optimization = field(default_factory=Optimization)
    execution: Execution = field(default_factory=Execution)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    watching: Watching = field(default_factory=Watching)


class Plan(NamedTuple):
    """A stage to be trained."""

    stage: StageName
    choice: Choice
    mode: Mode
    """Of sampling."""
    task: Callable[[CogVideoConfig, TextTokenizer], Task]
    """What it learns, once configuration and text tokenizer are known."""
    extra: Mapping[str, Any] = MappingProxyType({})
    """Further settings that decide the result."""
    special: Mapping[str, Any] = MappingProxyType({})
    """Settings of sampling that this stage alone has."""


def train(plan: Plan, options: Options) -> None:
    """Train a stage, or the rest of it, and put it into the bundle.

    Raises:
        ValueError: data, bundle or a setting cannot be used, another run began in the folder, or training diverged.
        OSError: something cannot be written.
    """
    require(len(options.clips.data) > 0, "there is no data, expected a folder of `cogvideo data prepare` with --data")
    shown = plan.stage in PROMPTED or not options.watching.prompts
    require(shown, f"--prompts says nothing to {plan.stage}, which starts from frames: its samples are held-out clips")
    with process_group(usable(options.device), options.parallel) as ranks:
        try:
            _train(plan, options, ranks)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(_too_large(plan, options, ranks)) from error


def _too_large(plan: Plan, options: Options, ranks: Ranks) -> str:
    """What was expected, and which switches help."""
    execution, share = options.execution, options.optimization.batch // ranks.data_size
    samples_a_pass = min(execution.micro_batch or share, share)
    switches = ["a smaller --micro-batch"] if samples_a_pass > 1 else []
    switches += [] if execution.checkpointing else ["--checkpointing"]
    switches += [] if options.optimization.precision == "bfloat16" else ["--precision bfloat16"]
    switches += [] if options.parallel.sharding == "sharded" else ["--sharding sharded with torchrun on more GPUs"]
    expected = ""
    if plan.stage != "superres":
        config = configured(_source(options).config, plan.stage, plan.choice)
        need = training(config, plan.stage, samples_a_pass)
        given = "" if options.optimization.precision == "bfloat16" else " with --precision bfloat16"
        expected = (
            f"; `cogvideo info` expects {need.total / 2**30:.1f} GiB{given}, and "
            f"{need.total_checkpointed / 2**30:.1f} GiB with --checkpointing too"
        )
    helps = ", ".join(switches) or "a smaller model"
    got = f"out of memory with {samples_a_pass} samples a pass{expected}"
    return f"{got}. What helps: {helps}. The last checkpoint is kept"


def _train(plan: Plan, options: Options, ranks: Ranks) -> None:
    settings = options.optimization
    source = _source(options)
    config = configured(source.config, plan.stage, plan.choice)
    named = parents(plan.stage, plan.choice, source)
    stream, entries = _data(plan, options, source, config)
    run = RunFolder(options.out / f".{plan.stage}-run")
    delivery = Delivery(options.out, source, config, plan.stage, plan.choice)
    check_codes(delivery, (*named, *continued(plan.stage, plan.choice)), stream.tokenizer_sha256)
    identity = _identity(plan, options, delivery, named, stream)
    with ExitStack() as locks:
        if any_rank(ranks.rank == 0 and _begin(options, delivery, run, identity, locks)):
            model = build(plan.stage, plan.choice, source, config, settings.dtype, settings.seed)
            objective = Objective(model, plan.task(config, source.text)).to(ranks.device)
            trainer = Trainer(objective, settings, options.execution, options.parallel, ranks)
            checkpoints = Checkpoints(run.path / "checkpoints", options.watching.keep, options.watching.asynchronous)
            seen = entries[0].stream if entries else stream
            draw = Preview(delivery, trainer, seen, options.watching.prompts, run.path / "samples")
            if ranks.rank == 0:
                run.describe(_about(trainer, stream, entries))
                for line in _notes(options, delivery, stream, entries, draw):
                    print(line, file=sys.stderr)
            job = Job(trainer, stream, entries, checkpoints, options.execution, options.watching, draw, draw.lacks)
            learn(job, partial(_recorder, run, options, identity, ranks))
            _finish(plan, delivery, run, trainer)
    if ranks.rank == 0:
        assert run.summary is not None
        print(f"{options.out}: {plan.stage} after {settings.steps:,} steps: {_words(run.summary)}")


def _begin(options: Options, delivery: Delivery, run: RunFolder, identity: dict[str, Any], locks: ExitStack) -> bool:
    """Lock the folder and make it that of this run; whether there is anything to do.

    A run that ended is over as long as the bundle has its stage, else it is delivered again. If it was another one, and
    its stage may be replaced, its folder is set aside.
    """
    locks.enter_context(alone_in(run.path))
    assert delivery.source.folder is not None
    typed = str(options.out if options.init is None else options.init)
    facts = {"from": ".." if delivery.in_place else str(delivery.source.folder.resolve()), TYPED: typed}
    changes, ended = run.changes(identity, facts), run.summary is not None
    if ended and not changes and delivered(delivery):
        advice = "With --overwrite, and other settings such as --seed, a new one begins."
        print(f"This run is over. {advice}", file=sys.stderr)
        return False
    if ended or not run.began:
        goes_on = delivery.in_place and delivery.choice.start == "continue"
        check_target(delivery, ended or options.overwrite or goes_on)
    if ended and changes:
        advice = "pass --overwrite to replace its stage, or another --out, with --init for the bundle to start from"
        require(options.overwrite, f"another run ended in {run.path}: {changes}; {advice}")
        print(f"The run that ended in {run.path} is now in {run.set_aside()}.", file=sys.stderr)
        locks.enter_context(alone_in(run.path))  # the other lock went with the other folder
    run.claim(identity, facts)
    return True


def _notes(
    options: Options, delivery: Delivery, stream: ClipStream, entries: list[HeldOut], draw: Preview
) -> Iterator[str]:
    """Lines about what the run goes without, and what may surprise."""
    if told := left_out(delivery):
        yield told
    if "image_tokenizer" not in delivery.source.components:
        card = stream.datasets[0].card
        yield (
            f"The bundle has no image tokenizer: {delivery.stage} learns the codes of {card.tokenizer} "
            f"(sha256 {card.tokenizer_sha256:.12}), and needs it to be drawn."
        )
    if options.optimization.batch > len(stream):
        yield f"A batch of {options.optimization.batch:,} is larger than the {len(stream):,} clips: it repeats them."
    if not entries:
        yield f"Nothing is held out: no clip of the split {options.clips.held_out_split} is there and long enough."
    if draw.problem and options.watching.sample_every:
        yield draw.problem


def _source(options: Options) -> CogVideo:
    """The bundle to start from."""
    name = options.init if options.init is not None else options.out
    hint = "" if options.init is not None else "; --init names a bundle to start from, and `train tokenizer` makes one"
    try:
        return CogVideo.from_pretrained(name)
    except InputError as error:
        raise InputError(f"{error}{hint}") from error


def _data(plan: Plan, options: Options, source: CogVideo, config: CogVideoConfig) -> tuple[ClipStream, list[HeldOut]]:
    """To learn from, and to be judged by."""
    clips, grid = options.clips, config.layout.grid
    sampling = clips.sampling(plan.mode, options.optimization.seed, config.layout.num_frames, **plan.special)
    tokenizer = source.sha256("image_tokenizer") if "image_tokenizer" in source.components else None
    stream = ClipStream(clips.data, clips.split, sampling, tokenizer, grid)
    if plan.stage == "superres":
        side, got = grid * config.upscaler.ratio, stream.datasets[0].card.high_grid
        require(got == side, f"{clips.data[0]} has high codes of side {got}, expected {side}")
    split, known = clips.held_out_split, sorted({name for each in stream.datasets for name in each.card.splits})
    absent = f"held_out_split is {split!r}, expected one that the data has: {', '.join(known)}"
    require(split in known or split == Clips.held_out_split, absent)
    return stream, held_out(stream, split, options.watching.evaluate_samples)


def _identity(
    plan: Plan, options: Options, delivery: Delivery, named: tuple[str, ...], stream: ClipStream
) -> dict[str, Any]:
    """All that decides the weights, wherever it lies."""
    replaced = own(plan.stage, plan.choice) if delivery.in_place else ()
    starts = (*named, *continued(plan.stage, plan.choice), "text")
    return {
        "stage": plan.stage,
        "choice": asdict(plan.choice),
        "task": dict(plan.extra),
        "config": asdict(delivery.config),
        "parents": {name: delivery.source.sha256(name) for name in starts if name not in replaced},
        "optimization": asdict(options.optimization),
        "clips": options.clips.settings,
        "data": stream.identity,
    }


def _recorder(run: RunFolder, options: Options, identity: dict[str, Any], ranks: Ranks, done: int) -> Recorder:
    first = ranks.rank == 0
    if first:
        run.forget_after(done)
    watching = options.watching
    return Recorder(
        run,
        done=done,
        steps=options.optimization.steps,
        settings=identity,
        tensorboard=watching.tensorboard,
        wandb=watching.wandb,
        is_first=first,
    )


def _finish(plan: Plan, delivery: Delivery, run: RunFolder, trainer: Trainer) -> None:
    """The stage into the bundle; the report goes last, as a sign that all is there."""
    with trainer.averaged():
        state = full_state(trainer.module)
    if trainer.ranks.rank > 0:
        return
    report = report_of(run, trainer.settings.steps)
    deliver(delivery, modules(plan.stage, plan.choice, delivery.config, state), report)
    run.finish(report)


def _about(trainer: Trainer, stream: ClipStream, entries: Sequence[HeldOut]) -> dict[str, Any]:
    """What cards say of a run that its settings do not. Folders have their names alone: cards are published."""
    count = {True: 0, False: 0}
    for parameter in trainer.objective.parameters():
        count[parameter.requires_grad] += parameter.numel()
    judged: Counter[Path] = Counter()
    for entry in entries:  # a rate has all clips that fill it
        here = {each.folder: clips for each, clips in zip(entry.stream.datasets, entry.stream.num_clips, strict=True)}
        judged |= Counter(here)
    return {
        "parameters": {"trained": count[True], "frozen": count[False]},
        "data": {
            each.folder.resolve().name: {
                "trained_on": clips,
                "held_out": judged[each.folder],
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
