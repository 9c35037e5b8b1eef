"""The model card: README.md of a bundle, written from what its training runs reported.

`training.json` beside it holds the reports themselves, one a component, and goes along when a bundle is copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvideo.bundle.format import COMPONENTS, Manifest
from cogvideo.config import CogVideoConfig, InputError
from cogvideo.files import write_text

REPORTS = "training.json"
CARD = "README.md"
_SIGN = "<!-- written by cogvideo; remove this line to keep your own text -->"


def read_reports(folder: Path) -> dict[str, dict[str, Any]]:
    """Reports of the runs of a bundle, by component; nothing where none is known.

    Raises:
        ValueError: the file cannot be read.
    """
    path = folder / REPORTS
    if not path.exists():
        return {}
    try:
        reports = json.loads(path.read_text(encoding="utf-8"))
        return {name: dict(report) for name, report in reports.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"cannot use {path}: {error}; remove it to do without") from error


def write_card(folder: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the reports of what the bundle in `folder` has, and its card. A README.md without our sign is left alone.

    Raises:
        OSError: they cannot be written.
    """
    there = Manifest.read(folder).components
    known = {name: reports[name] for name in COMPONENTS if name in reports and name in there}
    write_text(folder / REPORTS, json.dumps(known, indent=2) + "\n")
    path = folder / CARD
    if not path.exists() or _SIGN in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, "\n".join(_lines(folder, known)) + "\n")


def _lines(folder: Path, reports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    manifest = Manifest.read(folder)
    yield from ("---", "library_name: cogvideo", "pipeline_tag: text-to-video", "---", _SIGN, "")
    yield from (f"# {_plain(folder.resolve().name)}", "", "A model of cogvideo: text to video over VQ codes.", "")
    yield from (_sizes(manifest.config), "", "## Components", "")
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


def _sizes(config: CogVideoConfig) -> str:
    sizes, layout = config.transformer, config.layout
    return (
        f"{sizes.num_layers} layers, hidden {sizes.hidden}, {sizes.num_heads} heads, vocabulary {sizes.vocab_size:,}; "
        f"{layout.num_frames} frames of {layout.grid} x {layout.grid} codes a sequence."
    )


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A row a figure; tables of settings are one row each."""
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
    """One line without the signs of a table or of HTML."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "&#124;")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(map(_plain, row))} |" for row in rows)
