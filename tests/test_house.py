"""House rules: imports point downward, and every option has a self-explanatory help text."""

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
"""Rooms of the package, from the bottom to the top."""


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the name inside the package and the path of every module."""
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name not in ("", "__main__"):
            yield name, path


def imported(path: Path) -> Iterator[str]:
    """Yield the names, inside the package, of the modules that a file imports at any level."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            parts = node.module.split(".")
            if parts[0] == "cogvideo":
                yield from [".".join(parts[1:])] if parts[1:] else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("cogvideo.") for alias in node.names if alias.name[:9] == "cogvideo.")


def floor(room: str) -> int:
    """Return the height of a room."""
    return next(height for height, rooms in enumerate(FLOORS) if room in rooms)


def test_imports_point_downwards() -> None:
    """Prevents upward imports: to change a room, you only need to know the rooms below it."""
    upwards = set()
    for name, path in modules():
        room = name.split(".")[0]
        for other in imported(path):
            if not other.startswith("__") and floor(other.split(".")[0]) > floor(room):
                upwards.add((name, other.split(".")[0]))
    assert upwards == set()


FRAGMENTS = r"(also|of|that|between|what|how|whether|which|where|behind|beside|only|so|for|with|from|in|as)\b"
"""First words of a help text that would be a sentence fragment."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_explains_itself(name: str) -> None:
    """Guards help texts that are read alone: each is capitalized, ends with a period, and is not a fragment."""
    module, function = COMMANDS[name].target.split(":")
    for option in options(getattr(import_module(module), function)):
        assert option.help[0].isupper(), option
        assert option.help.endswith("."), option
        assert not re.match(FRAGMENTS, option.help, re.IGNORECASE), option
