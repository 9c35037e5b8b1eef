"""Recipes: TOML files of options, with a table for each command, named by its last word: `[tokenizer]`, `[image]`.

Keys are the option names of the command line, which takes precedence.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvideo.config import InputError, require


def recipe_arguments(path: Path, command: str) -> list[str]:
    """The options of a command in a recipe, as arguments."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"it cannot be read: {getattr(error, 'strerror', error)}") from error
    name = command.split()[-1]
    known = ", ".join(f"[{each}]" for each in tables) or "an empty file"
    table = tables.get(name)
    require(isinstance(table, dict), f"there is no table [{name}], only {known}")
    return [argument for key, value in tables[name].items() for argument in _arguments(key.replace("_", "-"), value)]


def _arguments(name: str, value: Any) -> Iterator[str]:
    values = value if isinstance(value, list) else [value]
    is_plain = all(type(each) in (str, int, float) for each in values)
    require(is_plain or isinstance(value, bool), f"{name} is {value}, expected a text, a number, true, false or a list")
    if isinstance(value, bool):
        yield f"--{name}" if value else f"--no-{name}"
    elif isinstance(value, list):
        yield from (f"--{name}", *map(str, values))
    else:
        yield f"--{name}={value}"
