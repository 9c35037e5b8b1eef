"""`cogvideo info`: what a model costs, as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from json import dumps
from typing import Any

from rich.console import Console
from rich.table import Table

from cogvideo.bundle.format import Manifest
from cogvideo.commands.terminal import table
from cogvideo.config import PRESETS, preset, require
from cogvideo.planning.costs import (
    GPU,
    NARROW,
    PRECISIONS,
    STAGES,
    WIDE,
    clip,
    components,
    decoding,
    resident,
    sums,
)
from cogvideo.planning.training import Training, training, training_states

MAX_BATCH = 1_000_000
PRECISION_NAMES = ("GPU 16 bit", "CPU float32", "CPU bfloat16")
"""Names of `PRECISIONS`."""


def info(target: str = "", /, json: bool = False, batch: int = 1) -> None:
    """Show parameters, memory and compute of a model, from its configuration.

    Without a target, show the presets side by side. Memory is counted in GiB (2**30 bytes), traffic in GB (10**9).

    Args:
        target: Preset, or folder of a bundle.
        json: Print everything as JSON.
        batch: Sequences per training step.
    """
    require(0 < batch <= MAX_BATCH, f"batch is {batch}, expected 1 to {MAX_BATCH}")
    if json:
        reports = [report(name, Manifest.of(name), batch) for name in ([target] if target else PRESETS)]
        print(dumps(reports, indent=2, ensure_ascii=False))
        return
    for part in _tables(target, Manifest.of(target), batch) if target else [_presets()]:
        Console(highlight=False).print(part)


def report(name: str, manifest: Manifest, batch: int = 1) -> dict[str, Any]:
    """Costs of a model, as JSON values; `batch` is the batch size in training. Sizes are in values or in bytes by
    precision."""
    config = manifest.config
    phases = clip(config)
    return {
        "name": name,
        "config": asdict(config),
        "files": {name: entry.num_bytes for name, entry in manifest.components.items()},
        "components": components(config),
        "sums": sums(config),
        "clip": [asdict(each) | {"memory": {kind: each.memory(kind) for kind in PRECISIONS}} for each in phases],
        "resident": {kind: resident(config, phases, kind) for kind in PRECISIONS},
        "training": [asdict(training(config, stage, batch)) for stage in STAGES],
    }


def _tables(name: str, manifest: Manifest, batch: int) -> Iterator[Table | str]:
    config, phases = manifest.config, clip(manifest.config)
    sizes, (rows, columns) = config.transformer, config.layout.sides
    shape = f"{sizes.num_layers} layers, hidden {sizes.hidden}, {sizes.num_heads} heads"
    kind = "preset " if name in PRESETS else ""
    yield f"{kind}[bold]{name}[/bold]: {shape}, {rows} x {columns} codes per frame\n"
    yield _parameters(manifest)
    works = [
        [
            each.name,
            str(each.rows),
            str(each.passes),
            _binary(each.cache * NARROW),
            _decimal(each.bytes_moved(GPU), "B"),
            _decimal(each.passes * each.flops + each.prefill_flops, "FLOP"),
        ]
        for each in phases
    ]
    heads = ["phase", "rows", "passes", "cache", "read per pass", "operations"]
    yield table("One clip: work, and bytes in 16 bit", heads, works)
    memory = [[each.name, *(_binary(each.memory(kind)) for kind in PRECISIONS)] for each in phases]
    memory.append(["all, weights kept", *(_binary(resident(config, phases, kind)) for kind in PRECISIONS)])
    yield table("One clip: memory, with the weights of the phase alone", ["phase", *PRECISION_NAMES], memory)
    steps = [training(config, stage, batch) for stage in STAGES]
    yield table(f"Training on one GPU, batch {batch}", ["", *STAGES], _training_rows(steps))


def _parameters(manifest: Manifest) -> Table:
    """Parameters and files; other components come last."""
    files = {name: entry.num_bytes for name, entry in manifest.components.items()}
    on_disk = ["on disk"] if files else []
    rows = []
    for name, count in (components(manifest.config) | sums(manifest.config)).items():
        row = [name, _number(count), _binary(count * WIDE), _binary(count * NARROW)]
        rows.append([*row, *(_binary(files.pop(name, 0)) for _ in on_disk)])
    rows += [[name, "", "", "", _binary(num_bytes)] for name, num_bytes in files.items()]
    return table("Parameters", ["component", "number", "float32", "16 bit", *on_disk], rows)


def _training_rows(steps: list[Training]) -> Iterator[list[str]]:
    for name in steps[0].states:
        yield [name, *(_binary(each.states[name]) for each in steps)]
    yield ["together", *(_binary(sum(each.states.values())) for each in steps)]
    for name in ("activations", "activations_checkpointed", "total", "total_checkpointed"):
        yield [name.replace("_", ", "), *(_binary(getattr(each, name)) for each in steps)]
    yield ["operations per position", *(_decimal(each.flops_per_position, "FLOP") for each in steps)]


def _presets() -> Table:
    """The figures that decide whether a machine can run a preset."""
    rows: dict[str, list[str]] = {}
    for config in map(preset, PRESETS):
        sizes, both = components(config), sums(config)["base with both stages"]
        key_frames = decoding(config, "", "sequential", 1, True)
        figures = {
            "base": _number(sizes["base"]),
            "a video stage adds": _number(sizes["sequential"]),
            "base with both stages": _number(both),
            "  in 16 bit": _binary(both * NARROW),
            "a guided key frame code": _decimal(key_frames.flops, "FLOP"),
            "  reads in 16 bit": _decimal(key_frames.bytes_moved(GPU), "B"),
            "key frames, GPU 16 bit": _binary(key_frames.memory(GPU)),
            "key frames, CPU float32": _binary(key_frames.memory("cpu_float32")),
            "training a video stage": _binary(sum(training_states(config, "sequential").values())),
        }
        for name, figure in figures.items():
            rows.setdefault(name, [name]).append(figure)
    return table("Presets", ["", *PRESETS], rows.values())


def _number(number: float) -> str:
    return _scaled(number, 1000, ["", "K", "M", "B"])


def _decimal(number: float, unit: str) -> str:
    return _scaled(number, 1000, [prefix + unit for prefix in ("", "K", "M", "G", "T", "P")])


def _binary(num_bytes: int) -> str:
    return _scaled(num_bytes, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]) if num_bytes else "-"


def _scaled(number: float, step: int, units: list[str]) -> str:
    """A number with three significant digits."""
    power = 0
    while number >= step and power < len(units) - 1:
        number /= step
        power += 1
    digits = max(0, 2 - int(math.log10(max(number, 1))))
    return f"{number:.{digits}f} {units[power]}".rstrip()
