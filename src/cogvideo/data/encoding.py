"""From items to one shard: read, encode in batches, write. Every engine runs this."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice, tee
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8, UInt16

from cogvideo.bundle.model import CogVideo
from cogvideo.config import Limited, Positive, times
from cogvideo.data.frames import FrameSettings, Pictures, read_item, shrink
from cogvideo.data.shards import Row, ShardInfo, write_shard
from cogvideo.data.sources import Item, Rejection
from cogvideo.data.tars import Member
from cogvideo.files import plain
from cogvideo.media.colors import Pixels
from cogvideo.media.video import VideoError
from cogvideo.models.autoencoder import Autoencoder

T = TypeVar("T")
U = TypeVar("U")
Encode = Callable[[Pixels], UInt16[np.ndarray, "frames rows columns"]]


@dataclass(frozen=True)
class PrepareSettings(Limited):
    """Content of shards. It also depends on the source and the tokenizer."""

    frames: FrameSettings = field(default_factory=FrameSettings)
    """Settings of the frames."""
    superres: bool = False
    """Store codes of every frame at the size of super-resolution, too, to train that stage."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder's layers; bfloat16 is twice as fast and changes some codes to similar ones."""
    batch: Positive[int] = 32
    """Frames per pass of the encoder. It changes rounding, which may change a few codes."""
    shard_clips: Positive[int] = 128
    """Items per shard; an interruption loses at most one shard per worker."""


class ShardJob(NamedTuple):
    """A shard to make from items; rejections are added to its info."""

    path: Path
    items: tuple[Item, ...]
    info: ShardInfo


@dataclass(frozen=True)
class ShardWorker:
    """Makes shards: the tokenizer on one device, and threads that read ahead of it."""

    bundle: Path
    """Folder with the tokenizer."""
    settings: PrepareSettings
    """Settings with a frame size."""
    ratio: int = 3
    """Side of a super-resolution frame divided by the side of a frame."""
    device: str = "cpu"
    readers: int = 0
    """Threads that read clips while the encoder works; with 0, reading and encoding alternate."""

    @cached_property
    def _tokenizer(self) -> Autoencoder:
        model = CogVideo.from_pretrained(self.bundle, torch.float32, self.device).autoencoder
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, frames: Pixels) -> UInt16[np.ndarray, "frames rows columns"]:
        """Codes of frames, in one pass; the first call loads the tokenizer."""
        is_halved = self.settings.precision == "bfloat16"
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=is_halved):
            codes = self._tokenizer.encode_pixels(frames, chunk=None)
        rows = frames.shape[1] // self._tokenizer.config.rate
        return codes.numpy().astype(np.uint16).reshape(len(frames), rows, -1)

    def make(self, job: ShardJob, on_clip: Callable[[], None] = lambda: None) -> None:
        """Write the shard of a job: rows in the order of its items, and the reasons why items have no row.

        `on_clip` is called after each item.
        """
        settings = self.settings
        rejected: list[Rejection] = []
        clips, sources = tee(self._read(job.items, rejected, on_clip))
        frames = (shrink(each.frames, self.ratio) if settings.superres else each.frames for _, each in sources)
        rows = []
        # Codes first: they pull whole batches.
        for codes, (item, pictures) in zip(encode_clips(frames, self.encode, settings.batch), clips, strict=False):
            assert item.split is not None
            high = None
            if settings.superres:  # as many pixels per pass as for the other frames
                (high,) = encode_clips([pictures.frames], self.encode, max(1, settings.batch // self.ratio**2))
            captions, attributes = pictures.captions, pictures.attributes
            rows.append(Row(item.id, captions, attributes, settings.frames.fps, codes, item.split, high))
            on_clip()
        write_shard(job.path, rows, replace(job.info, rejected=tuple(rejected)))

    def _read(
        self, items: Iterable[Item], rejected: list[Rejection], on_clip: Callable[[], None]
    ) -> Iterator[tuple[Item, Pictures]]:
        """Readable items, in order; the others are added to `rejected`."""
        settings = self.settings.frames
        assert settings.size is not None
        if self.settings.superres:
            settings = replace(settings, size=times(settings.size, self.ratio))
        for item, read in ahead(lambda item: read_item(item, settings), items, self.readers):
            try:
                pictures = read()
            except VideoError as error:
                path = item.media.archive if isinstance(item.media, Member) else item.media
                folder = f"{path.parent}{os.sep}" if isinstance(path, Path) else ""  # shards must not depend on it
                rejected.append(Rejection(item.id, error.reason, plain(error.detail.replace(folder, ""))))
                on_clip()
            else:
                yield item, pictures


def encode_clips(
    clips: Iterable[UInt8[np.ndarray, "_ height width 3"]], encode: Encode, batch: int
) -> Iterator[UInt16[np.ndarray, "_ rows columns"]]:
    """Codes of each clip. Frames are encoded `batch` at a time, across clips."""
    lengths: deque[int] = deque()

    def frames() -> Iterator[np.ndarray]:
        for clip in clips:
            lengths.append(len(clip))
            yield from clip

    stream = frames()
    batches = iter(lambda: list(islice(stream, batch)), [])
    codes = chain.from_iterable(encode(np.stack(each)) for each in batches)
    for first in codes:
        yield np.stack([first, *islice(codes, lengths.popleft() - 1)])


def ahead(function: Callable[[T], U], values: Iterable[T], threads: int) -> Iterator[tuple[T, Callable[[], U]]]:
    """Each value with a call that returns its result or raises its error; `threads` threads work ahead, none if 0."""
    if threads == 0:
        yield from ((value, partial(function, value)) for value in values)
        return
    with ThreadPoolExecutor(threads) as pool:
        stream = ((value, pool.submit(function, value).result) for value in values)
        waiting = deque(islice(stream, 2 * threads))
        while waiting:
            yield waiting.popleft()
            waiting.extend(islice(stream, 1))
