"""Death at a chosen moment: SIGKILL between two changes of the file system, in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def kill_at(number: int, work: Callable[[], None]) -> bool:
    """Do work in a process that gets SIGKILL before its `number`th change of the file system; False if it was done.

    Changes are what Python does: to make a folder, to open for writing, to rename, to remove.
    """
    if process := os.fork():
        return os.waitpid(process, 0)[1] == signal.SIGKILL
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        work()
    finally:
        os._exit(0)
