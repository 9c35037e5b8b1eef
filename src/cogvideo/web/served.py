"""The model that a server serves: clips that it can make, and requests for them."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from torch import Tensor

from cogvideo.config import CogVideoConfig, InputError, require, size_text, times
from cogvideo.generation.hierarchy import generate
from cogvideo.generation.request import (
    MAX_ROUNDS,
    MAX_SECONDS,
    MAX_SEED,
    GenerationSettings,
    Request,
    SamplingOptions,
    check_seconds,
)
from cogvideo.pipeline import CogVideoPipeline

MAX_PROMPT_LENGTH = 2000
"""Maximum number of characters in a prompt; the model's own limit is lower, and counts tokens."""
SECONDS_RANGE = (0.5, MAX_SECONDS)
"""Seconds of the shortest and the longest clip, without the frames that it continues."""
MAX_FRAMES = 1000
"""Number of frames of the longest clip, with those that it continues."""
_RULES = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
Text = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_LENGTH)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


@validated(frozen=True, kw_only=True, config=_RULES)
class ClipRequest(SamplingOptions):
    """A clip to make. Sampling options default to the model's own values."""

    prompt: Text
    """Text to make a video of."""
    model: str | None = None
    """Name of the model that is served; may be left out."""
    seconds: float | Annotated[str, Field(pattern=r"^\d{1,2}(\.\d{1,3})?$")] | None = None
    """Length of the clip, 0.5 to 60: one that the model was trained on, or a longer one."""
    size: str | None = None
    """Width and height, such as 96x96; a model has one size, or two with super-resolution."""
    seed: Seed | None = None
    """Seed; random by default."""
    rounds: Annotated[int, Field(ge=0, le=MAX_ROUNDS)] = 3
    """Rounds of interpolation: 0 to 3 give 5, 9, 17 or 33 frames in four seconds."""
    negative: Text | None = None
    """Text to move away from by guidance."""
    loop: bool = False
    """End the clip where it starts, so that it repeats without a jump."""


WANTED = TypeAdapter(ClipRequest)
_OUTLINE = {each.name for each in fields(ClipRequest)} - {each.name for each in fields(SamplingOptions)}


def wanted_of(work: str) -> ClipRequest:
    """The clip of a job.

    Raises:
        ValueError: another version of this package queued it, with options that this one does not have.
    """
    try:
        return WANTED.validate_json(work)
    except ValidationError as error:
        option = ".".join(map(str, error.errors()[0]["loc"]))
        told = f"another version of cogvideo queued the clip: {option} is unknown or out of range now"
        raise InputError(told) from error


def outline(work: str) -> ClipRequest:
    """The clip of a job without sampling options, so that clips of all versions can be shown."""
    given = json.loads(work)
    return WANTED.validate_python({name: given[name] for name in given.keys() & _OUTLINE})


@dataclass(frozen=True)
class Start:
    """Frames that a clip starts from, or ends with."""

    codes: Int64[Tensor, "frames slots"] | None = None
    """Codes of an earlier clip."""
    pixels: bytes = b""
    """Otherwise an upload, as a NumPy file of uint8 frames."""
    num_frames: int = 1

    @property
    def digest(self) -> str:
        """Hash of the frames."""
        return hashlib.sha256(self.pixels if self.codes is None else pack_codes(self.codes)).hexdigest()


