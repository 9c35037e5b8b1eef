"""`cogvideo train tokenizer`: frames of any source become an image tokenizer, which can be killed and continued."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from cogvideo import config
from cogvideo.bundle.format import MANIFEST, MODULES, Entry, Manifest, in_half
from cogvideo.bundle.model import CODES_PER_CLUSTER, CogVideo
from cogvideo.bundle.model import update as update_bundle
from cogvideo.config import CogVideoConfig, require
from cogvideo.data import frame_store
from cogvideo.data.frame_store import FrameStore, Reading, StoreSettings
from cogvideo.data.prepare import NO_SPLIT
from cogvideo.data.sources import SourceOptions
from cogvideo.devices import slowness, usable
from cogvideo.evaluation.networks.cache import fetched
from cogvideo.files import alone_in
from cogvideo.media.images import contact_sheet, evenly, write_image
from cogvideo.media.metrics import WINDOW
from cogvideo.models.adversary import PatchDiscriminator
from cogvideo.models.autoencoder import reconstruct
from cogvideo.models.perceptual import NETWORKS, Lpips, load_lpips
from cogvideo.models.quantizer import cluster_codes
from cogvideo.runs import TYPED, Checkpoint, RunFolder
from cogvideo.training.autoencoder import Quality, TokenizerSettings, Trainer, evaluate, generator
from cogvideo.training.card import read_reports
from cogvideo.training.loop import ProgressLine, Window, interrupts

RUN = ".tokenizer-run"
"""Folder of the run inside that of the bundle."""
REPORT_EVERY = 50
"""Steps of one line of `metrics.jsonl`."""
SHOWN = 12
"""Frames of a contact sheet."""
LOSSES = ("pixels", "edges", "perceptual", "commitment", "adversary")
"""What the autoencoder minimises."""


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
    evaluate_every: int = 1000,
    checkpoint_every: int = 500,
    overwrite: bool = False,
    recipe: Path | None = None,  # read by the command line
) -> None:
    """Train the image tokenizer on frames of clips. Killed and called again, it continues.

    The folder `.tokenizer-run` inside OUT has metrics.jsonl, contact sheets from before and after (frames above their
    reconstructions) and at the end report.json. The bundle gets the tokenizer and clusters of its codes.

    Args:
        sources: one or several: a folder of videos, a table, WebDataset tars, or world:NUMBER for synthetic clips.
        out: the bundle, which keeps its other components.
        init: a bundle whose image tokenizer is trained on, such as pocket: its folder, or its id on the Hugging Face
            Hub. Random weights unless given.
        preset: sizes of the model where there is no bundle yet; pocket unless given.
        settings: the recipe.
        frames: which frames of the clips it learns from.
        options: how sources are read.
        perceptual: lpips, for the perceptual distance LPIPS with the weights that `cogvideo fetch lpips` has fetched.
        vgg: torchvision's weights of VGG-16, for LPIPS from files.
        lpips: LPIPS's heads for VGG (version 0.1).
        device: cpu, cuda, cuda:0, or auto.
        evaluate_every: steps between measurements on the frames held out.
        checkpoint_every: steps between checkpoints, which is what is lost when a run is killed.
        overwrite: replace the tokenizer that the bundle has; models that learnt its codes cannot use another.
        recipe: a TOML file with a table for this command: options as they stand here. Those given here win.

    Raises:
        ValueError: a source, a file or a setting cannot be used, OUT holds another run, or training diverged.
        OSError: something cannot be written.
    """
    require(len(sources) > 0, "there is no source, expected one or several, such as a folder of videos or world:2000")
    for name, value in {"evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}.items():
        require(value > 0, f"{name} is {value}, expected a positive number of steps")
    place, console = usable(device), Console(stderr=True, highlight=False, soft_wrap=True)
    if slow := slowness(getattr(torch, settings.precision), place):
        console.print(slow)
    initial = None if init is None else _initial(init)
    whole = _config(out, preset, overwrite, initial)
    settings = settings if initial is None else replace(settings, plain_steps=0)
    frames, options = _complete(frames, options, settings, whole)
    weights = _lpips_files(perceptual, vgg, lpips)
    model = _lpips(weights, console)
    folder = RunFolder(out / RUN)
    with alone_in(folder.path):
        identity = _identity(sources, whole, settings, frames, options, initial, weights)
        folder.claim(identity, {TYPED: init})
        if folder.summary is None:
            store = _fetch(folder, sources, options, frames, settings, place, console)
            known = None if initial is None else initial.autoencoder
            trainer = Trainer(whole.autoencoder, settings, frames.clips.seed, model, place, known)
            _learn(trainer, store, folder, evaluate_every, checkpoint_every, console)
            _deliver(trainer, store, folder, out, whole)
            frame_store.remove(folder.path)
    assert folder.summary is not None
    quality = Quality(**folder.summary["held_out"])
    print(f"{out}: image tokenizer after {settings.steps:,} steps: {_words(quality)}; {folder.path / 'after.png'}")


def _initial(init: str) -> CogVideo:
    """The bundle that is started from."""
    found = CogVideo.from_pretrained(init, torch.float32)
    require("image_tokenizer" in found.components, f"{init} has no image tokenizer to start from")
    return found


def _config(out: Path, preset: str | None, overwrite: bool, initial: CogVideo | None) -> CogVideoConfig:
    """That of the bundle, else of the preset, else of the bundle that is started from."""
    found = _own_config(out, None if initial is None else initial.config, preset, overwrite)
    same = initial is None or initial.config.autoencoder == found.autoencoder
    require(same, "the image tokenizers of init and of out have other sizes: leave preset out, or give another out")
    return found


def _own_config(out: Path, start: CogVideoConfig | None, preset: str | None, overwrite: bool) -> CogVideoConfig:
    require(out.is_dir() or not out.exists(), f"{out} is a file, expected a folder")
    chosen = start if preset is None else config.preset(preset)
    if not (out / MANIFEST).exists():
        return chosen or config.preset("pocket")
    manifest = Manifest.read(out)
    require(
        preset is None or chosen == manifest.config,
        f"the bundle {out} has another configuration than the preset {preset}: leave --preset out",
    )
    require(
        overwrite or (out / RUN).exists() or "image_tokenizer" not in manifest.components,
        f"the bundle {out} has an image tokenizer, and models that learnt its codes cannot use another: "
        "pass --overwrite to replace it, or another folder",
    )
    learnt = [name for name in manifest.components if name in MODULES and name != "image_tokenizer"]
    require(
        overwrite or "image_tokenizer" in manifest.components or not learnt,
        f"the bundle {out} has {', '.join(learnt)}, which learnt the codes of another image tokenizer"
        f"{_known(out)}: take another folder, or pass --overwrite if they are to be trained anew",
    )
    return manifest.config


def _known(out: Path) -> str:
    """Which one, where the stages of a bundle say it."""
    hashes = sorted({f"{each['tokenizer']:.12}" for each in read_reports(out).values() if "tokenizer" in each})
    return f" (sha256 {', '.join(hashes)})" if hashes else ""


def _complete(
    frames: StoreSettings, options: SourceOptions, settings: TokenizerSettings, whole: CogVideoConfig
) -> tuple[StoreSettings, SourceOptions]:
    """The frames' size where none is given, and images where a clip may have one frame."""
    rate = max(whole.autoencoder.rates)
    size = frames.clips.size or whole.frame_side
    require(size % rate == 0, f"size is {size}, expected a multiple of {rate}: the pixels of a side of one code")
    least = max(WINDOW, NETWORKS["vgg"].least_side, 2 ** (settings.pyramid_levels - 1))
    if settings.adversary_weight > 0:
        least = max(least, PatchDiscriminator(1).least_side)
    require(size >= least, f"size is {size}, expected at least {least} pixels")
    return replace(frames, clips=replace(frames.clips, size=size)), replace(
        options, images=frames.clips.min_frames == 1
    )


