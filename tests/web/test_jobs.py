"""The queue: leases, turns, limits, and repeated requests, in SQLite and in PostgreSQL."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from cogvideo.config import InputError
from cogvideo.web.jobs import MAX_TRIES, FullError, Job, Jobs, Limits, Progress, new_id
from serving import HAS_POSTGRES, Postgres, postgres

needs_postgres = pytest.mark.skipif(not HAS_POSTGRES, reason="PostgreSQL is not installed")
LONG = 1000.0
LIMITS = Limits()
ages = count()


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def jobs(request: pytest.FixtureRequest, tmp_path: Path) -> Jobs:
    """An empty queue."""
    if request.param == "sqlite":
        return Jobs(f"sqlite:///{tmp_path / 'queue.db'}")
    queue = Jobs(request.getfixturevalue("database").url)
    for owner in "ab":
        for job in queue.listed(owner, None, 1000, True):
            queue.remove(job.id)
    return queue


def add(jobs: Jobs, owner: str = "a", alike: str = "x", limits: Limits = LIMITS, **more: str) -> Job:
    """Add a job that is newer than all previous ones."""
    job = Job(new_id("video"), owner, "model", "{}", alike, time.time() - 1000 + 0.01 * next(ages), **more)
    return jobs.add(job, limits)


def taken(jobs: Jobs, lease: str, most: int = 1, seconds: float = LONG) -> list[str]:
    return [job.id for job in jobs.take(lease, "model", most, seconds)]


def test_keys_take_turns(jobs: Jobs) -> None:
    """Guards against a key that fills the queue: another key's job does not have to wait for all of its jobs."""
    first, second, third = (add(jobs, "a", f"x{number}").id for number in range(3))
    other = add(jobs, "b", "y").id
    assert [taken(jobs, f"lease {number}") for number in range(5)] == [[first], [other], [second], [third], []]


def test_keys_have_a_number_of_jobs_at_work(jobs: Jobs) -> None:
    """Guards other keys against one that takes all workers: jobs beyond its limit wait, even within batches."""
    own = [add(jobs, "a").id for _ in range(3)]
    others = [add(jobs, "b").id for _ in range(2)]
    take = partial(jobs.take, model="model", max_jobs=8, running=2)
    assert {job.id for job in take("lost", seconds=0.0)} == {*own[:2], *others}
    time.sleep(0.01)
    assert {job.id for job in take("first", seconds=LONG)} == {*own[:2], *others}
    assert take("second", seconds=LONG) == []
    assert jobs.finish("first", own[1])
    assert [job.id for job in take("third", seconds=LONG)] == own[2:]


def test_errors_show_no_prompts(jobs: Jobs) -> None:
    """Guards logs against prompts: database errors do not include them."""
    job = replace(add(jobs), work="a secret")
    with pytest.raises(IntegrityError) as caught:
        jobs.add(job, LIMITS)
    assert "a secret" not in str(caught.value)


def test_batches_are_alike(jobs: Jobs) -> None:
    """Checks batches: equal settings, equal progress, at most the requested size, and only this model."""
    alike = [add(jobs).id for _ in range(3)]
    add(jobs, alike="other")
    assert jobs.take("lease 0", "another model", 8, LONG) == []
    assert taken(jobs, "lease 1", 2) == alike[:2]
    jobs.keep("lease 1", {alike[0]: Progress(5, "0", b"code")})
    jobs.release("lease 1", alike)
    assert [taken(jobs, "lease 2", 3), taken(jobs, "lease 3", 3)] == [alike[:1], alike[1:]]


