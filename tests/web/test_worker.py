"""Workers: clips that outlive them, batches, stopping, and clips that cannot be generated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from cogvideo.config import InputError
from cogvideo.pipeline import collect
from cogvideo.web.clips import from_png, kept
from cogvideo.web.jobs import JOBS, Job, Jobs
from cogvideo.web.schemas import Reference, Video
from cogvideo.web.served import WANTED, ClipRequest, ServedModel, pack_codes
from cogvideo.web.site import Order, ServerState
from cogvideo.web.storage import Store, frame_name
from cogvideo.web.worker import Worker
from serving import make_whole_bundle, wait_for, working


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text_model: bytes) -> Path:
    return make_whole_bundle(tmp_path_factory.mktemp("model") / "small", text_model)


@pytest.fixture(scope="module")
def served(model: Path) -> ServedModel:
    return ServedModel(str(model))


@pytest.fixture
def site(served: ServedModel, tmp_path: Path) -> ServerState:
    """Empty queue with the locations that the command line would choose."""
    return ServerState(served, Jobs(f"sqlite:///{tmp_path / 'queue.db'}"), Store(str(tmp_path / "files")))


def order(site: ServerState, **options: Any) -> str:
    return site.order("a", Order(ClipRequest(**{"prompt": "a cat", "seed": 3, "rounds": 0} | options))).id


def look(site: ServerState, id: str) -> Job:
    job = site.jobs.find(id, bulky=True)
    assert job is not None
    return job


def expected(site: ServerState, id: str) -> dict[int, bytes]:
    """Codes of a clip by place, as the pipeline generates them without a batch or interruption."""
    wanted = WANTED.validate_json(look(site, id).work)
    frames = site.served.pipeline.frames(site.served.request([wanted], None, None))
    return {frame.place: pack_codes(frame.codes) for frame in frames}


def codes(site: ServerState, id: str) -> dict[int, bytes]:
    """Codes of a clip by place, as stored in the queue."""
    job = look(site, id)
    return {place: pack_codes(row[None]) for place, row in zip(job.done, site.served.unpack(job.codes), strict=True)}


def worker(site: ServerState, batch: int = 8, stopping: Event | None = None) -> Worker:
    return Worker(site.jobs, site.store, site.served, batch, 1000.0, 0, stopping or Event())


def work_off(site: ServerState, batch: int = 8) -> None:
    """Work until the queue is empty."""
    stopping = Event()
    one = worker(site, batch, stopping)
    stopping.wait = lambda _: stopping.set()  # type: ignore[assignment, method-assign, return-value]
    one.run()


def test_a_clip_outlives_its_workers(model: Path, site: ServerState, tmp_path: Path) -> None:
    """Checks the durable queue: others resume after the last finished frame and get the codes of an uninterrupted run.

    One worker is killed; the next one is asked to exit, and returns its jobs at once.
    """
    ids = [order(site, seed=seed, rounds=2) for seed in (5, 6)]

    def seen() -> dict[int, int]:
        """Time at which each frame was written."""
        folder = tmp_path / "files" / ids[0]
        return {place: (folder / frame_name(place)).stat().st_mtime_ns for place in look(site, ids[0]).done}

    with working(model, tmp_path, "--lease", 3, "--batch", 2) as process:
        wait_for(lambda: len(look(site, ids[0]).done) >= 3, every=0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert look(site, ids[0]).status == "in_progress"
    first = seen()
    with working(model, tmp_path, "--batch", 2) as process:
        wait_for(lambda: len(look(site, ids[0]).done) > max(6, len(first)), every=0.01)
        process.terminate()
        assert process.wait() == 0
    assert [(look(site, id).status, look(site, id).lease, look(site, id).tries) for id in ids] == 2 * [
        ("queued", None, 0)
    ]
    second = seen()
    work_off(site)
    assert first.items() <= second.items() <= seen().items()  # finished frames are not generated again
    for id in ids:
        assert codes(site, id) == expected(site, id)
        assert len(codes(site, id)) == 17


SHARING = """
import torch
from cogvideo.web import worker

class Worker:
    def run(self):
        print(torch.get_num_threads())

worker.open_worker = lambda *_: Worker()
for sharing in (1, 2, 9):
    torch.set_num_threads(8)
    worker.work(sharing)
"""


def test_workers_share_the_cores() -> None:
    """Guards the throughput of several workers, whose threads would otherwise wait for each other."""
    done = subprocess.run([sys.executable, "-c", SHARING], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8", "4", "1"]


def test_batches_give_the_clips_of_single_jobs(site: ServerState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks batches: similar jobs share one, others get their own, and no clip depends on its batch."""
    sizes = []
    frames = site.served.pipeline.frames
    monkeypatch.setattr(site.served.pipeline, "frames", lambda asked: sizes.append(len(asked.prompts)) or frames(asked))
    ids = [order(site, seed=1), order(site, prompt="a dog"), order(site, seed=2, guidance=2.0), order(site, seed=4)]
    work_off(site, batch=2)
    assert sizes == [2, 1, 1]
    for id in ids:
        assert look(site, id).status == "completed"
        assert codes(site, id) == expected(site, id)
    stored = np.stack([from_png(site.store.get(ids[1], frame_name(place)) or b"") for place in range(5)])
    wanted = WANTED.validate_json(look(site, ids[1]).work)
    alone = collect(frames(site.served.request([wanted], None, None)), 1)
    assert np.array_equal(stored, alone.frames[0])


