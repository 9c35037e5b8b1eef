"""Benchmark of the loader compared with the least work any loader must do, for benchmarks/data.py."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import alternate
from cogvideo.data.clips import ClipSampling
from cogvideo.data.dataset import make_card, write_card
from cogvideo.data.loader import ClipSample, ClipStream, Loader, order
from cogvideo.data.shards import Row, ShardInfo, digest, shard_name, write_shard

FRAMES, GRID, NUM_CODES, FPS = 33, 8, 1024, 8.0
BATCH, STRIDE = 64, 8


def loading(num_rows: int = 12_800, shard_rows: int = 128, rounds: int = 5) -> dict[str, Any]:
    """Rows per second of one process, and growth of its private memory over 100,000 rows.

    The floor copies the same number of frames of the same rows from one memory-mapped array to an int64 tensor: a whole
    batch with one index, or row by row, as clips of different lengths require. It has no shards, captions, random
    offsets, or worker protocol. Starting the workers is not timed.

    Args:
        num_rows: clips in the dataset, each with 33 x 8 x 8 codes and one caption.
        shard_rows: clips per shard.
        rounds: number of timed rounds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        array = _write(path, num_rows, shard_rows)
        stream = ClipStream([path], sampling=ClipSampling())
        batches = num_rows // BATCH
        alone, workers = iter(Loader(stream, BATCH, collate)), iter(Loader(stream, BATCH, collate, num_workers=2))
        calls: dict[str, Callable[[], object]] = {
            "memory map, batch by batch": lambda: _index_batches(array, stream, batches),
            "memory map, row by row": lambda: _index_rows(array, stream, batches),
            "loader": lambda: _take(alone, batches),
            "loader, 2 workers": lambda: _take(workers, batches),
        }
        times = alternate(calls, rounds, warm_up=1)
        rates = {name: {key: batches * BATCH / ms * 1e3 for key, ms in each.items()} for name, each in times.items()}
        figures: dict[str, Any] = {"rows_per_second": rates, "opening_ms": _opening(path)}
        figures |= {"private_memory_growth_mib": _growth(stream, 100_000), "rows": num_rows, "batch": BATCH}
    _print(figures)
    return figures


def _write(folder: Path, num_rows: int, shard_rows: int) -> np.ndarray:
    """Write the dataset, and the same codes as one plain memory-mapped array."""
    codes = np.random.default_rng(0).integers(0, NUM_CODES, (num_rows, FRAMES, GRID, GRID), dtype=np.uint16)
    info = ShardInfo(
        grid=GRID, num_codes=NUM_CODES, fps=FPS, tokenizer_sha256="", settings_sha256=digest({}), work_sha256=""
    )
    rows = [Row(f"{n}.mp4", (f"a clip numbered {n}",), {}, FPS, each, "train") for n, each in enumerate(codes)]
    files = []
    for number, first in enumerate(range(0, num_rows, shard_rows)):
        files.append(shard_name(number))
        write_shard(folder / files[-1], rows[first : first + shard_rows], info)
    write_card(folder, make_card(folder, files, source="", tokenizer="", settings={}))
    np.save(folder / "plain.npy", codes)
    return np.load(folder / "plain.npy", mmap_mode="r")


def _batches(stream: ClipStream, batches: int) -> list[np.ndarray]:
    return list(order(len(stream), stream.sampling.seed, 0)[: batches * BATCH].reshape(batches, BATCH))


def _index_batches(array: np.ndarray, stream: ClipStream, batches: int) -> None:
    for rows in _batches(stream, batches):
        torch.from_numpy(array[rows, ::STRIDE].astype(np.int64))


def _index_rows(array: np.ndarray, stream: ClipStream, batches: int) -> None:
    for rows in _batches(stream, batches):
        torch.from_numpy(np.stack([array[row, ::STRIDE] for row in rows.tolist()]).astype(np.int64))


def collate(samples: list[ClipSample]) -> torch.Tensor:
    """Stack the codes of samples."""
    return torch.from_numpy(np.stack([sample.codes for sample in samples], dtype=np.int64))


def _take(batches: Iterator[object], count: int) -> None:
    for _ in islice(batches, count):
        pass


def _opening(folder: Path) -> float:
    start = time.perf_counter()
    ClipStream([folder])
    return (time.perf_counter() - start) * 1e3


def _growth(stream: ClipStream, num_rows: int) -> float:
    """Growth of private memory in MiB; mapped pages do not count, since the system can reclaim them."""
    _take(iter(Loader(stream, BATCH, collate)), 100)
    before = _private()
    _take(iter(Loader(stream, BATCH, collate)), num_rows // BATCH)
    return (_private() - before) / 1024


def _private() -> int:
    """Anonymous memory of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _print(figures: dict[str, Any]) -> None:
    print(f"{'rows per second, batch 64':32} {'median':>10} {'best':>10}")
    for name, each in figures["rows_per_second"].items():
        print(f"{name:32} {each['median']:10,.0f} {each['best']:10,.0f}")
    print(f"opening {figures['rows']:,} rows: {figures['opening_ms']:.0f} ms")
    print(f"memory growth in 100,000 rows: {figures['private_memory_growth_mib']:.1f} MiB")


if __name__ == "__main__":
    loading()
