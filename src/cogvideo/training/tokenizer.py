"""Training of the image tokenizer, from frames of any source into a bundle."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console

from cogvideo import config
from cogvideo.bundle.format import MANIFEST, MODULES, Entry, Manifest, in_half
from cogvideo.bundle.model import CODES_PER_CLUSTER, CogVideo
from cogvideo.bundle.model import update as update_bundle
from cogvideo.config import CogVideoConfig, Sides, both, check_size, require, size_text
from cogvideo.data import frame_store
from cogvideo.data.frame_store import FrameStore, ReadProgress, StoreSettings
from cogvideo.data.prepare import NO_SPLIT
from cogvideo.data.sources import SourceOptions
from cogvideo.devices import usable
from cogvideo.evaluation.networks.cache import fetched
from cogvideo.media.images import contact_sheet, evenly, write_image
from cogvideo.media.metrics import WINDOW, code_usage, count_codes, perplexity, psnr, ssim
from cogvideo.models.adversary import PatchDiscriminator
from cogvideo.models.autoencoder import Autoencoder, to_frames
from cogvideo.models.perceptual import NETWORKS, Lpips, load_lpips
from cogvideo.models.quantizer import cluster_codes
from cogvideo.runs import TYPED, RunFolder
from cogvideo.training.card import read_reports
from cogvideo.training.loop import learn
from cogvideo.training.objectives.task import generator
from cogvideo.training.objectives.tokenizer import FrameStream, TokenizerObjective, TokenizerSettings
from cogvideo.training.parallel import ParallelSettings, is_first, process_group, wait_for_all
from cogvideo.training.recorder import ProgressLine, standard_error
from cogvideo.training.session import Evaluation, LoggingConfig, Session, claimed
from cogvideo.training.step import Trainer

RUN = ".tokenizer-run"
"""Folder of the run inside the bundle's folder."""
NUM_SHOWN = 12
"""Frames of a contact sheet."""


def train_tokenizer(
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
) -> None:
    """Train the image tokenizer on frames of clips. Run an interrupted command again to continue.

    The folder `.tokenizer-run` inside OUT has metrics.jsonl, contact sheets from before and after (frames above their
    reconstructions) and at the end report.json. The bundle gets the tokenizer and clusters of its codes. If torchrun
    starts several ranks, they share each batch.

    Args:
        sources: One or more sources: a folder of videos, a table, WebDataset tars, or world:NUMBER for synthetic
            clips.
        out: Bundle to put the tokenizer into; its other components stay.
        init: Bundle whose image tokenizer to start from, such as pocket: a folder, or an ID on the Hugging Face Hub.
            Random weights unless given.
        preset: Preset that sets the model's sizes if there is no bundle yet; pocket unless given.
        settings: Training settings.
        frames: Frames to train on.
        options: Ways to read sources.
        perceptual: Network for the perceptual distance, with weights from `cogvideo fetch lpips`.
        vgg: VGG-16 weights from torchvision, for LPIPS from files.
        lpips: Weights of the LPIPS heads for VGG (version 0.1).
        device: Device to run on: cpu, cuda, cuda:0, or auto.
        logging: Reports and checkpoints.
        overwrite: Replace the bundle's tokenizer; models that learned its codes cannot use another.
    """
    weights = _lpips_files(perceptual, vgg, lpips)
    require(len(sources) > 0, "there is no source, expected one or several, such as a folder of videos or world:2000")
    with process_group(usable(device), ParallelSettings()) as ranks:
        initial = None if init is None else CogVideo.from_pretrained(init, torch.float32)
        has_start = initial is None or "image_tokenizer" in initial.components
        require(has_start, f"{init} has no image tokenizer to start from")
        whole = _config(out, preset, overwrite, initial)
        settings = settings if initial is None else replace(settings, plain_steps=0)
        frames, options = _complete(frames, options, settings, whole)
        whole = _shaped(whole, frames.clips.size)
        network = _lpips(weights)
        folder = RunFolder(out / RUN)
        identity = {
            "init": None if initial is None else initial.sha256("image_tokenizer"),
            "sources": sources,
            "autoencoder": asdict(whole.autoencoder),
            "settings": asdict(settings),
            "frames": asdict(frames),
            "options": asdict(options),
            "lpips": [Entry.of(path).sha256 for path in weights],
        }
        with claimed(folder, identity, {TYPED: init}) as is_open:
            if is_open:
                store = _fetch(folder, sources, options, frames, settings.batch, ranks.device)
                seed = frames.clips.seed
                stream = FrameStream(store.train, settings.batch, seed, ranks)
                known = None if initial is None else initial.autoencoder
                objective = TokenizerObjective(whole.autoencoder, settings, seed, stream, network, ranks.device, known)
                trainer = Trainer(objective, settings, ranks=ranks)

                def judge(step: int) -> Evaluation:
                    quality = evaluate(objective.model, store.held_out, settings.batch)
                    return Evaluation({"held_out": quality._asdict()}, str(quality))

                before = folder.path / "before.png"
                if is_first() and not before.exists():
                    _write_sheet(objective.model, store, before)
                learn(Session(folder, trainer, stream.after, logging, judge, identity))
                if is_first():
                    _deliver(objective, store, folder, out, whole)
        if is_first():
            assert folder.summary is not None
            quality = ReconstructionQuality(**folder.summary["held_out"])
            print(f"{out}: image tokenizer after {settings.steps:,} steps: {quality}; {folder.path / 'after.png'}")


