"""`cogvideo evaluate ucf101` and `evaluate kinetics600`: the paper's protocols, and its tables with our figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from cogvideo.commands.evaluate_distribution import describe, load_networks, show
from cogvideo.commands.terminal import table
from cogvideo.config import require
from cogvideo.data.engines import Machines, progress
from cogvideo.data.sources import Item
from cogvideo.evaluation.comparison import INCEPTION_SCORE, ComparisonRun, Figure, Networks
from cogvideo.evaluation.footage import Reading, Tokenizer
from cogvideo.evaluation.making import ClipOptions, clip_files, fill
from cogvideo.evaluation.paper import (
    KINETICS600,
    NOTE,
    UCF101,
    Language,
    ProtocolMaker,
    Published,
    Split,
    of_classes,
    of_videos,
    read_kinetics,
    read_ucf101,
    write_table,
    write_windows,
)
from cogvideo.evaluation.protocols import PROTOCOLS, Protocol
from cogvideo.evaluation.subjects import Prompt
from cogvideo.files import exclusive_lock, sha256_of, write_json
from cogvideo.media.colors import Pixels
from cogvideo.media.video import write_video
from cogvideo.runs import RunFolder

GENERATED = "generated"
"""Folder of the clips."""


def ucf101(
    model: str,
    videos: Path,
    /,
    *,
    lists: Path,
    out: Path,
    split: Split = "train",
    division: Literal["1", "2", "3"] = "1",
    language: Language = "english",
    fps: float = 8.0,
    clips: int = 2048,
    samples: int = 10_000,
    batch: int = 8,
    network: Path | None = None,
    unproven: bool = False,
    c3d_weights: Path | None = None,
    c3d_mean: Path | None = None,
    making: ClipOptions = ClipOptions(),  # noqa: B008  # frozen
    machines: Machines = Machines(),  # noqa: B008  # frozen
) -> None:
    """Measure a model on UCF-101 as the paper does: FVD, Inception Score, and published figures next to them.

    Generates clips of 16 frames from the names of the classes and compares them with real ones by the protocol of TATS.
    Run an interrupted command again to continue. Writes ucf101.json; the clips stay in the folder.

    Args:
        model: Folder of a bundle, or its ID on the Hugging Face Hub.
        videos: Folder of UCF-101 with a folder for each class.
        lists: Folder with the official lists, ucfTrainTestlist.
        out: Folder for clips and results.
        split: Real videos to compare with: train, as TATS does, test, or all.
        division: Number of the official division into train and test.
        language: Language of the class names in the prompts.
        fps: Frames per second of real and generated clips; the data set has 25.
        clips: Number of clips of FVD on each side.
        samples: Number of clips of the Inception Score, if --c3d-weights are given.
        batch: Clips per pass; only affects the speed.
        network: File with the weights of I3D; the fetched ones by default.
        unproven: Accept weights that are not those of FVD; their distance has another name.
        c3d_weights: File with the weights of C3D (.npz), for Inception Score.
        c3d_mean: File with the mean clip of C3D (.npz).
        making: How clips are made.
        machines: Devices and processes.
    """
    require(batch > 0, f"batch is {batch}, expected a positive number of clips")
    protocol = replace(PROTOCOLS["tats"], clips=clips, score_clips=samples)
    networks = load_networks(protocol, network, unproven, c3d_weights, c3d_mean)
    listed = read_ucf101(lists, videos, split, int(division), language)
    texts = sorted({each.text for each in listed})
    run = _Run("ucf101", model, out, protocol, fps, making, machines, networks)
    prompts = of_classes(texts, max(clips, samples) if networks.c3d else clips, making.seed)
    with run.claimed({"texts": texts}):
        write_table(run.real, listed)
        run.fill(prompts, lambda numbers: run.maker.generate([prompts[number] for number in numbers]), batch)
    run.report(UCF101, {"split": split, "division": division, "language": language})


def kinetics600(
    model: str,
    videos: Path,
    /,
    *,
    table: Path,
    out: Path,
    fps: float = 8.0,
    clips: int = 50_000,
    network: Path | None = None,
    unproven: bool = False,
    making: ClipOptions = ClipOptions(),  # noqa: B008  # frozen
    machines: Machines = Machines(),  # noqa: B008  # frozen
) -> None:
    """Measure prediction on Kinetics-600 as the paper does: 5 frames are given, 11 generated; FVD at 64 x 64 pixels.

    Run an interrupted command again to continue. Writes kinetics600.json; the clips stay in the folder.

    Args:
        model: Folder of a bundle, or its ID on the Hugging Face Hub.
        videos: Folder with the videos, such as ID_000010_000020.mp4, directly or in one subfolder per label.
        table: Official CSV of the test split, with label, youtube_id, time_start and time_end.
        out: Folder for clips and results.
        fps: Frames per second of real and generated clips.
        clips: Maximum number of clips, one for each video.
        network: File with the weights of I3D; the fetched ones by default.
        unproven: Accept weights that are not those of FVD; their distance has another name.
        making: How clips are made.
        machines: Devices and processes.
    """
    protocol = replace(PROTOCOLS["tats"], clips=clips, size=64, real="random")
    networks = load_networks(protocol, network, unproven, None, None)
    listed, num_missing = read_kinetics(table, videos)
    print(f"{num_missing:,} of {len(listed) + num_missing:,} listed videos are missing and left out")
    run = _Run("kinetics600", model, out, protocol, fps, making, machines, networks)
    captioned = Reading(protocol, fps, caption_columns=("caption",))
    with run.claimed({"clips": clips, "list": sha256_of(table)}):
        if not run.real.exists():
            write_table(out / "listed.jsonl", listed)
            write_windows(run.real, out / "listed.jsonl", captioned, making.seed)
        items = [each for each in captioned.find(str(run.real)) if isinstance(each, Item)]
        prompts = of_videos(items, making.seed)
        run.fill(prompts, lambda numbers: [run.maker.predict(prompts[each], items[each]) for each in numbers], 1)
    run.report(KINETICS600, {"missing": num_missing})


class _Run:
    """An evaluation of a model in a folder."""

    def __init__(
        self,
        name: str,
        model: str,
        out: Path,
        protocol: Protocol,
        fps: float,
        making: ClipOptions,
        machines: Machines,
        networks: Networks,
    ) -> None:
        require(out.is_dir() or not out.exists(), f"{out} is a file, expected a folder")
        self.real = out / "real.jsonl"
        self._name, self._out, self._machines, self._networks = name, out, machines, networks
        self._reading = Reading(protocol, fps, Tokenizer.of(model))
        self._seed = making.seed
        pipeline = making.pipeline(model, machines.device)
        self.maker = ProtocolMaker(pipeline, making, protocol, fps)
        self._identity: dict[str, Any] = {
            "data": name,
            "bundle": pipeline.model.fingerprint,
            "fps": fps,
            "making": making.record(pipeline.model.config),
        }

    @contextmanager
    def claimed(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Claim the folder for these inputs."""
        self._identity |= inputs
        folder = RunFolder(self._out)
        with exclusive_lock(self._out):
            folder.claim(self._identity)
            yield

    def fill(self, prompts: Sequence[Prompt], make: Callable[[list[int]], list[Pixels]], batch: int) -> None:
        """Make the clips that the folder lacks, as lossless files. All prompts are checked before the first one."""
        self.maker.check(prompts)
        files = clip_files(self._out / GENERATED, prompts, ".webp")
        assert self._reading.fps is not None
        write = partial(write_video, fps=self._reading.fps)
        with progress("generated", len(files), sum(file.exists() for file in files)) as advance:
            fill(files, make, write, batch, advance)

    def report(self, published: Sequence[Published], facts: Mapping[str, Any]) -> None:
        """Compare clips with real ones, print the tables, and write the file."""
        comparing = ComparisonRun(self._reading, self._networks, self._machines, self._seed)
        result = comparing.compare(str(self.real), str(self._out / GENERATED))
        show(result, "tats", self._reading.protocol)
        rows = [*published, *_ours(result.figures)]
        console = Console(highlight=False)
        console.print(_table(rows))
        console.print(NOTE)
        described = describe(result, "tats", self._networks, self._reading, self._seed) | self._identity
        described |= {**facts, "table": [each._asdict() for each in rows], "note": NOTE}
        path = self._out / f"{self._name}.json"
        write_json(path, described)
        print(path)


def _ours(figures: Sequence[Figure]) -> list[Published]:
    """Rows of this run. Distances by networks other than FVD's have other names, and are left out."""
    found = {(each.name, each.of): each for each in figures}

    def value(name: str, of: str) -> float | None:
        return found[name, of].value if (name, of) in found else None

    of = "real / generated"
    fvd = found.get(("FVD", of))
    floor, clips, real_clips = (None, 0, 0) if fvd is None else (fvd.real, fvd.clips, fvd.real_clips)
    source = f"this run, N = {clips:,}"
    return [
        Published("this model", value("FVD", of), value(INCEPTION_SCORE, "generated"), source),
        Published("this model **", value("FVD", "reconstructed / generated"), None, source),
        Published("real clips", floor, value(INCEPTION_SCORE, "real"), f"this run, N = {real_clips:,}"),
    ]


def _table(rows: Sequence[Published]) -> Table:
    shown = []
    for row in rows:
        fvd = "-" if row.fvd is None else f"{round(row.fvd, 2):g}"
        score = "-" if row.inception_score is None else f"{row.inception_score:.2f}"
        shown.append([row.method, row.source, fvd, score])
    return table("", ["", "source", "FVD", "Inception Score"], shown, num_texts=2)
