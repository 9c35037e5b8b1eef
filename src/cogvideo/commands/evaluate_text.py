"""`cogvideo evaluate text`: from options to CLIPSIM, its table and its file."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

from rich.console import Console
from torch import Tensor

from cogvideo.commands.evaluate_distribution import figures_table
from cogvideo.config import require
from cogvideo.data.engines import Machines
from cogvideo.data.tables import CAPTION_COLUMNS
from cogvideo.evaluation.comparison import Figure
from cogvideo.evaluation.distribution import mean
from cogvideo.evaluation.footage import Reading, Tokenizer
from cogvideo.evaluation.protocols import PROTOCOLS
from cogvideo.evaluation.similarity import CaptionChoice, Similarity, fingerprint, is_vit_b32, locate_clip
from cogvideo.files import check_place, write_json
from cogvideo.runs import provenance


def text(
    generated: str,
    /,
    *,
    real: str | None = None,
    network: str = "openai/clip-vit-base-patch32",
    captions: CaptionChoice = "random",
    caption_columns: tuple[str, ...] = CAPTION_COLUMNS[:1],
    clips: int = 2990,
    frames: int = 16,
    step: int = 1,
    fps: float | None = None,
    seed: int = 0,
    model: str | None = None,
    machines: Machines = Machines(),  # noqa: B008  # frozen
    json: Path | None = None,
) -> None:
    """Measure CLIPSIM: the similarity of captions and frames, by CLIP. Run an interrupted command again to continue.

    With --real, it also gives relative matching: CLIPSIM of the generated clips divided by that of the real ones.

    Args:
        generated: Folder of videos with captions or sidecars, table, WebDataset tar or prepared data with the clips.
        real: Folder, table, tar or prepared data with real clips of the same captions.
        network: Folder of a CLIP model, or its ID on the Hugging Face Hub. CLIPSIM is defined by ViT-B/32.
        captions: Captions to compare: a random one of each clip, or all.
        caption_columns: Columns of a table with captions, in the language of CLIP; otherwise text or prompt.
        clips: Maximum number of clips; 2,990 is the test set of MSR-VTT.
        frames: Number of frames of a clip, from its start.
        step: Distance between frames, in frames of the file.
        fps: Frames per second at which files are read; their own by default.
        seed: Seed of the choice of clips and captions, and of intervals.
        model: Bundle whose image tokenizer decodes prepared data.
        machines: Devices and processes.
        json: File for the figures with everything that they depend on.
    """
    if json is not None:
        check_place(json, "the figures")
    require(len(caption_columns) > 0, "caption_columns is empty, expected one column or more")
    import_module("transformers")  # if it is missing, fail before any work
    protocol = replace(PROTOCOLS["tfhub"], clips=clips, frames=frames, step=step)
    reading = Reading(protocol, fps, Tokenizer.of(model) if model else None, caption_columns)
    folder = locate_clip(network)
    similarity = Similarity(folder, reading, machines, captions, seed)
    sources = {"generated": generated} | ({} if real is None else {"real": real})
    measured = {name: similarity.measure(source) for name, source in sources.items()}
    title = "CLIPSIM" if is_vit_b32(folder) else "CLIP similarity (not ViT-B/32)"
    found = {name: each.similarities for name, each in measured.items()}
    figures = [Figure.measured(title, name, mean, [each], seed) for name, each in found.items()]
    if real is not None:
        both = [found["generated"], found["real"]]
        figures.append(Figure.measured("relative matching", "generated / real", _ratio, both, seed))
    console = Console(highlight=False)
    for name, each in measured.items():
        console.print(f"{name}: {each.side}")
        if each.num_cut:
            console.print(f"captions cut to the length that CLIP reads: {each.num_cut:,}")
    console.print(figures_table(figures))
    if json is not None:
        described = {
            **provenance(),
            "network": {"name": network, "sha256": fingerprint(folder), "vit_b32": is_vit_b32(folder)},
            "captions": captions,
            "frames": frames,
            "step": step,
            "fps": fps,
            "seed": seed,
            "sources": {name: asdict(each.side) | {"cut": each.num_cut} for name, each in measured.items()},
            "figures": [asdict(each) for each in figures],
        }
        write_json(json, described)
        print(json)


def _ratio(generated: Tensor, real: Tensor) -> float:
    return (generated.mean() / real.mean()).item()
