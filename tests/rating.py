"""Test studies: folders of plain clips, a server in its own process, answers without a browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from cogvideo.cli import main
from cogvideo.media.video import write_video

COLORS = {"zebra": (200, 40, 40), "walrus": (40, 40, 200), "heron": (40, 160, 40), "truth": (120, 120, 120)}
"""Names of folders, and the color of their clips: red, blue, green, gray."""


def make_folders(place: Path, count: int, names: tuple[str, ...] = ("zebra", "walrus"), suffix: str = ".mp4") -> None:
    """Create folders with numbered clips in one color each, and prompts.txt."""
    for name in names:
        (place / name).mkdir()
        frames = np.empty((8, 32, 32, 3), np.uint8)
        frames[:] = COLORS[name]
        for number in range(count):
            write_video(place / name / f"clip {number + 1}{suffix}", frames, 8)
    lines = [f"text {number + 1}" for number in range(count)]
    (place / "prompts.txt").write_text("\n".join(lines))


def make_study(place: Path, count: int, *options: str) -> Path:
    """Create a study of red and blue clips."""
    make_folders(place, count)
    folder = place / "study"
    given = ["--a", str(place / "zebra"), "--b", str(place / "walrus"), "--prompts", str(place / "prompts.txt")]
    assert main(["study", "new", str(folder), *given, *options]) == 0
    return folder


class Answered(NamedTuple):
    """A response from the server."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed as JSON."""
        return json.loads(self.body)


class Server:
    """A running `cogvideo study serve`."""

    def __init__(self, process: subprocess.Popen[str], links: list[str]) -> None:
        self.process, self.links = process, links
        self.address = urlsplit(links[0]).netloc

    def ask(self, path: str, body: Any = None, host: str = "", rater: int = 0) -> Answered:
        """Send a request below a rater's link, or from the root; a POST if there is a body."""
        connection = HTTPConnection(self.address, timeout=60)
        full = path if path.startswith("/") else urlsplit(self.links[rater]).path + path
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Host": host or self.address}
        connection.request("GET" if body is None else "POST", full, content, headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answered(response.status, found, response.read())

    def answer(self, place: int, value: int = -1, rater: int = 0) -> Answered:
        """Answer a pair."""
        return self.ask("answer", {"place": place, "values": {"preference": value}, "seconds": 1.5}, rater=rater)


@contextmanager
def serving(folder: Path, raters: int = 1) -> Iterator[Server]:
    """Run the server of a study, which is killed at the end."""
    command = [sys.executable, "-m", "cogvideo", "study", "serve", str(folder), "--port", "0", "--raters", str(raters)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            assert process.stdout is not None
            links = [re.search(r"http\S+", process.stdout.readline()) for _ in range(raters)]
            yield Server(process, [link[0] for link in links if link])
        finally:
            process.kill()
