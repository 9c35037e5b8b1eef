"""`cogvideo train`: options to runs of training. What the options do is in the room `training`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from cogvideo.bundle.model import update as update_bundle
from cogvideo.config import require
from cogvideo.data.frame_store import StoreSettings
from cogvideo.data.frames import FrameSettings
from cogvideo.data.sources import SourceOptions
from cogvideo.evaluation.networks.cache import fetched
from cogvideo.evaluation.reader import ATTRIBUTES, ReaderConfig
from cogvideo.text import TextTokenizer
from cogvideo.training.export import export_run
from cogvideo.training.launch import train
from cogvideo.training.objectives.image import ImageMixture
from cogvideo.training.objectives.reader import ReaderSettings
from cogvideo.training.objectives.tokenizer import TokenizerSettings
from cogvideo.training.reader import train_reader
from cogvideo.training.session import LoggingConfig, Options
from cogvideo.training.stages import BaseChoice, Choice
from cogvideo.training.text import (
    COUNTED,
    Normalization,
    bundle_config,
    figures,
    on_backgrounds,
    read_captions,
    spread,
    train_model,
)
from cogvideo.training.tokenizer import train_tokenizer

DURATIONS = (4.0, 2.0, 1.0, 0.5)
"""Seconds from the first to the last of five frames, at 1, 2, 4 and 8 a second."""


def image(
    options: Options,
    mixture: ImageMixture = ImageMixture(),  # noqa: B008  # frozen
    durations: tuple[float, ...] = DURATIONS,
    start: Literal["random", "continue"] = "random",
) -> None:
    """Train the image model on single frames of clips and on images: text to image, image to text, text alone.

    Half of the frames are the first of their clips, which is what the image model draws of a video. The others are
    later ones, with the text that the video stages give them: so these find what they need in the frozen base.

    Args:
        options: Options of all stages.
        mixture: Shares of the tasks.
        durations: Seconds in the text of later frames, one of these each: those of the key frames and of the rounds.
            With no number, all frames are alike and have the text of images.
        start: Random weights, or the base that the bundle has (continue).
    """
    train("image", Choice(start), options, {"mixture": mixture}, {"durations": durations})


def sequential(
    options: Options,
    start: Literal["inherit", "random", "continue"] = "inherit",
    base: BaseChoice = "frozen",
    window: int | None = None,
) -> None:
    """Train key frames: a temporal channel on the frozen image model, at the lowest frame rate that a clip fills.

    Args:
        options: Options of all stages.
        start: Start of the channel: the base's attention (inherit), random weights, or what the bundle has (continue).
        base: Base: frozen, trained too, or trained from random weights; for comparison.
        window: Side of the temporal windows in codes, 0 for full attention; the configuration's unless given.
    """
    train("sequential", Choice(start, base, window), options)


def interpolation(
    options: Options,
    start: Literal["sequential", "inherit", "random", "continue"] = "sequential",
    base: BaseChoice = "frozen",
    window: int | None = None,
) -> None:
    """Train frames between frames: a temporal channel that sees given frames whole, at the faster frame rates.

    Args:
        options: Options of all stages.
        start: Start of the channel: that of key frames (sequential), the base's attention (inherit), random weights, or
            what the bundle has (continue).
        base: Base: frozen, trained too, or trained from random weights; for comparison.
        window: Side of the temporal windows in codes, 0 for full attention; the configuration's unless given.
    """
    train("interpolation", Choice(start, base, window), options)


def superres(
    options: Options,
    corruption: float = 0.05,
    start: Literal["inherit", "random", "continue"] = "inherit",
    base: BaseChoice = "frozen",
) -> None:
    """Train super-resolution: codes of a frame to those of the same frame at a larger size, all in one pass.

    Args:
        options: Options of all stages.
        corruption: Share of the low codes that is replaced by random ones, since generated codes have faults.
        start: Start of the added attention: the base's (inherit), random weights, or what the bundle has (continue).
        base: Base: frozen, trained too, or trained from random weights; for comparison.
    """
    train("superres", Choice(start, base), options, {"corruption": corruption})


def tokenizer(
    sources: tuple[str, ...] = (),
    /,
    *,
    out: Path,
    init: str | None = None,
    preset: str | None = None,
    settings: TokenizerSettings = TokenizerSettings(),  # noqa: B008  # frozen
    frames: StoreSettings = StoreSettings(),  # noqa: B008
    options: SourceOptions = SourceOptions(),  # noqa: B008
    perceptual: Literal["lpips"] | None = None,
    vgg: Path | None = None,
    lpips: Path | None = None,
    device: str = "auto",
    logging: LoggingConfig = LoggingConfig(evaluate_every=1000),  # noqa: B008
    overwrite: bool = False,
    recipe: Path | None = None,  # read by the command line
) -> None:
    """Train the image tokenizer on frames of clips. Killed and called again, it continues.

    The folder `.tokenizer-run` inside OUT has metrics.jsonl, contact sheets from before and after (frames above their
    reconstructions) and at the end report.json. The bundle gets the tokenizer and clusters of its codes. Ranks that
    torchrun starts share each batch.

    Args:
        sources: Sources, one or several: a folder of videos, a table, WebDataset tars, or world:NUMBER for synthetic
            clips.
        out: Bundle that gets the tokenizer, and keeps its other components.
        init: Bundle whose image tokenizer is trained on, such as pocket: its folder, or its id on the Hugging Face Hub.
            Random weights unless given.
        preset: Preset with the sizes of the model where there is no bundle yet; pocket unless given.
        settings: Recipe.
        frames: Frames to learn from.
        options: Ways to read sources.
        perceptual: Network of the perceptual distance, with the weights that `cogvideo fetch lpips` has fetched.
        vgg: Weights of VGG-16 from torchvision, for LPIPS from files.
        lpips: Weights of the heads of LPIPS for VGG (version 0.1).
        device: Device: cpu, cuda, cuda:0, or auto.
        logging: Reports and checkpoints.
        overwrite: Replace the tokenizer that the bundle has; models that learned its codes cannot use another.
        recipe: TOML file with a table for this command: options as they stand here. Those given here win.
    """
    train_tokenizer(
        sources,
        out,
        settings,
        frames,
        options,
        init=init,
        preset=preset,
        weights=_lpips_files(perceptual, vgg, lpips),
        device=device,
        logging=logging,
        overwrite=overwrite,
    )


def _lpips_files(name: str | None, vgg: Path | None, heads: Path | None) -> tuple[Path, ...]:
    """Files with the weights of LPIPS; none if it is not asked for."""
    given = tuple(path for path in (vgg, heads) if path is not None)
    require(len(given) != 1, "LPIPS needs two files: --vgg (torchvision's VGG-16) and --lpips (its heads for VGG)")
    if name is None:
        return given
    require(not given, f"--perceptual {name} takes the fetched weights, expected no --vgg and no --lpips with it")
    return (fetched("lpips-vgg"),)


def reader(
    *,
    out: Path,
    settings: ReaderSettings = ReaderSettings(),  # noqa: B008  # frozen
    config: ReaderConfig = ReaderConfig(),  # noqa: B008
    test_clips: int = 2000,
    logging: LoggingConfig = LoggingConfig(checkpoint_every=200),  # noqa: B008
    device: str = "auto",
    recipe: Path | None = None,  # read by the command line
) -> None:
    """Train the World reader, which judges clips. Killed and called again, it continues.

    It learns from all splits of the World, and is tested on clips by numbers that it never saw: half of them with
    attribute pairs that models never see in training, half of the split `validation`.

    Args:
        out: File of the reader, .safetensors; the folder of the run is next to it.
        settings: Recipe.
        config: Sizes.
        test_clips: Number of clips of the test at the end.
        logging: Reports and checkpoints.
        device: Device: cpu, cuda, cuda:0, or auto.
        recipe: TOML file with a table for this command: options as they stand here. Those given here win.
    """
    right = train_reader(out, settings, config, test_clips, logging, device)
    Console(highlight=False).print(_table(right, test_clips))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB after {settings.steps:,} steps")


def _table(right: dict[str, dict[str, float]], number: int) -> Table:
    table = Table(title=f"Read right, of {number:,} clips that were never trained on")
    for name in ("", *ATTRIBUTES, "all"):
        table.add_column(name, justify="left" if name == "" else "right")
    for group, shares in right.items():
        table.add_row(group, *(f"{each:.1%}" for each in shares.values()))
    return table


def text(
    source: tuple[str, ...],
    /,
    out: Path,
    preset: str | None = None,
    options: SourceOptions = SourceOptions(),  # noqa: B008  # frozen
    normalization: Normalization = "nfkc",
    background_template: str = "",
    max_captions: int = 1_000_000,
    recipe: Path | None = None,  # read by the command line
) -> None:
    """Train the text tokenizer on the captions of the split `train`, and put it into a bundle.

    Args:
        source: Folders, tables, tars or world:NUMBER, as for `data prepare`.
        out: Folder of the bundle; other components in it stay, an older text tokenizer is replaced.
        preset: Preset with the configuration of a new bundle (pocket unless given); a bundle that exists has its own.
        options: Ways to read sources; take those of `data prepare`, so that validation captions stay unseen.
        normalization: Normalization of the text: nfkc, nfkc_cf (small letters too), or identity (only spaces).
        background_template: Template of `data prepare`, put around every caption with each background in turn.
        max_captions: Maximum number of captions; of more, some are used, evenly spaced in their sorted order.
        recipe: TOML file with a table for this command: options as they stand here. Those given here win.
    """
    require(len(source) > 0, "got no source, expected a folder, a table, a tar or world:NUMBER")
    require(max_captions > 0, f"max_captions is {max_captions}, expected a positive number")
    FrameSettings(background_template=background_template)  # refuses a template that does not work
    config = bundle_config(out, preset)
    captions = read_captions(source, options)
    used = spread(on_backgrounds(captions, background_template), max_captions)
    model = train_model(used, config.transformer, normalization)
    tokenizer = TextTokenizer(model, config.text, config.transformer.num_codes)
    update_bundle(out, config, text=tokenizer)
    distinct = sorted(set(used))
    counted = spread(distinct, COUNTED)
    slots = config.layout.text_slots
    found = figures(tokenizer, counted, slots)
    unused = f", of which {found.unused:,} unused: the captions have no more" if found.unused else ""
    print(f"captions  {len(captions):,} of the split train, {len(used):,} used, {len(distinct):,} different")
    print(f"pieces    {found.pieces:,}{unused}")
    print(f"tokens    {found.mean:.1f} a caption with its prefix, {found.longest} at most ({len(counted):,} counted)")
    print(f"fitting   {found.fitting:.2%} of them in the {slots} text slots")
    print(f"in bytes  {found.with_bytes:.2%} of them, in part")
    print(f"wrote the text tokenizer into {out}")


def export(
    run: Path,
    /,
    out: Path,
    step: int | None = None,
    best: bool = False,
    overwrite: bool = False,
) -> None:
    """Put a checkpoint of a run into a bundle, while the run goes on or after it. The run is only looked at.

    Args:
        run: Folder of the run, such as my-model/.sequential-run.
        out: Bundle that gets the stage; components that it lacks come from the bundle that the run started from.
        step: Step of the checkpoint; the newest unless given.
        best: Take the checkpoint with the lowest held-out loss.
        overwrite: Replace the stage where the bundle has it.
    """
    export_run(run, out, step, best, overwrite)
