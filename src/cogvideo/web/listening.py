"""Listening at an address, and serving an application there."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from cogvideo.config import InputError, require

HOST = "127.0.0.1"
"""An address that only this machine can reach."""
HEAD_SECONDS = 10.0
"""Seconds for a client to send the headers of a request."""
READ_SECONDS = 60.0
"""Seconds for a client to receive pending data."""
IDLE_SECONDS = 75
"""Seconds for which a connection stays open between requests, longer than clients keep it: if a server closes one just
as a client reuses it, the client sees an error."""
MAX_CONNECTIONS = 500
"""Maximum number of connections. Systems usually allow 1,024 open files, some of which the queue needs."""


class Connection(H11Protocol):
    """A connection that is closed if a request stalls, or if there are too many connections."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        """Receive a part of a request, which does not give the client more time."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        elif self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _wait(self) -> None:
        self._deadline = self._deadline or self.loop.call_later(HEAD_SECONDS, self.transport.close)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket, at which connections wait from now on; port 0 means any free port."""
    require(0 <= port < 65536, f"port is {port}, expected a number in [0, 65535]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(AttributeError):  # only Linux has it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * READ_SECONDS))
        try:
            listener.bind((host, port))
            listener.listen(1024)
        except OSError as error:
            reason = f"cannot listen at {host}, port {port} ({error.strerror})"
            raise InputError(f"{reason}: pass another --port, or 0 for any") from error
        yield listener


def is_local(host: str) -> bool:
    """True if only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Server(uvicorn.Server):
    """A server that sets an event when it is interrupted.

    Args:
        config: its application and settings.
        leaving: set on an interrupt.
    """

    def __init__(self, config: uvicorn.Config, leaving: Event) -> None:
        super().__init__(config)
        self._leaving = leaving

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down."""
        self._leaving.set()
        super().handle_exit(sig, frame)


def run(app: ASGIApp, listener: socket.socket, leaving: Event | None = None) -> None:
    """Serve until the process is interrupted.

    Args:
        app: application.
        listener: socket at which connections wait.
        leaving: set on the interrupt, a second before connections are closed: open responses should then end.
    """
    config = uvicorn.Config(
        app,
        http=Connection,  # and h11 limits the size of headers
        log_level="warning",
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=1,
    )
    _Server(config, leaving or Event()).run(sockets=[listener])
