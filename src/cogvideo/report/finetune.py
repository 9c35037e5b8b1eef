"""Facts about a fine-tuning, for `templates/finetune.html`: before and after, losses, clips, and what to do next."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from cogvideo.bundle.model import CogVideo
from cogvideo.data.clips import ClipSampling, FrameRates, choose_window, duration_of
from cogvideo.data.dataset import Dataset
from cogvideo.data.frames import FrameSettings, read_item
from cogvideo.data.sources import SourceOptions, list_source
from cogvideo.evaluation.reader import resized
from cogvideo.evaluation.retrieval import SIZE, distances, gallery, ranks
from cogvideo.generation.request import GenerationSettings, Request
from cogvideo.media.colors import Pixels
from cogvideo.media.images import contact_sheet, evenly
from cogvideo.pipeline import CogVideoPipeline, collect
from cogvideo.report.page import RunName, duration, percent, precise
from cogvideo.report.plots import curves
from cogvideo.report.runs import TOKENIZER, Run, read_runs
from cogvideo.report.training import TITLES
from cogvideo.runs import RunFolder
from cogvideo.training.finetune import DATA, MIN_PSNR, RUN, TABLE, Finetuning
from cogvideo.training.finetune import TITLES as STEPS

MAX_REAL = 200
"""Maximum number of real clips to compare generated ones with."""
NUM_GENERATED, NUM_SHOWN = 12, 4
"""Clips per split to generate, and to show."""
BATCH = 4
"""Clips per batch."""
MIN_SIDE = 96
"""Minimum side of a frame on the page, in pixels."""

Frames = UInt8[np.ndarray, "clips frames height width 3"]


class RealClips(NamedTuple):
    """Some clips of the data: their key frames as the tokenizer reconstructs them."""

    ids: list[str]
    captions: list[str]
    splits: list[str]
    durations: list[float]
    frames: Frames


def facts(out: Path, base: str, settings: Finetuning) -> dict[str, Any]:
    """Everything that the page shows."""
    began = time.monotonic()
    chain = RunFolder(out / RUN)
    runs = [run for run in read_runs([settings.trained_in(out)]) if run.stage in TITLES]
    device = settings.device
    model = CogVideo.from_pretrained(out, torch.float32, device, adapters=settings.adapters)
    real = read_real(out / RUN / DATA, model)
    chosen, shown = choose(real.splits)
    made: dict[str, Frames] = {}
    before = CogVideo.from_pretrained(base, torch.float32, device)
    before.config = before.config.shaped(model.config.layout.sides)
    for name, each in (("before", before), ("after", model)):
        if {"base", "sequential"} <= set(each.components):
            made[name] = generated(each, [real.captions[place] for place in chosen], _durations(real, chosen))
    found = {name: rank(frames, real, chosen) for name, frames in made.items()}
    titles = {"train": "Prompts that were trained on", "validation": "Prompts that were held out"}
    pictures: dict[str, list[dict[str, Any]]] = {split: [] for split in titles}
    for number, place in enumerate(chosen):
        if place in shown:
            sheets = [real_frames(out, real.ids[place], real.durations[place])]
            sheets += [frames[number] for frames in made.values()]
            places = [f"{name}: rank {found[name][number]} of {len(real.ids)}" for name in made]
            pictures[real.splits[place]].append(
                {
                    "pixels": _sheet(sheets),
                    "caption": real.captions[place],
                    "facts": [_short(real.ids[place]), *places],
                }
            )
    ranked = [
        [titles[split], _mean(old), _mean(new), _firsts(old), _firsts(new)]
        for split in titles
        for old, new in [[_of(found.get(name, []), real, chosen, split) for name in ("before", "after")]]
        if new or old
    ]
    plots = [_plot(run) for run in runs if run.figures or run.validation is not None]
    about = chain.about
    times = [(STEPS[row["name"]], row["seconds"]) for row in chain.rows()]
    times.append(("This page", time.monotonic() - began))
    return {
        "titles": {
            **{split: titles[split] for split in titles if pictures[split]},
            "runs": "Training",
            "clips": "Clips",
        },
        "pictures": pictures,
        "order": ["the real clip", *(f"generated {name} training" for name in made)],
        "ranked": ranked,
        "num_real": len(real.ids),
        "plots": plots,
        "stages": [_stage(run) for run in runs],
        "times": [[name, duration(seconds)] for name, seconds in times],
        "seconds": duration(sum(seconds for _, seconds in times)),
        "clips": about.get("clips", []),
        "rejected": about.get("rejected", []),
        "advice": advice(runs, about.get("clips", []), settings),
    }


def read_real(folder: Path, model: CogVideo) -> RealClips:
    """Key frames of the clips of a dataset, from the start of each, at the lowest frame rate that it fills."""
    dataset = Dataset(folder)
    sampling = ClipSampling(rates=FrameRates(dataset.card.fps), random_offset=False)
    found = RealClips([], [], [], [], np.zeros(0, np.uint8))
    frames = []
    for number in evenly(len(dataset), MAX_REAL).tolist():
        row = dataset.row(number)
        window = choose_window(len(row.codes), sampling, 0.0, 0.0)
        places = range(1) if window is None else window
        codes = torch.from_numpy(row.codes[list(places)].astype(np.int64)).flatten(1)
        pixels = model.autoencoder.decode_pixels(codes, sides=row.codes.shape[1:])
        frames.append(pixels if len(pixels) > 1 else pixels.repeat(sampling.rates.num_frames, 0))
        found.ids.append(row.id)
        found.captions.append(row.captions[0])
        found.splits.append(row.split)
        found.durations.append(0.0 if window is None else duration_of(window, sampling, 0.0))
    return found._replace(frames=np.stack(frames))


def real_frames(out: Path, id: str, seconds: float) -> Pixels:
    """Key frames of a clip from its file."""
    card = Dataset(out / RUN / DATA).card
    settings = FrameSettings(**card.settings["frames"])
    items = list_source(str(out / RUN / TABLE), SourceOptions(validation=0.0)).items
    (item,) = [each for each in items if each.id == id]
    frames = read_item(item, settings).frames
    number = min(len(frames), round(seconds * card.fps) + 1)
    return frames[evenly(number, 5)]


def _short(id: str) -> str:
    """The file of a clip, and the second where it starts unless that is the file's start."""
    name = id.rpartition("/")[2]
    part = re.search(r"#([\d.]+)-[\d.]*$", name)
    if part is None:
        return name
    start = float(part[1])
    return name[: part.start()] + (f"#{start:.2f}" if start else "")