def _lpips_files(name: str | None, vgg: Path | None, heads: Path | None) -> tuple[Path, ...]:
    """Files with the weights of LPIPS; none if it is not requested."""
    given = tuple(path for path in (vgg, heads) if path is not None)
    require(len(given) != 1, "LPIPS needs two files: --vgg (torchvision's VGG-16) and --lpips (its heads for VGG)")
    if name is None:
        return given
    require(not given, f"--perceptual {name} uses the fetched weights: leave out --vgg and --lpips")
    return (fetched("lpips-vgg"),)


def _config(out: Path, preset: str | None, overwrite: bool, initial: CogVideo | None) -> CogVideoConfig:
    """Configuration of the bundle, else of the preset, else of the initial bundle."""
    found = _own_config(out, None if initial is None else initial.config, preset, overwrite)
    same = initial is None or initial.config.autoencoder == found.autoencoder
    require(same, "the image tokenizers of init and out differ in size: leave preset out, or choose another out")
    return found


def _own_config(out: Path, start: CogVideoConfig | None, preset: str | None, overwrite: bool) -> CogVideoConfig:
    require(out.is_dir() or not out.exists(), f"{out} is a file, expected a folder")
    chosen = start if preset is None else config.preset(preset)
    if not (out / MANIFEST).exists():
        return (chosen or config.preset("pocket")).sizes
    manifest = Manifest.read(out)
    other = f"the bundle {out} has a different configuration from the preset {preset}: leave out --preset"
    require(preset is None or chosen == manifest.config.sizes, other)
    has_tokenizer = "image_tokenizer" in manifest.components
    require(
        overwrite or (out / RUN).exists() or not has_tokenizer,
        f"the bundle {out} has an image tokenizer, and models that learned its codes cannot use another: "
        "pass --overwrite to replace it, or another folder",
    )
    learned = [name for name in manifest.components if name in MODULES and name != "image_tokenizer"]
    hashes = sorted({f"{each['tokenizer']:.12}" for each in read_reports(out).values() if "tokenizer" in each})
    known = f" (sha256 {', '.join(hashes)})" if hashes else ""
    require(
        overwrite or has_tokenizer or not learned,
        f"the bundle {out} has {', '.join(learned)}, which learned the codes of another image tokenizer"
        f"{known}: take another folder, or pass --overwrite if you will train them again",
    )
    return manifest.config


def _complete(
    frames: StoreSettings, options: SourceOptions, settings: TokenizerSettings, whole: CogVideoConfig
) -> tuple[StoreSettings, SourceOptions]:
    """Settings with the frame size, by default the configuration's, and images if a clip may have one frame."""
    rate = max(whole.autoencoder.rates)
    size = frames.clips.size or whole.frame_size
    check_size(size, rate)
    least = max(WINDOW, NETWORKS["vgg"].least_side, 2 ** (settings.pyramid_levels - 1))
    if settings.adversary_weight > 0:
        least = max(least, PatchDiscriminator(1).least_side)
    require(min(both(size)) >= least, f"size is {size_text(size)}, expected at least {least} pixels")
    sized = replace(frames, clips=replace(frames.clips, size=size))
    return sized, replace(options, images=frames.clips.min_frames == 1)


