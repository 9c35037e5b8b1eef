"""The command line: a table of commands, each a typed function that is imported when it is called.

The function's signature and docstring are its options and help (tyro): parameters before `/` are positional.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NamedTuple

from cogvideo import __version__

USER_ERROR, BROKEN_PIPE, INTERRUPTED = 2, 1, 130


class Command(NamedTuple):
    """One command of the command line."""

    target: str
    """`module:function`."""
    help: str
    """What it does, in a line."""


COMMANDS = {
    "info": Command("cogvideo.info:info", "Parameters, memory and work of a preset or a bundle."),
    "convert": Command("cogvideo.convert:convert", "Released checkpoints of 2022 to a bundle."),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit status; mistakes of the user are one line on stderr."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch: huge pages, from which weights are read faster
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        if os.environ.get("COGVIDEO_DEBUG") == "1" or not _is_mistake(error):
            raise
        print(f"cogvideo: error: {_line(error)}", file=sys.stderr)
        return USER_ERROR
    return 0


def _run(arguments: list[str]) -> None:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"cogvideo {__version__}")
    elif name in COMMANDS:
        _call(name, rest)
    else:
        raise ValueError(_unknown(name))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
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


def _call(name: str, arguments: list[str]) -> None:
    """Import the command's function and call it with what its signature makes of the arguments."""
    import tyro  # neither help nor version need it

    module, function = COMMANDS[name].target.split(":")
    run = getattr(import_module(module), function)
    tyro.cli(run, prog=f"cogvideo {name}", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
    return f"unknown command {name!r}, {hint}"


def _is_mistake(error: ValueError | OSError) -> bool:
    """An OSError is the user's where it is about a path; others are the system's or ours."""
    return isinstance(error, ValueError) or error.filename is not None


def _line(error: ValueError | OSError) -> str:
    text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
    return " ".join(text.split())
