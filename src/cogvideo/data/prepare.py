"""Data preparation: from a source of captioned clips to a folder of shards. A killed run can be continued.

The list of items is split into jobs, one per shard. A shard depends only on its items, the settings and the tokenizer,
and appears when it is complete, so it need not be made again, whatever engine or machine makes the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import locate
from cogvideo.config import CogVideoConfig, InputError, both, check_size, joined, require, times
from cogvideo.data.dataset import REJECTED, Card, check_hashes, make_card, write_card
from cogvideo.data.encoding import PrepareSettings, ShardJob, ShardWorker
from cogvideo.data.engines import Machines, progress
from cogvideo.data.shards import ShardInfo, digest, read_info, shard_name
from cogvideo.data.sources import Item, Rejection, SourceOptions, list_source
from cogvideo.data.tars import Member
from cogvideo.files import exclusive_lock, named, remove_leftovers, write_csv

NO_SPLIT = "one in twenty clips becomes validation unless --validation says otherwise"
"""Why a few clips may have no validation split."""
TOO_MANY_REJECTED = 1
"""Exit status."""


def prepare(
    source: str,
    /,
    out: Path,
    tokenizer: str,
    settings: PrepareSettings = PrepareSettings(),  # noqa: B008  # frozen
    options: SourceOptions = SourceOptions(),  # noqa: B008
    machines: Machines = Machines(),  # noqa: B008
    max_rejected: int = 0,
) -> int:
    """Turn captioned clips into shards of codes. Run an interrupted command again to continue.

    Exit status 1 means that more clips were rejected than allowed; `rejected.csv` lists them with the reasons.

    Args:
        source: Folder of videos with x.txt next to x.mp4, table (CSV, JSONL, Parquet) with the columns file and
            caption, WebDataset tars, or world:NUMBER for clips of the synthetic World.
        out: Folder for the shards.
        tokenizer: Bundle with the image tokenizer: a folder, or its ID on the Hugging Face Hub.
        settings: Encoding settings.
        options: Source options.
        machines: Devices and processes.
        max_rejected: Number of rejected clips to allow; more give exit status 1.
    """
    require(max_rejected >= 0, f"max_rejected is {max_rejected}, expected 0 or more")
    require(len(options.caption_columns) > 0, "caption_columns is empty, expected one column or more")
    require(out.resolve() != Path(source).resolve(), f"the folder {out} is the source: pass another one with --out")
    machines.check()
    bundle = locate(tokenizer)
    manifest = Manifest.read(bundle)
    if options.images:
        settings = replace(settings, frames=replace(settings.frames, min_frames=1))
    settings = complete(settings, manifest.config)
    options = replace(options, images=settings.frames.min_frames == 1)
    described = asdict(settings) | {"source": asdict(options)}
    listing = list_source(source, options)
    jobs = plan(listing.items, out, shard_info(manifest, settings, digest(described)), settings.shard_clips)
    worker = ShardWorker(bundle, settings, manifest.config.upscaler.ratio)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out):
        left = remaining(jobs, out)
        check_hashes(out)
        total, todo = (sum(len(job.items) for job in each) for each in (jobs, left))
        with progress("clips", total, total - todo) as on_clip:
            if left:
                machines.run(left, worker, on_clip)
        rejected = [*listing.rejected, *chain.from_iterable(read_info(job.path).rejected for job in jobs)]
        write_csv(out / REJECTED, [Rejection._fields, *rejected])
        if len(rejected) == len(listing.rejected) + len(listing.items):
            (name, reason, _), *others = rejected
            more = f", and {len(others)} more in {out / REJECTED}" if others else ""
            raise InputError(f"no clip in {source} can be used: {name}: {reason}{more}")
        card = make_card(
            out,
            [job.path.name for job in jobs],
            source=_in_full(source),
            tokenizer=_in_full(tokenizer),
            settings=described,
            rejected=listing.rejected,
        )
        write_card(out, card)
    print(_summary(out, card, options))
    return TOO_MANY_REJECTED if card.num_rejected > max_rejected else 0


def complete(settings: PrepareSettings, config: CogVideoConfig) -> PrepareSettings:
    """The settings, with the model's frame size if they have none."""
    rate, num_codes = config.autoencoder.rate, config.autoencoder.num_codes
    size = joined(*both(settings.frames.size or config.frame_size))
    check_size(size, rate)
    expected = f"expected at most {2**16}: they are stored as uint16"
    require(num_codes <= 2**16, f"the tokenizer has {num_codes} codes, {expected}")
    names = ("fps", "max_seconds", "loop_to")
    floats: dict[str, Any] = {name: float(getattr(settings.frames, name)) for name in names}  # 8 is the same as 8.0
    return replace(settings, frames=replace(settings.frames, size=size, **floats))


