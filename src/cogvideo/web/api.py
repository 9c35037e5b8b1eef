"""The API: the video endpoint that existing clients know, and what the studio page needs beyond it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse, ServerSentEvent

from cogvideo.config import require
from cogvideo.web.clips import TYPES, Variant
from cogvideo.web.jobs import Job
from cogvideo.web.keys import LOCAL
from cogvideo.web.metrics import Metrics
from cogvideo.web.schemas import (
    DeletionResponse,
    ErrorResponse,
    Model,
    Models,
    Page,
    Reference,
    Remix,
    RequestBody,
    Video,
    body_schema,
)
from cogvideo.web.served import MAX_FRAMES, WANTED, ClipRequest, wanted_of
from cogvideo.web.site import Order, ServerState, refuse
from cogvideo.web.storage import frame_name

POLL_SECONDS = 0.3
"""Seconds between polls of a video while a client waits for its events."""
POLL_MILLISECONDS = {"queued": 5000, "in_progress": 1000}
"""Milliseconds that clients should wait before they poll a video again."""
UPLOADS = CapacityLimiter(2)
"""Maximum number of uploads decoded at once."""
Responses = dict[int | str, dict[str, Any]]


def _described(**texts: str) -> Responses:
    """Error responses by status code, for OpenAPI. FastAPI would give them the media type of a route's response."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    found: Responses = {int(name[1:]): {"description": text, "content": content} for name, text in texts.items()}
    for status in found.keys() & {429, 503}:
        found[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}}
    return found


ERRORS = _described(
    _401="No key, or a wrong one.",
    _422="A value cannot be used.",
    _503="The queue or the file storage is unavailable.",
)
ERRORS[403] = {"description": "Sent by a page of another site."}
UNKNOWN = _described(_404="No such video of yours.")
BODY = _described(
    _400="The body cannot be read.",
    _408="The body came too slowly.",
    _413="The body is too large.",
    _429="Too many videos.",
)
FORM = BODY | _described(_415="Neither JSON nor a form.")


async def site(request: Request) -> ServerState:
    """The server state for a request."""
    return request.app.state.site


Server = Annotated[ServerState, Depends(site)]
BEARER = HTTPBearer(auto_error=False, description="An API key, as `cogvideo key` prints it.")


async def owner(server: Server, given: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]) -> str:
    """Name of the key of a request."""
    if server.keys is None:
        return LOCAL
    found = None if given is None else server.keys.owner(given.credentials)
    if found is None:
        refuse(401, "the API key is missing or wrong: send Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
    return found


Owner = Annotated[str, Depends(owner)]


def own(server: Server, owner: Owner, id: str) -> Job:
    """The owner's video with the id in a path."""
    return server.find(owner, id)


OwnJob = Annotated[Job, Depends(own)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=255)]
router = APIRouter(prefix="/v1", responses=ERRORS)
open_router = APIRouter()
_FIELDS = WANTED.json_schema(ref_template="#/components/schemas/{model}")
_REFERENCE = Reference.model_json_schema()
_EXTENSION = _FIELDS | {"required": ["prompt", "video"]}
_VIDEO_ID = {
    "type": "object",
    "properties": {"id": {"type": "string"}},
    "required": ["id"],
    "additionalProperties": False,
}


@router.post(
    "/videos",
    responses=FORM | UNKNOWN,
    openapi_extra=body_schema(_FIELDS, input_reference=_REFERENCE, last_reference=_REFERENCE),
)
async def create(request: Request, server: Server, owner: Owner, repeat: IdempotencyKey = None) -> Video:
    """Queue a video of a prompt, optionally with a given first and last frame."""
    asked = await RequestBody.read(request)
    if "video" in asked.references:
        refuse(422, "video cannot be used here: POST /v1/videos/extensions continues videos")
    wanted = asked.wanted

    def order() -> Job:
        server.served.completed(wanted)  # before uploads are decoded
        first, last = (server.start(owner, asked.reference(f"{name}_reference"), wanted) for name in ("input", "last"))
        return server.order(owner, Order(wanted, first, last, None, repeat))

    return Video.of(await _in_thread(order, asked), server.served)


