"""The house: imports point downwards, and every option explains itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from cogvideo.cli import COMMANDS
from cogvideo.commands.options import options

PACKAGE = Path(__file__).parents[1] / "src" / "cogvideo"
FLOORS = (
    {"config", "layout", "text", "files", "devices", "kernels", "runs"},
    {"world", "media"},
    {"models"},
    {"packing", "bundle"},
    {"data"},
    {"generation"},
    {"planning"},
    {"pipeline"},
    {"evaluation"},
    {"training"},
    {"report"},
    {"web"},
    {"commands"},
    {"cli"},
)
"""From the bottom to the top."""


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its name inside of it."""
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name not in ("", "__main__"):
            yield name, path


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, by their names inside of it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            parts = node.module.split(".")
            if parts[0] == "cogvideo":
                yield from [".".join(parts[1:])] if parts[1:] else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("cogvideo.") for alias in node.names if alias.name[:9] == "cogvideo.")


def floor(room: str) -> int:
    """Height of a room."""
    return next(height for height, rooms in enumerate(FLOORS) if room in rooms)


def test_imports_point_downwards() -> None:
    """Guards the house: whoever changes a room needs to know only those below it."""
    upwards = set()
    for name, path in modules():
        room = name.split(".")[0]
        for other in imported(path):
            if not other.startswith("__") and floor(other.split(".")[0]) > floor(room):
                upwards.add((name, other.split(".")[0]))
    assert upwards == set()


FRAGMENTS = r"(of|that|between|what|how|whether|which|where|behind|beside|only|so|for|with|from|in|as)\b"
"""Beginnings of a help text that is no sentence by itself."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_explains_itself(name: str) -> None:
    """Guards readers of one line of help: it begins with a noun or a verb, and stands alone."""
    module, function = COMMANDS[name].target.split(":")
    for option in options(getattr(import_module(module), function)):
        assert option.help[0].isupper(), option
        assert option.help.endswith("."), option
        assert not re.match(FRAGMENTS, option.help, re.IGNORECASE), option
