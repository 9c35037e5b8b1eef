"""The raters' web page. It never reveals which system made a clip, nor the kind of a trial."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from cogvideo import report
from cogvideo.config import InputError
from cogvideo.evaluation.study import Rater, Study
from cogvideo.web.guard import RequestGuard
from cogvideo.web.listening import HOST

STATIC = Path(__file__).parent / "static"
FILES = {
    "page.css": Path(report.__file__).parent / "templates" / "style.css",
    "study.css": STATIC / "study.css",
    "study.js": STATIC / "study.js",
}
MAX_ANSWER_BYTES = 10_000
"""Maximum number of bytes in an answer."""


class SubmittedAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """An answer as the page sends it."""

    place: int
    values: dict[str, int]
    seconds: float


class Pages:
    """Request handlers of a rater's page. The token in the path is the rater's key."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def page(self, request: Request) -> Response:
        """The page itself, the same for all raters."""
        self._rater(request)
        return FileResponse(STATIC / "study.html")

    def file(self, request: Request) -> Response:
        """The page's style sheets and script."""
        path = FILES.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404)
        return FileResponse(path)

    def trial(self, request: Request) -> Response:
        """Progress, and the next trial unless all are answered."""
        return JSONResponse(self._state(self._rater(request)))

    def clip(self, request: Request) -> Response:
        """A clip of the next trial, by its number and side; no other clip is served."""
        shown = self.study.shown(self._rater(request).number)
        side = request.path_params["side"]
        if shown is None or shown.place != request.path_params["place"] or side >= len(shown.clips):
            raise HTTPException(404)
        if not shown.clips[side].is_file():
            raise HTTPException(404)
        return FileResponse(shown.clips[side], media_type="video/mp4")

    async def answer(self, request: Request) -> Response:
        """Store an answer, then send the next trial; status code 409 if another trial is next."""
        rater = self._rater(request)
        if int(request.headers.get("content-length", MAX_ANSWER_BYTES)) >= MAX_ANSWER_BYTES:
            raise HTTPException(413)
        try:
            sent = msgspec.json.decode(await request.body(), type=SubmittedAnswer)
            is_stored = self.study.answer(rater.number, sent.place, sent.values, sent.seconds)
        except (msgspec.MsgspecError, InputError) as error:
            raise HTTPException(422, str(error)) from error
        if not is_stored:
            raise HTTPException(409, "This trial is not the next one.")
        return JSONResponse(self._state(self._rater(request)))

    def _rater(self, request: Request) -> Rater:
        rater = self.study.rater(request.path_params["token"])
        if rater is None:
            raise HTTPException(404, "This link belongs to no rater: ask for yours.")
        return rater

    def _state(self, rater: Rater) -> dict[str, Any]:
        state: dict[str, Any] = {"answered": rater.num_answered, "total": rater.num_trials}
        shown = self.study.shown(rater.number)
        if shown is None:
            return state
        clips = [f"clips/{shown.place}/{side}" for side in range(len(shown.clips))]
        questions = [asdict(question) for question in self.study.questions]
        return state | {"place": shown.place, "prompt": shown.prompt, "clips": clips, "questions": questions}


def application(study: Study) -> Starlette:
    """The pages of a study as an ASGI application. Requests under another name of this machine are refused."""
    pages = Pages(study)
    routes = [
        Route("/static/{name}", pages.file),
        Route("/{token}/", pages.page),
        Route("/{token}/trial", pages.trial),
        Route("/{token}/clips/{place:int}/{side:int}", pages.clip),
        Route("/{token}/answer", pages.answer, methods=["POST"]),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    return Starlette(routes=routes, middleware=[Middleware(RequestGuard), hosts])
