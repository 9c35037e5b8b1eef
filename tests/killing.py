"""Simulated crashes: SIGKILL between two file system changes or at a training step, and full disks."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

PAUSED = """
import sys, time
from cogvideo.cli import main
from cogvideo.training.step import Trainer

def pausing(trainer, done):
    if done == step:
        print("paused", flush=True)
        time.sleep(1000)
    return figures(trainer, done)

step, figures, Trainer.figures = int(sys.argv[1]), Trainer.figures, pausing
sys.exit(main(sys.argv[2:]))
"""
"""Arguments: the step after which to pause, then those of `python -m cogvideo`."""


def kill_at(number: int, work: Callable[[], None]) -> bool:
    """Run work in a child process that gets SIGKILL before file system change `number`; False if the work finished.

    Changes are those that Python makes: creating a folder, opening a file for writing, renaming, removing.
    """
    if process := os.fork():
        status = os.waitpid(process, 0)[1]
        assert status in (0, signal.SIGKILL), "the work failed, with the traceback above"
        return status == signal.SIGKILL
    left, status = number, 1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        gc.freeze()  # finalizers of other tests' garbage would count here
        sys.addaudithook(hook)
        work()
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)


def paused(step: int, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start `cogvideo train ...`, given the words after `cogvideo`; return when it pauses after a step."""
    arguments = [sys.executable, "-c", PAUSED, str(step), *command]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    assert "paused\n" in process.stdout, "the run ended"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL; loader processes, which share the pipe, may survive."""
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Limit the size of files to a number of bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
