"""What an evaluation is about: prompts, the real clips that they are the captions of, and who judges clips of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

NUM_FRAMES, FPS = 33, 8.0
"""Frames of all clips, and their rate."""
Clip = UInt8[np.ndarray, "33 64 64 3"]
"""A clip as it is judged, whatever the model's own size: red, green and blue."""


class Prompt(NamedTuple):
    """What a clip is made from."""

    name: str
    """Of the file that keeps the clip; another text has another name."""
    text: str
    """The caption."""
    seed: int
    """Of the clip."""

    @classmethod
    def of(cls, kind: str, number: int, text: str, seed: int) -> Prompt:
        """The prompt with a number, whose clip has the seed plus that number."""
        return cls(f"{kind}-{number:07}-{hashlib.sha256(text.encode()).hexdigest()[:8]}", text, seed + number)


class Verdict(NamedTuple):
    """What was found about clips of all prompts of a subject."""

    shares: dict[str, dict[str, float]]
    """Share of the clips by group and measure, each in [0, 1]."""
    counts: dict[str, int]
    """Clips of each group."""
    findings: list[dict[str, Any]]
    """What was found about each clip, for the record."""
    right: list[bool]
    """Whether each clip is what its prompt says."""
    words: list[str]
    """The findings in words, a line a clip."""


class Subject(Protocol):
    """Prompts and who judges them."""

    @property
    def name(self) -> str:
        """A word."""

    @property
    def prompts(self) -> Sequence[Prompt]:
        """All of them."""

    def real(self, number: int, size: int) -> UInt8[np.ndarray, "33 {size} {size} 3"]:
        """The real clip of the prompt with that number."""

    def judge(self, clips: Sequence[Clip]) -> Verdict:
        """Compare clips, one a prompt, with what they should show."""

    def record(self) -> dict[str, Any]:
        """What the protocol says of it."""
