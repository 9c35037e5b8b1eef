"""Clips of any source for comparisons: which frames are used, and how they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import CogVideo, locate
from cogvideo.config import InputError, both, require
from cogvideo.data.dataset import CARD, Dataset
from cogvideo.data.encoding import ahead
from cogvideo.data.frames import FrameSettings, read_item
from cogvideo.data.sources import Item, SourceOptions, list_source
from cogvideo.data.tars import Member
from cogvideo.evaluation.protocols import Protocol
from cogvideo.files import sha256_of
from cogvideo.media.colors import Pixels
from cogvideo.media.video import MAX_FPS, VideoError, count_frames, examine
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.world.scenes import Scene

NUM_THREADS = 4
"""Threads that examine files."""

WindowChoice = Literal["start", "random", "anywhere"]
"""Windows to use: the first of each clip, a random one of each clip, or random ones of all windows of all clips."""


class DatasetRow(NamedTuple):
    """A clip of prepared data."""

    dataset: Path
    number: int


@dataclass(frozen=True)
class SourceClip:
    """A whole clip of a source."""

    id: str
    """Name in the source."""
    media: Item | DatasetRow
    """Source of its frames."""
    num_frames: int
    """Number of frames at `fps`."""
    fps: float
    """Frames per second at which it is read."""
    size: tuple[int, int]
    """Rows and columns of its frames."""
    codec: str
    """Codec or format."""

    @property
    def captions(self) -> tuple[str, ...]:
        """Captions of the clip; for a file, none unless they were read."""
        if isinstance(self.media, DatasetRow):
            return _dataset(self.media.dataset).row(self.media.number).captions
        return self.media.captions

    @property
    def content(self) -> str:
        """Hash of the content that is read."""
        if isinstance(self.media, DatasetRow):
            codes = np.ascontiguousarray(_dataset(self.media.dataset).row(self.media.number).codes)
            return hashlib.sha256(codes.tobytes()).hexdigest()
        media = self.media.media
        assert not isinstance(media, Scene)
        if isinstance(media, Member):
            return hashlib.sha256(media.read()).hexdigest()
        return _sha256(media, media.stat().st_mtime_ns)


@dataclass(frozen=True)
class Excerpt:
    """Frames of a clip that are compared."""

    footage: SourceClip
    first: int
    """Number of the first frame."""
    through_codes: bool = False
    """True if the image tokenizer encodes and decodes them first."""


class Tokenizer(NamedTuple):
    """An image tokenizer, to decode prepared data and reconstruct clips."""

    bundle: Path
    sha256: str
    side: int
    """Shorter side of its model's frames, in pixels."""
    rate: int
    """Side of one code, in pixels."""

    @classmethod
    def of(cls, model: str) -> Tokenizer:
        """The tokenizer of a bundle."""
        bundle = locate(model)
        manifest = Manifest.read(bundle)
        entry, config = manifest.entry("image_tokenizer", f"the bundle {bundle}"), manifest.config
        return cls(bundle, entry.sha256, min(both(config.frame_size)), config.autoencoder.rate)