def test_stopped_and_deleted_clips(site: ServerState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks early ends: a stopped clip keeps its frames, a deleted one leaves no files, and the others continue."""
    ids = [order(site, seed=seed, rounds=1) for seed in range(3)]
    keep = site.jobs.keep

    def interrupted(lease: str, made: dict[str, Any]) -> dict[str, bool]:
        held = keep(lease, made)
        if len(look(site, ids[2]).done) == 6:
            site.jobs.stop(ids[0])
            site.jobs.remove(ids[1])
        return held

    monkeypatch.setattr(site.jobs, "keep", interrupted)
    work_off(site)
    assert [look(site, ids[0]).status, look(site, ids[2]).status] == ["completed", "completed"]
    assert [len(look(site, ids[0]).done), len(look(site, ids[2]).done)] == [7, 9]
    assert [Video.of(look(site, id), site.served).fps for id in (ids[0], ids[2])] == [1.0, 2.0]  # every other frame
    assert site.jobs.find(ids[1]) is None
    assert site.store.get(ids[1], frame_name(0)) is None
    assert site.store.get(ids[0], "video") is not None
    waiting = order(site)
    site.jobs.stop(waiting)
    assert (look(site, waiting).status, look(site, waiting).reason) == ("failed", "stopped before the first frame")


@pytest.mark.parametrize(
    ("done", "places"),
    [
        ([0, 1, 2, 3, 4], range(5)),
        ([0], range(1)),
        ([0, 4, 8], range(0, 9, 4)),
        ([0, 4, 8, 12, 16, 2, 6, 10], range(0, 17, 4)),
        ([0, 4, 8, 12, 16, 2, 10, 6, 14, 1], range(0, 17, 2)),
    ],
)
def test_frames_of_a_stopped_clip(done: list[int], places: range) -> None:
    """Checks motion in clips that end early: the frames kept are evenly spaced."""
    assert kept(done, 17 if len(done) != 5 else 5) == places


def test_one_bad_clip_spoils_no_batch(
    site: ServerState, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a batch against a bad clip: the others finish, the bad one fails, and its user sees no internals."""
    ids = [order(site, seed=seed) for seed in (1, 2)]
    frames = site.served.pipeline.frames

    def failing(request: Any) -> Any:
        if any(generator.initial_seed() == 2 for generator in request.generators):
            raise RuntimeError("a secret")
        return frames(request)

    monkeypatch.setattr(site.served.pipeline, "frames", failing)
    work_off(site)
    assert (look(site, ids[0]).status, look(site, ids[0]).reason) == ("completed", None)
    assert (look(site, ids[1]).status, look(site, ids[1]).reason) == ("failed", "internal error")
    assert "a secret" in capsys.readouterr().err


def test_clips_of_another_version(site: ServerState) -> None:
    """Checks a queue that outlives its version of the package: its clips are listed, and pending ones fail if the
    current version does not know one of their options."""
    old, new = order(site), order(site, seed=4)
    with site.jobs._writing() as connection:
        work = look(site, old).work.replace('"rounds"', '"colour":1,"rounds"')
        connection.execute(update(JOBS).where(JOBS.c.id == old).values(work=work))
    work_off(site)
    assert (look(site, old).status, look(site, new).status) == ("failed", "completed")
    video = Video.of(look(site, old), site.served)
    assert (video.prompt, video.fps, video.options["colour"]) == ("a cat", 1.0, 1)
    reason = "another version of cogvideo queued the clip: colour is unknown or out of range now"
    assert look(site, old).reason == reason


def test_clips_of_another_model(site: ServerState, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks clips that wait for a model that is gone: their worker reports them once and leaves them queued. The codes
    of another model's clips cannot start new ones."""
    old = order(site)
    work_off(site)
    start = site.start("a", Reference(video_id=old), ClipRequest(prompt="a cat"))
    waiting = site.order("a", Order(ClipRequest(prompt="a cat"), start)).id
    with site.jobs._writing() as connection:
        connection.execute(update(JOBS).values(model="another", codes=b"of another length"))
    stopping = Event()
    looks = iter([False, False, True])
    stopping.wait = lambda _: next(looks) and stopping.set()  # type: ignore[assignment, method-assign, return-value]
    worker(site, stopping=stopping).run()
    job = look(site, waiting)
    assert job.status == "queued"
    assert capsys.readouterr().err.count("1 waiting videos need another model than small as it is now") == 1
    for use in (lambda: site.start("a", Reference(video_id=old), ClipRequest(prompt="x")), lambda: site.starts(job)):
        with pytest.raises(InputError, match="was made by another model than small, or an older one"):
            use()


def test_little_memory_makes_smaller_batches(site: ServerState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards batches against running out of memory: jobs that do not fit go back to the queue."""
    ids = [order(site, seed=seed) for seed in range(5)]
    monkeypatch.setattr("cogvideo.planning.memory.AMPLE_RATIO", 10**9)
    monkeypatch.setattr("cogvideo.planning.memory.needed_memory", lambda *given: given[4] * 2**40)
    monkeypatch.setattr("cogvideo.planning.memory.free_memory", lambda _: 2 * 2**40)
    sizes = []
    frames = site.served.pipeline.frames
    monkeypatch.setattr(site.served.pipeline, "frames", lambda asked: sizes.append(len(asked.prompts)) or frames(asked))
    site.served.pipeline._fitting.clear()
    work_off(site)
    assert sizes == [2, 2, 1]
    assert all(look(site, id).status == "completed" for id in ids)
