"""Benchmark of the data tools: `python -m benchmarks.data [SECTION ...]` writes to benchmarks/results/.

Every figure with a goal is a ratio of measurements that alternate in the same run: preparing clips against the encoder
alone, reading against raw decoding, the loader against a plain memory map.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loading import loading
from benchmarks.machine import alternate, write
from benchmarks.reading import measure_reading, moving_picture, resident_mebibytes
from benchmarks.rendering import rendering
from cogvideo.bundle import model as bundle
from cogvideo.bundle.format import Manifest
from cogvideo.config import preset
from cogvideo.data.encoding import PrepareSettings, ShardJob, ShardWorker, encode_clips
from cogvideo.data.frames import FrameSettings, read_item
from cogvideo.data.prepare import complete, plan, shard_info
from cogvideo.data.sources import SourceOptions, list_source
from cogvideo.media.video import write_video
from cogvideo.models.autoencoder import Autoencoder

PREPARE_GOAL = 0.9


def preparing(num_clips: int = 12, rounds: int = 5) -> dict[str, Any]:
    """Speed of one worker process on camera-like clips, from files to a shard, compared with its encoder alone.

    Clips are H.264, 320 x 240, 24 frames per second for 4 seconds, prepared at 8 frames per second at the pocket
    preset's sizes. The floor encodes the same frames from memory, in the same batches, on the same thread.
    """
    torch.set_num_threads(1)  # as worker processes do
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        _write_clips(path / "clips", num_clips)
        worker, job = _work(path, str(path / "clips"), FrameSettings())
        batch = worker.settings.batch
        clips = [read_item(item, worker.settings.frames).frames for item in job.items]
        times = alternate(
            {
                "encoder alone": lambda: list(encode_clips(clips, worker.encode, batch)),
                "prepare": lambda: worker.make(job),
            },
            rounds,
            warm_up=1,
        )
    share = {key: times["encoder alone"][key] / times["prepare"][key] for key in ("median", "best")}
    seconds = times["prepare"]["median"] / 1e3
    frames = sum(map(len, clips))
    return {
        "clips per second and core": num_clips / seconds,
        "frames per second and core": frames / seconds,
        "share of the encoder's speed": share,
        "goal": PREPARE_GOAL,
    }


def memory(num_clips: int = 10_000) -> dict[str, Any]:
    """Resident memory of one worker process that prepares thousands of clips, after a tenth of them and after all.

    Clips are excerpts of small files in three formats, at 16 x 16 pixels, so that encoding takes little time.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        marks = {}
        names = [f"small{suffix}" for suffix in (".mp4", ".gif", ".webp")]
        for name in names:
            write_video(path / name, moving_picture(30, 48, 64), 10)
        rows = (f"{names[row % 3]},a clip,{row / num_clips:.4f}" for row in range(num_clips))
        (path / "clips.csv").write_text("\n".join(["file,caption,start", *rows]))
        worker, job = _work(path, str(path / "clips.csv"), FrameSettings(size=16, max_seconds=1))
        size = num_clips // 100
        for done in range(size, num_clips + 1, size):
            worker.make(job._replace(items=job.items[done - size : done]))
            marks[done] = resident_mebibytes()
    return {"MiB after a tenth": marks[num_clips // 10], "MiB after all": marks[num_clips]}


def _work(folder: Path, source: str, frames: FrameSettings) -> tuple[ShardWorker, ShardJob]:
    """A worker with a random pocket tokenizer, and one job with all clips."""
    config = preset("pocket")
    bundle.update(folder / "bundle", config, image_tokenizer=Autoencoder(config.autoencoder))
    settings = complete(PrepareSettings(frames), config)
    items = list_source(source, SourceOptions()).items
    info = shard_info(Manifest.read(folder / "bundle"), settings, "")
    (job,) = plan(items, folder, info, len(items))
    return ShardWorker(folder / "bundle", settings), job


def _write_clips(folder: Path, number: int) -> None:
    folder.mkdir()
    for clip in range(number):
        write_video(folder / f"{clip}.mp4", moving_picture(96, 240, 320), 24)
        (folder / f"{clip}.txt").write_text(f"clip number {clip}\n")


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "preparing": preparing,
    "memory": memory,
    "reading": measure_reading,
    "loading": loading,
    "rendering": rendering,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", nargs="*", default=list(SECTIONS), help=f"any of {', '.join(SECTIONS)}")
    chosen = parser.parse_args().section
    figures = {}
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}, expected any of {', '.join(SECTIONS)}")
    for name in chosen:
        print(f"{name}: {SECTIONS[name].__doc__}", flush=True)
        figures[name] = SECTIONS[name]()
        print(json.dumps(figures[name], indent=2))
    print(f"-> {write('data', figures)}")


if __name__ == "__main__":
    main()
