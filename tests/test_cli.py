"""The command line as users see it: real processes, their output, their exit status."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cogvideo import __version__
from cogvideo.cli import COMMANDS, OPENMP_SPINS, main

HEAVY = {"torch", "numpy", "argparse", "rich", "safetensors", "huggingface_hub"}
MISTAKES = """
import os
import subprocess
import sys
import time

from cogvideo.config import InputError

def path():
    open("no/such/file")

def value():
    raise InputError("got 3\\nexpected 4")

def unequal():
    list(zip([1], [2, 3], strict=True))

def fault():
    raise RuntimeError("a fault of ours")

def broken():
    raise OSError("the system's fault")

def wrapped():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise RuntimeError("Error calling __set_name__") from error

def writes():
    with open("clip", "wb") as file:
        for number in (1, 2):
            os.write(number, b"printed by a library")
        program = "import os; os.write(1, b'printed'); os.write(2, b'printed')"
        subprocess.run([sys.executable, "-c", program], check=True)
        file.write(b"a clip")

def slow():
    print("ready", flush=True)
    time.sleep(60)

def much():
    for _ in range(100_000):
        print("a long line of text that fills the pipe")
"""


def cogvideo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `cogvideo` in its own process."""
    command = [sys.executable, "-m", "cogvideo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def imported_by(*arguments: str) -> set[str]:
    """Return the top-level packages that a Python process imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {name.split(".")[0] for name in re.findall(r"^import time:.*\| +(\S+)$", log, flags=re.MULTILINE)}


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A command line that runs the function of `MISTAKES` whose name is appended."""
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    program = (
        "import sys; from cogvideo import cli; sys.path.insert(0, sys.argv[1]); name = sys.argv[2];"
        "cli.COMMANDS[name] = cli.Command(f'mistakes:{name}', ''); sys.exit(cli.main([name]))"
    )
    return [sys.executable, "-c", program, str(tmp_path)]


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Guards startup time: `import cogvideo` takes a tenth of a second at most; importing PyTorch takes one second."""
    assert imported_by("-c", "import cogvideo").isdisjoint(HEAVY)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str) -> None:
    """Guards the time to the first help text: listing the commands must not import what they need."""
    imported = imported_by("-m", "cogvideo", option)
    assert "cogvideo" in imported
    assert imported.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, OPENMP_SPINS), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_that_wait_sleep(given: dict[str, str], spins: str | None) -> None:
    """Guards speed next to a busy program: waiting threads soon sleep, unless the user configured OpenMP otherwise."""
    program = "import os; from cogvideo.cli import main; main(['--version']); print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=plain | given, check=True
    )
    assert done.stdout.splitlines()[1] == str(spins)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(arguments: tuple[str, ...]) -> None:
    """Guards against commands that are missing from the help."""
    done = cogvideo(*arguments)
    assert done.returncode == 0
    assert done.stderr == ""
    for name, each in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(each.help)}$", done.stdout, flags=re.MULTILINE)


def test_version() -> None:
    """Guards `cogvideo --version`, which bug reports quote."""
    assert cogvideo("--version").stdout == f"cogvideo {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_command_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the table: each command's function exists, has a docstring, and its signature yields a command line."""
    module, function = COMMANDS[name].target.split(":")
    summary = getattr(import_module(module), function).__doc__.splitlines()[0]
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    assert end.value.code in (0, None)
    told = capsys.readouterr().out
    assert f"usage: cogvideo {name}" in told
    assert summary in told


def test_command_gets_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Checks that positional arguments, flags and values reach the command's function."""
    assert main(["info", "tiny", "--json", "--batch", "3"]) == 0
    assert '"batch": 3' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("info --jsno", "unknown option --jsno; did you mean --json?"),
        ("generate x --samplse 3", "unknown option --samplse; did you mean --samples?"),
        ("info --x=1 --y", "unknown option --x; `cogvideo info --help` lists all options"),
        ("info pocket b", "unknown argument b; `cogvideo info --help` lists all options"),
        ("generate -rf", "unknown option -rf; write -- before texts that begin with a dash"),
        ("generate x --seed", "--seed: expected one argument"),
        ("generate x --seed 1e5", "--seed: got '1e5', expected a whole number"),
        ("generate x --guidance abc", "--guidance: got 'abc', expected a number"),
        ("generate x --text-bonus=-1e-", "--text-bonus: got '-1e-', expected a number"),
        ("generate x --text-bonus -1e-3 --batch 0", "batch is 0, expected a positive number"),
        ("generate x --dtype int8", "--dtype: got 'int8', expected one of auto, float32, bfloat16, float16"),
        ("fetch x", "NETWORK: got 'x', expected one of i3d, lpips"),
        ("data world", "missing: --out; `cogvideo data world --help` explains them"),
        ("train image", "missing: --data, --out; `cogvideo train image --help` explains them"),
        ("data prepare", "missing: SOURCE, --out, --tokenizer; `cogvideo data prepare --help` explains them"),
        ("study serve", "missing: NAME; `cogvideo study serve --help` explains them"),
        ("fetch", "missing: NETWORK; `cogvideo fetch --help` explains them"),
        ("evaluate ucf101 pocket", "missing: VIDEOS, --lists, --out; `cogvideo evaluate ucf101 --help` explains them"),
        ("train image --out x --data y --rates a", "--rates: got 'a', expected a number"),
        ("train reader --out x --widths 1 2", "--widths: expected 4 arguments"),
        ("info pokcet", "got 'pokcet', expected a preset (tiny, pocket, small, cogvideo) or the folder of a bundle"),
    ],
)
def test_wrong_options_are_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against silently ignored options: one line says what it got, what it expected, and where to look."""
    assert main(arguments.split()) == 2
    assert capsys.readouterr() == ("", f"cogvideo: error: {message}\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_one_line() -> None:
    """Guards against a traceback when output goes to a file on a full disk."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cogvideo", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (2, "cogvideo: error: No space left on device: the output\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inof",), "unknown command 'inof'; did you mean 'info'?"),
        (("inspect", "foo"), "unknown command 'inspect foo'; expected one of inspect attention"),
        (("xyzzy",), "unknown command 'xyzzy'; expected one of " + ", ".join(COMMANDS)),
    ],
)
def test_mistake_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    """Guards against a traceback, or exit status 0, when the user makes a mistake."""
    done = cogvideo(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"cogvideo: error: {message}\n"


@pytest.mark.parametrize(
    ("name", "message"), [("value", "got 3 expected 4"), ("path", "No such file or directory: no/such/file")]
)
def test_refusal_inside_a_command_is_one_line(command: list[str], name: str, message: str) -> None:
    """Guards against user errors of several lines and missing file names; COGVIDEO_DEBUG=1 adds the traceback."""
    done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"cogvideo: error: {message}\n")
    environment = os.environ | {"COGVIDEO_DEBUG": "1"}
    done = subprocess.run([*command, name], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.endswith(f"cogvideo: error: {message}\n")


@pytest.mark.parametrize("name", ["fault", "broken", "unequal"])
def test_fault_of_ours_keeps_its_traceback(command: list[str], name: str) -> None:
    """Guards bug reports: a bug in the package, even a ValueError, must not look like a user error."""
    done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert re.search(r"^cogvideo: this is a bug in cogvideo .*; please report it", done.stderr, flags=re.MULTILINE)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("arguments", "status"), [("--version", 0), ("nonsense", 2)])
def test_a_stream_may_be_missing(arguments: str, status: int, closed: str) -> None:
    """Guards services, cron and pythonw, which close streams: no traceback, and no errors on standard output."""
    program = f"'{sys.executable}' -m cogvideo {arguments} {closed}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert "error" not in done.stdout


def test_files_do_not_get_what_is_printed(command: list[str], tmp_path: Path) -> None:
    """Prevents library output from landing in a clip whose file got the descriptor of a closed stream."""
    shell = f"{shlex.join([*command, 'writes'])} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", shell], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "clip").read_text() == "a clip"


def test_interrupt_is_quiet(command: list[str]) -> None:
    """Guards Ctrl-C: exit status 130, as shells expect, and no traceback."""
    process = subprocess.Popen([*command, "slow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (130, "")


def test_interrupt_of_an_import_is_quiet(command: list[str]) -> None:
    """Guards Ctrl-C while a class is created, which Python 3.11 reports as a RuntimeError."""
    done = subprocess.run([*command, "wrapped"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_closed_pipe_is_quiet(command: list[str]) -> None:
    """Guards `cogvideo ... | head`: no traceback when the reader closes the pipe."""
    process = subprocess.Popen([*command, "much"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=300) == 1
    process.stderr.close()