def _lpips_files(name: str | None, vgg: Path | None, heads: Path | None) -> tuple[Path, ...]:
    """Files with the weights of LPIPS; none if it is not asked for."""
    given = tuple(path for path in (vgg, heads) if path is not None)
    require(len(given) != 1, "LPIPS needs two files: --vgg (torchvision's VGG-16) and --lpips (its heads for VGG)")
    if name is None:
        return given
    require(not given, f"--perceptual {name} takes the fetched weights, expected no --vgg and no --lpips with it")
    return (fetched("lpips-vgg"),)


def _lpips(files: tuple[Path, ...], console: Console) -> Lpips | None:
    """LPIPS if it has weights; says what is used."""
    if not files:
        console.print(
            "No LPIPS weights are given (--perceptual lpips): differences of pixels at several sizes and of edges "
            "stand for the perceptual distance."
        )
        return None
    model = load_lpips(*files)
    console.print(f"The perceptual distance is LPIPS with the weights {' and '.join(map(str, files))}.")
    return model


def _identity(
    sources: tuple[str, ...],
    whole: CogVideoConfig,
    settings: TokenizerSettings,
    frames: StoreSettings,
    options: SourceOptions,
    initial: CogVideo | None,
    weights: tuple[Path, ...],
) -> dict[str, Any]:
    """All that decides the weights, except what the sources hold."""
    return {
        "init": None if initial is None else initial.sha256("image_tokenizer"),
        "sources": sources,
        "autoencoder": asdict(whole.autoencoder),
        "settings": asdict(settings),
        "frames": asdict(frames),
        "options": asdict(options),
        "lpips": [Entry.of(path).sha256 for path in weights],
    }