def _shaped(whole: CogVideoConfig, size: Sides | None) -> CogVideoConfig:
    """Configuration for frames of the training size, if they are not square and fit."""
    width, height = (side // whole.autoencoder.rate for side in both(size or 0))
    is_other = width != height and max(width, height) <= whole.layout.grid
    return whole.shaped((height, width)) if is_other else whole


def _lpips(files: tuple[Path, ...]) -> Lpips | None:
    """LPIPS if its weights are given; prints what is used."""
    model = load_lpips(*files) if files else None
    if is_first() and files:
        standard_error().print(f"The perceptual distance is LPIPS with the weights {' and '.join(map(str, files))}.")
    elif is_first():
        instead = "differences of pixels at several sizes and of edges replace the perceptual distance"
        standard_error().print(f"No LPIPS weights are given (`cogvideo fetch lpips`): {instead}.")
    return model


def _fetch(
    folder: RunFolder,
    sources: tuple[str, ...],
    options: SourceOptions,
    frames: StoreSettings,
    batch: int,
    device: torch.device,
) -> FrameStore:
    """The frames, which the first rank reads."""
    readers = (os.cpu_count() or 1) if device.type == "cuda" else 0  # meanwhile a GPU waits for them
    if is_first():
        console = standard_error()
        with ProgressLine(console, 0, 1, "clip") as line:

            def show(reading: ReadProgress) -> None:
                line.total = reading.total
                line.advance(reading.clips, lambda: f"{reading.frames:,} frames")

            store = frame_store.fetch(folder.path, sources, options, frames, show, readers)
        _say_frames(store, batch, console)
    wait_for_all()
    return frame_store.fetch(folder.path, sources, options, frames)


def _say_frames(store: FrameStore, batch: int, console: Console) -> None:
    """Print how many frames there are, and what may surprise."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(store.rejected.items())) or "none"
    learned, held_out = len(store.train), len(store.held_out)
    console.print(
        f"{learned:,} frames to train on and {held_out:,} held out, of {store.clips:,} clips; rejected: {reasons}"
    )
    if store.held_out is store.train:
        console.print("No clip could be held out: all figures are those of training frames.")
    elif not store.has_split:
        console.print(f"The sources have no split but train ({NO_SPLIT}): some of their clips are held out here.")
    if batch > learned:
        console.print(f"A batch of {batch:,} is larger than the {learned:,} frames: it repeats them.")


def _write_sheet(autoencoder: Autoencoder, store: FrameStore, path: Path) -> None:
    """Write a contact sheet of held-out frames above their reconstructions."""
    frames = np.array(store.held_out[evenly(len(store.held_out), NUM_SHOWN)])
    write_image(path, contact_sheet([frames, autoencoder.reconstruct(frames)], columns=len(frames)))


def _deliver(
    objective: TokenizerObjective, store: FrameStore, folder: RunFolder, out: Path, whole: CogVideoConfig
) -> None:
    """Put the tokenizer into the bundle; the report is written last, to mark completion."""
    _write_sheet(objective.model, store, folder.path / "after.png")
    autoencoder = in_half("image_tokenizer", objective.model, whole)
    rows = autoencoder.state_dict()["codebook.embedding"].float()
    num_clusters = max(1, len(rows) // CODES_PER_CLUSTER)
    labels = cluster_codes(rows, num_clusters, generator(objective.seed, "clusters"))
    update_bundle(out, whole, image_tokenizer=autoencoder, cluster_labels=labels)
    steps = objective.settings.steps
    measured = {row["step"]: row["held_out"] for row in folder.rows() if "held_out" in row}
    if steps not in measured:  # an earlier version ran the last step
        measured[steps] = evaluate(objective.model, store.held_out, objective.settings.batch)._asdict()
    folder.finish(
        {
            "steps": steps,
            "held_out": measured[steps],
            "clusters": num_clusters,
            "frames": {"train": len(store.train), "held_out": len(store.held_out)},
            "clips": store.clips,
            "rejected": store.rejected,
            "perceptual": "pyramid and edges" if objective.lpips is None else "pyramid, edges and LPIPS",
        }
    )
    frame_store.remove(folder.path)


class ReconstructionQuality(NamedTuple):
    """Reconstruction quality: means over frames, share of the codes that occur, evenness of their use."""

    psnr: float
    ssim: float
    code_usage: float
    perplexity: float

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.3f}, {self.code_usage:.1%} of the codes used, "
            f"perplexity {self.perplexity:,.0f}"
        )


@torch.inference_mode()
def evaluate(
    autoencoder: Autoencoder, pixels: UInt8[np.ndarray, "_ height width 3"], batch: int
) -> ReconstructionQuality:
    """Quality of the frames' reconstructions, clamped to the displayable range."""
    device = autoencoder.codebook.embedding.device
    counts = torch.zeros(autoencoder.config.num_codes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(pixels), batch):
        frames = to_frames(torch.from_numpy(np.array(pixels[start : start + batch])).to(device))
        codes = autoencoder.encode(frames)
        made = autoencoder.decode(codes).clamp(0, 1)
        counts += count_codes(codes, len(counts))
        sums += torch.stack([psnr(made, frames).sum(), ssim(made, frames).sum()])
    means = (sums / len(pixels)).tolist()
    return ReconstructionQuality(means[0], means[1], code_usage(counts), perplexity(counts))