def shard_info(manifest: Manifest, settings: PrepareSettings, settings_sha256: str) -> ShardInfo:
    """The information that all shards of a run share."""
    config = manifest.config
    assert settings.frames.size is not None
    width, height = (side // config.autoencoder.rate for side in both(settings.frames.size))
    grid = joined(height, width)
    return ShardInfo(
        grid=grid,
        num_codes=config.autoencoder.num_codes,
        fps=settings.frames.fps,
        tokenizer_sha256=manifest.entry("image_tokenizer").sha256,
        settings_sha256=settings_sha256,
        work_sha256="",
        high_grid=times(grid, config.upscaler.ratio) if settings.superres else 0,
    )


def plan(items: Sequence[Item], folder: Path, info: ShardInfo, size: int) -> list[ShardJob]:
    """The items split into shards of `size`, each with the hash of its inputs."""
    jobs = []
    for index, start in enumerate(range(0, len(items), size)):
        part = tuple(items[start : start + size])
        work = digest([info.tokenizer_sha256, info.settings_sha256, *map(_identity, part)])
        jobs.append(ShardJob(folder / shard_name(index), part, replace(info, work_sha256=work)))
    return jobs


def _identity(item: Item) -> Any:
    """Values that an item's row depends on, wherever the source is; a file's size stands in for its content."""
    media = item.media
    if isinstance(media, Path):
        content = media.stat().st_size if media.is_file() else None
    else:
        content = media.num_bytes if isinstance(media, Member) else media.index
    return [content, item.id, item.captions, item.attributes, item.start, item.end, item.split, item.copy]


def remaining(jobs: Sequence[ShardJob], folder: Path) -> list[ShardJob]:
    """Jobs whose shards do not exist yet; leftovers of a killed run are removed."""
    ours = {job.path: job.info for job in jobs}
    for path in named(folder, "shard-*.arrow"):
        there, here = read_info(path), ours.get(path)
        if here is not None and there.work_sha256 == here.work_sha256:
            continue
        change = "from other clips"
        if here is not None and there.tokenizer_sha256 != here.tokenizer_sha256:
            change = "with another tokenizer"
        elif here is not None and there.settings_sha256 != here.settings_sha256:
            change = "with other settings"
        advice = "give this run another folder with --out, or remove the old one"
        raise InputError(f"{path} was made {change}: {advice}")
    remove_leftovers(folder)
    return [job for job in jobs if not job.path.exists()]


def _in_full(name: str) -> str:
    """A path in absolute form; other names are unchanged."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _summary(folder: Path, card: Card, options: SourceOptions) -> str:
    splits = ", ".join(f"{count:,} {split}" for split, count in card.splits.items())
    lines = [f"{folder}: {sum(card.splits.values()):,} clips ({splits or 'none'}), {card.num_frames:,} frames"]
    if card.rejected:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in card.rejected.items())
        lines.append(f"rejected: {card.num_rejected:,} ({reasons}); see {folder / REJECTED}")
    if set(card.splits) == {"train"} and options.validation:
        lines.append(f"the only split is train ({NO_SPLIT}): stages trained on it hold nothing out")
    return "\n".join(lines)
