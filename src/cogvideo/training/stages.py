"""`cogvideo train image|sequential|interpolation|superres`: what each learns and where it starts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from cogvideo.config import CogVideoConfig
from cogvideo.layout import SequenceLayout, UpscaleLayout
from cogvideo.text import TextTokenizer
from cogvideo.training.launch import Options, Plan, train
from cogvideo.training.objectives.image import ImageMixture, ImageTask
from cogvideo.training.objectives.superres import SuperresTask
from cogvideo.training.objectives.task import Task
from cogvideo.training.objectives.video import VideoTask
from cogvideo.training.start import BaseChoice, Choice

DURATIONS = (4.0, 2.0, 1.0, 0.5)
"""Seconds from the first to the last of five frames, at 1, 2, 4 and 8 a second."""


def image(
    run: Options,
    mixture: ImageMixture = ImageMixture(),  # noqa: B008  # frozen
    durations: tuple[float, ...] = DURATIONS,
    start: Literal["random", "continue"] = "random",
) -> None:
    """Train the image model on single frames of clips and on images: text to image, image to text, text alone.

    Half of the frames are the first of their clips, which is what the image model draws of a video. The others are
    later ones, with the text that the video stages give them: so these find what they need in the frozen base.

    Args:
        run: what all stages have.
        mixture: shares of the tasks.
        durations: seconds in the text of later frames, one of these each: those of the key frames and of the rounds.
            With no number, all frames are alike and have the text of images.
        start: random weights, or the base that the bundle has.
    """

    def task(config: CogVideoConfig, text: TextTokenizer) -> Task:
        return ImageTask(SequenceLayout.text_to_image(config.layout), text, mixture)

    frames = {"durations": durations}
    train(Plan("image", Choice(start), "image", task, asdict(mixture) | frames, frames), run)


def sequential(
    run: Options,
    start: Literal["inherit", "random", "continue"] = "inherit",
    base: BaseChoice = "frozen",
    window: int | None = None,
) -> None:
    """Train key frames: a temporal channel on the frozen image model, at the lowest frame rate that a clip fills.

    Args:
        run: what all stages have.
        start: of the channel: the base's attention (inherit), random weights, or what the bundle has (continue).
        base: frozen, trained too, or trained from random weights; for comparison.
        window: side of the temporal windows in codes, 0 for full attention; the configuration's unless given.
    """

    def task(config: CogVideoConfig, text: TextTokenizer) -> Task:
        return VideoTask(SequenceLayout.sequential(config.layout), text)

    train(Plan("sequential", Choice(start, base, window), "sequential", task), run)


def interpolation(
    run: Options,
    start: Literal["sequential", "inherit", "random", "continue"] = "sequential",
    base: BaseChoice = "frozen",
    window: int | None = None,
) -> None:
    """Train frames between frames: a temporal channel that sees given frames whole, at the faster frame rates.

    Args:
        run: what all stages have.
        start: of the channel: that of key frames (sequential), the base's attention (inherit), random weights, or what
            the bundle has (continue).
        base: frozen, trained too, or trained from random weights; for comparison.
        window: side of the temporal windows in codes, 0 for full attention; the configuration's unless given.
    """

    def task(config: CogVideoConfig, text: TextTokenizer) -> Task:
        return VideoTask(SequenceLayout.interpolation(config.layout), text)

    train(Plan("interpolation", Choice(start, base, window), "interpolation", task), run)


def superres(
    run: Options,
    corruption: float = 0.05,
    start: Literal["inherit", "random", "continue"] = "inherit",
    base: BaseChoice = "frozen",
) -> None:
    """Train super-resolution: codes of a frame to those of the same frame at a larger size, all in one pass.

    Args:
        run: what all stages have.
        corruption: share of the low codes that is replaced by random ones, since generated codes have faults.
        start: of the added attention: the base's (inherit), random weights, or what the bundle has (continue).
        base: frozen, trained too, or trained from random weights; for comparison.
    """

    def task(config: CogVideoConfig, text: TextTokenizer) -> Task:
        return SuperresTask(UpscaleLayout.of(config.layout, config.upscaler), text, corruption)

    train(Plan("superres", Choice(start, base), "image", task, {"corruption": corruption}, {"high_codes": True}), run)
