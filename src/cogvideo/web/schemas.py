"""Requests and responses. Names and fields are those of the video endpoint that existing clients know."""

from __future__ import annotations

import json
from typing import Any, Literal

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from cogvideo.web.clips import kept
from cogvideo.web.jobs import Job, Status
from cogvideo.web.served import WANTED, ClipRequest, Seed, ServedModel, Text, outline

ID = r"^video_[0-9a-f]{32}$"
REFERENCES = ("input_reference", "last_reference", "video")
"""Fields that hold files, or say where frames come from."""
_RULES = ConfigDict(extra="forbid", use_attribute_docstrings=True, strict=True)


class Reference(BaseModel):
    """Frames to start from: a picture, or a frame of an earlier video."""

    model_config = _RULES
    image_url: str | None = None
    """Picture as a data URL, `data:image/png;base64,...`; other URLs are not fetched."""
    video_id: str | None = None
    """An earlier video of yours."""
    frame: int = Field(default=0, ge=0)
    """Number of its frame, from 0."""


class Remix(BaseModel):
    """Changes to an earlier clip."""

    model_config = _RULES
    prompt: Text
    """Text to make a video of."""
    seed: Seed | None = None
    """Seed; the other clip's by default."""


class Failure(BaseModel):
    """Cause of a failure."""

    code: str
    message: str


class Video(BaseModel):
    """A video, finished or not."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int | None = None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None
    error: Failure | None
    seed: int
    fps: float
    num_frames: int
    finished_frames: list[int]
    started_at: float | None
    options: dict[str, Any]

    @classmethod
    def of(cls, job: Job, served: ServedModel) -> Video:
        """The state of a job."""
        wanted = outline(job.work)
        given = json.loads(job.work)
        done = job.done
        progress = 100 * len(done) // job.num_frames if job.num_frames else 0
        is_over = job.status in ("completed", "failed")
        is_short = job.status == "completed" and len(done) < job.num_frames  # stopped
        return cls(
            id=job.id,
            model=wanted.model or served.name,
            status=job.status,
            progress=100 if job.status == "completed" else min(progress, 99),
            created_at=int(job.created),
            completed_at=int(job.ended) if is_over and job.ended is not None else None,
            prompt=wanted.prompt,
            seconds=str(wanted.seconds),
            size=wanted.size or served.sizes[0],
            remixed_from_video_id=job.source,
            error=None if job.reason is None else Failure(code="generation_failed", message=job.reason),
            seed=wanted.seed or 0,
            fps=served.fps(wanted) / (kept(done, job.num_frames).step if is_short else 1),
            num_frames=job.num_frames,
            finished_frames=done,
            started_at=job.taken,
            options={name: given[name] for name in given.keys() - {"prompt", "model", "seconds", "size", "seed"}},
        )


class Page(BaseModel):
    """Videos by time."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletionResponse(BaseModel):
    """Confirmation that a video was deleted."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "cogvideo"
    sizes: list[str]


class Models(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Problem(BaseModel):
    """An error, in one sentence."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Response to a request that cannot be fulfilled."""

    error: Problem


class RequestBody:
    """A request's body: fields, and files or references by name.

    Args:
        fields: all fields that are not references.
        references: bytes of files, or dictionaries.
        is_form: whether values are strings.
    """

    def __init__(self, fields: dict[str, Any], references: dict[str, Any], is_form: bool) -> None:
        self.fields, self.references, self.is_form = fields, references, is_form

    @classmethod
    async def read(cls, request: Request) -> RequestBody:
        """Read JSON or a form.

        Raises:
            HTTPException: it is neither, or cannot be read.
            RequestValidationError: the JSON is not an object.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            try:
                found = json.loads(await request.body())
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise RequestValidationError([{"loc": ("body",), "msg": "expected a JSON object", "input": None}])
        elif kind == "multipart/form-data":
            try:
                found = await _form(request)
            except UnicodeError:
                raise HTTPException(400, "the form is not in the charset that it names, expected UTF-8") from None
        else:
            raise HTTPException(415, f"content-type is {kind!r:.80}, expected application/json or multipart/form-data")
        references = {name: value for name in REFERENCES if (value := found.pop(name, None)) is not None}
        return cls(found, references, kind != "application/json")

    @property
    def wanted(self) -> ClipRequest:
        """The requested clip.

        Raises:
            RequestValidationError: a field cannot be used.
        """
        try:
            if self.is_form:
                return WANTED.validate_strings(self.fields)
            return WANTED.validate_json(json.dumps(self.fields), strict=True)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False)) from error

    def reference(self, name: str) -> bytes | Reference | None:
        """A file, or a reference to frames; None if there is neither.

        Raises:
            RequestValidationError: a field cannot be used.
        """
        found = self.references.get(name)
        if found is None or isinstance(found, bytes):
            return found
        if name == "video" and isinstance(found, dict):
            found = {"video_id" if key == "id" else key: value for key, value in found.items()}
        try:
            return Reference.model_validate(found, strict=not self.is_form)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False)) from error


async def _form(request: Request) -> dict[str, Any]:
    """Fields of a form; `a[b]` is field b of a. File names do not matter."""
    found: dict[str, Any] = {}
    async with request.form(max_files=3, max_fields=50) as form:
        for name, value in form.multi_items():
            outer, _, inner = name.partition("[")
            content = await value.read() if isinstance(value, UploadFile) else value
            is_reference = outer in REFERENCES
            if inner and is_reference:
                group = found.setdefault(outer, {})
                if isinstance(group, dict):
                    group[inner.rstrip("]")] = content
            elif isinstance(content, bytes) and not is_reference:
                raise HTTPException(422, f"{name:.80} is a file, expected a text")
            else:
                found[name] = content
    return found


def body_schema(form: dict[str, Any], **references: dict[str, Any]) -> dict[str, Any]:
    """The body of a request for OpenAPI: JSON with references, or a form with files.

    Args:
        form: schema of the fields.
        references: schema of each reference in JSON.
    """

    def kind(more: dict[str, Any]) -> dict[str, Any]:
        return {"schema": form | {"properties": form["properties"] | more}}

    files = {name: {"type": "string", "format": "binary"} for name in references}
    content = {"application/json": kind(references), "multipart/form-data": kind(files)}
    return {"requestBody": {"required": True, "content": content}}
