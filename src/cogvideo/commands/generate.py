"""`cogvideo generate`: from prompts to video files."""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from json import dumps
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import cogvideo
from cogvideo.commands.choices import FILES, Choices, Sidecar, Type
from cogvideo.commands.outputs import (
    Folder,
    Format,
    Record,
    check_writable,
    is_file,
    make_frames_folder,
    sidecar_of,
    write_clip,
    write_frame,
)
from cogvideo.commands.prompts import ANY_SEED, ListedPrompt, read_prompts
from cogvideo.config import InputError, Limited, Positive, require
from cogvideo.data.folders import existing
from cogvideo.data.tables import LINE_SEPARATORS
from cogvideo.devices import default_dtype, slowness, usable
from cogvideo.generation.request import MAX_SEED, Request
from cogvideo.media.colors import Pixels
from cogvideo.media.video import check_rate, read_video
from cogvideo.pipeline import CogVideoPipeline, Frame, collect

NAMES: dict[torch.dtype, Type] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MAX_SAMPLES = 100_000


@dataclass(frozen=True)
class Files:
    """Output."""

    output: Path = Path("out")
    """File for a single clip (.mp4, .gif, .webp), which is replaced, or a folder, in which no file is replaced."""
    format: Format = "mp4"
    """Format of clips in a folder; png writes a folder of frames per clip."""
    fps: float | None = None
    """Frames per second of the files; plays the same frames faster or slower."""
    preview: bool = False
    """Write each frame as a PNG file as soon as it is finished, into a new folder NAME-frames next to the clip."""
    json: bool = False
    """Print the sidecar of each clip as one line of JSON, instead of its path."""


@dataclass(frozen=True)
class Execution(Limited):
    """Device, batch and memory. They change clips by no more than rounding."""

    device: str = "auto"
    """Device to run on: cpu, cuda, cuda:0, or auto."""
    batch: Positive[int] = 1
    """Number of clips to generate at once."""
    offload: bool = False
    """Keep only the weights in use in memory: slower, for large models."""


def generate(
    prompt: tuple[str, ...] = (),
    /,
    *,
    prompts: Path | None = None,
    seed: int | None = None,
    samples: int = 1,
    from_sidecar: Path | None = None,
    choices: Choices = Choices(),  # noqa: B008  # frozen
    files: Files = Files(),
    execution: Execution = Execution(),
) -> int:
    """Generate clips from prompts. A JSON file next to each clip, its sidecar, records how it was made.

    Ctrl-C keeps finished clips and exits with status 130.

    Args:
        prompt: Prompts, each in quotes. Write -- before prompts that start with a dash.
        prompts: File of prompts: one per line, or a table (.csv, .tsv, .jsonl, .parquet) with a column prompt and an
            optional column seed. Clips that the output folder already has are skipped.
        seed: Seed of the first clip; each further clip has the next number. Random by default, or if -1.
        samples: Number of clips per prompt.
        from_sidecar: Sidecar of a clip to regenerate; the exit status is 1 if the codes differ. Cannot be combined
            with a prompt, nor with options that change the clip.
        choices: Model and content.
        files: Output.
        execution: Device, batch and memory.
    """
    prompts, from_sidecar = (None if path is None else existing(path) for path in (prompts, from_sidecar))
    choices, sidecar = choices.found(), None
    if from_sidecar is None:
        if len(prompt) > 1 and not any(" " in each for each in prompt):
            print(f"{len(prompt)} prompts of one word each: put a prompt of several words in quotes", file=sys.stderr)
        listed = _listed(prompt, prompts, None if seed == ANY_SEED else seed, samples)
    else:
        is_alone = not prompt and prompts is None and seed in (None, ANY_SEED) and samples == 1
        got = "got --from-sidecar with a prompt or an option that the sidecar sets"
        moved = "except --model, --image, --extend, --first and --last if those files were moved"
        require(is_alone and choices == Choices(**choices.places), f"{got}, expected none, {moved}")
        sidecar = Sidecar(from_sidecar)
        listed = [ListedPrompt(sidecar.clip.prompt, sidecar.clip.seed, str(from_sidecar))]
        choices = sidecar.choices(choices.places)
    to_file = is_file(files.output, len(listed))
    for replaced in (files.output, sidecar_of(files.output)) if to_file else ():
        for path in (prompts, from_sidecar, *choices.files.values()):
            is_other = path is None or not (path.exists() and replaced.exists() and path.samefile(replaced))
            require(is_other, f"output is {files.output}, which would replace the input {path}: choose another name")
    suits = not to_file or files.format in ("mp4", files.output.suffix.lower()[1:])
    require(suits, f"output is {files.output} and format {files.format}, expected one format")
    maker = ClipMaker(choices, execution)
    if sidecar is not None:
        sidecar.check_origin(maker.record)
    rates = (files.fps, None if sidecar is None else sidecar.clip.fps, maker.fps)
    fps = next(rate for rate in rates if rate is not None)
    check_rate(files.output.suffix if to_file else f".{files.format}", fps)
    record, folder = maker.record | {"fps": fps}, Folder(files.output, files.format)
    if to_file:
        wanted = [PlannedClip(listed[0].text, _seed(listed[0]), files.output, listed[0].where)]
    else:
        wanted = list(_wanted(listed, record, folder, skip=prompts is not None))
    is_same = True
    for clip, pixels, figures in maker.make(wanted, fps, files.preview):
        with nullcontext(clip.path) if to_file else folder.holding(clip.path) as path:
            made: Record = {"file": path.name, "prompt": clip.prompt, "seed": clip.seed} | record | figures
            write_clip(path, pixels, fps, made)
        print(dumps(made) if files.json else path, flush=True)
        is_same = sidecar is None or sidecar.is_again(made["codes"])
    if len(wanted) < len(listed):
        print(f"skipped {len(listed) - len(wanted)} of {len(listed)} clips, which exist already", file=sys.stderr)
    return int(not is_same)


