"""The folder of a run: its identity and its measurements.

Files are replaced atomically: after an interruption, each is either the old one or the new one.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

import cogvideo
from cogvideo.config import InputError, require, upgraded
from cogvideo.devices import is_out_of_memory
from cogvideo.files import write_json, write_text

IDENTITY = "run.json"
"""File with the identity of a run."""
TYPED = "typed"
"""Fact: name of the initial bundle as the user typed it; the identity has its hashes."""


def provenance() -> dict[str, Any]:
    """Command line and versions, stored with results so that they can be reproduced."""
    return {
        "command": shlex.join(["cogvideo", *sys.argv[1:]]),
        "versions": {
            "cogvideo": cogvideo.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


class RunFolder:
    """The files of one run; whoever claims or finishes it creates the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity, self._about = path / IDENTITY, path / "about.json"
        self._metrics, self._summary = path / "metrics.jsonl", path / "report.json"

    def claim(self, identity: Mapping[str, Any], facts: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Write the identity of the run, or check that it matches the run that began here.

        Args:
            identity: settings and whatever else decides the result, in nested tables.
            facts: further facts, which may differ when the run continues.
        """
        changes = self.changes(identity, facts)
        advice = "pass the same as before to continue it, or remove the folder to start anew"
        require(not changes, f"another run began in {self.path}: {changes}; {advice}")
        self.path.mkdir(parents=True, exist_ok=True)
        here = _plain({**identity, **facts})
        if not self.began or _read(self._identity) != here:
            write_json(self._identity, here)

    @property
    def began(self) -> bool:
        """True if a run claimed the folder."""
        return self._identity.exists()

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the run that claimed the folder."""
        return dict(_read(self._identity))

    def changes(self, identity: Mapping[str, Any], facts: Mapping[str, Any] = MappingProxyType({})) -> str:
        """Differences between a run and the one that began here, in words; empty if there are none or no run began."""
        if not self.began:
            return ""
        there = _read(self._identity)
        if isinstance(there.get("config"), dict):
            there["config"] = upgraded(there["config"])
        typed = there.get(TYPED), facts.get(TYPED)
        changes = list(_changes(there, _plain(identity), typed, ignored={TYPED, *facts}))
        return "; ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")

    def set_aside(self) -> Path:
        """Make room for another run: rename the folder to a numbered name, which is returned, and make a new one."""
        numbered = (self.path.with_name(f"{self.path.name}-{number}") for number in count(1))
        aside = self.path.rename(next(each for each in numbered if not each.exists()))
        self.path.mkdir()
        return aside

    def old_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """Last step and state of a tokenizer or reader run of an earlier version, which had its own format, if any."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            step, state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # corrupt bytes may raise anything
            if isinstance(error, OSError) or is_out_of_memory(error):
                raise
            raise InputError(f"cannot use {path}: it is not a checkpoint of this version") from error
        return step, state

    def report(self, row: Mapping[str, Any]) -> None:
        """Append a row, which includes the step, to `metrics.jsonl`."""
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # on a full disk, it names no file
            raise OSError(error.errno, error.strerror, str(self._metrics)) from error

    def forget_after(self, step: int) -> None:
        """Drop the rows that a killed run reported after its last checkpoint; those steps are repeated."""
        if self._metrics.exists():
            kept = [row for row in self.rows() if row["step"] <= step]
            write_text(self._metrics, "".join(f"{json.dumps(row)}\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`, except one that a killed run left half-written."""
        if not self._metrics.exists():
            return []
        with naming(self._metrics):
            lines = self._metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Write `about.json`: facts for reports, known from the start, that do not affect the result."""
        write_json(self._about, facts)

    @property
    def about(self) -> dict[str, Any]:
        """Facts that `describe` wrote, if it did."""
        return dict(_read(self._about)) if self._about.exists() else {}

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `report.json`, which marks the run as finished."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self._summary, summary)

    @property
    def summary(self) -> dict[str, Any] | None:
        """Summary that `finish` wrote; None until the run is finished."""
        return _read(self._summary) if self._summary.exists() else None


def _plain(values: Any) -> Any:
    """Values after a round trip through JSON."""
    return json.loads(json.dumps(values))


def _read(path: Path) -> Any:
    """Content of a JSON file."""
    with naming(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn errors about a file's content into one line that names the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(reason if str(path) in reason else f"cannot use {path}: {reason}") from error


def _changes(
    there: Any, here: Any, typed: tuple[Any, Any], name: str = "", ignored: Collection[str] = ()
) -> Iterator[str]:
    """Differences between two nested tables, in words; `ignored` are top-level keys."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted((there.keys() | here.keys()) - set(ignored)):
            yield from _changes(there.get(key), here.get(key), typed, f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} was {_shown(there, typed[0])} and is {_shown(here, typed[1])}"


def _shown(value: Any, typed: Any) -> str:
    """A value for a message; a hash follows the bundle's name as the user typed it."""
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
        return f"{value!r:.60}"
    return f"sha256 {value:.12}" if typed is None else f"{typed} (sha256 {value:.12})"