def choose(splits: Sequence[str]) -> tuple[list[int], set[int]]:
    """Indices of the clips to generate, and of those among them to show."""
    chosen, shown = [], set()
    for split in ("train", "validation"):
        places = [place for place, each in enumerate(splits) if each == split]
        made = [places[number] for number in evenly(len(places), NUM_GENERATED)]
        chosen += made
        shown |= {made[number] for number in evenly(len(made), NUM_SHOWN)}
    return chosen, shown


def _durations(real: RealClips, places: Sequence[int]) -> list[float]:
    longest = max(real.durations) or GenerationSettings.duration
    return [real.durations[place] or longest for place in places]


def generated(model: CogVideo, prompts: Sequence[str], durations: Sequence[float]) -> Frames:
    """Key frames of clips, with the model's own samplers; the seed is the index in the list."""
    pipeline = CogVideoPipeline(model)
    settings = replace(pipeline.settings, rounds=0, truncate=True, should_enlarge=False)
    found = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        generators = [torch.Generator().manual_seed(start + number) for number in range(len(prompts[part]))]
        request = Request(prompts[part], generators, settings, durations=durations[part])
        found.append(collect(pipeline.frames(request), 1.0).frames)
    return np.concatenate(found)


def rank(made: Frames, real: RealClips, right: Sequence[int]) -> list[int]:
    """Rank of the clip of the same prompt among the real ones, by distance from each generated clip."""
    small = np.stack([resized(clip, SIZE) for clip in real.frames])
    drawn = np.stack([resized(clip, SIZE) for clip in made])
    return ranks(distances(drawn, gallery(small, small)), list(right)).tolist()


