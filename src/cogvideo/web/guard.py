"""Checks on every request: its origin, limits on time and size, and headers of the response."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
BODY_SECONDS = 60
"""Seconds for a client to send the body of a request."""
MAX_BODY_BYTES = 32 * 2**20
"""Maximum number of bytes in the body of a request."""


class RequestGuard:
    """Middleware that refuses cross-site requests from a user's browser, and slow or large bodies."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and _host_of(origin) != headers.get("host"):
            await PlainTextResponse("Requests from other sites are refused.", 403)(scope, receive, send_more)
            return
        await self._app(scope, _bounded(receive, headers.get("content-length", "")), send_more)


def _host_of(origin: str) -> str | None:
    """Host and port of an origin; None if it is not a URL."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _bounded(receive: Receive, announced: str) -> Receive:
    """Receive a body within `BODY_SECONDS` and `MAX_BODY_BYTES`. After that, waiting for the client to disconnect may
    take forever.

    Args:
        receive: source of the body.
        announced: its Content-Length, as sent by the client.
    """
    end = time.monotonic() + BODY_SECONDS
    size = int(announced) if announced.isdecimal() else 0
    read = 0
    is_whole = False

    async def receive_part() -> Message:
        nonlocal read, is_whole
        if is_whole:
            return await receive()
        _check_size(size)
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the request took more than {BODY_SECONDS} seconds") from None
        read += len(message.get("body", b""))
        _check_size(read)
        is_whole = not message.get("more_body", False)
        return message

    return receive_part


def _check_size(size: int) -> None:
    if size > MAX_BODY_BYTES:
        raise HTTPException(413, f"the request has more than {MAX_BODY_BYTES // 2**20} MiB")
