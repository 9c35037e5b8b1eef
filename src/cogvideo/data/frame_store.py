"""Training frames of the image tokenizer: drawn evenly from the clips of any source, in one file on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from cogvideo.config import InputError, Limited, Positive, Sides, both, require, times
from cogvideo.data.encoding import ahead
from cogvideo.data.frames import FrameSettings, read_item
from cogvideo.data.sources import Item, SourceOptions, list_source, other_splits
from cogvideo.files import replacing, write_json
from cogvideo.media.video import VideoError

FILES = ("train.rgb", "held_out.rgb")
"""Pixels of the training frames and of the held-out frames, frame after frame."""
HELD_OUT_SHARE = 0.05
"""Share of clips to hold out if all clips are in the split `train`."""
MANIFEST = "frames.json"
"""Written last: without it, the files are incomplete."""


@dataclass(frozen=True)
class StoreSettings(Limited):
    """Frames to train on."""

    num_frames: Positive[int] = 20_000
    """Frames to train on, taken evenly from the sources and their clips; fewer if the clips have fewer."""
    num_held_out: Positive[int] = 512
    """Held-out frames for validation, from clips that are not trained on."""
    frames_per_clip: Positive[int] = 8
    """Minimum number of frames per clip, spread over it; higher values read fewer clips."""
    zoom: Positive[int] = 1
    """Magnification of every second clip, whose frames are then cropped; prepares the tokenizer for
    super-resolution."""
    clips: FrameSettings = FrameSettings(min_frames=1)  # noqa: RUF009  # frozen
    """Settings of the frames; an image is a clip of one frame."""


class FrameStore(NamedTuple):
    """Memory-mapped frames, and counts of the clips."""

    train: UInt8[np.ndarray, "_ height width 3"]
    held_out: UInt8[np.ndarray, "_ height width 3"]
    """Held-out frames; the training frames if no held-out clip is readable or there is only one clip."""
    clips: int
    """Number of clips read."""
    rejected: dict[str, int]
    """Number of rejected clips, by reason."""
    has_split: bool
    """True if the sources have a split other than `train`."""


class ReadProgress(NamedTuple):
    """Progress: clips read or rejected, the estimated number needed, and frames taken."""

    clips: int
    total: int
    frames: int


OnRead = Callable[[ReadProgress], None]


def fetch(
    folder: Path,
    sources: Sequence[str],
    options: SourceOptions,
    settings: StoreSettings,
    on_read: OnRead = lambda reading: None,
    readers: int = 0,
) -> FrameStore:
    """The frames in `folder`, drawn from the sources (see `list_source`) unless an equal call already did.

    The settings must have a frame size. `on_read` is called after each clip, and `readers` threads read clips ahead.
    """
    decisive = json.dumps([list(sources), asdict(options), asdict(settings)])
    key = hashlib.sha256(decisive.encode()).hexdigest()
    if not (folder / MANIFEST).exists():
        drawn = {"key": key} | _draw(folder, sources, options, settings, on_read, readers)
        write_json(folder / MANIFEST, drawn)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"cannot use {folder / MANIFEST} ({error}): remove its folder and start again") from error
    other = f"{folder} holds frames from other sources or settings"
    require(manifest["key"] == key, f"{other}: use those it was made with, or remove it")
    size = settings.clips.size
    assert size is not None
    train, held_out = (_map(folder / name, count, size) for name, count in zip(FILES, manifest["frames"], strict=True))
    held_out, has_split = held_out if len(held_out) else train, manifest.get("has_split", True)
    return FrameStore(train, held_out, manifest["clips"], manifest["rejected"], has_split)


def remove(folder: Path) -> None:
    """Delete the frames in `folder`."""
    for name in (MANIFEST, *FILES):
        (folder / name).unlink(missing_ok=True)


def _draw(
    folder: Path, sources: Sequence[str], options: SourceOptions, settings: StoreSettings, on_read: OnRead, readers: int
) -> dict[str, Any]:
    """Write the pixel files; returns the manifest entries."""
    listings = [list_source(source, options) for source in sources]
    items = [item for listing in listings for item in listing.items]
    drawing = _Drawing(settings, len(items), on_read, readers)
    drawing.reasons.update(each.reason for listing in listings for each in listing.rejected)
    parts = []
    for listing in listings:
        generator = torch.Generator().manual_seed(settings.clips.seed)
        order = torch.randperm(len(listing.items), generator=generator)
        parts.append(divide([listing.items[place] for place in order.tolist()]))
    train = _write(folder / FILES[0], drawing.frames([each for each, _ in parts], settings.num_frames))
    held_out = _write(folder / FILES[1], drawing.frames([each for _, each in parts], settings.num_held_out))
    if not train:
        found = [f"{count} {reason}" for reason, count in drawing.reasons.items()]
        told = ", ".join(filter(None, [*found, other_splits(items)])) or "they hold none"
        raise InputError(f"no clip in {', '.join(sources)} can be trained on: {told}")
    return {
        "frames": [sum(train), sum(held_out)],
        "clips": len(train) + len(held_out),
        "rejected": drawing.reasons,
        "has_split": any(item.split not in ("train", None) for item in items),
    }


def _write(path: Path, clips: Iterable[UInt8[np.ndarray, "_ height width 3"]]) -> list[int]:
    """Write the frames of clips, one after another; returns the number of each."""
    counts = []
    with replacing(path) as file:
        for frames in clips:
            file.write(frames.tobytes())
            counts.append(len(frames))
    return counts


def divide(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Clips to train on, and held-out clips: those of splits other than `train`.

    If there are none, the first `HELD_OUT_SHARE` of the clips is held out: at least one, but never all. Copies of a
    clip stay together.
    """
    train = [item for item in items if item.split in ("train", None)]
    if len(train) < len(items):
        return train, [item for item in items if item.split not in ("train", None)]
    media = list(dict.fromkeys(item.media for item in train))
    left_out = set(media[: min(len(media) - 1, max(1, round(HELD_OUT_SHARE * len(media))))])
    kept = [item for item in train if item.media not in left_out]
    return kept, [item for item in train if item.media in left_out]


