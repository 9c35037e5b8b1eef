"""Options of `cogvideo generate` that determine a clip: from the command line, or from the sidecar of a clip."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import msgspec

from cogvideo.bundle.adapters import scales
from cogvideo.bundle.model import POCKET
from cogvideo.commands.outputs import Record, check_name, public, read_record
from cogvideo.config import CLIP_SECONDS, CogVideoConfig, InputError, require, size_of
from cogvideo.data.folders import existing
from cogvideo.files import sha256_of
from cogvideo.generation.request import (
    ADDED,
    MAX_ROUNDS,
    MAX_SEED,
    GenerationSettings,
    SamplingOptions,
    check_seconds,
    shape_of,
    usual_rounds,
)
from cogvideo.media.video import check_rate

Type = Literal["auto", "float32", "bfloat16", "float16"]
T = TypeVar("T")
FILES = ("image", "extend", "first", "last")
"""Choices that name a file."""


@dataclass(frozen=True)
class Choices(SamplingOptions):
    """Model and content. Sampling options default to the model's own values."""

    model: str = POCKET
    """Model: pocket (the model in the box), a folder of a bundle, or an ID on the Hugging Face Hub."""
    channel: str | None = None
    """Name of an additional video channel in the model, such as a style."""
    adapter: tuple[str, ...] = ()
    """Names of adapters in the model, or their folders, each with its scale as NAME:SCALE; 1 unless given."""
    image: Path | None = None
    """Image to animate: the first frame of the clip. For a video, its first frame is used."""
    extend: Path | None = None
    """Video to continue: its frames are kept, at the rate of the clip (8 per second with three rounds), and up to
    four seconds follow, or --seconds."""
    first: Path | None = None
    """Image for the first frame; requires --last."""
    last: Path | None = None
    """Image for the last frame; requires --first."""
    loop: bool = False
    """End the clip where it starts, so that it repeats without a jump."""
    negative: str | None = None
    """Text that guidance moves away from; the model's own unconditional text if empty."""
    seconds: float | None = None
    """Length of the clip in seconds, such as 4, 2, 1 or 0.5: one that the key frames were trained on, the longest of
    them by default. A longer clip, such as 20, continues in overlapping sequences."""
    rounds: int | None = None
    """Rounds of interpolation: 0 to 3 give 5, 9, 17 or 33 frames in four seconds. Up to 6; each doubles the frame
    rate. By default, as many as give 8 frames per second."""
    size: str | None = None
    """Width and height of the clip in pixels, such as 128x72, each at most the side of the model's square frames; by
    default, the shape that the model was trained on."""
    fit: Literal["crop", "letterbox"] = "crop"
    """Treatment of images and videos of another shape: crop to the center, or add white bars."""
    superres: bool = True
    """Enlarge the frames, if the model can."""
    dtype: Type = "auto"
    """Data type of the weights; auto is float32 on CPUs and bfloat16 on GPUs."""

    def __post_init__(self) -> None:
        fits = self.rounds is None or 0 <= self.rounds <= MAX_ROUNDS
        require(fits, f"rounds is {self.rounds}, expected 0 to {MAX_ROUNDS}")
        is_positive = self.seconds is None or self.seconds > 0
        require(is_positive, f"seconds is {self.seconds}, expected a positive number")
        starts = [name for name in ("image", "extend", "first") if getattr(self, name) is not None]
        require(len(starts) < 2, f"got --{' and --'.join(starts)}, expected only one of them")
        pair = (self.first is None) == (self.last is None)
        require(pair, "got one of --first and --last, expected both; for a first frame alone, pass --image")
        end = "--last" if self.last else "--extend"
        require(not (self.loop and (self.last or self.extend)), f"got --loop and {end}, expected only one of them")

    @property
    def files(self) -> dict[str, Path]:
        """Given files, by option."""
        return {name: path for name in FILES if (path := getattr(self, name)) is not None}

    @property
    def places(self) -> Record:
        """Locations of the model and of files, which do not change the clip."""
        return {"model": self.model, "adapter": self.adapter, **self.files}

    @property
    def adapters(self) -> dict[str, float]:
        """Scale of each adapter."""
        return scales(self.adapter)

    def found(self) -> Choices:
        """The same, with file names as they are on disk."""
        paths: dict[str, Any] = {name: existing(path) for name, path in self.files.items()}
        return replace(self, **paths)

    def settings(self, own: CogVideoConfig) -> GenerationSettings:
        """Generation settings for a model."""
        settings = super().settings(own).lasting(self.seconds or own.seconds, own)
        return replace(
            settings,
            rounds=usual_rounds(settings.duration) if self.rounds is None else self.rounds,
            negative=self.negative or None,
            should_enlarge=self.superres,
        )

    def check_seconds(self, own: CogVideoConfig) -> None:
        """Refuse a length that the model's key frames were never trained on."""
        if self.seconds is None:
            return
        check_seconds(self.seconds, own)
        is_known = bool(own.sequential.durations) or self.seconds >= CLIP_SECONDS
        require(is_known, f"seconds is {self.seconds}, but this model makes clips of {CLIP_SECONDS:g} seconds or more")

    def sized(self, own: CogVideoConfig, is_enlarged: bool) -> CogVideoConfig:
        """The configuration of a model for clips of this size."""
        if self.size is None:
            return own
        return own.shaped(shape_of(size_of(self.size), own, own.upscaler.ratio if is_enlarged else 1))

    def record(self, settings: GenerationSettings) -> Record:
        """All choices, to share with the clip: only the names of private paths, and a hash of each file."""
        for path in (Path(self.model), *self.files.values()):
            check_name(path)  # the record is UTF-8
        found = asdict(self) | {name: public(path) for name, path in self.files.items()}
        found |= {"model": public(Path(self.model)), "negative": settings.negative} | settings.sampling_options
        found |= {"adapter": [f"{public(Path(name))}:{scale:g}" for name, scale in self.adapters.items()]}
        found |= {"seconds": self.seconds or settings.duration, "rounds": settings.rounds}
        return found | {"sha256": {name: _hash(path) for name, path in self.files.items()}}