@dataclass(frozen=True)
class Reading:
    """Conversion of excerpts to pixels."""

    protocol: Protocol
    """Number, distance and size of frames."""
    fps: float | None = None
    """Frames per second at which files are read; their own by default."""
    tokenizer: Tokenizer | None = None
    """Tokenizer of prepared data and reconstructions."""
    caption_columns: tuple[str, ...] = ()
    """Columns of a table with captions; by default, captions are not read."""

    def __post_init__(self) -> None:
        is_rate = self.fps is None or 0 < self.fps <= MAX_FPS
        require(is_rate, f"fps is {self.fps}, expected a number of frames per second in (0, {MAX_FPS}]")

    def find(self, source: str) -> list[Item | DatasetRow]:
        """Clips of a source in the order of their names, before they are examined."""
        if (Path(source) / CARD).is_file():
            return self._find_rows(Path(source))
        listing = list_source(source, SourceOptions(self.caption_columns, validation=0))
        if listing.rejected:
            first, number = listing.rejected[0], len(listing.rejected)
            raise InputError(f"{source}: clips that cannot be used: {number}, the first is {first.id}: {first.reason}")
        rendered = any(isinstance(item.media, Scene) for item in listing.items)
        require(not rendered, f"{source} is not a file, expected clips: `cogvideo data world` writes these")
        return [*sorted(listing.items, key=lambda item: item.id)]

    def _find_rows(self, folder: Path) -> list[Item | DatasetRow]:
        if self.tokenizer is None:
            raise InputError(f"{folder} is prepared data, expected the bundle that decodes it: pass --model")
        data = Dataset(folder, self.tokenizer.sha256)
        stored = data.card.fps
        require(
            self.fps in (None, stored), f"{folder} has {stored:g} frames per second, expected {self.fps}, from --fps"
        )
        return [DatasetRow(folder, number) for number in range(len(data))]

    def look(self, found: Sequence[Item | DatasetRow]) -> Iterator[SourceClip]:
        """Facts about clips, in order. Files are decoded for this, some of them ahead."""
        for _, looked in ahead(self._look, found, NUM_THREADS):
            yield looked()

    def _look(self, media: Item | DatasetRow) -> SourceClip:
        if isinstance(media, DatasetRow):
            assert self.tokenizer is not None
            row = _dataset(media.dataset).row(media.number)
            num_frames, rows, columns = row.codes.shape
            size = rows * self.tokenizer.rate, columns * self.tokenizer.rate
            return SourceClip(row.id, media, num_frames, row.fps, size, "codes")
        assert not isinstance(media.media, Scene)
        facts = examine(BytesIO(media.media.read()) if isinstance(media.media, Member) else media.media)
        end = facts.seconds if media.end is None else min(media.end, facts.seconds)
        fps = facts.fps if self.fps is None else self.fps
        num_frames = count_frames(end - media.start, fps)
        return SourceClip(media.id, media, num_frames, fps, (facts.height, facts.width), facts.codec)

    def autoencoder(self, device: str) -> Autoencoder | None:
        """The tokenizer's network, if there is one."""
        if self.tokenizer is None:
            return None
        return CogVideo.from_pretrained(self.tokenizer.bundle, torch.float32, device).autoencoder

    def read(self, excerpt: Excerpt, autoencoder: Autoencoder | None) -> Pixels:
        """The frames of an excerpt."""
        media, protocol = excerpt.footage.media, self.protocol
        if isinstance(media, DatasetRow):
            assert autoencoder is not None
            codes = _dataset(media.dataset).row(media.number).codes[excerpt.first :: protocol.step][: protocol.frames]
            _, rows, columns = codes.shape
            given = torch.from_numpy(codes.astype(np.int64)).flatten(1)
            frames = autoencoder.decode_pixels(given, sides=(rows, columns))
        else:
            frames = self._read_file(media, excerpt)
        if excerpt.through_codes and isinstance(media, Item):
            assert autoencoder is not None
            assert self.tokenizer is not None
            frames = autoencoder.reconstruct(replace(protocol, antialias=True).reduced(frames, self.tokenizer.side))
        return protocol.reduced(frames, protocol.size)

    def _read_file(self, item: Item, excerpt: Excerpt) -> Pixels:
        fps, expected = excerpt.footage.fps, self.protocol.frames
        rate = fps / self.protocol.step
        settings = FrameSettings(fps=rate, max_seconds=expected / rate, min_frames=1)
        frames = read_item(replace(item, start=item.start + excerpt.first / fps), settings).frames
        if len(frames) < expected:
            raise VideoError("too short", f"{item.id} has {len(frames)} frames there, expected {expected}")
        return frames

    def identity(self, excerpt: Excerpt) -> list[object]:
        """Everything that determines the pixels of an excerpt."""
        protocol, media = self.protocol, excerpt.footage.media
        part = [media.start, media.end] if isinstance(media, Item) else []
        frames = [excerpt.first, protocol.frames, protocol.step, excerpt.footage.fps, *part]
        decoded = self.tokenizer is not None and (excerpt.through_codes or isinstance(media, DatasetRow))
        codes = [self.tokenizer.sha256, self.tokenizer.side] if self.tokenizer and decoded else []
        return [excerpt.footage.content, frames, protocol.size, protocol.antialias, codes]


class DrawnExcerpts(NamedTuple):
    """Excerpts of the clips of a source."""

    excerpts: list[Excerpt]
    """In the order in which they are used."""
    num_clips: int
    """Number of clips in the source."""
    num_short: int
    """Number of clips left out for too few frames, among those examined."""


def draw(source: str, reading: Reading, where: WindowChoice, count: int, seed: int) -> DrawnExcerpts:
    """Excerpts of a source, at most `count`, by the rules of the protocol."""
    span, found = reading.protocol.span, reading.find(source)
    random = np.random.default_rng(seed)
    if reading.protocol.order == "shuffled":
        found = [found[number] for number in random.permutation(len(found))]
    long: list[SourceClip] = []
    longest = num_short = 0
    for footage in reading.look(found):
        longest = max(longest, footage.num_frames)
        if footage.num_frames < span:
            num_short += 1
            continue
        long.append(footage)
        if len(long) == count and where != "anywhere":
            break
    counted = f"{source} has {len(long)} {'clip' if len(long) == 1 else 'clips'} of {span} frames or more"
    require(len(long) > 1, f"{counted} among {len(found)}, the longest has {longest}; expected at least 2 clips")
    windows = [footage.num_frames - span + 1 for footage in long]
    if where == "anywhere":
        ends = np.cumsum(windows)
        chosen = random.permutation(ends[-1])[:count]  # a larger number begins with the same clips
        numbers = np.searchsorted(ends, chosen, "right")
        firsts = chosen - (ends - windows)[numbers]
        excerpts = [Excerpt(long[number], int(first)) for number, first in zip(numbers, firsts, strict=True)]
    elif where == "random":
        excerpts = [Excerpt(each, int(random.integers(size))) for each, size in zip(long, windows, strict=True)]
    else:
        excerpts = [Excerpt(each, 0) for each in long]
    return DrawnExcerpts(excerpts, len(found), num_short)


@lru_cache(maxsize=8)
def _dataset(folder: Path) -> Dataset:
    return Dataset(folder)


@lru_cache(maxsize=2**17)
def _sha256(path: Path, changed: int) -> str:
    """Hash of a file; the modification time `changed` invalidates the cache."""
    return sha256_of(path)
