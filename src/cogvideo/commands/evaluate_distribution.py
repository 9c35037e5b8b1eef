"""`cogvideo evaluate distribution`: from options to a comparison, its tables and its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from cogvideo.commands.terminal import table
from cogvideo.config import require
from cogvideo.data.engines import Machines
from cogvideo.evaluation.comparison import Comparison, ComparisonRun, Figure, Networks
from cogvideo.evaluation.features import c3d, i3d, lpips
from cogvideo.evaluation.footage import Reading, Tokenizer
from cogvideo.evaluation.networks.cache import fetched
from cogvideo.evaluation.protocols import MIN_RELIABLE_CLIPS, PROTOCOLS, Protocol
from cogvideo.files import check_place, write_json
from cogvideo.models.perceptual import Network as Perceptual
from cogvideo.runs import provenance


def distribution(
    real: str,
    generated: str,
    /,
    *,
    protocol: Literal["tfhub", "tats", "stylegan-v"] = "tats",
    clips: int | None = None,
    frames: int | None = None,
    step: int | None = None,
    size: int | None = None,
    fps: float | None = None,
    seed: int = 0,
    model: str | None = None,
    network: Path | None = None,
    unproven: bool = False,
    c3d_weights: Path | None = None,
    c3d_mean: Path | None = None,
    pairs: Perceptual | None = None,
    machines: Machines = Machines(),  # noqa: B008  # frozen
    json: Path | None = None,
) -> None:
    """Compare clips with real ones: FVD, KVD, Inception Score, LPIPS. Run an interrupted command again to continue.

    The network of FVD comes from `cogvideo fetch i3d`. Features are cached by the content of each clip.

    Args:
        real: Folder of videos, table, WebDataset tar or prepared data with the real clips.
        generated: Folder, table, tar or prepared data with the clips to judge.
        protocol: Implementation to match: tfhub (the original), tats, or stylegan-v.
        clips: Number of clips on each side; the protocol's by default, 2,048.
        frames: Number of frames of a clip; the protocol's by default, 16.
        step: Distance between frames, in frames of the file; the protocol's by default, 1.
        size: Side in pixels to which clips are reduced first; the protocol's by default, 128 for tats, else the file's.
        fps: Frames per second at which files are read; their own by default.
        seed: Seed of all random choices.
        model: Bundle whose image tokenizer decodes prepared data, and reconstructs real clips for another FVD.
        network: File with the weights of I3D; the fetched ones by default.
        unproven: Accept weights that are not those of FVD; their distance is not called FVD.
        c3d_weights: File with the weights of C3D (.npz), for Inception Score.
        c3d_mean: File with the mean clip of C3D (.npz).
        pairs: Network of LPIPS, vgg or alexnet, to compare clips of the same name.
        machines: Devices and processes.
        json: File for the figures with everything that they depend on.
    """
    if json is not None:
        check_place(json, "the figures")
    given: dict[str, Any] = {"clips": clips, "score_clips": clips, "frames": frames, "step": step, "size": size}
    chosen = replace(PROTOCOLS[protocol], **{name: value for name, value in given.items() if value is not None})
    networks = load_networks(chosen, network, unproven, c3d_weights, c3d_mean)
    if pairs is not None:
        networks = replace(networks, lpips=lpips(fetched(f"lpips-{pairs}"), pairs))
    reading = Reading(chosen, fps, Tokenizer.of(model) if model else None)
    result = ComparisonRun(reading, networks, machines, seed).compare(real, generated)
    show(result, protocol, chosen)
    if json is not None:
        write_json(json, describe(result, protocol, networks, reading, seed))
        print(json)


def load_networks(
    protocol: Protocol, network: Path | None, unproven: bool, c3d_weights: Path | None, c3d_mean: Path | None
) -> Networks:
    """I3D, and C3D if its files are given."""
    require((c3d_weights is None) == (c3d_mean is None), "got one of --c3d-weights and --c3d-mean, expected both")
    judge = i3d(network or fetched("i3d"), protocol, not unproven)
    return Networks(judge, not unproven, c3d(c3d_weights, c3d_mean) if c3d_weights and c3d_mean else None)


def show(result: Comparison, name: str, protocol: Protocol) -> None:
    """Print the figures, what they depend on, and warnings."""
    console = Console(highlight=False)
    console.print(f"real: {result.real}")
    console.print(f"generated: {result.generated}")
    size = "the size of the files" if protocol.size is None else f"{protocol.size} x {protocol.size} pixels"
    console.print(f"protocol {name}: {protocol.frames} frames, step {protocol.step}, at {size}")
    console.print(figures_table(result.figures))
    for warning in warnings(result):
        console.print(f"warning: {warning}")


def figures_table(figures: Sequence[Figure]) -> Table:
    """A row for each figure."""
    rows = []
    for each in figures:
        low, high = each.interval
        floor = "-" if each.real is None else _number(each.real)
        if each.real is not None and each.real_clips != each.clips:
            floor += f" (N = {each.real_clips:,})"
        limit = "-" if each.limit is None else f"{_number(each.limit.value)} ± {_number(each.limit.error)}"
        between = f"{_number(low)} to {_number(high)}"
        rows.append([each.name, each.of, f"{each.clips:,}", _number(each.value), between, floor, limit])
    heads = ["figure", "clips", "N", "value", "95% interval", "real / real", "N to infinity"]
    return table("", heads, rows, num_texts=2)


def _number(value: float) -> str:
    """Two decimals, or more for small figures such as KVD."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"


def warnings(result: Comparison) -> Iterator[str]:
    """Warnings about less reliable figures."""
    count = result.real.clips
    if count < MIN_RELIABLE_CLIPS:
        yield f"N is {count:,}, below {MIN_RELIABLE_CLIPS:,}: FVD is mostly bias, and comparable only at this N"
    if result.num_shared:
        yield f"{result.num_shared:,} of the generated clips are among the real ones, with the same content"
    for name, side in (("real", result.real), ("generated", result.generated)):
        if side.clips > 2 * side.videos:
            yield f"the {side.clips:,} {name} clips are parts of {side.videos:,} videos: the interval is too narrow"
    if set(result.real.codecs) != set(result.generated.codecs):
        yield "the files use different codecs, which alone changes FVD"


def describe(result: Comparison, name: str, networks: Networks, reading: Reading, seed: int) -> dict[str, Any]:
    """Everything needed to repeat the measurement, and the figures."""
    return {
        **provenance(),
        "protocol": {"name": name, **asdict(reading.protocol)},
        "fps": reading.fps,
        "seed": seed,
        "i3d": networks.i3d.identity,
        "c3d": networks.c3d.identity if networks.c3d else None,
        "lpips": networks.lpips.identity if networks.lpips else None,
        "tokenizer_sha256": reading.tokenizer.sha256 if reading.tokenizer else None,
        "real": asdict(result.real),
        "generated": asdict(result.generated),
        "figures": [asdict(each) | {"limit": each.limit and each.limit._asdict()} for each in result.figures],
        "warnings": list(warnings(result)),
    }
