"""Servers and workers for tests: real processes, a small model, clients."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from cogvideo.config import CogVideoConfig
from cogvideo.models.transformer import TemporalChannel, initialize
from cogvideo.models.upscaler import UpscaleChannel
from workshop import make_bundle, small_config

PATIENCE = 120.0
"""Maximum seconds to wait for anything on a busy machine."""


def make_whole_bundle(folder: Path, text_model: bytes) -> Path:
    """Save a small model with all stages, whose codes depend on everything that they may depend on."""
    config: CogVideoConfig = small_config(text_model)
    sizes = (config.transformer, config.layout)
    parts = {
        "sequential": TemporalChannel(*sizes, config.sequential),
        "interpolation": TemporalChannel(*sizes, config.interpolation),
        "superres": UpscaleChannel(*sizes, config.upscaler),
    }
    generator = torch.Generator().manual_seed(2)
    for part in parts.values():
        initialize(part, config.transformer.num_layers, generator)
        for parameter in part.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    make_bundle(folder, text_model, **parts)
    return folder


class Running(NamedTuple):
    """A running `cogvideo serve`."""

    process: subprocess.Popen[str]
    address: str

    def client(self, key: str = "none") -> httpx.Client:
        """Create a plain client."""
        return httpx.Client(base_url=self.address, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE)

    def openai(self, key: str = "none") -> Any:
        """Create the official client, unmodified."""
        import openai

        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, timeout=PATIENCE)


def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """Start a command of the command line in its own process group."""
    command = [sys.executable, "-m", "cogvideo", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ, start_new_session=True, **options
    )


@contextmanager
def serving(model: Path | str, folder: Path, *arguments: Any, command: str = "serve") -> Iterator[Running]:
    """Run a server on a free port, killed at the end with its workers."""
    process = start(command, "--model", model, "--folder", folder, "--port", 0, *arguments)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http"), address
        yield Running(process, address)
    finally:
        kill_group(process)


@contextmanager
def working(model: Path | str, folder: Path, *arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a worker, killed at the end."""
    process = start("worker", "--model", model, "--folder", folder, *arguments)
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], Any], every: float = 0.2, patience: float = PATIENCE) -> Any:
    """Poll until the condition is true; return its value."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)
    return found


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a private PostgreSQL server; PostgreSQL refuses to run as root, so root starts it as another user."""
    programs = {name: shutil.which(name, path=POSTGRES) for name in ("initdb", "postgres")}
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:  # a short path: socket paths are limited
        place = Path(name)
        how: dict[str, Any] = {"cwd": place}
        if os.geteuid() == 0:
            how |= {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(place, "postgres", "postgres")
        data = place / "data"
        create = [programs["initdb"], "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8"]
        subprocess.run(create, check=True, capture_output=True, **how)
        server = Postgres(place, [programs["postgres"], "-D", data, "-k", place, "-c", "listen_addresses="], how)
        try:
            server.start()
            yield server
        finally:
            server.kill()


POSTGRES = os.pathsep.join([os.environ["PATH"], *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))])
HAS_POSTGRES = shutil.which("postgres", path=POSTGRES) is not None


class Postgres:
    """A PostgreSQL server that can be killed and restarted."""

    def __init__(self, place: Path, command: list[Any], how: dict[str, Any]) -> None:
        self.url = f"postgresql://postgres@/postgres?host={place}"
        self._place, self._command, self._how = place, command, how
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        import psycopg

        with (self._place / "log").open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True, **self._how)

        def is_up() -> bool:
            with suppress(psycopg.OperationalError), psycopg.connect(self.url):
                return True
            return False

        wait_for(is_up)

    def kill(self) -> None:
        """Send SIGKILL to the server and the processes of its connections."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
