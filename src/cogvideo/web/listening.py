"""Listening at an address, and serving an application there."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from cogvideo.config import InputError, require

HOST = "127.0.0.1"
"""The address that only this machine can reach."""


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at which connections wait from now on.

    Args:
        host: an address of this machine.
        port: 0 for any that is free.

    Raises:
        ValueError: the port is taken, or this machine has no such address.
    """
    require(0 <= port < 65536, f"port is {port}, expected a number in [0, 65535]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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


def run(app: ASGIApp, listener: socket.socket) -> None:
    """Serve until the process is interrupted."""
    config = uvicorn.Config(
        app,
        http="h11",  # which limits the size of headers
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[listener])