@dataclass
class _Drawing:
    """Takes frames from clips, and counts both."""

    settings: StoreSettings
    num_items: int
    on_read: OnRead
    readers: int
    clips_read: int = 0
    frames_taken: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def frames(self, groups: Sequence[Sequence[Item]], total: int) -> Iterator[UInt8[np.ndarray, "_ height width 3"]]:
        """Frames of one clip after another, `total` in all; later sources make up for a shortage."""
        for place, items in enumerate(groups):
            for frames in self._of_source(items, total // (len(groups) - place)):
                total -= len(frames)
                yield frames

    def _of_source(self, items: Sequence[Item], total: int) -> Iterator[UInt8[np.ndarray, "_ height width 3"]]:
        """Frames of each clip: its share of `total`, at least `frames_per_clip`; clips that fail are skipped."""
        for (place, _), read in ahead(self._read, enumerate(items), self.readers):
            if total <= 0:
                return
            try:
                frames = read()
            except VideoError as error:
                self.reasons[error.reason] += 1
                self._count(0)
                continue
            quota = max(self.settings.frames_per_clip, math.ceil(total / (len(items) - place)))
            count = min(len(frames), total, quota)
            middles = (2 * np.arange(count) + 1) * len(frames) // (2 * count)  # of equal parts of the clip
            chosen = _parts(frames[middles], self.settings, place)
            total -= len(chosen)
            self._count(len(chosen))
            yield chosen

    def _read(self, numbered: tuple[int, Item]) -> UInt8[np.ndarray, "_ height width 3"]:
        """All frames of a clip; every second clip is zoomed."""
        place, item = numbered
        clips = self.settings.clips
        assert clips.size is not None
        zoomed = replace(clips, size=times(clips.size, self.settings.zoom))
        return read_item(item, zoomed if place % 2 else clips).frames

    def _count(self, frames: int) -> None:
        self.clips_read += 1
        self.frames_taken += frames
        left = self.settings.num_frames + self.settings.num_held_out - self.frames_taken
        total = self.clips_read + math.ceil(left * self.clips_read / max(1, self.frames_taken))
        self.on_read(ReadProgress(self.clips_read, min(self.num_items, total), self.frames_taken))


def _parts(
    frames: UInt8[np.ndarray, "_ large_height large_width 3"], settings: StoreSettings, place: int
) -> UInt8[np.ndarray, "_ height width 3"]:
    """A random part of each frame that is larger than `settings.clips.size`."""
    assert settings.clips.size is not None
    width, height = both(settings.clips.size)
    random = np.random.default_rng((settings.clips.seed, place))
    free = [frames.shape[1] - height + 1, frames.shape[2] - width + 1]
    corners = random.integers(0, free, (len(frames), 2)).tolist()
    cut = zip(frames, corners, strict=True)
    return np.stack([frame[top : top + height, left : left + width] for frame, (top, left) in cut])


def _map(path: Path, count: int, size: Sides) -> UInt8[np.ndarray, "_ height width 3"]:
    width, height = both(size)
    expected = count * height * width * 3
    got = path.stat().st_size if path.exists() else 0
    require(got == expected, f"{path} has {got} bytes, expected {expected}: remove its folder and start again")
    if count == 0:  # a memory map cannot be empty
        return np.empty((0, height, width, 3), np.uint8)
    return np.memmap(path, np.uint8, "r", shape=(count, height, width, 3))
