"""Options of `cogvideo generate` that decide a clip: from the command line, or from the sidecar of a clip."""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from cogvideo.bundle.model import POCKET
from cogvideo.commands.outputs import Record, check_name, public, read_record
from cogvideo.commands.prompts import LARGEST_SEED, Prompt
from cogvideo.config import CogVideoConfig, InputError, require
from cogvideo.data.folders import existing
from cogvideo.generation.request import ADDED, SamplingOptions, Settings

Type = Literal["auto", "float32", "bfloat16", "float16"]
MOST_ROUNDS = 6
"""Rounds of interpolation that give 257 frames of four seconds."""
FILES = ("image", "extend", "first", "last")
"""Choices that name a file."""
SEEDS = msgspec.Meta(ge=0, le=LARGEST_SEED)
"""Bounds of the seed in a sidecar."""


@dataclass(frozen=True)
class Choices(SamplingOptions):
    """Model and content. Sampling options default to the model's own values."""

    model: str = POCKET
    """Model: pocket, which comes with the package, the folder of a bundle, or its ID on the Hugging Face Hub."""
    image: Path | None = None
    """Image to animate: the first frame of the clip. For a video, its first frame is used."""
    extend: Path | None = None
    """Video to continue: its frames are kept, at the rate of the clip (8 per second with three rounds), and up to
    four seconds follow."""
    first: Path | None = None
    """Image for the first frame; requires --last."""
    last: Path | None = None
    """Image for the last frame; requires --first."""
    loop: bool = False
    """End the clip where it starts, so that it repeats without a jump."""
    negative: str | None = None
    """Text to move away from by guidance; the model's own unconditional text if empty."""
    rounds: int = 3
    """Rounds of interpolation: 0 to 3 give 5, 9, 17 or 33 frames in four seconds. Up to 6, each doubles the rate."""
    superres: bool = True
    """Enlarge the frames, if the model can."""
    dtype: Type = "auto"
    """Data type of the weights; auto is float32 on CPUs and bfloat16 on GPUs."""

    def __post_init__(self) -> None:
        require(0 <= self.rounds <= MOST_ROUNDS, f"rounds is {self.rounds}, expected 0 to {MOST_ROUNDS}")
        starts = [name for name in ("image", "extend", "first") if getattr(self, name) is not None]
        require(len(starts) < 2, f"got --{' and --'.join(starts)}, expected one start")
        pair = (self.first is None) == (self.last is None)
        require(pair, "got one of --first and --last, expected both; --image is a first frame alone")
        end = "--last" if self.last else "--extend"
        require(not (self.loop and (self.last or self.extend)), f"got --loop and {end}, expected one end")

    @property
    def files(self) -> dict[str, Path]:
        """Files that are named."""
        return {name: path for name in FILES if (path := getattr(self, name)) is not None}

    @property
    def places(self) -> Record:
        """Places of model and files, which change no clip."""
        return {"model": self.model, **self.files}

    def found(self) -> Choices:
        """The same, with files by the names that they have on disk."""
        paths: dict[str, Any] = {name: existing(path) for name, path in self.files.items()}
        return replace(self, **paths)

    def settings(self, own: CogVideoConfig) -> Settings:
        """Settings of a clip by a model."""
        settings = super().settings(own)
        return replace(settings, rounds=self.rounds, negative=self.negative or None, should_enlarge=self.superres)

    def record(self, settings: Settings) -> Record:
        """All of them, for whoever gets the clip: of paths on this machine the name alone, and of a file its content,
        since another one may come to have its name."""
        for path in (Path(self.model), *self.files.values()):
            check_name(path)  # the record is UTF-8
        found = asdict(self) | {name: public(path) for name, path in self.files.items()}
        found |= {"model": public(Path(self.model)), "negative": settings.negative} | settings.sampling_options
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.files.items()}
        return found | {"sha256": hashes}


class Sidecar:
    """The record of a clip that is to be made again.

    Args:
        path: the JSON file.

    Raises:
        ValueError: it is no sidecar, or a value in it cannot be used.
        OSError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path, found = path, read_record(path)
        if found is None:
            path.stat()  # if it is missing, say that
        expected = f"{path} is no sidecar, expected the JSON file next to a clip"
        require(found is not None and "prompt" in found and "seed" in found, expected)
        assert found is not None
        self.record: Record = {"fps": None, "sha256": {}} | ADDED | found
        self.prompt = Prompt(self._value("prompt", str), self._value("seed", Annotated[int, SEEDS]))
        self.fps: float | None = self._value("fps", float | None)
        self.hashes: dict[str, str] = self._value("sha256", dict[str, str])

    def choices(self, places: Record) -> Choices:
        """The clip's choices. A model or a file that is named here is where that of the clip lies now."""
        hints = get_type_hints(Choices)
        missing = sorted(hints.keys() - self.record.keys())
        require(not missing, f"{self.path} lacks {', '.join(missing)}: another version of cogvideo wrote it")
        found = {name: self._value(name, hint) for name, hint in hints.items()}
        found |= {name: value for name, value in places.items() if value != getattr(Choices, name)}
        for name in FILES:
            found[name] = None if found[name] is None else self._lies(name, found[name])
        if found["model"] != POCKET and "/" not in found["model"]:  # no id on the Hub
            found["model"] = str(self._lies("model", found["model"]))
        try:
            choices = Choices(**found)
            choices.settings(CogVideoConfig())  # all values are given, so this model's own do not matter
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        return choices

    def check_origin(self, record: Record) -> None:
        """Refuse a model or files that are not those of the clip."""
        same = self.record.get("bundle") == record["bundle"]
        require(same, f"{self.path} was made with another model than {record['model']}: say with --model where it lies")
        changed = [record[name] for name, value in record["sha256"].items() if self.hashes.get(name) != value]
        require(not changed, f"{self.path} was made with another file than {', '.join(changed)}")

    def is_again(self, codes: str) -> bool:
        """Compare the hash of new codes with that of the clip's; print a line if they differ."""
        if codes == self.record.get("codes", codes):
            return True
        maker = f"torch {self.record.get('torch')} on {self.record.get('device')}"
        print(f"these are other codes than those of {self.path}, which {maker} made", file=sys.stderr)
        return False

    def _value(self, name: str, hint: Any) -> Any:
        value = self.record[name]
        got = f"{self.path}: {name} is {value!r:.60}"
        require("\0" not in str(value), f"{got}, expected no zero byte")
        require(not isinstance(value, float) or math.isfinite(value), f"{got}, expected a number")
        try:
            return msgspec.convert(value, hint, dec_hook=_path)
        except msgspec.ValidationError as error:
            raise InputError(f"{got}: {error}") from error

    def _lies(self, option: str, name: str | Path) -> Path:
        """Path of a file or folder, from here, else from the sidecar's folder."""
        found = [path for folder in (Path(), self.path.parent) if (path := existing(folder / name)).exists()]
        absent = f"{self.path} was made with {name}, which is not here: say with --{option} where it lies"
        require(len(found) > 0, absent)
        return found[0]


def _path(kind: type, value: Any) -> Path:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError("Expected a path")
