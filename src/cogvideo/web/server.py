"""`cogvideo serve`: the application and its worker processes."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from threading import Event, Thread
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from cogvideo import __version__
from cogvideo.config import InputError
from cogvideo.web.api import open_router, router
from cogvideo.web.guard import RequestGuard
from cogvideo.web.jobs import FullError, Unreachable
from cogvideo.web.metrics import Metrics, MetricsMiddleware
from cogvideo.web.site import ServerState
from cogvideo.web.studio import router as studio

SECONDS_TO_FULL, SECONDS_TO_REACH = 10, 2
"""Values of Retry-After, in seconds."""
DRAINING = 60
"""Seconds for a worker to finish its frame."""
ERRORS = (ClientDisconnect, HTTPException, RequestValidationError, InputError, FullError, OSError, *Unreachable)
"""Errors that clients are told; any other is a bug."""


def application(site: ServerState, hosts: Sequence[str]) -> FastAPI:
    """The API and the studio as an ASGI application."""
    app = FastAPI(title="cogvideo", version=__version__, docs_url=None, redoc_url=None)
    app.state.site, app.state.metrics = site, Metrics(site.jobs)
    app.include_router(router)
    app.include_router(open_router)
    app.include_router(studio)
    if site.keys is None:
        _without_security(app)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts], www_redirect=False)
    app.add_middleware(RequestGuard)
    app.add_middleware(MetricsMiddleware, metrics=app.state.metrics)
    for kind in ERRORS:
        app.add_exception_handler(kind, _respond)
    return app


def _problem(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


def _respond(_: Request, error: Exception) -> JSONResponse:
    """Respond to a request with its error; one of the server is also logged."""
    match error:
        case ClientDisconnect():
            return _problem(400, "the request ended too early")
        case HTTPException():
            return _problem(error.status_code, str(error.detail), dict(error.headers or {}))
        case RequestValidationError():
            return _problem(422, _invalid(error))
        case InputError():
            return _problem(422, " ".join(str(error).split()))
        case FullError():
            return _problem(429, str(error), {"Retry-After": str(SECONDS_TO_FULL)})
        case OSError():
            told = f"files cannot be written or read now ({error.strerror or 'no answer'})"
        case _:
            told = "the queue cannot be reached now"
    reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
    print(f"503: {reason:.200}", file=sys.stderr, flush=True)
    return _problem(503, f"{told}: try again", {"Retry-After": str(SECONDS_TO_REACH)})


def _invalid(error: RequestValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(each) for each in first["loc"] if each not in ("body", "query", "header", "path"))
    got = first.get("input")
    value = "" if got is None or isinstance(got, dict) else f", got {got!r:.60}"
    return f"{where or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}{value}"


def _without_security(app: FastAPI) -> None:
    """Leave keys out of the OpenAPI description if the server needs none."""
    described = app.openapi()
    described["components"].pop("securitySchemes", None)
    for path in described["paths"].values():
        for operation in path.values():
            operation.pop("security", None)


@contextmanager
def workers(number: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[None]:
    """Worker processes, each restarted when it dies. At the end, they finish their frames and exit.

    Args:
        number: number of processes.
        work: function that each runs, called with the number and the arguments.
        arguments: arguments of the work.
    """
    context = get_context("spawn")
    is_over = Event()

    def start() -> BaseProcess:
        process = context.Process(target=work, args=(number, *arguments))
        process.start()
        return process

    running = [start() for _ in range(number)]

    def watch() -> None:
        while not is_over.wait(1.0):
            for place, process in enumerate(running):
                if process.exitcode is not None:
                    print(
                        f"a worker ended with status {process.exitcode}, starting another", file=sys.stderr, flush=True
                    )
                    time.sleep(1.0)
                    running[place] = start()

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        for process in running:
            process.terminate()
        for process in running:
            process.join(DRAINING)
            process.kill()


def leave_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does, so that workers are drained."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