def _fetch(
    folder: RunFolder,
    sources: tuple[str, ...],
    options: SourceOptions,
    frames: StoreSettings,
    settings: TokenizerSettings,
    place: torch.device,
    console: Console,
) -> FrameStore:
    with ProgressLine(console, 0, 1, "clip") as line:

        def show(reading: Reading) -> None:
            line.total = reading.total
            line.advance(reading.clips, lambda: f"{reading.frames:,} frames")

        readers = (os.cpu_count() or 1) if place.type == "cuda" else 0  # a GPU waits for them meanwhile
        store = frame_store.fetch(folder.path, sources, options, frames, show, readers)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(store.rejected.items())) or "none"
    console.print(
        f"{len(store.train):,} frames to learn from and {len(store.held_out):,} held out, of {store.clips:,} clips; "
        f"rejected: {reasons}"
    )
    if store.held_out is store.train:
        console.print("No clip could be held out: all figures are those of frames that are learnt from.")
    elif not store.has_split:
        console.print(f"The sources have no split but train ({NO_SPLIT}): some of their clips are held out here.")
    if settings.batch > len(store.train):
        console.print(f"A batch of {settings.batch:,} is larger than the {len(store.train):,} frames: it repeats them.")
    return store


def _learn(
    trainer: Trainer,
    store: FrameStore,
    folder: RunFolder,
    evaluate_every: int,
    checkpoint_every: int,
    console: Console,
) -> None:
    """All steps that are left."""
    steps = trainer.settings.steps
    first = folder.resume(trainer.load_state_dict, steps, console)
    if first == 0:
        _write_sheet(trainer, store, folder.path / "before.png")
    window = Window(trainer.settings.batch)
    with ProgressLine(console, first, steps) as line, interrupts() as interrupt:
        for done in range(first + 1, steps + 1):
            if trainer.starts_codebook and done == trainer.settings.codes_from + 1:
                console.print(f"Step {done:,}: the codebook starts, by k-means; this takes a while.")
            window.add(trainer.step(done - 1, store.train))
            line.advance(done, lambda done=done: _shown(window.glance(done)))  # type: ignore[misc]
            saves = done % checkpoint_every == 0 or done == steps or interrupt.is_set()
            if saves or done % REPORT_EVERY == 0:
                row = window.row(done)
                folder.report(row | {"psnr": _decibel(row), "learning_rate": trainer.settings.rate_at(done - 1)})
            if saves:
                folder.save(Checkpoint(done, trainer.state_dict()))
            if interrupt.is_set():
                console.print(f"Stopped after step {done:,}; the same command continues.")
                interrupt.leave()
            if done % evaluate_every == 0 and done < steps:
                quality = _measure(trainer, store)
                folder.report({"step": done, "held_out": quality._asdict()})
                console.print(f"step {done:,}: {_words(quality)}")


def _shown(row: dict[str, float]) -> str:
    """A line beside the bar."""
    loss = sum(row.get(name, 0.0) for name in LOSSES)
    return f"loss {loss:.4f}  PSNR {_decibel(row):.1f} dB  {row['images_per_second']:.0f} images/s"


def _decibel(row: dict[str, float]) -> float:
    return -10 * math.log10(max(row["squared_error"], 1e-10))


def _measure(trainer: Trainer, store: FrameStore) -> Quality:
    return evaluate(trainer.autoencoder, store.held_out, trainer.settings.batch, trainer.device)


def _words(quality: Quality) -> str:
    return (
        f"PSNR {quality.psnr:.2f} dB, SSIM {quality.ssim:.3f}, {quality.code_usage:.1%} of the codes used, "
        f"perplexity {quality.perplexity:,.0f}"
    )


def _write_sheet(trainer: Trainer, store: FrameStore, path: Path) -> None:
    """Frames that were held out, above their reconstructions."""
    frames = np.array(store.held_out[evenly(len(store.held_out), SHOWN)])
    rows = [frames, reconstruct(trainer.autoencoder, frames)]
    write_image(path, contact_sheet(rows, columns=len(frames)))


def _deliver(trainer: Trainer, store: FrameStore, folder: RunFolder, out: Path, whole: CogVideoConfig) -> None:
    """The last figures, and the tokenizer in the bundle; the report goes last, as a sign that all is there."""
    quality = _measure(trainer, store)
    _write_sheet(trainer, store, folder.path / "after.png")
    autoencoder = in_half("image_tokenizer", trainer.autoencoder, whole)
    rows = autoencoder.state_dict()["codebook.embedding"].float()
    num_clusters = max(1, len(rows) // CODES_PER_CLUSTER)
    labels = cluster_codes(rows, num_clusters, generator(trainer.seed, "clusters"))
    update_bundle(out, whole, image_tokenizer=autoencoder, cluster_labels=labels)
    folder.finish(
        {
            "steps": trainer.settings.steps,
            "held_out": quality._asdict(),
            "clusters": num_clusters,
            "frames": {"train": len(store.train), "held_out": len(store.held_out)},
            "clips": store.clips,
            "rejected": store.rejected,
            "perceptual": "pyramid and edges" if trainer.lpips is None else "pyramid, edges and LPIPS",
        }
    )
