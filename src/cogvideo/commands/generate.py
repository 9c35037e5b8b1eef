"""`cogvideo generate`: prompts to video files."""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from json import dumps
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import cogvideo
from cogvideo.bundle.model import POCKET
from cogvideo.commands.outputs import (
    Folder,
    Format,
    Record,
    check_name,
    check_writable,
    is_file,
    make_frames_folder,
    public,
    read_record,
    write_clip,
    write_frame,
)
from cogvideo.commands.prompts import ANY_SEED, LARGEST_SEED, Prompt, read_prompts
from cogvideo.config import DrawingConfig, InputError, require
from cogvideo.data.folders import existing
from cogvideo.data.tables import SPACES
from cogvideo.devices import default_dtype, slowness, usable
from cogvideo.generation.hierarchy import Settings
from cogvideo.media.video import check_rate, read_video
from cogvideo.pipeline import CogVideoPipeline, Drawing, Frame, Given, Upscaling, collect

Type = Literal["auto", "float32", "bfloat16", "float16"]
NAMES: dict[torch.dtype, Type] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MOST_SAMPLES = 100_000
MOST_ROUNDS = 6
"""Of interpolation: 257 frames of four seconds."""
FILES = ("image", "extend", "first", "last")
"""Choices that name a file."""


@dataclass(frozen=True)
class Choices(Drawing):
    """What decides a clip beside its prompt and its seed."""

    model: str = POCKET
    """Folder of a bundle, its id on the Hugging Face Hub, or pocket, the one in the box."""
    image: Path | None = None
    """A picture that starts to move: the first frame. Of a video, its first frame is taken."""
    extend: Path | None = None
    """A video that goes on: its frames, at the rate of the clip (8 a second with three rounds), stay, and up to four
    seconds follow."""
    first: Path | None = None
    """The first frame, together with --last."""
    last: Path | None = None
    """The last frame, together with --first: what is between is made."""
    loop: bool = False
    """End where the clip begins, so that it can be repeated without a jump."""
    negative: str | None = None
    """What to move away from, in place of the model's unconditional text, which an empty one is, too. It acts where
    there is guidance."""
    rounds: int = 3
    """Of interpolation: 0 to 3 give 5, 9, 17, 33 frames of four seconds; up to 6, each doubles the rate."""
    superres: bool = True
    """Enlarge the frames, where the model can."""
    dtype: Type = "auto"
    """Of the weights; auto is float32 on a CPU and bfloat16 on a GPU."""

    def __post_init__(self) -> None:
        require(0 <= self.rounds <= MOST_ROUNDS, f"rounds is {self.rounds}, expected 0 to {MOST_ROUNDS}")
        starts = [name for name in ("image", "extend", "first") if getattr(self, name) is not None]
        require(len(starts) < 2, f"got --{' and --'.join(starts)}, expected one start")
        pair = (self.first is None) == (self.last is None)
        require(pair, "got one of --first and --last, expected both; --image is a first frame alone")
        end = "--last" if self.last else "--extend"
        require(not (self.loop and (self.last or self.extend)), f"got --loop and {end}, expected one end")

    def found(self) -> Choices:
        """The same, with files by the names that they have on disk."""
        paths: dict[str, Any] = {name: path for name in FILES if (path := getattr(self, name)) is not None}
        paths = {name: existing(path) for name, path in paths.items()}
        return replace(self, **paths)

    def settings(self, own: DrawingConfig) -> Settings:
        """Of the stages."""
        drawn = super().settings(own)
        return replace(drawn, rounds=self.rounds, guidance=replace(drawn.guidance, negative=self.negative or None))

    @property
    def record(self) -> Record:
        """All of them, for whoever gets the clip: of paths on this machine the name alone, and of a file its content,
        since another one may come to have its name."""
        paths = {name: path for name in FILES if (path := getattr(self, name)) is not None}
        for path in (Path(self.model), *paths.values()):
            check_name(path)  # the record is UTF-8
        found = asdict(self) | {name: public(path) for name, path in paths.items()}
        found |= {"model": public(Path(self.model)), "negative": self.negative or None}
        return found | {"sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}}


@dataclass(frozen=True)
class Files:
    """Where clips go, and how they are told."""

    output: Path = Path("out")
    """A file (.mp4, .gif, .webp) for a single clip, which is replaced, else a folder, in which nothing is."""
    format: Format = "mp4"
    """Of clips in a folder; png is a folder of frames."""
    fps: float | None = None
    """Frames a second of the files, to play the same frames faster or slower."""
    preview: bool = False
    """Write each frame as PNG as soon as it is finished, into a new folder NAME-frames beside the clip."""
    json: bool = False
    """Print the record of each clip, a line each, instead of its path."""


@dataclass(frozen=True)
class Execution:
    """How the work is done, which changes its speed and its memory."""

    device: str = "auto"
    """cpu, cuda, cuda:0, or auto."""
    batch: int = 1
    """Clips that are made at once."""
    offload: bool = False
    """Keep in memory only the weights at work: slower, for large models."""

    def __post_init__(self) -> None:
        require(self.batch > 0, f"batch is {self.batch}, expected a positive number")


def generate(
    prompt: tuple[str, ...] = (),
    /,
    *,
    prompts: Path | None = None,
    seed: int | None = None,
    samples: int = 1,
    from_sidecar: Path | None = None,
    choices: Choices = Choices(),  # frozen
    files: Files = Files(),
    execution: Execution = Execution(),
) -> int:
    """Make clips of prompts. A JSON file beside each, its sidecar, says how it was made, and so does the clip itself.

    Ctrl-C keeps what is finished and ends with status 130.

    Args:
        prompt: one or several texts. Write -- before those that begin with a dash.
        prompts: a file of prompts: a line each, or a table (.csv, .tsv, .jsonl, .parquet) with the column prompt and,
            if wanted, seed. What is finished in the output folder is not made again.
        seed: of the noise of the first clip; the next has the next number. Random, and recorded, unless given, or -1.
        samples: clips of each prompt.
        from_sidecar: make the clip of a sidecar again: the same codes, or status 1. Other
            options that decide a clip are refused, but for those that say what is the default anyway.
        choices: what decides a clip beside its prompt and its seed.
        files: where clips go.
        execution: how the work is done.

    Raises:
        ValueError: a prompt, the model or a setting cannot be used.
        OSError: something cannot be read or written.
    """
    before: Record = {}
    seed = None if seed == ANY_SEED else seed
    prompts, from_sidecar = (None if path is None else existing(path) for path in (prompts, from_sidecar))
    choices = choices.found()
    if from_sidecar is None:
        listed = _listed(prompt, prompts, seed, samples)
    else:
        alone = not prompt and prompts is None and seed is None and samples == 1
        named = {name: getattr(choices, name) for name in ("model", *FILES)}
        require(
            alone and choices == Choices(**named),
            "got --from-sidecar with a prompt, --seed, --samples or an option that decides a clip, which the sidecar "
            "brings; expected none but --model, --image, --extend, --first and --last, where these lie elsewhere now",
        )
        before = _sidecar(from_sidecar)
        listed, choices = [Prompt(before["prompt"], before["seed"])], _choices(from_sidecar, before, named)
    for path in (prompts, from_sidecar, *(getattr(choices, name) for name in FILES)):
        is_other = path is None or not (path.exists() and files.output.exists() and path.samefile(files.output))
        require(is_other, f"output is {files.output}, which is read, too: give another name")
    to_file = is_file(files.output, len(listed))
    suits = not to_file or files.format in ("mp4", files.output.suffix.lower()[1:])
    require(suits, f"output is {files.output} and format {files.format}, expected one format")
    maker = Maker(choices, execution)
    _check_origin(from_sidecar, before, maker.record)
    fps = before.get("fps", maker.fps) if files.fps is None else files.fps
    check_rate(files.output.suffix if to_file else f".{files.format}", fps)
    record = maker.record | {"fps": fps}
    folder = Folder(files.output, files.format)
    if to_file:
        wanted = [Wanted(listed[0].text, _seed(listed[0]), files.output, listed[0].where)]
    else:
        wanted = list(_wanted(listed, record, folder, skip=prompts is not None))
    same = True
    for clip in maker.make(wanted, fps, files.preview):
        path = clip.path if to_file else folder.settled(clip.path)
        made = {"file": path.name, "prompt": clip.prompt, "seed": clip.seed} | record | clip.figures
        write_clip(path, clip.frames, fps, made)
        print(dumps(made) if files.json else path, flush=True)
        same = same and made["codes"] == before.get("codes", made["codes"])
    if len(wanted) < len(listed):
        print(f"{len(listed) - len(wanted)} of {len(listed)} clips were there already", file=sys.stderr)
    if not same:
        there = f"torch {before.get('torch')} on {before.get('device')}"
        print(f"these are other codes than those of {from_sidecar}, which {there} made", file=sys.stderr)
    return int(not same)


# What is to be made


class Wanted(NamedTuple):
    """A clip that is to be made."""

    prompt: str
    seed: int
    path: Path
    where: str
    """Place in a list, for messages."""


def _listed(prompt: tuple[str, ...], path: Path | None, seed: int | None, samples: int) -> list[Prompt]:
    """Each prompt as often as it is wanted, with its seed where one is given."""
    fits = seed is None or 0 <= seed <= LARGEST_SEED
    require(fits, f"seed is {seed}, expected a number in [0, {LARGEST_SEED}], or -1 for any")
    require(0 < samples <= MOST_SAMPLES, f"samples is {samples}, expected 1 to {MOST_SAMPLES}")
    require(path is None or not prompt, "got prompts and a file of prompts, expected one of them")
    require(path is not None or len(prompt) > 0, "there is no prompt, expected one or several texts, or --prompts FILE")
    listed = [Prompt(each.translate(SPACES)) for each in prompt] if path is None else read_prompts(path)
    found = []
    for place, each in enumerate(listed):
        first = each.seed if seed is None or each.seed is not None else seed + place * samples
        last = (first or 0) + samples - 1
        require(last <= LARGEST_SEED, f"the seed of the last clip would be {last}, expected {LARGEST_SEED} at most")
        for number in range(samples):
            found.append(each._replace(seed=None if first is None else first + number))
    return found


def _seed(prompt: Prompt) -> int:
    return secrets.randbelow(2**31) if prompt.seed is None else prompt.seed


def _wanted(listed: Sequence[Prompt], record: Record, folder: Folder, skip: bool) -> Iterator[Wanted]:
    """The clips that the folder lacks. Which model has made one, its hash says, wherever it lay."""
    alike = {name: value for name, value in record.items() if name not in ("model", *FILES)}
    there = set()
    # Those with a seed first: any clip of its prompt will do for one without.
    for place, each in sorted(enumerate(listed), key=lambda pair: pair[1].seed is None):
        if skip and folder.take(alike, each.text, each.seed):
            there.add(place)
    for place, each in enumerate(listed):
        if place not in there:
            yield Wanted(each.text, _seed(each), folder.name(each.text), each.where)


# From a sidecar


def _sidecar(path: Path) -> Record:
    found = read_record(path)
    told = f"{path} is no sidecar, expected the JSON file beside a clip"
    if found is None:
        path.stat()  # if it is missing, say that
        raise InputError(told)
    require("prompt" in found and "seed" in found, told)
    require(isinstance(found["prompt"], str), f"{path}: prompt is {found['prompt']!r:.60}, expected a text")
    fits = type(found["seed"]) is int and 0 <= found["seed"] <= LARGEST_SEED
    require(fits, f"{path}: seed is {found['seed']!r:.60}, expected a number in [0, {LARGEST_SEED}]")
    require(isinstance(found.get("sha256", {}), dict), f"{path}: sha256 is no table of hashes")
    require(_fits(found.get("fps", 8.0), float), f"{path}: fps is {found.get('fps')!r:.60}, expected a number")
    return found


def _choices(path: Path, record: Record, named: Record) -> Choices:
    """What decided the clip. A model or a file that is named beside the sidecar is where its own lies now."""
    hints = get_type_hints(Choices)
    missing = sorted(hints.keys() - record.keys())
    require(not missing, f"{path} lacks {', '.join(missing)}: another version of cogvideo wrote it")
    for name, hint in hints.items():
        require(_fits(record[name], hint), f"{path}: {name} is {record[name]!r:.60}, expected {_in_words(hint)}")
    found: dict[str, Any] = {name: record[name] for name in hints}
    found |= {name: value for name, value in named.items() if value != getattr(Choices, name)}
    for name in FILES:
        found[name] = None if found[name] is None else _lies(path, name, found[name])
    if found["model"] != POCKET and "/" not in found["model"]:  # no id on the Hub
        found["model"] = str(_lies(path, "model", found["model"]))
    try:
        return Choices(**found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _lies(sidecar: Path, option: str, name: str | Path) -> Path:
    """Where a file or folder of a sidecar lies: seen from here, else from its own folder."""
    found = [path for folder in (Path(), sidecar.parent) if (path := existing(folder / name)).exists()]
    told = f"{sidecar} was made with {name}, which is not here: say with --{option} where it lies"
    require(len(found) > 0, told)
    return found[0]


def _in_words(hint: Any) -> str:
    """What a value of a sidecar is to be."""
    if get_args(hint):
        return " or ".join(map(_in_words, get_args(hint)))
    words = {Path: "a path", str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(hint, "null" if hint is type(None) else str(hint))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a sidecar is one of a choice's type."""
    if hint is Path:
        return isinstance(value, str) and "\0" not in value
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_fits(value, each) for each in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is hint and "\0" not in str(value)


def _check_origin(path: Path | None, before: Record, record: Record) -> None:
    """Refuse a model or files that are not those of the sidecar."""
    if path is not None:
        same = before.get("bundle") == record["bundle"]
        require(same, f"{path} was made with another model than {record['model']}: say with --model where it lies")
        changed = [name for name, value in record["sha256"].items() if before.get("sha256", {}).get(name) != value]
        require(not changed, f"{path} was made with another file than {', '.join(record[name] for name in changed)}")


# Making it


class Made(NamedTuple):
    """A finished clip."""

    prompt: str
    seed: int
    path: Path
    frames: UInt8[np.ndarray, "frames height width 3"]
    figures: Record
    """For its record."""


class Maker:
    """A model that makes clips with one set of choices.

    Args:
        choices: what decides them.
        execution: how the work is done.

    Raises:
        ValueError: the model, a file or a setting cannot be used.
        OSError: a file cannot be read.
    """

    def __init__(self, choices: Choices, execution: Execution) -> None:
        self.device = usable(execution.device)
        if choices.dtype == "auto":
            choices = replace(choices, dtype=NAMES[default_dtype(self.device)])
        dtype = getattr(torch, choices.dtype)
        self.pipeline = CogVideoPipeline.from_pretrained(choices.model, dtype, self.device, execution.offload)
        model = self.pipeline.model
        self.choices, self.execution = choices.of(model.config.drawing), execution
        self.settings = choices.settings(model.config.drawing)
        self.record = self.choices.record | {"bundle": model.fingerprint}
        """What decides all clips."""
        self.fps = self.pipeline.fps(self.settings)

    @cached_property
    def given(self) -> Given:
        """Frames of the files; a part of the model is loaded for them."""
        choices, size = self.choices, self.pipeline.model.config.frame_side

        def codes(path: Path | None, most: int | None = 1) -> Int64[Tensor, "frames slots"] | None:
            if path is None:
                return None
            return self.pipeline.encode(read_video(path, self.fps, size, max_frames=most).frames)

        first = codes(choices.extend, None) if choices.extend else codes(choices.image or choices.first)
        last = codes(choices.last)
        return Given(first, None if last is None else last[0], choices.loop)

    def make(self, wanted: Sequence[Wanted], fps: float, preview: bool) -> Iterator[Made]:
        """Clips as they are finished. All prompts are looked at, and folders made, before the first of them.

        Raises:
            ValueError: a prompt cannot be used, or there is too little memory.
        """
        self._check(wanted)
        groups = [wanted[start : start + self.execution.batch] for start in range(0, len(wanted), self.execution.batch)]
        for folder in {each.path.parent for each in wanted}:
            folder.mkdir(parents=True, exist_ok=True)
            check_writable(folder)
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        if slow := slowness(getattr(torch, self.choices.dtype), self.device):
            console.print(slow)
        for group in groups:
            stream = self._stream(group)
            watched = _watched(_previewed(stream, group) if preview else stream, console)
            clips = collect(watched, fps)
            for each, frames, codes in zip(group, clips.frames, clips.codes, strict=True):
                yield Made(each.prompt, each.seed, each.path, frames, self._figures(frames, codes))

    def _check(self, wanted: Sequence[Wanted]) -> None:
        """Refuse what cannot be made; a prompt of a list by its line."""
        if wanted:
            self.pipeline.check_memory(self.settings, min(self.execution.batch, len(wanted)))
        for each in reversed({each.prompt: each for each in reversed(wanted)}.values()):  # the first of equal ones
            try:
                self._stream([each])
            except InputError as error:
                raise InputError(f"{each.where}: {error}" if each.where else str(error)) from error

    def _stream(self, group: Sequence[Wanted]) -> Iterator[Frame]:
        generators = [torch.Generator().manual_seed(each.seed) for each in group]
        upscaling = Upscaling(self.choices.superres, self.choices.superres_sampling(self.pipeline.model.config.drawing))
        return self.pipeline.stream([each.prompt for each in group], generators, self.settings, upscaling, self.given)

    def _figures(
        self, frames: UInt8[np.ndarray, "frames height width 3"], codes: Int64[Tensor, "frames slots"]
    ) -> Record:
        return {
            "frames": len(frames),
            "width": frames.shape[2],
            "height": frames.shape[1],
            "codes": hashlib.sha256(codes.numpy().tobytes()).hexdigest(),
            "device": str(self.device),
            "torch": torch.__version__,
            "cogvideo": cogvideo.__version__,
        }


def _previewed(stream: Iterator[Frame], group: Sequence[Wanted]) -> Iterator[Frame]:
    """The frames, each written before it is passed on."""
    folders = [make_frames_folder(each.path) for each in group]
    for folder, each in zip(folders, group, strict=True):
        print(f"{folder}: frames of seed {each.seed}", file=sys.stderr)
    for frame in stream:
        for folder, pixels in zip(folders, frame.pixels, strict=True):
            write_frame(folder, frame.place, pixels)
        yield frame


def _watched(stream: Iterator[Frame], console: Console) -> Iterator[Frame]:
    """The frames, with a bar that says how far they are."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        for number, frame in enumerate(stream, 1):
            bar.update(task, description=frame.stage, total=frame.num_frames, completed=number)
            yield frame