@router.post("/videos/extensions", responses=FORM | UNKNOWN, openapi_extra=body_schema(_EXTENSION, video=_VIDEO_ID))
async def extend(request: Request, server: Server, owner: Owner, repeat: IdempotencyKey = None) -> Video:
    """Queue a video that keeps the frames of another one, yours or uploaded, and continues from them."""
    asked = await RequestBody.read(request)
    new = asked.wanted
    reference = asked.reference("video")
    if reference is None:
        refuse(422, "video is missing, expected a file or the id of a video")

    def order() -> Job:
        wanted, source = new, None
        if isinstance(reference, Reference):
            earlier = server.find(owner, reference.video_id or "")
            source = earlier.id
            before = wanted_of(earlier.work)
            own = ClipRequest(prompt=new.prompt, seed=new.seed, seconds=new.seconds)
            is_same = new.seconds is None or float(new.seconds) == float(before.seconds or 0)
            require(new == own and is_same, f"got options other than those of {source}, expected only prompt and seed")
            wanted = replace(before, prompt=new.prompt, loop=False, seed=new.seed)
        first = server.start(owner, reference, wanted, MAX_FRAMES)
        return server.order(owner, Order(wanted, first, None, source, repeat))

    return Video.of(await _in_thread(order, asked), server.served)


@router.post("/videos/{id}/remix", responses=BODY | UNKNOWN)
def remix(server: Server, owner: Owner, id: str, body: Remix, repeat: IdempotencyKey = None) -> Video:
    """Queue a video with another prompt or seed from the same start, with the same options."""
    job = server.find(owner, id, bulky=True)
    before = wanted_of(job.work)
    wanted = replace(before, prompt=body.prompt, seed=before.seed if body.seed is None else body.seed)
    return Video.of(server.order(owner, Order(wanted, *server.starts(job), id, repeat)), server.served)


@router.post("/videos/{id}/stop", responses=UNKNOWN)
def stop(server: Server, owner: Owner, job: OwnJob) -> Video:
    """End a video early: it is completed with the frames that it has, and fails if it has none."""
    server.jobs.stop(job.id)
    return Video.of(server.find(owner, job.id), server.served)