class PlannedClip(NamedTuple):
    """A clip to generate."""

    prompt: str
    seed: int
    path: Path
    where: str
    """Place in a list, for messages."""


def _listed(prompt: tuple[str, ...], path: Path | None, seed: int | None, samples: int) -> list[ListedPrompt]:
    """Each prompt, once per sample, with its seed if one is given."""
    fits = seed is None or 0 <= seed <= MAX_SEED
    require(fits, f"seed is {seed}, expected a number in [0, {MAX_SEED}], or -1 for any")
    require(0 < samples <= MAX_SAMPLES, f"samples is {samples}, expected 1 to {MAX_SAMPLES}")
    require(path is None or not prompt, "got prompts and a file of prompts, expected one of them")
    require(path is not None or len(prompt) > 0, "got no prompt, expected texts or --prompts FILE")
    listed = [ListedPrompt(each.translate(LINE_SEPARATORS)) for each in prompt] if path is None else read_prompts(path)
    found = []
    for place, each in enumerate(listed):
        first = each.seed if seed is None or each.seed is not None else seed + place * samples
        last = (first or 0) + samples - 1
        require(last <= MAX_SEED, f"the seed of the last clip would be {last}, expected {MAX_SEED} at most")
        for number in range(samples):
            found.append(each._replace(seed=None if first is None else first + number))
    return found


def _seed(prompt: ListedPrompt) -> int:
    return secrets.randbelow(2**31) if prompt.seed is None else prompt.seed


def _wanted(listed: Sequence[ListedPrompt], record: Record, folder: Folder, skip: bool) -> Iterator[PlannedClip]:
    """The clips that the folder lacks. The model is identified by its hash, wherever it was."""
    alike = {name: value for name, value in record.items() if name not in ("model", *FILES)}
    there = set()
    # Prompts with a seed first: for one without, any clip of the prompt will do.
    for place, each in sorted(enumerate(listed), key=lambda pair: pair[1].seed is None):
        if skip and folder.take(alike, each.text, each.seed):
            there.add(place)
    for place, each in enumerate(listed):
        if place not in there:
            yield PlannedClip(each.text, _seed(each), folder.name(each.text), each.where)