def _of(found: Sequence[int], real: RealClips, chosen: Sequence[int], split: str) -> list[int]:
    return [each for each, place in zip(found, chosen, strict=False) if real.splits[place] == split]


def _mean(found: Sequence[int]) -> str:
    return f"{np.mean(found):.1f}" if found else "–"


def _firsts(found: Sequence[int]) -> str:
    return percent(sum(each == 1 for each in found), len(found)) if found else "–"


def _sheet(clips: Sequence[UInt8[np.ndarray, "_ _ _ 3"]]) -> UInt8[np.ndarray, "height width 3"]:
    """Clips below each other, enlarged."""
    times = max(1, -(-MIN_SIDE // clips[0].shape[1]))
    rows = [clip.repeat(times, 1).repeat(times, 2) for clip in clips]
    return contact_sheet(rows, max(map(len, rows)))


def _plot(run: Run) -> Any:
    """Both losses of a run, with the best step."""
    name = "psnr" if run.stage == TOKENIZER else "loss"
    both = (("training", run.figures.get(name)), ("held out", run.validation))
    known = {RunName(words, place): curve for place, (words, curve) in enumerate(both) if curve is not None}
    what, better = ("PSNR in dB", "higher") if run.stage == TOKENIZER else ("loss", "lower")
    plot = curves(run.stage, f"{TITLES[run.stage]}: {what}", known, marked=run.best)
    return plot._replace(note=f"By training step; {better} is better. {plot.note}")


def _stage(run: Run) -> list[str]:
    unit = " dB" if run.stage == TOKENIZER else ""
    first = "–" if run.validation is None else f"{precise(float(run.validation.values[0]))}{unit}"
    best = "–" if run.best is None else f"{precise(run.best[1])}{unit} at step {run.best[0]:,}"
    return [TITLES[run.stage], f"{run.num_steps:,}", first, best, "–" if run.seconds is None else duration(run.seconds)]


def advice(runs: Sequence[Run], clips: Sequence[dict[str, Any]], settings: Finetuning) -> str:
    """Advice for clips that look bad, in a line."""
    longer = "`--minutes`" if settings.steps is None else "`--steps`"
    ends = {(run.stage, name): curve.values[-1] for run in runs for name, curve in run.figures.items()}
    best = {run.stage: (*run.best, run.num_steps) for run in runs if run.stage != TOKENIZER and run.best is not None}
    num_still = sum(step == steps for step, _, steps in best.values())
    num_known = sum(ends.get((stage, "loss"), math.inf) < loss / 2 for stage, (_, loss, _) in best.items())
    shown = ends.get((TOKENIZER, "psnr"), math.inf)
    unnamed = sum("no caption" in each["notes"] for each in clips)
    if 2 * unnamed > len(clips):
        advised = "write captions (`cogvideo data captions`), since file names say little to a model"
    elif shown < MIN_PSNR:
        advised = f"train longer ({longer}, another `--out`): codes still blur what they learn from ({shown:.1f} dB)"
    elif num_known > num_still:
        advised = "add more clips, and different ones; the model knows these by heart, as its low loss on them shows"
    elif num_still:
        advised = f"train longer ({longer}, another `--out`); the held-out loss was still falling"
    elif settings.lora is not None and best:
        advised = "train with a higher rank, or without --lora: the adapters have not learned these clips"
    else:
        advised = f"give it more clips, and more time ({longer}, another `--out`)"
    return f"If clips look bad: {advised}."
