"""Items to the rows of one shard: read, encoded in batches, written. Every engine runs this."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice, tee
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8, UInt16

from cogvideo.bundle.model import CogVideo
from cogvideo.config import require
from cogvideo.data.frames import FrameSettings, Pictures, read_item, shrink
from cogvideo.data.shards import Row, ShardInfo, write_shard
from cogvideo.data.sources import File, Item, Rejection
from cogvideo.data.tars import Member
from cogvideo.media.video import VideoError

T = TypeVar("T")
U = TypeVar("U")
Encode = Callable[[UInt8[np.ndarray, "frames size size 3"]], UInt16[np.ndarray, "frames grid grid"]]


@dataclass(frozen=True)
class PrepareSettings:
    """Settings that determine the content of shards, in addition to the source and the tokenizer."""

    frames: FrameSettings = field(default_factory=FrameSettings)
    """How clips become frames."""
    superres: bool = False
    """Also store the codes of every frame at the size of super-resolution, to train that stage."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder's layers; bfloat16 is twice as fast and changes some codes to similar ones."""
    batch: int = 32
    """Frames per pass of the encoder. It changes rounding, which may change a few codes."""
    shard_clips: int = 128
    """Items per shard; an interruption loses at most one shard per worker."""

    def __post_init__(self) -> None:
        for name in ("batch", "shard_clips"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected a positive number")


class Job(NamedTuple):
    """One shard to be made."""

    path: Path
    """The file that it becomes."""
    items: tuple[Item, ...]
    """What it is made from."""
    info: ShardInfo
    """What the file will say about itself; rejections are added."""


@dataclass(frozen=True)
class Worker:
    """Makes shards: the tokenizer on one device, and threads that read ahead of it."""

    bundle: Path
    """Where the tokenizer is."""
    settings: PrepareSettings
    """As above; the frames' size is given."""
    ratio: int = 3
    """Side of a frame for super-resolution over that of a frame."""
    device: str = "cpu"
    """Where the encoder runs."""
    readers: int = 0
    """Threads that read clips while the encoder works; with none, reading and encoding take turns."""

    def encoder(self) -> Encode:
        """The function from pixels to codes; loads the tokenizer."""
        model = CogVideo.from_pretrained(self.bundle, torch.float32, self.device).autoencoder
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in PyTorch's stubs
        halved = self.settings.precision == "bfloat16"

        def encode(
            frames: UInt8[np.ndarray, "frames size size 3"],
        ) -> UInt16[np.ndarray, "frames grid grid"]:
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=halved):
                codes = model.encode_pixels(frames, chunk=None)
            return codes.numpy().astype(np.uint16).reshape(len(frames), frames.shape[1] // model.config.rate, -1)

        return encode

    def make(self, job: Job, encode: Encode, on_clip: Callable[[], None] = lambda: None) -> None:
        """Write the shard of a job: rows in the order of its items, and why the others have none.

        Args:
            job: what to make.
            encode: from `encoder`, loaded once for many shards.
            on_clip: called after each item.

        Raises:
            OSError: the file cannot be written.
        """
        rejected: list[Rejection] = []
        clips, sources = tee(self._read(job.items, rejected, on_clip))
        codes = encode_clips((self._low(each.frames) for _, each in sources), encode, self.settings.batch)
        rows, fps = [], self.settings.frames.fps
        for clip_codes, (item, pictures) in zip(codes, clips, strict=False):  # codes first: they pull whole batches
            assert item.split is not None
            high_codes = self._high(pictures.frames, encode)
            rows.append(Row(item.id, pictures.captions, pictures.attributes, fps, clip_codes, item.split, high_codes))
            on_clip()
        write_shard(job.path, rows, replace(job.info, rejected=tuple(rejected)))

    def _read(
        self, items: Iterable[Item], rejected: list[Rejection], on_clip: Callable[[], None]
    ) -> Iterator[tuple[Item, Pictures]]:
        """Items that can be read, in their order; the others are added to `rejected`."""
        settings = self.settings.frames
        assert settings.size is not None
        if self.settings.superres:
            settings = replace(settings, size=settings.size * self.ratio)
        for item, result in ahead(lambda item: read_item(item, settings), items, self.readers):
            if isinstance(result, VideoError):
                rejected.append(Rejection(item.id, result.reason, _without_folder(result.detail, item)))
                on_clip()
            else:
                yield item, result

    def _low(
        self, frames: UInt8[np.ndarray, "frames high_size high_size 3"]
    ) -> UInt8[np.ndarray, "frames size size 3"]:
        """Frames in the size of the video stages."""
        return shrink(frames, self.ratio) if self.settings.superres else frames

    def _high(
        self, frames: UInt8[np.ndarray, "frames high_size high_size 3"], encode: Encode
    ) -> UInt16[np.ndarray, "frames high_grid high_grid"] | None:
        """Codes for super-resolution: as many pixels in a pass as for the video stages."""
        if not self.settings.superres:
            return None
        return next(encode_clips([frames], encode, max(1, self.settings.batch // self.ratio**2)))


def encode_clips(
    clips: Iterable[UInt8[np.ndarray, "_ size size 3"]], encode: Encode, batch: int
) -> Iterator[UInt16[np.ndarray, "_ grid grid"]]:
    """Codes of each clip. Frames are encoded `batch` at a time, whichever clips they belong to."""
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


def ahead(function: Callable[[T], U], values: Iterable[T], threads: int) -> Iterator[tuple[T, U | VideoError]]:
    """Each value with its result or error, in order; `threads` work on those that come next, none means in turn."""

    def attempt(value: T) -> U | VideoError:
        try:
            return function(value)
        except VideoError as error:
            return error

    if threads == 0:
        yield from ((value, attempt(value)) for value in values)
        return
    with ThreadPoolExecutor(threads) as pool:
        stream = ((value, pool.submit(attempt, value)) for value in values)
        waiting = deque(islice(stream, 2 * threads))
        while waiting:
            value, future = waiting.popleft()
            yield value, future.result()
            waiting.extend(islice(stream, 1))


def _without_folder(detail: str, item: Item) -> str:
    """A shard must not depend on where its source lies."""
    match item.media:
        case File(path) | Member(path):
            return detail.replace(f"{path.parent}{os.sep}", "")
    return detail
