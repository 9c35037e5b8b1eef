"""Features of excerpts by the networks of metrics, cached by the content of clip and network.

Results are bit-identical for any number of processes and devices: on a CPU, each process has one thread, and all passes
have the same size. Features from CPUs and GPUs differ in the last bits, and are cached separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.backends import cudnn

from cogvideo.config import require
from cogvideo.data.encoding import ahead
from cogvideo.data.engines import Machines, OnClip, progress
from cogvideo.data.shards import digest
from cogvideo.evaluation.footage import Excerpt, Reading
from cogvideo.evaluation.networks.c3d import load_c3d
from cogvideo.evaluation.networks.cache import cache_folder
from cogvideo.evaluation.networks.i3d import MIN_FRAMES, load_i3d
from cogvideo.evaluation.protocols import Protocol
from cogvideo.files import replacing, sha256_of
from cogvideo.media.colors import Pixels
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.perceptual import Network as Perceptual
from cogvideo.models.perceptual import load_lpips

VERSION = 1
"""Version of the features, changed whenever they change."""
CPU_BATCH, GPU_BATCH = 1, 16
"""Clips per pass."""
JOB_BATCHES = 8
"""Passes per job, a worker's unit of work."""

ExcerptPixels = Sequence[tuple[Pixels, ...]]
"""Pixels of excerpts, one at a time or in pairs."""
Encode = Callable[[ExcerptPixels], Float[Tensor, "clips features"]]


@dataclass(frozen=True)
class Judge:
    """A network and how clips are fed to it."""

    identity: tuple[object, ...]
    """Everything that determines its features."""
    load: Callable[[str], Encode]
    """The function from clips to features on a device; picklable."""


def i3d(path: Path, protocol: Protocol, proven: bool = True) -> Judge:
    """I3D, whose logits FVD compares."""
    frames = protocol.frames
    require(frames >= MIN_FRAMES, f"frames is {frames}, expected {MIN_FRAMES} or more, for I3D")
    load_i3d(path, proven=proven)  # features in the cache prove nothing
    identity = ("i3d", sha256_of(path), protocol.eps, protocol.resize)
    return Judge(identity, partial(_load_i3d, path, protocol, proven))


def c3d(weights: Path, mean: Path) -> Judge:
    """C3D, whose logits Inception Score uses."""
    load_c3d(weights, mean)  # a file that cannot be used is refused before any work
    return Judge(("c3d", sha256_of(weights), sha256_of(mean)), partial(_load_c3d, weights, mean))


def lpips(path: Path, network: Perceptual) -> Judge:
    """LPIPS of pairs of clips, averaged over their frames."""
    return Judge(("lpips", network, sha256_of(path)), partial(_load_lpips, path, network))


def _load_i3d(path: Path, protocol: Protocol, proven: bool, device: str) -> Encode:
    model = load_i3d(path, protocol.eps, proven).to(device)
    return lambda clips: model(torch.stack([protocol.to_i3d(frames, device) for (frames,) in clips]))


def _load_c3d(weights: Path, mean: Path, device: str) -> Encode:
    model = load_c3d(weights, mean).to(device)

    def encode(clips: ExcerptPixels) -> Tensor:
        pixels = torch.stack([torch.from_numpy(frames).permute(3, 0, 1, 2) for (frames,) in clips])
        return model(pixels.to(device) / 127.5 - 1)

    return encode


def _load_lpips(path: Path, network: Perceptual, device: str) -> Encode:
    model = load_lpips(path, network=network).to(device)

    def distance(real: Pixels, generated: Pixels) -> Tensor:
        frames, others = (torch.from_numpy(each).permute(0, 3, 1, 2).to(device) / 255 for each in (real, generated))
        return torch.cat([model(one[None], other[None]) for one, other in zip(frames, others, strict=True)]).mean()

    return lambda clips: torch.stack([distance(*pair) for pair in clips])[:, None]


class FeatureInput(NamedTuple):
    """Input of one row of features."""

    excerpts: tuple[Excerpt, ...]
    """An excerpt, or a pair of them."""
    file: Path
    """File that caches the features."""


@dataclass(frozen=True)
class Extractor:
    """Makes the features of excerpts."""

    judge: Judge
    reading: Reading
    device: str = "cpu"
    readers: int = 0
    """Threads that read clips while the networks work."""

    @cached_property
    def _loaded(self) -> tuple[Encode, Autoencoder | None]:
        return self.judge.load(self.device), self.reading.autoencoder(self.device)

    def make(self, job: Sequence[FeatureInput], on_clip: OnClip = lambda: None) -> None:
        """Write the features of some samples."""
        size = CPU_BATCH if self.device == "cpu" else GPU_BATCH
        encode, autoencoder = self._loaded

        def pixels(sample: FeatureInput) -> tuple[Pixels, ...]:
            return tuple(self.reading.read(each, autoencoder) for each in sample.excerpts)

        read = ahead(pixels, job, self.readers)
        with one_thread(), cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for start in range(0, len(job), size):
                samples = job[start : start + size]
                clips = [clip() for _, clip in islice(read, size)]
                for sample, features in zip(samples, _encode(clips, encode, size), strict=True):
                    with replacing(sample.file) as file:
                        np.save(file, features)
                    on_clip()

    def sample(self, excerpts: tuple[Excerpt, ...]) -> FeatureInput:
        """A sample, named by a hash of everything that determines its features."""
        key = digest([VERSION, self.device, self.judge.identity, *map(self.reading.identity, excerpts)])
        return FeatureInput(excerpts, cache_folder() / "features" / key[:2] / f"{key}.npy")


def _encode(clips: ExcerptPixels, encode: Encode, size: int) -> NDArray[np.float32]:
    """Features of clips, from a pass padded to `size`."""
    padded = [*clips, *[clips[-1]] * (size - len(clips))]
    with torch.inference_mode():
        return encode(padded)[: len(clips)].float().cpu().numpy()


@contextmanager
def one_thread() -> Iterator[None]:
    """Make figures bit-identical on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def extract(
    title: str, judge: Judge, clips: Sequence[tuple[Excerpt, ...]], reading: Reading, machines: Machines
) -> Float[Tensor, "clips features"]:
    """Features of clips or pairs of clips, in order; missing ones are computed and cached."""
    extractor = Extractor(judge, reading, machines.kind)
    samples = [extractor.sample(each) for each in clips]
    missing = list({sample.file: sample for sample in samples if _kept(sample.file) is None}.values())
    for folder in {sample.file.parent for sample in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    size = JOB_BATCHES * (CPU_BATCH if machines.kind == "cpu" else GPU_BATCH)
    jobs = [missing[start : start + size] for start in range(0, len(missing), size)]
    if jobs:
        with progress(title, len(samples), len(samples) - len(missing)) as on_clip:
            machines.settled.run(jobs, extractor, on_clip)
    found = [_kept(sample.file) for sample in samples]
    assert all(each is not None for each in found)
    return torch.from_numpy(np.stack([each for each in found if each is not None]))


def _kept(file: Path) -> NDArray[np.float32] | None:
    """Features in a file; None if it is missing or unreadable."""
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
