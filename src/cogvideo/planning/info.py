"""`cogvideo info`: what a model costs, as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from json import dumps

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cogvideo.bundle.format import Manifest
from cogvideo.config import PRESETS, CogVideoConfig, preset, require
from cogvideo.planning.costs import (
    PRECISIONS,
    STAGES,
    CacheSize,
    Component,
    Phase,
    Work,
    bytes_a_token,
    cache_size,
    clip,
    components,
    decoding,
    resident,
    sums,
    work,
)
from cogvideo.planning.training import Training, training, training_states

MOST_BATCH = 1_000_000


@dataclass(frozen=True)
class Costs:
    """Everything about one configuration."""

    name: str
    config: CogVideoConfig
    files: dict[str, int]
    """Bytes on disk of each component of a bundle; a preset has none."""
    components: tuple[Component, ...]
    sums: tuple[Component, ...]
    bytes_a_token: dict[str, int]
    """Keys and values of one slot in all layers, a channel and row, by dtype."""
    caches: tuple[CacheSize, ...]
    work: tuple[Work, ...]
    """Work of one sample in each stage, without and with guidance: a pass is a code."""
    clip: tuple[Phase, ...]
    resident: dict[str, int]
    """Device memory of the clip if all weights stay loaded, by precision."""
    training: tuple[Training, ...]


def report(name: str, config: CogVideoConfig, files: dict[str, int] | None = None, batch: int = 1) -> Costs:
    """The report on a configuration; `batch` is that of training."""
    phases, cases = clip(config), [(stage, guided) for stage in STAGES for guided in (False, True)]
    return Costs(
        name,
        config,
        files or {},
        components(config),
        sums(config),
        bytes_a_token(config),
        tuple(cache_size(config, *case) for case in cases),
        tuple(work(config, stage, 1, guided) for stage, guided in cases),
        phases,
        resident(config, phases),
        tuple(training(config, stage, batch) for stage in STAGES),
    )


def info(target: str = "", /, json: bool = False, batch: int = 1) -> None:
    """Parameters, memory and work of a model, computed from its configuration.

    Without a target, the presets side by side. Memory is counted in GiB (2**30 bytes), traffic in GB (10**9).

    Args:
        target: A preset, or the folder of a bundle.
        json: Print everything as JSON.
        batch: Sequences in a step of training.

    Raises:
        ValueError: `target` is neither, or `batch` is not positive.
    """
    require(0 < batch <= MOST_BATCH, f"batch is {batch}, expected 1 to {MOST_BATCH}")
    if not json and not target:
        return _print([_side_by_side()])
    reports = [report(*_find(name), batch) for name in ([target] if target else PRESETS)]
    if json:
        print(dumps([asdict(each) for each in reports], indent=2, ensure_ascii=False))
    else:
        _print(_tables(reports[0]))
    return None


def _find(target: str) -> tuple[str, CogVideoConfig, dict[str, int]]:
    """Name, configuration and sizes of files."""
    manifest = Manifest.of(target)
    return target, manifest.config, {name: entry.num_bytes for name, entry in manifest.components.items()}


def _print(parts: Iterable[Table | str]) -> None:
    console = Console(highlight=False)
    for part in parts:
        console.print(part)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table for the terminal: the first column names the row, the others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


_PRECISION_NAMES = ("GPU 16 bit", "CPU float32", "CPU bfloat16")


def _tables(report: Costs) -> Iterator[Table | str]:
    sizes, grid = report.config.transformer, report.config.layout.grid
    shape = f"{sizes.num_layers} layers, hidden {sizes.hidden}, {sizes.num_heads} heads, {grid} x {grid} codes a frame"
    yield f"[bold]{report.name}[/bold]: {shape}\n"
    on_disk = ["on disk"] if report.files else []
    yield table("Parameters", ["component", "number", "float32", "16 bit", *on_disk], _parameter_rows(report))
    token = f"{_decimal(report.bytes_a_token['bfloat16'], 'B')} a token, channel and row in 16 bit"
    columns = ["stage", "spatial", "temporal", "16 bit", "float32"]
    yield table(f"Cache of a sample, {token}", columns, map(_cache_row, report.caches))
    title = "Operations and bytes read for a code, mean over the stage, without prefill"
    yield table(title, ["stage", "operations", *_PRECISION_NAMES], map(_work_row, report.work))
    columns = ["phase", "rows", "passes", "read a pass, 16 bit", "operations"]
    yield table("One clip: work", columns, map(_phase_row, report.clip))
    columns = ["phase", *_PRECISION_NAMES, "GPU's host"]
    yield table("One clip: memory, with the weights of the phase alone", columns, _memory_rows(report))
    title = f"Training on one GPU, batch {report.training[0].batch}"
    yield table(title, ["", *STAGES], _training_rows(report.training))


def _parameter_rows(report: Costs) -> Iterator[list[str]]:
    for each in (*report.components, *report.sums):
        row = [each.name, _count_text(each.parameters), _binary(each.bytes["float32"]), _binary(each.bytes["bfloat16"])]
        yield [*row, _binary(report.files.get(each.name, 0))] if report.files else row
    for name in report.files.keys() - {each.name for each in report.components}:
        yield [name, "", "", "", _binary(report.files[name])]


def _cache_row(cache: CacheSize) -> list[str]:
    totals = (cache.spatial[kind] + cache.temporal[kind] for kind in ("bfloat16", "float32"))
    parts = (cache.spatial["bfloat16"], cache.temporal["bfloat16"])
    return [_stage(cache.stage, cache.guided), *map(_binary, parts), *map(_binary, totals)]


def _work_row(work: Work) -> list[str]:
    moved = (_decimal(work.bytes_moved[kind], "B") for kind in PRECISIONS)
    return [_stage(work.stage, work.rows > 1), _decimal(work.flops, "FLOP"), *moved]


def _stage(stage: str, guided: bool) -> str:
    return f"{stage}, guided" if guided else stage


def _phase_row(phase: Phase) -> list[str]:
    work, total = phase.work, phase.passes * phase.work.flops + phase.prefill_flops
    moved = _decimal(work.bytes_moved["gpu_bfloat16"], "B")
    return [phase.name, str(work.rows), str(phase.passes), moved, _decimal(total, "FLOP")]


def _memory_rows(report: Costs) -> Iterator[list[str]]:
    for phase in report.clip:
        devices = (_binary(phase.memory[kind].device) for kind in PRECISIONS)
        yield [phase.name, *devices, _binary(phase.memory["gpu_bfloat16"].host)]
    yield ["all, weights kept", *(_binary(report.resident[kind]) for kind in PRECISIONS), ""]


def _training_rows(stages: Iterable[Training]) -> Iterator[list[str]]:
    stages = list(stages)
    for name in stages[0].states:
        yield [name, *(_binary(each.states[name]) for each in stages)]
    yield ["together", *(_binary(sum(each.states.values())) for each in stages)]
    for name in ("activations", "activations_checkpointed", "total", "total_checkpointed"):
        yield [name.replace("_", ", "), *(_binary(getattr(each, name)) for each in stages)]
    yield ["saved, by way of the host", *(_binary(each.saved) for each in stages)]
    yield ["operations a position", *(_decimal(each.flops_a_position, "FLOP") for each in stages)]


def _side_by_side() -> Table:
    columns = [_overview(preset(name)) for name in PRESETS]
    rows = ([name, *(column[name] for column in columns)] for name in columns[0])
    return table("Presets", ["", *PRESETS], rows)


def _overview(config: CogVideoConfig) -> dict[str, str]:
    """The figures that decide whether one can run it."""
    base, stage, *_ = components(config)
    key_frames, both = decoding(config, "", "sequential", 1, True), sums(config)[1]
    return {
        "base": _count_text(base.parameters),
        "a video stage adds": _count_text(stage.parameters),
        "base with both stages": _count_text(both.parameters),
        "  in 16 bit": _binary(both.bytes["bfloat16"]),
        "a guided code of a key frame": _decimal(key_frames.work.flops, "FLOP"),
        "  reads in 16 bit": _decimal(key_frames.work.bytes_moved["gpu_bfloat16"], "B"),
        "key frames, GPU 16 bit": _binary(key_frames.memory["gpu_bfloat16"].device),
        "key frames, CPU float32": _binary(key_frames.memory["cpu_float32"].device),
        "training a video stage": _binary(sum(training_states(config, "sequential").values())),
    }


def _count_text(number: float) -> str:
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
