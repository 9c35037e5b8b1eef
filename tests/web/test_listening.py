"""Clients that stall: each is disconnected, and the others are served."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection

import pytest

from serving import wait_for

SERVER = """
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from cogvideo.web import guard, listening

listening.HEAD_SECONDS = guard.BODY_SECONDS = 3.0
listening.READ_SECONDS = 0.5
listening.MAX_CONNECTIONS = 20

async def answer(request):
    return Response(bytes(100_000_000) if request.url.path == "/large" else await request.body())

app = guard.RequestGuard(Starlette(routes=[Route("/{name}", answer, methods=["GET", "POST"])]))
with listening.listening("127.0.0.1", 0) as listener:
    print(listener.getsockname()[1], flush=True)
    listening.run(app, listener)
"""
PATIENCE = 120


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
        finally:
            server.kill()


def until_closed(client: socket.socket, drop: bytes = b"") -> bytes:
    """Everything the server sends until it hangs up, while the client keeps sending `drop`."""
    answers = b""
    end = time.monotonic() + PATIENCE
    client.settimeout(0.1)
    with suppress(ConnectionError):
        while time.monotonic() < end:
            with suppress(TimeoutError):
                if not (answer := client.recv(2**20)):
                    return answers
                answers += answer
            client.sendall(drop)
        pytest.fail("the server does not hang up")
    return answers


WHOLE = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"


HALVES = [
    (b"", b"", b""),
    (b"GET /x HTTP/1.1\r\nX: ", b"x", b""),
    (WHOLE + b"GET /", b"x", b" 200 "),
    (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n", b"x", b" 408 "),
    (b"POST /x HTTP/1.1\r\nHost: a\r\nOrigin: b\r\nContent-Length: 9999\r\n\r\n", b"x", b" 403 "),
]
"""What a client sends first, what it then trickles byte by byte, and the expected status."""


def test_clients_that_do_not_go_on(port: int) -> None:
    """Guards connections against clients that hold them: headers and bodies time out, however they trickle in."""

    def answers(half: tuple[bytes, bytes, bytes]) -> bytes:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(half[0])
            return until_closed(client, half[1])

    with ThreadPoolExecutor(len(HALVES)) as pool:  # all timeouts run at the same time
        for (*_, status), answer in zip(HALVES, pool.map(answers, HALVES), strict=True):
            assert status in answer, status


def test_clients_that_come_back(port: int) -> None:
    """Checks that clients that poll as often as they are told can reuse their connection after five seconds."""
    client = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    client.connect()
    client.auto_open = 0  # fail on a closed connection instead of reconnecting
    with closing(client):
        for wait in (0, 6):
            time.sleep(wait)
            client.request("POST", "/x", b"hi")
            assert client.getresponse().read() == b"hi"


def test_clients_that_do_not_read(port: int) -> None:
    """Guards memory against responses that nobody reads."""

    def read_after(seconds: float) -> int:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
            time.sleep(seconds)  # a busy server may not have started to answer
            return len(until_closed(client))

    assert any(read_after(seconds) < 100_000_000 for seconds in (2, 20, 60))


def test_too_many_clients(port: int) -> None:
    """Guards the queue's file descriptors against clients that exhaust them. Patient clients are served afterward."""
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    for client in clients[20:]:
        assert until_closed(client) == b""
    for client in clients:
        client.close()

    def is_answered() -> bool:
        with socket.create_connection(("127.0.0.1", port)) as client, suppress(ConnectionError):
            client.sendall(WHOLE)
            return client.recv(2**20).startswith(b"HTTP/1.1 200 OK")
        return False

    wait_for(is_answered)
