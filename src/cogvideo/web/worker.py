"""A worker: takes jobs from the queue, makes their clips in batches, and continues where another worker died."""

from __future__ import annotations

import hashlib
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from multiprocessing import parent_process
from secrets import token_hex
from threading import Event, Thread
from traceback import print_exception
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

import cogvideo
from cogvideo.config import InputError
from cogvideo.devices import is_out_of_memory, usable
from cogvideo.media.colors import Pixels
from cogvideo.pipeline import Frame
from cogvideo.web.clips import EAGER_VARIANTS, from_png, kept, render, to_png
from cogvideo.web.jobs import Job, Jobs, Progress, Unreachable
from cogvideo.web.served import ClipRequest, ServedModel, pack_codes, wanted_of
from cogvideo.web.storage import Store, frame_name

T = TypeVar("T")
POLL_SECONDS = 0.5
"""Seconds between polls of an empty queue."""
RETRY_SECONDS = 1.0
"""Seconds between attempts to reach a database."""
GIVEN, LAST = "given.npy", "last.npy"
"""Files with uploaded frames."""


def work(sharing: int, *arguments: Any) -> None:
    """Work until SIGTERM or Ctrl-C, or until the parent process has died.

    Args:
        sharing: number of workers that share the cores of this machine.
        arguments: arguments of `open_worker`, except the first.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() // sharing))
    stopping = Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stopping.set())
    if parent_process() is not None:
        Thread(target=_stop_with_parent, args=(stopping,), daemon=True).start()
    open_worker(stopping, *arguments).run()


def open_worker(
    stopping: Event,
    queue: str,
    files: str,
    model: str,
    device: str,
    batch: int,
    lease: float,
    running: int = 0,
    adapters: Mapping[str, float] = MappingProxyType({}),
) -> Worker:
    """A worker, from values of the command line."""
    served = ServedModel(model, usable(device), adapters=adapters)
    return Worker(Jobs(queue), Store(files), served, batch, lease, running, stopping)


def _stop_with_parent(stopping: Event) -> None:
    """Set `stopping` when the parent process ends."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    stopping.set()


