"""`cogvideo train`: from options to training runs. The package `training` does the training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from cogvideo.bundle.adapters import ADAPTERS, OWN
from cogvideo.bundle.format import CHANNELS, MANIFEST, PLAIN_NAME
from cogvideo.commands.terminal import table
from cogvideo.config import require
from cogvideo.evaluation.reader import ATTRIBUTES, ReaderConfig
from cogvideo.training.launch import train
from cogvideo.training.objectives.image import ImageMixture
from cogvideo.training.objectives.reader import ReaderSettings
from cogvideo.training.reader import train_reader
from cogvideo.training.session import LoggingConfig, Options
from cogvideo.training.stages import BaseChoice, Choice, StageName, StartChoice

DURATIONS = (4.0, 2.0, 1.0, 0.5)
"""Seconds from the first to the last of five frames, at 1, 2, 4 and 8 per second."""


def image(
    options: Options,
    mixture: ImageMixture = ImageMixture(),  # noqa: B008  # frozen
    durations: tuple[float, ...] = DURATIONS,
    start: Literal["random", "continue"] = "random",
    lora: int | None = None,
    adapter: str = OWN,
) -> None:
    """Train the image model on single frames of clips and on images: text to image, image to text, text alone.

    Half of the frames are first frames of their clips, which the image model generates in a video. The others are later
    frames with captions as in the video stages, so that these can use the frozen base.

    Args:
        options: Options of all stages.
        mixture: Shares of the tasks.
        durations: Durations in seconds, one of which is in the text of each later frame: those of key frames and of
            the rounds. Without any, all frames have the text format of images.
        start: Starting weights: random, or the base in the bundle (continue).
        lora: Rank of an adapter (LoRA) to train in place of the base in the bundle, such as 8.
        adapter: Name of the adapter.
    """
    choice = Choice(start if lora is None else "continue", lora=lora)
    train("image", choice, _adapting(options, lora, adapter), {"mixture": mixture}, {"durations": durations})


@dataclass(frozen=True)
class VideoOptions:
    """Options of video stages."""

    base: BaseChoice = "frozen"
    """Base weights: frozen, trained too, or trained from random ones; the last two are for comparison."""
    window: int | None = None
    """Side of the temporal windows in codes; 0 is full attention. The configuration's unless given."""
    lora: int | None = None
    """Rank of an adapter (LoRA) to train in place of the channel in the bundle, such as 8."""
    adapter: str = OWN
    """Name of the adapter. If the base has an adapter of the same name, it is used, too."""
    channel: str | None = None
    """Name of an additional channel next to the bundle's own, such as a style; train its key frames first.
    `generate --channel` selects it."""


def sequential(
    options: Options,
    start: Literal["inherit", "random", "continue"] = "inherit",
    video: VideoOptions = VideoOptions(),  # frozen
) -> None:
    """Train key frames: a temporal channel on the frozen base, at the lowest frame rate at which a clip is long enough.

    Args:
        options: Options of all stages.
        start: Starting weights of the channel: the base's attention (inherit), random, or the bundle's (continue).
        video: Options of video stages.
    """
    _train_video("sequential", options, start, video)


def interpolation(
    options: Options,
    start: Literal["sequential", "inherit", "random", "continue"] = "sequential",
    video: VideoOptions = VideoOptions(),  # frozen
) -> None:
    """Train interpolation: a temporal channel that sees all of the given frames, at the higher frame rates.

    Args:
        options: Options of all stages.
        start: Starting weights of the channel: those of key frames (sequential), the base's attention (inherit),
            random, or the bundle's (continue).
        video: Options of video stages.
    """
    _train_video("interpolation", options, start, video)


def _train_video(stage: StageName, options: Options, start: StartChoice, video: VideoOptions) -> None:
    choice = Choice(start if video.lora is None else "continue", video.base, video.window, video.lora)
    train(stage, choice, _adapting(_in_channel(options, video.channel), video.lora, video.adapter))


def _in_channel(options: Options, name: str | None) -> Options:
    """The options, for a named channel of the bundle."""
    if name is None:
        return options
    folder = options.out / CHANNELS / _plain("channel", name)
    start = folder if (folder / MANIFEST).exists() else options.out
    return replace(options, out=folder, init=options.init or str(start))


def _adapting(options: Options, rank: int | None, name: str) -> Options:
    """The options, for an adapter of the bundle if one is trained."""
    if rank is None:
        return options
    folder = options.out / ADAPTERS / _plain("adapter", name)
    return replace(options, out=folder, init=options.init or str(options.out))


def _plain(option: str, name: str) -> str:
    """The name, if it can be a folder name."""
    require(PLAIN_NAME.fullmatch(name) is not None, f"{option} is {name!r}, expected letters, digits, dots and dashes")
    return name


def superres(
    options: Options,
    corruption: float = 0.05,
    start: Literal["inherit", "random", "continue"] = "inherit",
    base: BaseChoice = "frozen",
) -> None:
    """Train super-resolution: from the codes of a frame to those of the same frame at a larger size, in one pass.

    Args:
        options: Options of all stages.
        corruption: Share of the low codes to replace with random ones, since generated codes have errors.
        start: Starting weights of the added attention: the base's (inherit), random, or the bundle's (continue).
        base: Base weights: frozen, trained too, or trained from random ones; the last two are for comparison.
    """
    train("superres", Choice(start, base), options, {"corruption": corruption})


def reader(
    *,
    out: Path,
    settings: ReaderSettings = ReaderSettings(),  # noqa: B008  # frozen
    config: ReaderConfig = ReaderConfig(),  # noqa: B008
    test_clips: int = 2000,
    logging: LoggingConfig = LoggingConfig(checkpoint_every=200),  # noqa: B008
    device: str = "auto",
) -> None:
    """Train the World reader, which judges clips. Run an interrupted command again to continue.

    It learns from all splits of the World, and is tested on clips that it never saw: half of them with attribute pairs
    that models never see in training, half from the split `validation`.

    Args:
        out: File for the reader, .safetensors; the folder of the run is next to it.
        settings: Training settings.
        config: Sizes of the network.
        test_clips: Number of clips in the final test.
        logging: Reports and checkpoints.
        device: Device to run on: cpu, cuda, cuda:0, or auto.
    """
    right = train_reader(out, settings, config, test_clips, logging, device)
    Console(highlight=False).print(_table(right, test_clips))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB after {settings.steps:,} steps")


def _table(right: dict[str, dict[str, float]], number: int) -> Table:
    rows = ([group, *(f"{each:.1%}" for each in shares.values())] for group, shares in right.items())
    return table(f"Read correctly, of {number:,} clips never trained on", ["", *ATTRIBUTES, "all"], rows)