@router.get("/videos", responses=UNKNOWN)
def list_videos(
    server: Server,
    owner: Owner,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Page:
    """Your videos by time, the latest first by default, starting after a given one."""
    last = None if after is None else server.find(owner, after)
    jobs = server.jobs.listed(owner, last, limit + 1, order == "asc")
    data = [Video.of(job, server.served) for job in jobs[:limit]]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return Page(data=data, first_id=ends[0], last_id=ends[1], has_more=len(jobs) > limit)


@router.get("/videos/{id}", responses=UNKNOWN)
def retrieve(server: Server, job: OwnJob, response: Response) -> Video:
    """The state of a video."""
    if job.status in POLL_MILLISECONDS:
        response.headers["openai-poll-after-ms"] = str(POLL_MILLISECONDS[job.status])
    return Video.of(job, server.served)


@router.delete("/videos/{id}", responses=UNKNOWN)
def delete(server: Server, job: OwnJob) -> DeletionResponse:
    """Delete a video and its files, even while it is being made."""
    server.store.remove(job.id)  # first, to make room on a full disk for the queue
    server.jobs.remove(job.id)
    server.store.remove(job.id)  # also what a worker wrote meanwhile
    return DeletionResponse(id=job.id)


_BYTES = {"schema": {"type": "string", "format": "binary"}}
PNG: Responses = {200: {"content": {"image/png": _BYTES}}}
CONTENT: Responses = {
    200: {"content": dict.fromkeys(sorted(set(TYPES.values())), _BYTES)},
    206: {"description": "The part that a Range header asks for."},
}
CONTENT |= _described(_416="No such part.")


@router.get("/videos/{id}/content", response_class=Response, responses=UNKNOWN | CONTENT)
def content(
    server: Server, job: OwnJob, variant: Variant = "video", part: Annotated[str | None, Header(alias="Range")] = None
) -> Response:
    """The file of a completed video: mp4, an animated gif or webp, a still frame, or all frames as one picture."""
    if job.status != "completed":
        refuse(404, f"the video is {job.status}: it has no content yet")
    found = server.content(job, variant)
    if found is None:
        refuse(404, "the video was deleted")
    return _part(found, part, TYPES[variant])


@router.get(
    "/videos/{id}/frames/{place}",
    response_class=Response,
    responses=UNKNOWN | PNG,
)
def frame(server: Server, job: OwnJob, place: int) -> Response:
    """A finished frame as PNG, even while the video is being made."""
    found = server.store.get(job.id, frame_name(place)) if place in job.done else None
    if found is None:
        refuse(404, "there is no such frame yet")
    return Response(found, media_type="image/png")


@router.get("/videos/{id}/events", response_class=EventSourceResponse, responses=UNKNOWN)
async def events(
    server: Server, job: OwnJob, last: Annotated[str | None, Header(alias="Last-Event-ID")] = None
) -> AsyncIterator[ServerSentEvent]:
    """Events until a video ends: `frame` for each finished frame, with its address, and `video` when its state changes.

    The id of an event is the number of frames so far: a client that reconnects with it gets the frames after it.
    """
    sent = int(last) if last is not None and last.isdecimal() and len(last) < 9 else 0
    known = None
    current: Job | None = job
    while current is not None and not server.leaving.is_set():
        for place in current.done[sent:]:
            sent += 1
            url = f"/v1/videos/{job.id}/frames/{place}"
            data = {"place": place, "num_frames": current.num_frames, "url": url}
            yield ServerSentEvent(event="frame", id=str(sent), data=data)
        state = (current.status, len(current.done), current.taken)
        if state != known:
            known = state
            yield ServerSentEvent(event="video", id=str(sent), data=Video.of(current, server.served))
        if current.status in ("completed", "failed"):
            return
        await asyncio.sleep(POLL_SECONDS)
        current = await run_in_threadpool(server.jobs.find, job.id)


@router.get("/models")
def models(server: Server, owner: Owner) -> Models:
    """The models that are served."""
    return Models(data=[Model(id=server.served.name, sizes=server.served.sizes)])


@open_router.get("/health")
async def health() -> dict[str, str]:
    """Return status code 200 if the server runs."""
    return {"status": "ok"}


@open_router.get("/ready", responses={503: ERRORS[503] | {"model": ErrorResponse}})
def ready(server: Server) -> dict[str, str]:
    """Return status code 200 if the server can take requests: the queue responds."""
    server.jobs.counts()
    return {"status": "ok"}


@open_router.get("/metrics", response_class=Response, responses={key: ERRORS[key] for key in (401, 503)})
def metrics(request: Request, owner: Owner) -> Response:
    """Metrics for Prometheus."""
    found: Metrics = request.app.state.metrics
    return Response(found.text(), media_type="text/plain; version=0.0.4")


async def _in_thread(order: Callable[[], Job], asked: RequestBody) -> Job:
    """Run a function in a thread. Only a few uploads run at once, so that they never take all threads."""
    return await to_thread.run_sync(order, limiter=UPLOADS if asked.references else None)


def _part(content: bytes, asked: str | None, kind: str) -> Response:
    """A file, or the range of bytes that a header requests; headers with several ranges get the whole file."""
    headers = {"Accept-Ranges": "bytes"}
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", asked or "")
    if match is None or match[0] == "bytes=-":
        return Response(content, media_type=kind, headers=headers)
    size = len(content)
    first, last = match[1], match[2]
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= end:
        headers["Content-Range"] = f"bytes */{size}"
        refuse(416, f"the file has {size} bytes", headers)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Response(content[start:end], 206, headers, kind)