class Worker:
    """A worker. When told to stop, it finishes the current frame and returns its jobs to the queue."""

    def __init__(
        self, jobs: Jobs, store: Store, served: ServedModel, batch: int, lease: float, running: int, stopping: Event
    ) -> None:
        self.jobs, self.store, self.served = jobs, store, served
        self.batch, self.lease, self.running, self.stopping = batch, lease, running, stopping
        self._is_told = False

    def run(self) -> None:
        """Work until `stopping` is set."""
        with suppress(*Unreachable):  # only while stopping; its lease will expire
            while not self.stopping.is_set():
                self._work()

    def _work(self) -> None:
        """Do the next jobs, if there are any."""
        lease = token_hex(16)
        take = partial(self.jobs.take, lease, self.served.fingerprint, self.batch, self.lease, self.running)
        jobs = self._reach(take)
        if not jobs:
            self._tell_others()
            self.stopping.wait(POLL_SECONDS)
            return
        with self._renewing(lease):
            self._make(lease, jobs)

    def _tell_others(self) -> None:
        """Report once that jobs wait for another model, such as one before further training."""
        number = self._reach(lambda: self.jobs.others(self.served.fingerprint))
        if number and not self._is_told:
            told = f"{number} waiting videos need another model than {self.served.name} as it is now"
            print(f"{told}; start a worker with that model, or delete them", file=sys.stderr, flush=True)
        self._is_told = number > 0

    def _fitting(self, lease: str, jobs: Sequence[Job]) -> Sequence[Job]:
        """As many jobs as memory allows; the others go back."""
        settings = self.served.settings(wanted_of(jobs[0].work))
        number = len(jobs)
        while number > 1:
            try:
                self.served.pipeline.check_memory(settings, number)
                break
            except InputError:
                number -= 1
        self._release(lease, jobs[number:])
        return jobs[:number]

    def _make(self, lease: str, jobs: Sequence[Job]) -> None:
        """Make clips as one batch; if that fails, one by one, so that one failure does not affect the others."""
        try:
            self._make_batch(lease, self._fitting(lease, jobs))
        except Unreachable:
            raise
        except OSError as error:  # not the clips' fault
            print(f"waiting for the file storage: {error}", file=sys.stderr, flush=True)
            self._release(lease, jobs)
            self.stopping.wait(RETRY_SECONDS)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._make(lease, [job])
                return
            reason = str(error) if isinstance(error, InputError) else "internal error"
            if is_out_of_memory(error):
                reason = "out of memory"
            elif not isinstance(error, InputError):
                print_exception(error)
            self._reach(lambda: self.jobs.finish(lease, jobs[0].id, " ".join(reason.split())))

    def _make_batch(self, lease: str, jobs: Sequence[Job]) -> None:
        clips = [_Clip(job, self.served.unpack(job.codes), self.store) for job in jobs]
        active = {clip.job.id: clip for clip in clips}

        def settle(held: dict[str, bool]) -> None:
            """Set aside clips that are stopped, and those that other workers now have."""
            for id in [id for id in active if held.get(id, True)]:
                self._close(lease, active.pop(id), is_held=id in held)

        settle(self._reach(lambda: self.jobs.keep(lease, {})))
        for frame in self._frames(clips) if active else ():
            for clip, codes, pixels in zip(clips, frame.codes, frame.pixels, strict=True):
                if clip.job.id in active:
                    clip.add(frame, codes, pixels)
            settle(self._reach(lambda: self.jobs.keep(lease, {id: clip.state for id, clip in active.items()})))
            if self.stopping.is_set():
                self._release(lease, jobs)
                return
            if not active:
                return
        for clip in active.values():
            self._close(lease, clip, is_held=True)

    def _frames(self, clips: Sequence[_Clip]) -> Iterator[Frame]:
        first = clips[0]
        finished = {place: torch.stack([clip.codes[place] for clip in clips]) for place in first.codes}
        wanted = [wanted_of(clip.job.work) for clip in clips]
        given = self._start(first.job, GIVEN, first.job.given)
        last = self._start(first.job, LAST, first.job.last)
        return self.served.pipeline.frames(self.served.request(wanted, given, last, finished))

    def _start(self, job: Job, name: str, codes: bytes | None) -> Int64[Tensor, "frames slots"] | None:
        if codes is not None:
            return self.served.unpack(codes)
        content = self.store.get(job.id, name)
        if content is None:
            return None
        return self.served.pipeline.encode(np.load(io.BytesIO(content), allow_pickle=False))

    def _close(self, lease: str, clip: _Clip, is_held: bool) -> None:
        """Write the files of a complete or stopped clip. A deleted job's files are deleted with it."""
        id = clip.job.id
        if is_held:
            wanted = wanted_of(clip.job.work)
            places = kept(clip.codes, clip.num_frames)
            fps = self.served.fps(wanted) / places.step
            frames, record = clip.frames(places), self._record(wanted, clip, places)
            for variant in EAGER_VARIANTS:
                self.store.put(id, variant, render(variant, frames, fps, record))
            self._reach(lambda: self.jobs.finish(lease, id))
        if self._reach(lambda: self.jobs.find(id)) is None:
            self.store.remove(id)

    def _record(self, wanted: ClipRequest, clip: _Clip, places: range) -> dict[str, Any]:
        """Facts to regenerate the clip; its codes are hashed as in a sidecar."""
        codes = torch.stack([clip.codes[place] for place in places])
        given = {name: value for name, value in asdict(wanted).items() if value is not None}
        made = {"bundle": self.served.fingerprint, "codes": hashlib.sha256(codes.numpy().tobytes()).hexdigest()}
        return given | made | {"torch": torch.__version__, "cogvideo": cogvideo.__version__}

    def _release(self, lease: str, jobs: Sequence[Job]) -> None:
        if jobs:
            self._reach(lambda: self.jobs.release(lease, [job.id for job in jobs]))

    def _reach(self, call: Callable[[], T]) -> T:
        """The response of the database, however long it is away. Waiting loses nothing: leases decide who continues."""
        is_told = False
        while True:
            try:
                return call()
            except Unreachable as error:
                if self.stopping.is_set():
                    raise
                if not is_told:
                    print(
                        f"waiting for the queue: {str(error).partition(chr(10))[0]:.200}", file=sys.stderr, flush=True
                    )
                is_told = True
                time.sleep(RETRY_SECONDS)

    @contextmanager
    def _renewing(self, lease: str) -> Iterator[None]:
        """Renew a lease from another thread."""
        is_over = Event()

        def renew() -> None:
            while not is_over.wait(self.lease / 3):
                with suppress(*Unreachable):
                    self._reach(lambda: self.jobs.renew(lease, self.lease))

        thread = Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


class _Clip:
    """A clip in progress: its frames by index, those of earlier workers from their files."""

    def __init__(self, job: Job, codes: Int64[Tensor, "frames slots"], store: Store) -> None:
        self.job = job
        self.num_frames = job.num_frames
        self.codes = dict(zip(job.done, codes, strict=True))
        self._store = store
        self._pixels: dict[int, np.ndarray] = {}

    def add(self, frame: Frame, codes: Int64[Tensor, " slots"], pixels: np.ndarray) -> None:
        """Store a frame."""
        self._store.put(self.job.id, frame_name(frame.place), to_png(pixels))
        self.codes[frame.place], self._pixels[frame.place] = codes, pixels
        self.num_frames = frame.num_frames

    @property
    def state(self) -> Progress:
        """Progress for the queue."""
        places = ",".join(map(str, self.codes))
        return Progress(self.num_frames, places, pack_codes(torch.stack([*self.codes.values()])))

    def frames(self, places: range) -> Pixels:
        """Frames in order of time."""
        return np.stack([self._frame(place) for place in places])

    def _frame(self, place: int) -> np.ndarray:
        if place not in self._pixels:
            content = self._store.get(self.job.id, frame_name(place))
            assert content is not None, "a finished frame has no file"
            self._pixels[place] = from_png(content)
        return self._pixels[place]