class ClipMaker:
    """A model that generates clips with one set of choices."""

    def __init__(self, choices: Choices, execution: Execution) -> None:
        self.device, self.execution = usable(execution.device), execution
        if choices.dtype == "auto":
            choices = replace(choices, dtype=NAMES[default_dtype(self.device)])
        self.choices, self.dtype = choices, getattr(torch, choices.dtype)
        self.pipeline = CogVideoPipeline.from_pretrained(
            choices.model, self.dtype, self.device, execution.offload, choices.adapters, choices.channel
        )
        model = self.pipeline.model
        choices.check_seconds(model.config)
        model.config = choices.sized(model.config, choices.superres and "superres" in model.components)
        self.settings = choices.settings(model.config)
        self.record = choices.record(self.settings) | {"bundle": model.fingerprint}
        """Choices and hashes, the same for all clips."""
        self.fps = self.pipeline.fps(self.settings)

    @cached_property
    def request(self) -> Request:
        """A request without prompts, with the frames of the files, which the tokenizer encodes."""
        choices = self.choices
        first = self._codes(choices.extend or choices.image or choices.first, None if choices.extend else 1)
        last = self._codes(choices.last, 1)
        return Request((), (), self.settings, first, None if last is None else last[0], choices.loop)

    def _codes(self, path: Path | None, max_frames: int | None) -> Int64[Tensor, "frames slots"] | None:
        if path is None:
            return None
        size, fit = self.pipeline.model.config.frame_size, self.choices.fit
        return self.pipeline.encode(read_video(path, self.fps, size, fit=fit, max_frames=max_frames).frames)

    def make(
        self, wanted: Sequence[PlannedClip], fps: float, preview: bool
    ) -> Iterator[tuple[PlannedClip, Pixels, Record]]:
        """Clips as they are finished, with figures for their records. Before the first one, all prompts are checked and
        folders are created.
        """
        self._check(wanted)
        size = self.execution.batch
        groups = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        for folder in {each.path.parent for each in wanted}:
            folder.mkdir(parents=True, exist_ok=True)
            check_writable(folder)
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        if slow := slowness(self.dtype, self.device):
            console.print(slow)
        for group in groups:
            frames = self._frames(group)
            watched = _watched(_previewed(frames, group) if preview else frames, console)
            try:
                clips = collect(watched, fps)
            except KeyboardInterrupt:
                console.print(f"stopped at seed {', '.join(str(each.seed) for each in group)}")
                raise
            for each, pixels, codes in zip(group, clips.frames, clips.codes, strict=True):
                yield each, pixels, self._figures(pixels, codes)

    def _check(self, wanted: Sequence[PlannedClip]) -> None:
        """Refuse clips that cannot be generated; a prompt from a list is named by its line."""
        if wanted:
            self.pipeline.check_memory(self.settings, min(self.execution.batch, len(wanted)))
        for each in reversed({each.prompt: each for each in reversed(wanted)}.values()):  # the first of equal ones
            try:
                self._frames([each])
            except InputError as error:
                raise InputError(f"{each.where}: {error}" if each.where else str(error)) from error

    def _frames(self, group: Sequence[PlannedClip]) -> Iterator[Frame]:
        generators = [torch.Generator().manual_seed(each.seed) for each in group]
        prompts = [each.prompt for each in group]
        return self.pipeline.frames(replace(self.request, prompts=prompts, generators=generators))

    def _figures(self, frames: Pixels, codes: Int64[Tensor, "frames slots"]) -> Record:
        return {
            "frames": len(frames),
            "width": frames.shape[2],
            "height": frames.shape[1],
            "codes": hashlib.sha256(codes.numpy().tobytes()).hexdigest(),
            "device": str(self.device),
            "torch": torch.__version__,
            "cogvideo": cogvideo.__version__,
        }


def _previewed(stream: Iterator[Frame], group: Sequence[PlannedClip]) -> Iterator[Frame]:
    """Write each frame before it is passed on."""
    folders = [make_frames_folder(each.path) for each in group]
    for folder, each in zip(folders, group, strict=True):
        print(f"{folder}: frames of seed {each.seed}", file=sys.stderr)
    for frame in stream:
        for folder, pixels in zip(folders, frame.pixels, strict=True):
            write_frame(folder, frame.place, pixels)
        yield frame


def _watched(stream: Iterator[Frame], console: Console) -> Iterator[Frame]:
    """Show the progress of the frames."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        for number, frame in enumerate(stream, 1):
            bar.update(task, description=frame.stage, total=frame.num_frames, completed=number)
            yield frame
