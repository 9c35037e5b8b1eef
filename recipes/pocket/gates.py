"""Gates that a stage of the pocket model must pass before the next one is trained: `python recipes/pocket/gates.py`.

Reads unseen clips of the simple World with the World reader, and ranks emoji among all in a folder. Each gate prints a
row for real pictures, which is the ceiling, and one for the model's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import UInt8

from cogvideo import world
from cogvideo.bundle.model import CogVideo
from cogvideo.commands.options import parse
from cogvideo.data.frames import BACKGROUNDS, on_background
from cogvideo.data.sources import SourceOptions, list_source
from cogvideo.evaluation import retrieval
from cogvideo.evaluation.distribution import interval
from cogvideo.evaluation.networks.cache import network_path
from cogvideo.evaluation.reader import ATTRIBUTES, FIRST_PROMPT, FPS, NUM_FRAMES, SIZE, Reader, resized, unseen_scenes
from cogvideo.evaluation.subjects import TEMPLATE, read_animation, unseen_background
from cogvideo.generation import hierarchy
from cogvideo.generation.request import MAX_CONTEXT, Request
from cogvideo.generation.sampling import spawn
from cogvideo.generation.upscale import enlarge
from cogvideo.media.images import contact_sheet, evenly, write_image
from cogvideo.media.metrics import psnr
from cogvideo.models.autoencoder import to_pixels
from cogvideo.models.perceptual import load_lpips
from cogvideo.pipeline import CogVideoPipeline, collect

Frames = UInt8[np.ndarray, "frames height width 3"]
LONG = 20.0
"""Seconds of clips whose joints are looked at."""


def shares(read: Sequence[dict[str, str]], scenes: Sequence[world.Scene], names: Sequence[str]) -> str:
    """Percentages of right attributes, for all clips and for held-out pairs."""
    rights = np.array(
        [[each[name] == getattr(scene, name) for name in names] for each, scene in zip(read, scenes, strict=True)]
    )
    held_out = np.array([world.is_held_out(scene) for scene in scenes])
    lines = []
    for group in (np.ones(len(scenes), bool), held_out):
        means = dict(zip(names, 100 * rights[group].mean(0), strict=True)) | {"all": 100 * rights[group].all(1).mean()}
        lines.append("  ".join(f"{name} {share:5.1f}" for name, share in means.items()))
    return f"{lines[0]}   held out: {lines[1]}"


def by_turns(scenes: Sequence[world.Scene]) -> list[world.Scene]:
    """The same scenes with their actions in turn."""
    seen = Counter[str]()
    rounds = []
    for scene in scenes:
        rounds.append(seen[scene.action])
        seen[scene.action] += 1
    return [scenes[place] for place in np.argsort(rounds, kind="stable")]


def held(frames: Frames) -> Frames:
    """Key frames as a clip for the reader: each is held until the next."""
    moments = np.linspace(0, len(frames) - 1, NUM_FRAMES) if len(frames) > 1 else np.zeros(NUM_FRAMES)
    return resized(frames, SIZE)[np.floor(moments + 1e-9).astype(int)]


def pixels(model: CogVideo, codes: torch.Tensor) -> UInt8[np.ndarray, "batch frames height width 3"]:
    """Decode codes, `(batch, frames, slots)`, to pictures."""
    made = model.autoencoder.decode_pixels(codes.flatten(0, 1), chunk=8)
    return made.reshape(*codes.shape[:2], *made.shape[1:])


def request(pipeline: CogVideoPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> Request:
    """Request of key frames for each prompt."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return Request(prompts, generators, replace(pipeline.settings, rounds=0))


