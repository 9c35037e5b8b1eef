"""`cogvideo info`: what a model costs, as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import product
from json import dumps
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cogvideo.bundle.format import Manifest
from cogvideo.config import PRESETS, preset, require
from cogvideo.planning.costs import (
    DTYPES,
    GPU,
    PRECISIONS,
    STAGES,
    Phase,
    cache_size,
    clip,
    components,
    decoding,
    resident,
    sums,
)
from cogvideo.planning.training import training, training_states

MOST_BATCH = 1_000_000
HEADS = ("GPU 16 bit", "CPU float32", "CPU bfloat16")
"""Names of `PRECISIONS`."""


def info(target: str = "", /, json: bool = False, batch: int = 1) -> None:
    """Show parameters, memory and compute of a model, from its configuration.

    Without a target, show the presets side by side. Memory is counted in GiB (2**30 bytes), traffic in GB (10**9).

    Args:
        target: Preset, or folder of a bundle.
        json: Print everything as JSON.
        batch: Sequences per training step.
    """
    require(0 < batch <= MOST_BATCH, f"batch is {batch}, expected 1 to {MOST_BATCH}")
    if json:
        reports = [report(name, Manifest.of(name), batch) for name in ([target] if target else PRESETS)]
        print(dumps(reports, indent=2, ensure_ascii=False))
        return
    for part in _tables(report(target, Manifest.of(target), batch)) if target else [_presets()]:
        Console(highlight=False).print(part)


def report(name: str, manifest: Manifest, batch: int = 1) -> dict[str, Any]:
    """The costs of a model, as JSON has them; `batch` is that of training.

    Bytes are by type or precision. A pass of a stage is the mean of all passes that draw codes one by one.
    """
    config = manifest.config
    phases = clip(config)
    caches, works = [], []
    for stage, guided in product(STAGES, (False, True)):
        case = {"stage": stage, "guided": guided}
        spatial, temporal = map(by_dtype, cache_size(config, stage, guided))
        caches.append(case | {"spatial": spatial, "temporal": temporal})
        works.append(case | _work(decoding(config, "", stage, 1, guided)))
    return {
        "name": name,
        "config": asdict(config),
        "files": {name: entry.num_bytes for name, entry in manifest.components.items()},
        "components": _sizes(components(config)),
        "sums": _sizes(sums(config)),
        "bytes_a_token": by_dtype(2 * config.transformer.num_layers * config.transformer.hidden),
        "caches": caches,
        "work": works,
        "clip": [_phase(each) for each in phases],
        "resident": {kind: resident(config, phases, kind) for kind in PRECISIONS},
        "training": [asdict(training(config, stage, batch)) for stage in STAGES],
    }


def by_dtype(values: int) -> dict[str, int]:
    """Bytes of a number of values."""
    return {name: values * num_bytes for name, num_bytes in DTYPES.items()}


def _sizes(parameters: dict[str, int]) -> list[dict[str, Any]]:
    return [{"name": name, "parameters": each, "bytes": by_dtype(each)} for name, each in parameters.items()]


def _work(phase: Phase) -> dict[str, Any]:
    moved = {kind: phase.bytes_moved(kind) for kind in PRECISIONS}
    return {"rows": phase.rows, "flops": phase.flops, "bytes_moved": moved}


def _phase(phase: Phase) -> dict[str, Any]:
    memory = {
        kind: {"parts": phase.memory(kind), "device": phase.device(kind), "host": phase.host(kind)}
        for kind in PRECISIONS
    }
    figures = {"name": phase.name, "passes": phase.passes, "work": {"stage": phase.stage} | _work(phase)}
    return figures | {"prefill_flops": phase.prefill_flops, "memory": memory}


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table for the terminal: the first column names the row, the others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _tables(report: dict[str, Any]) -> Iterator[Table | str]:
    sizes, layout = report["config"]["transformer"], report["config"]["layout"]
    rows, columns = layout["shape"] or [layout["grid"]] * 2
    shape = f"{sizes['num_layers']} layers, hidden {sizes['hidden']}, {sizes['num_heads']} heads"
    yield f"[bold]{report['name']}[/bold]: {shape}, {rows} x {columns} codes a frame\n"
    files, rows = dict(report["files"]), []
    on_disk = ["on disk"] if files else []
    for each in (*report["components"], *report["sums"]):
        name, sizes = each["name"], each["bytes"]
        row = [name, _number(each["parameters"]), _binary(sizes["float32"]), _binary(sizes["bfloat16"])]
        rows.append([*row, _binary(files.pop(name, 0))] if on_disk else row)
    rows += [[name, "", "", "", _binary(num_bytes)] for name, num_bytes in files.items()]
    yield table("Parameters", ["component", "number", "float32", "16 bit", *on_disk], rows)
    rows = []
    for each in report["caches"]:
        spatial, temporal = each["spatial"], each["temporal"]
        both = [spatial[kind] + temporal[kind] for kind in ("bfloat16", "float32")]
        rows.append([_case(each), *map(_binary, [spatial["bfloat16"], temporal["bfloat16"], *both])])
    token = f"{_decimal(report['bytes_a_token']['bfloat16'], 'B')} a token, channel and row in 16 bit"
    yield table(f"Cache of a sample, {token}", ["stage", "spatial", "temporal", "16 bit", "float32"], rows)
    rows = []
    for each in report["work"]:
        moved = [_decimal(num_bytes, "B") for num_bytes in each["bytes_moved"].values()]
        rows.append([_case(each), _decimal(each["flops"], "FLOP"), *moved])
    title = "Operations and bytes read for a code, mean over the stage, without prefill"
    yield table(title, ["stage", "operations", *HEADS], rows)
    rows, memory = [], []
    for each in report["clip"]:
        work, total = each["work"], each["passes"] * each["work"]["flops"] + each["prefill_flops"]
        read = _decimal(work["bytes_moved"][GPU], "B")
        rows.append([each["name"], str(work["rows"]), str(each["passes"]), read, _decimal(total, "FLOP")])
        devices = [_binary(part["device"]) for part in each["memory"].values()]
        memory.append([each["name"], *devices, _binary(each["memory"][GPU]["host"])])
    memory.append(["all, weights kept", *map(_binary, report["resident"].values()), ""])
    yield table("One clip: work", ["phase", "rows", "passes", "read a pass, 16 bit", "operations"], rows)
    yield table("One clip: memory, with the weights of the phase alone", ["phase", *HEADS, "GPU's host"], memory)
    title = f"Training on one GPU, batch {report['training'][0]['batch']}"
    yield table(title, ["", *STAGES], _training_rows(report["training"]))


def _case(work: dict[str, Any]) -> str:
    return f"{work['stage']}, guided" if work["guided"] else work["stage"]


def _training_rows(stages: list[dict[str, Any]]) -> Iterator[list[str]]:
    for name in stages[0]["states"]:
        yield [name, *(_binary(each["states"][name]) for each in stages)]
    yield ["together", *(_binary(sum(each["states"].values())) for each in stages)]
    for name in ("activations", "activations_checkpointed", "total", "total_checkpointed"):
        yield [name.replace("_", ", "), *(_binary(each[name]) for each in stages)]
    yield ["saved, by way of the host", *(_binary(each["saved"]) for each in stages)]
    yield ["operations a position", *(_decimal(each["flops_a_position"], "FLOP") for each in stages)]


def _presets() -> Table:
    """The figures that decide whether one can run it."""
    rows: dict[str, list[str]] = {}
    for config in map(preset, PRESETS):
        sizes, both = components(config), sums(config)["base with both stages"]
        key_frames = decoding(config, "", "sequential", 1, True)
        figures = {
            "base": _number(sizes["base"]),
            "a video stage adds": _number(sizes["sequential"]),
            "base with both stages": _number(both),
            "  in 16 bit": _binary(by_dtype(both)["bfloat16"]),
            "a guided code of a key frame": _decimal(key_frames.flops, "FLOP"),
            "  reads in 16 bit": _decimal(key_frames.bytes_moved(GPU), "B"),
            "key frames, GPU 16 bit": _binary(key_frames.device(GPU)),
            "key frames, CPU float32": _binary(key_frames.device("cpu_float32")),
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
    """Three figures."""
    while number >= step and len(units) > 1:
        number, units = number / step, units[1:]
    digits = max(0, 2 - int(math.log10(max(number, 1))))
    return f"{number:.{digits}f} {units[0]}".rstrip()
