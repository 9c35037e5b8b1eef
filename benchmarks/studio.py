"""Benchmark of the first frame: `python -m benchmarks.studio [--model MODEL]` writes to benchmarks/results/.

Measures seconds from clicking the studio's button to the first frame in Chromium, for a server's first clip and for
later ones, and from the start of `cogvideo generate` to the first frame on disk. Needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import sync_playwright

from benchmarks.generate import PROMPT, wait
from benchmarks.machine import write
from cogvideo.bundle.model import POCKET


@contextmanager
def studio(model: str) -> Iterator[str]:
    """Address of a server with one worker."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cogvideo", "serve", "--model", model, "--folder", folder, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield process.stdout.readline().strip()
            finally:
                process.terminate()


def in_browser(model: str, rounds: int) -> list[float]:
    """Seconds from clicking the button to the first frame of each clip; the first clip loads the weights."""
    programs = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    found = []
    with studio(model) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=next(programs, None), args=["--no-sandbox", "--disable-gpu"])
        for _ in range(rounds):
            page = browser.new_page()
            page.goto(address)
            page.get_by_label("Prompt", exact=True).fill(PROMPT)
            start = time.perf_counter()
            page.locator("#generate").click()
            page.locator(".strip img").first.wait_for(timeout=600_000)
            found.append(time.perf_counter() - start)
            page.locator(".clip[data-status=completed]").wait_for(timeout=600_000)
            page.close()
        browser.close()
    return found


def on_command_line(model: str) -> float:
    """Seconds from the start of the command to the first frame on disk."""
    with TemporaryDirectory() as folder:
        first, _ = wait(model, Path(folder))
    return first


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=POCKET)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    cold, *warm = in_browser(given.model, given.rounds + 1)
    commands = [on_command_line(given.model) for _ in range(given.rounds)]
    figures: dict[str, Any] = {
        "button to first frame, seconds": {"first clip of a server": cold, "later clips": statistics.median(warm)},
        "command to first frame, seconds": statistics.median(commands),
    }
    print(json.dumps(figures, indent=2))
    print(write("studio", figures, *([given.out] if given.out else [])))


if __name__ == "__main__":
    main()
