"""The state that routes work with (a model, a queue, files and keys), and how it queues clips."""

from __future__ import annotations

import binascii
import hashlib
import io
import json
import re
import time
from base64 import b64decode
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event
from typing import NoReturn

import numpy as np
import torch
from starlette.exceptions import HTTPException

from cogvideo.config import InputError, require
from cogvideo.web.clips import Variant, from_png, kept, render
from cogvideo.web.jobs import Job, Jobs, Limits, new_id
from cogvideo.web.keys import Keys
from cogvideo.web.schemas import ID, Reference
from cogvideo.web.served import WANTED, ClipRequest, ServedModel, Start, outline, pack_codes
from cogvideo.web.storage import Store, frame_name
from cogvideo.web.uploads import decode
from cogvideo.web.worker import GIVEN, LAST


@dataclass(frozen=True)
class Order:
    """A clip to queue."""

    wanted: ClipRequest
    first: Start | None = None
    """Frames to start from."""
    last: Start | None = None
    """Frame to end with."""
    source: str | None = None
    """Video from which it is made."""
    repeat: str | None = None
    """Idempotency key."""

    @property
    def digest(self) -> str:
        """Hash of the order, to tell whether a repeated one is the same."""
        starts = [None if each is None else each.digest for each in (self.first, self.last)]
        return _hash(json.dumps([WANTED.dump_json(self.wanted).decode(), *starts, self.source]))


@dataclass(frozen=True)
class ServerState:
    """State that all routes share."""

    served: ServedModel
    jobs: Jobs
    store: Store
    keys: Keys | None = None
    """None if everybody who can reach the server may use it."""
    limits: Limits = field(default_factory=Limits)
    leaving: Event = field(default_factory=Event)
    """Set when the server shuts down."""

    def find(self, owner: str, id: str, bulky: bool = False) -> Job:
        """A video of an owner. Other owners' videos count as missing."""
        job = self.jobs.find(id, owner, bulky) if re.fullmatch(ID, id) else None
        if job is None:
            refuse(404, "there is no such video")
        return job

    def order(self, owner: str, order: Order) -> Job:
        """Put a clip into the queue.

        Raises:
            ValueError: it cannot be made.
            FullError: the owner has too many videos.
        """
        first, last = order.first, order.last
        wanted = self.served.completed(order.wanted)
        self.served.check(wanted, first, last)
        job = Job(
            id=new_id("video"),
            owner=owner,
            model=self.served.fingerprint,
            work=WANTED.dump_json(wanted, exclude_none=True).decode(),
            alike=self.served.alike(wanted, first, last),
            created=time.time(),
            source=order.source,
            repeat=None if order.repeat is None else _hash(order.repeat),
            digest=order.digest,
            given=None if first is None or first.codes is None else pack_codes(first.codes),
            last=None if last is None or last.codes is None else pack_codes(last.codes),
        )
        files = {name: start.pixels for name, start in ((GIVEN, first), (LAST, last)) if start and start.pixels}
        stored = None
        try:
            for name, content in files.items():
                self.store.put(job.id, name, content)
            stored = self.jobs.add(job, self.limits)
        finally:
            if files and (stored is None or stored.id != job.id):
                self.store.remove(job.id)
        return stored

    def start(
        self, owner: str, reference: bytes | Reference | None, wanted: ClipRequest, max_frames: int = 1
    ) -> Start | None:
        """Frames of a reference: one, or all of a video if `max_frames` is larger than 1.

        Raises:
            ValueError: it cannot be decoded, or there is no such frame.
            HTTPException: there is no such video of the owner.
        """
        if isinstance(reference, Reference) and reference.image_url is None:
            require(reference.video_id is not None, "a reference is empty, expected image_url or video_id")
            return self._earlier(owner, reference, is_whole=max_frames > 1)
        content = _of_data_url(reference.image_url or "") if isinstance(reference, Reference) else reference
        if content is None:
            return None
        fps = self.served.fps(self.served.completed(wanted))
        frames = decode(content, fps, self.served.config.frame_size, max_frames)
        file = io.BytesIO()
        np.save(file, frames)
        return Start(pixels=file.getvalue(), num_frames=len(frames))

    def _earlier(self, owner: str, reference: Reference, is_whole: bool) -> Start:
        job = self.find(owner, reference.video_id or "", bulky=True)
        self._check_model(job)
        codes = dict(zip(job.done, self.served.unpack(job.codes), strict=True))
        places = range(job.num_frames) if is_whole else [reference.frame]
        require(not is_whole or job.status == "completed", f"{job.id} is {job.status}, expected a completed video")
        missing = sorted(set(places) - codes.keys())
        first = next(iter(missing), None)
        require(not missing, f"{job.id} has no frame {first}, it has the frames {sorted(codes)}")
        return Start(torch.stack([codes[each] for each in places]), num_frames=len(places))

    def _check_model(self, job: Job) -> None:
        """Refuse the codes of another model."""
        name = self.served.name
        require(
            job.model == self.served.fingerprint, f"{job.id} was made by another model than {name}, or an older one"
        )

    def starts(self, job: Job) -> tuple[Start | None, Start | None]:
        """First and last frames of a job."""
        if job.given is not None or job.last is not None:
            self._check_model(job)
        return self._start_of(job.given, job.id, GIVEN), self._start_of(job.last, job.id, LAST)

    def _start_of(self, codes: bytes | None, id: str, name: str) -> Start | None:
        if codes is not None:
            found = self.served.unpack(codes)
            return Start(found, num_frames=len(found))
        pixels = self.store.get(id, name)
        return None if pixels is None else Start(pixels=pixels, num_frames=len(np.load(io.BytesIO(pixels))))

    def content(self, job: Job, variant: Variant) -> bytes | None:
        """A variant of a completed clip, made when it is first requested; None if the clip was deleted."""
        found = self.store.get(job.id, variant)
        if found is not None:
            return found
        places = kept(job.done, job.num_frames)
        pngs = [self.store.get(job.id, frame_name(place)) for place in places]
        frames = [from_png(each) for each in pngs if each is not None]
        if len(frames) < len(places):
            return None
        fps = self.served.fps(outline(job.work)) / places.step
        found = render(variant, np.stack(frames), fps, json.loads(job.work))
        with suppress(OSError):  # as on a full disk
            self.store.put(job.id, variant, found)
        return found


def refuse(status: int, message: str, headers: dict[str, str] | None = None) -> NoReturn:
    """Respond with an error."""
    raise HTTPException(status, message, headers)


def _of_data_url(url: str) -> bytes:
    head, _, content = url.partition(";base64,")
    require(head.startswith("data:"), "image_url is no data URL: send the picture itself")
    try:
        return b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("image_url is not valid Base64") from None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
