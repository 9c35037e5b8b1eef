"""Command lines from typed functions: signatures become options, and docstrings become their help.

Parameters before `/` are positional, dataclasses are groups of options. An optional dataclass is for use from Python
only. Options may also come from a recipe: a TOML file with a table for each command, named by its last word, such as
`[tokenizer]`. Its keys are the names of options. The command line takes precedence.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import partial
from inspect import BoundArguments, Parameter, signature
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from types import NoneType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from docstring_parser import Docstring, DocstringStyle, parse_from_object

from cogvideo.config import InputError, Sides, require, size_of

ARGUMENTS, OPTIONS = "arguments", "options"
"""Headings of positional arguments, and of options that are in no dataclass."""
REQUIRED = Parameter.empty
NAMES = {str: "TEXT", Path: "PATH", int: "INT", float: "FLOAT", Sides: "SIZE"}
"""Names of types in help."""
NOUNS = {int: "a whole number", float: "a number", Sides: "pixels such as 96, or 128x72"}
"""Names of types in errors."""
EXPONENT = re.compile(r"-[\d.]+e[+-]?\d+", re.IGNORECASE)
"""Negative numbers that argparse takes for options."""
PLAIN = "\0"
"""Prefix of arguments that argparse must not take for options."""


class Option(NamedTuple):
    """An option, or a positional argument."""

    name: str
    """Parameter of the function, or field of a dataclass."""
    kind: Any
    """Type; for a tuple, the type of its items."""
    nargs: str | int | None
    """Number of values, as in argparse."""
    default: Any
    help: str
    group: str
    """Heading in help."""

    def __str__(self) -> str:
        """The option on the command line."""
        return self.name.upper() if self.group == ARGUMENTS else f"--{self.name.rstrip('_').replace('_', '-')}"

    @property
    def metavar(self) -> str:
        """Value in help."""
        kind = NAMES.get(self.kind) or f"{{{','.join(get_args(self.kind))}}}"
        return str(self) if self.group == ARGUMENTS else kind

    @property
    def note(self) -> str:
        """Default in help, if it is informative."""
        if self.default is REQUIRED:
            return "" if self.group == ARGUMENTS else " (required)"
        value = " ".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default
        is_nothing = value is None or value is False or value == ""
        return "" if is_nothing else f" (default: {'on' if value is True else value})"

    def value(self, text: str) -> Any:
        """The value that a text stands for."""
        text, choices = text.removeprefix(PLAIN), get_args(self.kind)
        if text in choices:
            return text
        try:
            if self.kind == Sides:
                return size_of(text)
            if not choices:
                return self.kind(text)
            expected = f"one of {', '.join(choices)}"
        except ValueError:
            expected = NOUNS[self.kind]
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")


RECIPE = Option(
    name="recipe",
    kind=Path,
    nargs=None,
    default=None,
    help="TOML file with a table of options for this command. Options on the command line take precedence.",
    group=OPTIONS,
)


def parse(
    command: str, function: Callable[..., Any], arguments: Sequence[str], has_recipe: bool = False
) -> Callable[[], Any]:
    """A call of the function with the arguments of a command, and of a recipe that they name.

    Args:
        command: its name, such as `train image`.
        function: function to call; its signature and docstring define the options.
        arguments: the user's arguments, after the name of the command.
        has_recipe: add the option `--recipe`.
    """
    known = [*options(function), *([RECIPE] if has_recipe else [])]
    parser = _parser(command, function, known)
    given = _read(parser, known, arguments)
    if path := given.get("recipe"):
        try:
            given = _read(parser, known, _recipe_arguments(path, command)) | given
        except InputError as error:
            raise InputError(f"recipe {path}: {error}") from error
    missing = [str(each) for each in known if each.default is REQUIRED and each.name not in given]
    require(not missing, f"missing: {', '.join(missing)}; `cogvideo {command} --help` explains them")
    bound = BoundArguments(signature(function), _filled(function, given))
    return partial(function, *bound.args, **bound.kwargs)


def options(owner: Callable[..., Any], instance: Any = None, group: str = OPTIONS) -> Iterator[Option]:
    """Options of a function or a dataclass; an instance overrides the defaults."""
    texts = _texts(owner)
    for name, kind, default, is_positional in _parameters(owner, instance):
        if _is_group(kind):
            yield from options(kind, default, kind.__doc__.partition(".")[0])
            continue
        if NoneType in get_args(kind):
            kind = Union[tuple(each for each in get_args(kind) if each is not NoneType)]  # noqa: UP007  # at run time
        nargs: str | int | None = None
        if get_origin(kind) is tuple:
            kind, *rest = get_args(kind)
            nargs = "*" if rest == [...] else 1 + len(rest)
        if not _is_group(kind):
            yield Option(name, kind, nargs, default, texts[name], ARGUMENTS if is_positional else group)


def _is_group(kind: Any) -> bool:
    return is_dataclass(kind)


def _parameters(owner: Callable[..., Any], instance: Any) -> Iterator[tuple[str, Any, Any, bool]]:
    """Name, type and default of each parameter, and whether it is positional."""
    kinds = get_type_hints(owner)
    for name, parameter in signature(owner).parameters.items():
        default = getattr(instance, name, parameter.default)
        yield name, kinds[name], default, parameter.kind is Parameter.POSITIONAL_ONLY


def _docstring(owner: Any) -> Docstring:
    return parse_from_object(owner, DocstringStyle.GOOGLE)


def _texts(owner: Any) -> dict[str, str]:
    """Help of each parameter of a function, or of each field of a dataclass and its bases."""
    owners = owner.__mro__[-2::-1] if isinstance(owner, type) else (owner,)
    parameters = [parameter for each in owners for parameter in _docstring(each).params]
    return {each.arg_name: " ".join((each.description or "").split()) for each in parameters}


def _filled(owner: Callable[..., Any], given: Mapping[str, Any], instance: Any = None) -> dict[str, Any]:
    """All arguments of a function or a dataclass: given values, else the defaults."""
    return {
        name: kind(**_filled(kind, given, default)) if _is_group(kind) else given.get(name, default)
        for name, kind, default, _ in _parameters(owner, instance)
    }


def _parser(command: str, function: Callable[..., Any], known: Sequence[Option]) -> argparse.ArgumentParser:
    usage = [f"cogvideo {command}"]
    for each in known:
        text = each.metavar if each.group == ARGUMENTS else f"{each} {each.metavar}"
        text += " ..." if each.nargs else ""
        if each.default is REQUIRED:
            usage.append(text)
        elif each.group == ARGUMENTS:
            usage.append(f"[{text}]")
    paragraphs = (_docstring(function).description or "").split("\n\n")
    parser = argparse.ArgumentParser(
        prog=usage[0],
        usage=" ".join([*usage, "[OPTIONS]"]),
        description="\n\n".join(fill(each, get_terminal_size().columns - 2) for each in paragraphs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    headings = (ARGUMENTS, OPTIONS, *(each.group for each in known))
    groups = {heading: parser.add_argument_group(heading) for heading in dict.fromkeys(headings)}
    for each in known:
        names: dict[str, Any] = {"help": f"{each.help}{each.note}".replace("%", "%%")}
        values = {"type": each.value, "nargs": each.nargs, "metavar": each.metavar} | names
        if each.group == ARGUMENTS:
            optional = {} if each.nargs else {"nargs": "?", "default": None}  # argparse would convert SUPPRESS, a text
            groups[ARGUMENTS].add_argument(each.name, **values | optional)
        elif each.default == ():  # repeating the option adds values
            groups[each.group].add_argument(str(each), dest=each.name, action="extend", **values)
        elif each.kind is bool:
            groups[each.group].add_argument(str(each), dest=each.name, action=argparse.BooleanOptionalAction, **names)
        else:
            groups[each.group].add_argument(str(each), dest=each.name, **values)
    groups[OPTIONS].add_argument("-h", "--help", action="help", help="Show this help.")
    return parser


def _read(parser: argparse.ArgumentParser, known: Sequence[Option], arguments: Sequence[str]) -> dict[str, Any]:
    """Given values by parameter name."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before = [f"{PLAIN}{each}" if EXPONENT.fullmatch(each) else each for each in arguments[:end]]
    after = [f"{PLAIN}{each}" for each in arguments[end + 1 :]]
    try:
        given, rest = parser.parse_known_intermixed_args(before + after)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}") from None
    if not rest:
        values = {name: value for name, value in vars(given).items() if value is not None}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    hint = f"`{parser.prog} --help` lists all options"
    option = next((each.partition("=")[0] for each in rest if each.startswith("-")), None)
    if option is None:
        raise InputError(f"unknown argument {rest[0].removeprefix(PLAIN)}; {hint}")
    if near := get_close_matches(option, map(str, known), n=1, cutoff=0.7):
        hint = f"did you mean {near[0]}?"
    elif not option.startswith("--"):
        hint = "write -- before texts that begin with a dash"
    raise InputError(f"unknown option {option}; {hint}")


def _recipe_arguments(path: Path, command: str) -> list[str]:
    """The options of a command in a recipe, as arguments."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"it cannot be read: {getattr(error, 'strerror', error)}") from error
    name = command.split()[-1]
    known = ", ".join(f"[{each}]" for each in tables) or "an empty file"
    table = tables.get(name)
    require(isinstance(table, dict), f"there is no table [{name}], only {known}")
    return [argument for key, value in tables[name].items() for argument in _in_recipe(key.replace("_", "-"), value)]


def _in_recipe(name: str, value: Any) -> Iterator[str]:
    values = value if isinstance(value, list) else [value]
    is_plain = all(type(each) in (str, int, float) for each in values)
    require(is_plain or isinstance(value, bool), f"{name} is {value}, expected a text, a number, true, false or a list")
    if isinstance(value, bool):
        yield f"--{name}" if value else f"--no-{name}"
    elif isinstance(value, list):
        yield from (f"--{name}", *map(str, values))
    else:
        yield f"--{name}={value}"