def first_frames(pipeline: CogVideoPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
    """Generate codes of first frames, `(prompts, 1, slots)`."""
    return hierarchy.first_frames(pipeline.model, request(pipeline, prompts, seeds))[:, None]


def key_frames(pipeline: CogVideoPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
    """Generate codes of key frames, `(prompts, frames, slots)`."""
    return hierarchy.collect(hierarchy.generate(pipeline.model, request(pipeline, prompts, seeds)))


Draw = Callable[[CogVideoPipeline, Sequence[str], Sequence[int]], torch.Tensor]


def drawn(pipeline: CogVideoPipeline, draw: Draw, prompts: Sequence[str], batch: int = 16) -> Iterator[Frames]:
    """Generate frames for each prompt; the seed is the number of the prompt."""
    numbers = range(len(prompts))
    for start in range(0, len(prompts), batch):
        part = numbers[start : start + batch]
        yield from pixels(pipeline.model, draw(pipeline, [prompts[each] for each in part], list(part)))


def main(
    model: str,
    gate: Literal["tokenizer", "image", "sequential", "superres", "joints"],
    /,
    emoji: Path | None = None,
    scenes: int = 200,
    limit: int | None = None,
    sheet: Path | None = None,
) -> None:
    """Measure a gate.

    Args:
        model: the bundle.
        gate: tokenizer (reconstructions of whole clips), image (first frames), sequential (key frames), superres (real
            small frames, enlarged; needs `cogvideo fetch lpips`), or joints (clips of 20 seconds).
        emoji: a folder of animations with alpha and captions.csv.
        scenes: number of scenes; for joints, their actions take turns.
        limit: number of emoji, evenly spread; all by default.
        sheet: PNG file to write, with real pictures above the model's.
    """
    pipeline = CogVideoPipeline.from_pretrained(model)
    reader = Reader.load()
    chosen = unseen_scenes(scenes, FIRST_PROMPT, "simple")
    side = pipeline.model.config.frame_size
    if gate == "joints":
        shown = by_turns(unseen_scenes(20 * scenes, FIRST_PROMPT, "simple"))[:scenes]
        _joints(pipeline, [world.captions(scene)[0] for scene in shown], sheet)
        return
    if gate == "superres":
        large = side * pipeline.model.config.upscaler.ratio
        clips = [(world.captions(scene)[0], world.render(scene, large, 1.0, 5)) for scene in chosen]
        _superres(pipeline, "scenes", clips, sheet)
        if emoji is not None:
            items = list_source(str(emoji), SourceOptions()).items
            shown = [(item, unseen_background(item, 0)) for item in (items[i] for i in evenly(len(items), limit or 60))]
            clips = [
                (on_background(item.captions[0], ground, TEMPLATE), read_animation(item, ground, large)[::8])
                for item, ground in shown
            ]
            _superres(pipeline, "emoji", clips, sheet and sheet.with_stem(f"{sheet.stem}-emoji"))
        return
    fps, num_frames = {"tokenizer": (FPS, NUM_FRAMES), "image": (1.0, 1), "sequential": (1.0, 5)}[gate]
    names = ("object", "colour", "background") if gate == "image" else ATTRIBUTES
    real = [world.render(scene, side, fps, num_frames) for scene in chosen]
    readings = reader.read(np.stack(list(map(held, real))))
    if gate == "image":  # only scenes whose figure is visible
        clear = [each["object"] == scene.object for each, scene in zip(readings, chosen, strict=True)]
        real, readings, chosen = (
            [one for one, is_clear in zip(row, clear, strict=True) if is_clear] for row in (real, readings, chosen)
        )
    draw: Draw = first_frames if gate == "image" else key_frames
    if gate == "tokenizer":
        made = list(map(pipeline.model.autoencoder.reconstruct, real))
    else:
        made = list(drawn(pipeline, draw, [world.captions(scene)[0] for scene in chosen]))
    print(f"{len(chosen)} scenes, real:  {shares(readings, chosen, names)}")
    print(f"{len(chosen)} scenes, model: {shares(reader.read(np.stack(list(map(held, made)))), chosen, names)}")
    print(f"scenes: {decibels(made, real)}")
    if sheet is not None:
        write_image(sheet, pairs(real, made, 24))
    if emoji is not None:
        _emoji(pipeline, gate, emoji, limit, sheet)


def _emoji(pipeline: CogVideoPipeline, gate: str, folder: Path, limit: int | None, sheet: Path | None) -> None:
    """Rank emoji among all in the folder, each on the background that never occurs in training."""
    side = pipeline.model.config.frame_size
    cut = {"tokenizer": slice(0, None, 2), "image": slice(1), "sequential": slice(0, None, 8)}[gate]
    items = list_source(str(folder), SourceOptions()).items
    looks = [
        np.stack([small(read_animation(each, ground, SIZE)[cut]) for each in items]) for ground in ("black", "white")
    ]
    gallery = retrieval.gallery(*looks)
    places = evenly(len(items), limit or len(items)).tolist()
    grounds = [unseen_background(items[place], 0) for place in places]
    real = [read_animation(items[place], ground, side)[cut] for place, ground in zip(places, grounds, strict=True)]
    if gate == "tokenizer":
        made = [pipeline.model.autoencoder.reconstruct(frames) for frames in real]
    else:
        prompts = [
            on_background(items[place].captions[0], ground, TEMPLATE)
            for place, ground in zip(places, grounds, strict=True)
        ]
        made = list(drawn(pipeline, first_frames if gate == "image" else key_frames, prompts))
    for name, clips in (("real", real), ("model", made)):
        ranks = retrieval.ranks(retrieval.distances(np.stack(list(map(small, clips))), gallery), places)
        borders = [retrieval.nearest_name(retrieval.border_color(clip), BACKGROUNDS) for clip in clips]
        right = 100 * np.mean([border == ground for border, ground in zip(borders, grounds, strict=True)])
        first, five = (100 * (ranks <= most).float().mean().item() for most in (1, 5))
        print(f"{len(clips)} emoji, {name}: rank 1 {first:.1f}  rank 5 {five:.1f}  background {right:.1f}")
    print(f"emoji: {decibels(made, real)}")
    if sheet is not None:
        write_image(sheet.with_stem(f"{sheet.stem}-emoji"), pairs(real, made, 24))


def _superres(pipeline: CogVideoPipeline, name: str, clips: Sequence[tuple[str, Frames]], sheet: Path | None) -> None:
    """Compare frames enlarged by super-resolution, and bicubically, with the real large ones."""
    model, lpips = pipeline.model, load_lpips(network_path("lpips-vgg"))
    ratio = model.config.upscaler.ratio
    made: dict[str, list[Frames]] = {"bicubic": [], "model": []}
    for number, (prompt, frames) in enumerate(clips):
        low = reduce(unit(frames), "frames rgb (h down) (w right) -> frames rgb h w", "mean", down=ratio, right=ratio)
        codes = model.autoencoder.encode(low)
        text = model.text.batch([prompt] * len(frames), None, model.config.upscaler.text_slots, truncate=True)
        noise = spawn(torch.Generator().manual_seed(number), len(frames))
        high = enlarge(model, text, codes.flatten(1), noise, pipeline.settings.superres)
        blurred = F.interpolate(model.autoencoder.decode(codes), scale_factor=ratio, mode="bicubic")
        made["bicubic"].append(to_pixels(blurred.clamp(0, 1)))
        made["model"].append(model.autoencoder.decode_pixels(high, chunk=1))
    real = [frames for _, frames in clips]
    for way, results in made.items():
        with torch.inference_mode():
            far = np.mean([lpips(unit(a), unit(b)).mean() for a, b in zip(results, real, strict=True)])
        print(f"{len(real)} {name}, {way}: {decibels(results, real)}  LPIPS {far:.4f}")
    if sheet is not None:
        rows = [each[place][:5] for place in evenly(len(real), 8) for each in (real, made["bicubic"], made["model"])]
        write_image(sheet, contact_sheet(rows, columns=5))


def _joints(pipeline: CogVideoPipeline, prompts: Sequence[str], sheet: Path | None) -> None:
    """Compare changes from frame to frame inside the sequences of long clips with those that lead to the next one."""
    sizes = pipeline.model.config.layout
    settings = replace(pipeline.settings.lasting(LONG, pipeline.model.config), should_enlarge=False)
    made: list[Frames] = []
    for number, prompt in enumerate(prompts):
        generators = [torch.Generator().manual_seed(number)]
        made.extend(collect(pipeline.frames(Request([prompt], generators, settings)), FPS).frames)
    changes = np.abs(np.diff(np.stack(made).astype(np.float32), axis=1)).mean((2, 3, 4))
    gaps = np.arange(changes.shape[1]) // 2**settings.rounds
    is_joint = (gaps >= sizes.num_frames - 1) & ((gaps - sizes.num_frames + 1) % (sizes.num_frames - MAX_CONTEXT) == 0)
    joints, inside = changes[:, is_joint], changes[:, ~is_joint]
    for name, part in (("inside", inside), ("joints", joints)):
        largest = 100 * (part > np.quantile(inside, 0.95)).mean()
        print(f"{name}: mean change {part.mean():.2f} of 255, {largest:.1f}% above the 95th percentile of those inside")
    differences = torch.from_numpy(joints.mean(1) - inside.mean(1))
    low, high = interval(lambda some: some.mean().item(), [differences[:, None]])
    print(f"difference: {differences.mean():.2f}, 95% interval over {len(made)} clips: {low:.2f} to {high:.2f}")
    if sheet is not None:
        write_image(sheet, contact_sheet([clip[:: 2**settings.rounds] for clip in made[:8]], columns=int(LONG) + 1))


def small(frames: Frames) -> UInt8[np.ndarray, "17 32 32 3"]:
    """Frames at the size at which emoji are compared."""
    return resized(held(frames), retrieval.SIZE)


def pairs(real: Sequence[Frames], made: Sequence[Frames], number: int) -> UInt8[np.ndarray, "height width 3"]:
    """Contact sheet with real frames above the model's."""
    rows = [
        frames[:: max(1, len(frames) // 5)][:5]
        for place in evenly(len(real), number)
        for frames in (real[place], made[place])
    ]
    across = 1 if len(rows[0]) > 1 else 8
    if across > 1:  # single frames: several clips per row
        tops = [np.concatenate([np.concatenate([rows[2 * i], rows[2 * i + 1]], 1)], 0) for i in range(len(rows) // 2)]
        rows = [np.concatenate(tops[i : i + across]) for i in range(0, len(tops), across)]
    return contact_sheet(rows, columns=max(map(len, rows)))


def unit(frames: Frames) -> torch.Tensor:
    """Frames in [0, 1], colors first."""
    return rearrange(torch.from_numpy(frames).float() / 255, "frames h w rgb -> frames rgb h w")


def decibels(made: Sequence[Frames], real: Sequence[Frames]) -> str:
    """Mean PSNR."""
    return (
        f"PSNR {np.mean([psnr(unit(one), unit(other)).mean() for one, other in zip(made, real, strict=True)]):.2f} dB"
    )


if __name__ == "__main__":
    parse("gates", main, sys.argv[1:])()