def test_a_lost_lease_is_worth_nothing(jobs: Jobs) -> None:
    """Guards against duplicate work: a worker that lost its lease cannot store or finish what others took over."""
    job = add(jobs).id
    assert taken(jobs, "early", seconds=0.0) == [job]
    jobs.keep("early", {job: Progress(5, "0,4", b"codes")})
    time.sleep(0.01)
    (again,) = jobs.take("late", "model", 1, LONG)
    assert (again.done, again.codes, again.num_frames) == ([0, 4], b"codes", 5)
    assert jobs.keep("early", {job: Progress(5, "0", b"other")}) == {}
    assert not jobs.finish("early", job)
    assert taken(jobs, "third") == []
    assert jobs.finish("late", job)
    assert not jobs.finish("late", job, "twice")
    found = jobs.find(job, bulky=True)
    assert found is not None
    assert (found.status, found.codes, found.reason) == ("completed", b"codes", None)


def test_a_lost_answer_takes_nothing_more(jobs: Jobs) -> None:
    """Guards jobs whose worker never got the response: the same lease gets the same jobs."""
    jobs_of_first = [add(jobs).id for _ in range(2)]
    add(jobs)
    assert taken(jobs, "lease", 2) == taken(jobs, "lease", 2) == jobs_of_first


def test_a_job_that_kills_workers_fails(jobs: Jobs) -> None:
    """Guards the queue against a job that no worker survives."""
    job = add(jobs).id
    for number in range(MAX_TRIES):
        assert taken(jobs, f"lease {number}", seconds=0.0) == [job]
        time.sleep(0.01)
    assert taken(jobs, "last") == []
    found = jobs.find(job)
    assert found is not None
    assert (found.status, found.reason) == ("failed", "5 workers died while making it")


def test_limits_hold_for_requests_at_once(jobs: Jobs) -> None:
    """Guards limits against clients that send many requests at once."""

    def one(_: int) -> bool:
        try:
            add(jobs, limits=Limits(waiting=3))
        except FullError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one, range(12))) == 3
    add(jobs, "b", limits=Limits(waiting=3))
    with pytest.raises(FullError, match="delete some"):
        add(jobs, limits=Limits(kept=3))


def test_repeated_requests_are_one(jobs: Jobs) -> None:
    """Checks retries: the same key gives the same job, but only for the same owner and request."""
    first = add(jobs, repeat="key", digest="same")
    assert add(jobs, repeat="key", digest="same", limits=Limits(waiting=1)) == replace(first, status="queued")
    assert add(jobs, "b", repeat="key", digest="same").id != first.id
    with pytest.raises(InputError, match="Idempotency-Key"):
        add(jobs, repeat="key", digest="different")


def test_pages(jobs: Jobs) -> None:
    """Checks listings: only the owner's jobs, in order, without gaps between pages."""
    own = [add(jobs).id for _ in range(4)]
    add(jobs, "b")
    middle = jobs.find(own[1], "a")
    assert [job.id for job in jobs.listed("a", None, 9, False)] == own[::-1]
    assert [job.id for job in jobs.listed("a", middle, 9, True)] == own[2:]
    assert [job.id for job in jobs.listed("a", middle, 9, False)] == own[:1]
    assert jobs.find(own[1], "b") is None


@pytest.mark.parametrize(
    "url", ["nothing", "mysql://x/y", "sqlite:////no/such/folder/x.db", "postgresql://x@/y?host=/no"]
)
def test_queues_that_cannot_be_opened(url: str) -> None:
    """Guards users against database tracebacks."""
    with pytest.raises(InputError, match="cannot open the queue"):
        Jobs(url)


def test_files_that_are_no_queue(tmp_path: Path) -> None:
    """Guards users against tracebacks, and against a server that waits forever for a queue it does not have."""
    (tmp_path / "queue.db").write_text("no database at all")
    with pytest.raises(InputError, match="cannot open the queue"):
        Jobs(f"sqlite:///{tmp_path / 'queue.db'}")
    older = f"sqlite:///{tmp_path / 'older.db'}"
    Jobs(older)
    with sqlite3.connect(tmp_path / "older.db") as connection:
        connection.execute("ALTER TABLE jobs DROP COLUMN is_stopped")
    with pytest.raises(InputError, match=r"another version of cogvideo made the queue \(column is_stopped\): use"):
        Jobs(older)