@dataclass(frozen=True)
class ClipRecord:
    """Fields of a sidecar other than the choices."""

    prompt: str
    seed: int
    fps: float | None
    sha256: dict[str, str]

    def __post_init__(self) -> None:
        require(0 <= self.seed <= MAX_SEED, f"seed is {self.seed}, expected 0 to {MAX_SEED}")
        if self.fps is not None:
            check_rate(".mp4", self.fps)


class Sidecar:
    """The record of a clip to regenerate, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path, found = path, read_record(path)
        if found is None:
            path.stat()  # a missing file is an OSError
        if found is None or "prompt" not in found or "seed" not in found:
            raise InputError(f"{path} is not a sidecar, expected the JSON file next to a clip")
        self.record: Record = {"fps": None, "sha256": {}} | ADDED | found
        self.clip = self._converted(ClipRecord)

    def choices(self, places: Record) -> Choices:
        """The clip's choices, with the given locations of the model and files."""
        missing = sorted({each.name for each in fields(Choices)} - self.record.keys())
        require(not missing, f"{self.path} lacks {', '.join(missing)}: another version of cogvideo wrote it")
        choices = self._converted(Choices)
        moved = {name: value for name, value in places.items() if value != getattr(Choices, name)}
        try:
            choices = replace(choices, **moved)
            found: Record = {name: self._find(name, path) for name, path in choices.files.items()}
            if choices.model != POCKET and "/" not in choices.model:  # not an ID on the Hub
                found["model"] = str(self._find("model", Path(choices.model)))
            choices = replace(choices, **found)
            choices.settings(CogVideoConfig())  # all values are given, so this model's own do not matter
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        return choices

    def check_origin(self, record: Record) -> None:
        """Refuse a model or files other than those of the clip."""
        same = self.record.get("bundle") == record["bundle"]
        require(
            same,
            f"{self.path} was made with a different model from {record['model']}: pass the clip's model with --model",
        )
        changed = [record[name] for name, value in record["sha256"].items() if self.clip.sha256.get(name) != value]
        require(not changed, f"{self.path} was made with a different file from {', '.join(changed)}")

    def is_again(self, codes: str) -> bool:
        """Compare the hash of new codes with that of the clip; print a line if they differ."""
        if codes == self.record.get("codes", codes):
            return True
        maker = f"torch {self.record.get('torch')} on {self.record.get('device')}"
        print(f"the codes differ from those of {self.path}, made by {maker}", file=sys.stderr)
        return False

    def _converted(self, kind: type[T]) -> T:
        """Values of the record as a dataclass."""
        values = {name: self._value(name, hint) for name, hint in get_type_hints(kind).items()}
        try:
            return kind(**values)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def _value(self, name: str, hint: Any) -> Any:
        value = self.record[name]
        got = f"{self.path}: {name} is {value!r:.60}"
        require("\0" not in str(value), f"{got}, expected no zero byte")
        require(not isinstance(value, float) or math.isfinite(value), f"{got}, expected a finite number")
        try:
            return msgspec.convert(value, hint, dec_hook=_path)
        except msgspec.ValidationError as error:
            raise InputError(f"{got}: {error}") from error

    def _find(self, option: str, path: Path) -> Path:
        """A file or folder, here or in the sidecar's folder."""
        for folder in (Path(), self.path.parent):
            if (found := existing(folder / path)).exists():
                return found
        raise InputError(f"it was made with {path}, which is not there: pass its new path with --{option}")


def _hash(path: Path) -> str:
    is_special = path.exists() and not path.is_file() and not path.is_dir()
    require(not is_special, f"{path} is a pipe or a device, expected a file")  # some never end
    return sha256_of(path)


def _path(kind: type, value: Any) -> Path:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError("Expected a path")