class ServedModel:
    """A model by its name, as a pipeline.

    Args:
        name: folder, ID on the Hub, or `pocket`.
        device: device of the model.
        dtype: type of its weights, which are loaded when the first clip is made.
        adapters: adapters by name or folder, each with its scale.
    """

    def __init__(
        self,
        name: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        adapters: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.pipeline = CogVideoPipeline.from_pretrained(name, dtype, device, adapters=adapters)
        self.name = Path(name).name
        self.config: CogVideoConfig = self.pipeline.model.config
        there = self.pipeline.model.components
        require("image_tokenizer" in there, f"{name} has no image tokenizer, which videos need")
        ratios = [self.config.upscaler.ratio, 1] if "superres" in there else [1]
        self.sizes = [size_text(times(self.config.frame_size, each)) for each in ratios]
        """Sizes of its clips, the default first."""

    @property
    def fingerprint(self) -> str:
        """Hash of the model's files."""
        return self.pipeline.model.fingerprint or ""

    def completed(self, wanted: ClipRequest) -> ClipRequest:
        """The same, with random values and the model's defaults filled in."""
        asked = wanted.model or self.name
        require(asked == self.name, f"model is {asked!r:.80}, expected {self.name}")
        size = wanted.size or self.sizes[0]
        require(size in self.sizes, f"size is {size!r:.80}, expected {' or '.join(self.sizes)}")
        seconds = float(self.config.seconds if wanted.seconds is None else wanted.seconds)
        low, high = SECONDS_RANGE
        require(low <= seconds <= high, f"seconds is {seconds:g}, expected {low:g} to {high:g}")
        check_seconds(seconds, self.config)
        seed = secrets.randbelow(2**31) if wanted.seed is None else wanted.seed
        return replace(wanted, model=asked, size=size, seconds=f"{seconds:g}", seed=seed)

    def settings(self, wanted: ClipRequest) -> GenerationSettings:
        """Settings of a completed clip."""
        seconds = float(wanted.seconds or self.config.seconds)
        return replace(
            wanted.settings(self.config).lasting(seconds, self.config),
            rounds=wanted.rounds,
            negative=wanted.negative,
            should_enlarge=wanted.size == self.sizes[0],
        )

    def fps(self, wanted: ClipRequest) -> float:
        """Frames per second of a completed clip."""
        return self.pipeline.fps(self.settings(wanted))

    def request(
        self,
        wanted: Sequence[ClipRequest],
        given: Int64[Tensor, "frames slots"] | None,
        last: Int64[Tensor, "_ slots"] | None,
        finished: Mapping[int, Int64[Tensor, "batch slots"]] | None = None,
    ) -> Request:
        """A request for completed clips that differ only in prompt and seed."""
        generators = [torch.Generator().manual_seed(each.seed or 0) for each in wanted]
        prompts = [each.prompt for each in wanted]
        end = None if last is None else last[0]
        settings = self.settings(wanted[0])
        return Request(prompts, generators, settings, given, end, wanted[0].loop, finished=finished or {})

    def check(self, wanted: ClipRequest, first: Start | None, last: Start | None) -> None:
        """Refuse a completed clip that the model cannot make, before any work."""
        require("\0" not in wanted.prompt + (wanted.negative or ""), "the prompt has a zero byte, expected text")
        require(last is None or first is not None, "got last_reference alone, expected input_reference, too")
        slots = self.config.layout.frame_slots
        given, end = (None if each is None else torch.zeros(each.num_frames, slots).long() for each in (first, last))
        try:
            generate(self.pipeline.model, self.request([wanted], given, end))
        except InputError as error:
            raise InputError(str(error).replace("this model has no", f"{self.name} has no")) from error
        length = (0 if first is None else first.num_frames) + self.pipeline.num_frames(self.settings(wanted))
        require(length <= MAX_FRAMES, f"the clip would have {length} frames, expected {MAX_FRAMES} at most")

    def alike(self, wanted: ClipRequest, first: Start | None, last: Start | None) -> str:
        """Hash of everything that clips in a batch must share."""
        shared = WANTED.dump_json(replace(wanted, prompt="x", seed=0)).decode()
        digests = [None if each is None else each.digest for each in (first, last)]
        return hashlib.sha256(f"{self.fingerprint} {shared} {digests}".encode()).hexdigest()

    def unpack(self, codes: bytes) -> Int64[Tensor, "frames slots"]:
        """Codes from the bytes of `pack_codes`."""
        return torch.from_numpy(np.frombuffer(codes, "<i4").astype(np.int64)).view(-1, self.config.layout.frame_slots)


def pack_codes(codes: Int64[Tensor, "frames slots"]) -> bytes:
    """Codes as bytes of int32."""
    return codes.numpy().astype("<i4").tobytes()
