"""Reports of training runs, and the model card made from them: README.md of a bundle.

`training.json` next to it holds the reports themselves, one per component; a copied bundle keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvideo.bundle.format import COMPONENTS, Manifest
from cogvideo.config import InputError, require
from cogvideo.files import write_json, write_text
from cogvideo.runs import IDENTITY, RunFolder
from cogvideo.training.stages import STAGES

REPORTS = "training.json"
CARD = "README.md"
_SIGN = "<!-- written by cogvideo; remove this line to keep your own text -->"


def read_reports(folder: Path) -> dict[str, dict[str, Any]]:
    """Reports of the runs of a bundle, by component; empty if there are none."""
    path = folder / REPORTS
    if not path.exists():
        return {}
    try:
        reports = json.loads(path.read_text(encoding="utf-8"))
        return {name: dict(report) for name, report in reports.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"cannot use {path}: {error}; remove it to do without") from error


def report_of(run: RunFolder, step: int) -> dict[str, Any]:
    """Report of a run at a step, for its card: everything recorded in its folder."""
    identity, about = identity_of(run.path), run.about
    rows = [row for row in run.rows() if row["step"] <= step]
    measured: dict[str, Any] = {
        name: row[name] for row in rows if row["step"] == step for name in ("loss", "held_out") if name in row
    }
    start = {name: value for name, value in identity["choice"].items() if value is not None}
    settings = {name: identity[name] for name in ("task", "optimization", "clips")}
    course = _course([row for row in rows if "loss" in row])
    return {"steps": step, **measured, **course, **about, "start": start, **settings}


def _course(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Time, throughput and memory of a run, from its rows across restarts."""
    if not rows:
        return {}
    ends = [row["step"] for row in rows]
    steps = [end - before for end, before in zip(ends, [0, *ends[:-1]], strict=True)]
    slowness = sum(made / max(row["tokens_per_second"], 0.1) for made, row in zip(steps, rows, strict=True))
    return {
        "time": {"seconds": rows[-1]["seconds"], "positions_per_second": round(sum(steps) / slowness)},
        "memory": {"peak_bytes": max(row.get("peak_bytes", 0) for row in rows)},
    }


def identity_of(run: Path) -> dict[str, Any]:
    """Everything that determines the result of a stage's run."""
    path = run / IDENTITY
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(identity, dict) and identity.get("stage") in STAGES
        require(known, f"it names no stage, expected one of {', '.join(STAGES)}")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{run} is not a run of a stage ({path.name}: {reason}): pass such a folder as .sequential-run"
        ) from error
    return identity


def write_model_card(folder: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Write reports of the components that the bundle in `folder` has, and its card.

    A README.md without our marker is left alone.
    """
    there = Manifest.read(folder).components
    known = {name: reports[name] for name in COMPONENTS if name in reports and name in there}
    write_json(folder / REPORTS, known)
    path = folder / CARD
    if not path.exists() or _SIGN in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, "\n".join(_lines(folder, known)) + "\n")


def _lines(folder: Path, reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    manifest = Manifest.read(folder)
    yield from ("---", "library_name: cogvideo", "pipeline_tag: text-to-video", "---", _SIGN, "")
    yield from (f"# {_plain(folder.resolve().name)}", "", "A model of cogvideo: text to video over VQ codes.", "")
    sizes, layout = manifest.config.transformer, manifest.config.layout
    yield (
        f"{sizes.num_layers} layers, hidden {sizes.hidden}, {sizes.num_heads} heads, vocabulary {sizes.vocab_size:,}; "
        f"{layout.num_frames} frames of {layout.sides[0]} x {layout.sides[1]} codes a sequence."
    )
    yield from ("", "## Components", "")
    yield from _table(
        ("component", "file", "size", "sha256"),
        [
            (name, entry.file, f"{entry.num_bytes / 1e6:,.1f} MB", f"`{entry.sha256[:12]}`")
            for name, entry in manifest.components.items()
        ],
    )
    for name, report in reports.items():
        yield from ("", f"## Training: {name}", "")
        yield from _table(("what", "value"), list(_facts(report)))


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One row per figure; each table of settings is one row."""
    for name, value in report.items():
        title = name.replace("_", " ")
        if isinstance(value, Mapping) and any(isinstance(each, Mapping) for each in value.values()):
            yield from ((f"{title}, {key}", _words(each)) for key, each in value.items())
        else:
            yield title, _words(value)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name.replace('_', ' ')} {_words(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _plain(text: str) -> str:
    """Text on one line, with characters of tables and HTML escaped."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "&#124;")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(map(_plain, row))} |" for row in rows)
