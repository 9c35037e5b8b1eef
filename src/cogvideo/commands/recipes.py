"""Recipes: files of settings that a command takes as if they stood on the command line.

A recipe is TOML with one table a command, named by its last word: `[tokenizer]`, `[sequential]`. Keys are the options'
names as on the command line. What stands there itself comes later, and the later one wins.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cogvideo.config import InputError, require

OPTION = "--recipe"


def expand(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments with those of the recipe that they name put in front of the options.

    Args:
        command: such as `train sequential`.
        arguments: of the user.

    Raises:
        ValueError: the recipe cannot be read, or has nothing for the command.
    """
    path = _path(arguments)
    if path is None:
        return list(arguments)
    first = next(place for place, each in enumerate(arguments) if each.startswith("--"))  # what is before is positional
    return [*arguments[:first], *_arguments(_table(path, command.split()[-1]), path), *arguments[first:]]


def _path(arguments: Sequence[str]) -> Path | None:
    for place, each in enumerate(arguments):
        if each == OPTION and place + 1 < len(arguments):
            return Path(arguments[place + 1])
        if each.startswith(f"{OPTION}="):
            return Path(each.removeprefix(f"{OPTION}="))
    return None


def _table(path: Path, name: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot use the recipe {path}: {reason}") from error
    table = tables.get(name)
    known = ", ".join(f"[{each}]" for each in tables) or "no table"
    require(isinstance(table, dict), f"the recipe {path} has no table [{name}], it has {known}")
    return table  # type: ignore[return-value]


def _arguments(table: dict[str, Any], path: Path) -> Iterator[str]:
    for key, value in table.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
            continue
        values = value if isinstance(value, list) else [value]
        plain = all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in values)
        require(plain, f"{key} is {value!r} in the recipe {path}, expected a text, a number, true, false or a list")
        yield from (f"--{name}", *map(str, values))
