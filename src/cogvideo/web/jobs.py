"""The queue: one table of jobs with leases, in SQLite or PostgreSQL. No other file has SQL.

A worker takes jobs for some seconds under a lease, a random token, and renews it as long as it lives. A worker's writes
only take effect under its own lease, so a job is never finished twice.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    Connection,
    Double,
    Engine,
    Index,
    String,
    Text,
    UniqueConstraint,
    and_,
    case,
    create_engine,
    delete,
    event,
    extract,
    func,
    insert,
    inspect,
    make_url,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from cogvideo.config import InputError, require

Status = Literal["queued", "in_progress", "completed", "failed"]
OPEN = ("queued", "in_progress")
MAX_TRIES = 5
"""Number of workers that may die on a job without finishing a frame."""
BUSY_SECONDS = 30
"""Seconds to wait for another process to finish its transaction."""
POOL: dict[str, Any] = {"pool_pre_ping": True, "pool_size": 10, "max_overflow": 40, "hide_parameters": True}
"""As many connections as a server has threads, ten of which stay open. Error messages hide prompts."""

Unreachable = (OperationalError, InterfaceError)
"""Errors of a database that is unreachable for now. A retry may help."""


class Base(MappedAsDataclass, DeclarativeBase):
    """Base of the classes that are tables."""


class Job(Base):
    """A row of the table. Codes are the bytes of int32 arrays, and empty unless requested."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("owner", "repeat"),
        Index("jobs_by_owner", "owner", "created"),
        Index("jobs_by_status", "status", "created"),
        Index("jobs_by_turn", "owner", "taken"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    """Name of the key that requested it."""
    model: Mapped[str] = mapped_column(String(64))
    """Fingerprint of the model."""
    work: Mapped[str] = mapped_column(Text)
    """Clip to make, as JSON."""
    alike: Mapped[str] = mapped_column(String(64))
    """Hash of everything that jobs in a batch must share."""
    created: Mapped[float] = mapped_column(Double)
    source: Mapped[str | None] = mapped_column(String(40), default=None)
    """Job that this one remixes or extends."""
    repeat: Mapped[str | None] = mapped_column(String(64), default=None)
    """Hash of the request's idempotency key."""
    digest: Mapped[str | None] = mapped_column(String(64), default=None)
    """Hash of the request's body."""
    given: Mapped[bytes | None] = mapped_column(default=None)
    """Codes of leading frames; uploaded frames are files."""
    last: Mapped[bytes | None] = mapped_column(default=None)
    """Codes of the last frame."""
    status: Mapped[Status] = mapped_column(String(12), default="queued")
    reason: Mapped[str | None] = mapped_column(Text, default=None)
    """Cause of a failure, for the user."""
    taken: Mapped[float | None] = mapped_column(Double, default=None)
    """Time at which a worker last took it."""
    ended: Mapped[float | None] = mapped_column(Double, default=None)
    num_frames: Mapped[int] = mapped_column(default=0)
    """Number of frames of the whole clip; 0 until the first is finished."""
    places: Mapped[str] = mapped_column(Text, default="")
    """Indices of finished frames, in the order in which they were finished, separated by commas."""
    codes: Mapped[bytes] = mapped_column(default=b"")
    """Codes of finished frames in that order."""
    is_stopped: Mapped[bool] = mapped_column(default=False)
    """True if the clip should end with the frames that it has."""
    lease: Mapped[str | None] = mapped_column(String(32), default=None)
    lease_end: Mapped[float | None] = mapped_column(Double, default=None)
    tries: Mapped[int] = mapped_column(default=0)

    @property
    def done(self) -> list[int]:
        """Indices of finished frames."""
        return [int(place) for place in self.places.split(",") if place]


JOBS = Base.metadata.tables[Job.__tablename__]
LARGE_COLUMNS = ("given", "last", "codes")
SMALL_COLUMNS = [column for column in JOBS.c if column.name not in LARGE_COLUMNS]


class Progress(NamedTuple):
    """Finished frames of a job."""

    num_frames: int
    """Number of frames of the whole clip."""
    places: str
    """See `Job.places`."""
    codes: bytes
    """See `Job.codes`."""


@dataclass(frozen=True)
class Limits:
    """Limits of each key."""

    waiting: int = 100
    """Number of unfinished videos of a key."""
    kept: int = 10_000
    """Number of videos of a key, with finished ones."""


class FullError(Exception):
    """A key has reached its limit of jobs."""


class Jobs:
    """The queue.

    Args:
        url: URL of SQLite or PostgreSQL for SQLAlchemy, such as `postgresql://user@host/name`.
    """

    def __init__(self, url: str) -> None:
        try:
            self._engine = _engine(url)
            # with SQLite, threads wait for each other here: SQLite itself would sleep and poll
            self._turn: AbstractContextManager[Any] = Lock() if self._engine.name == "sqlite" else nullcontext()
            with self._writing("schema") as connection:
                Base.metadata.create_all(connection)
                there = {column["name"] for column in inspect(connection).get_columns(JOBS.name)}
            other = sorted(there ^ {*JOBS.c.keys()})
            told = f"another version of cogvideo made the queue (column {' '.join(other)})"
            require(not other, f"{told}: use that version, or start another queue")
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, DBAPIError) as error:
            reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
            raise InputError(
                f"cannot open the queue ({reason}), expected sqlite:///FILE or postgresql://..."
            ) from error

    def add(self, job: Job, limits: Limits) -> Job:
        """Store a new job, or find the one that an earlier request with the same idempotency key stored.

        Raises:
            FullError: the owner has too many jobs.
            ValueError: the idempotency key belongs to another request.
        """
        with self._writing(job.owner) as connection:
            own = select(*SMALL_COLUMNS).where(JOBS.c.owner == job.owner)
            if job.repeat is not None and (row := connection.execute(own.where(JOBS.c.repeat == job.repeat)).first()):
                same = row.digest == job.digest
                require(same, "this Idempotency-Key was used with another request: use a new key")
                return Job(**row._mapping)
            is_open = func.count(case((JOBS.c.status.in_(OPEN), 1)))
            kept, waiting = connection.execute(select(func.count(), is_open).where(JOBS.c.owner == job.owner)).one()
            if waiting >= limits.waiting:
                raise FullError(f"{waiting} of your videos are unfinished, which is the limit: wait for one of them")
            if kept >= limits.kept:
                raise FullError(f"you have {kept} videos, which is the limit: delete some")
            connection.execute(insert(JOBS), {column.name: getattr(job, column.name) for column in JOBS.c})
        return job

    def find(self, id: str, owner: str | None = None, bulky: bool = False) -> Job | None:
        """A job, of an owner if one is given, with codes if `bulky`."""
        query = select(*(JOBS.c if bulky else SMALL_COLUMNS)).where(JOBS.c.id == id)
        if owner is not None:
            query = query.where(JOBS.c.owner == owner)
        with self._reading() as connection:
            row = connection.execute(query).first()
        return None if row is None else Job(**row._mapping)

    def listed(self, owner: str, after: Job | None, limit: int, is_ascending: bool) -> list[Job]:
        """Jobs of an owner by time, starting after the job `after`."""
        order = (JOBS.c.created, JOBS.c.id)
        query = select(*SMALL_COLUMNS).where(JOBS.c.owner == owner).limit(limit)
        if after is not None:
            there = tuple_(*order)
            query = query.where(
                there > (after.created, after.id) if is_ascending else there < (after.created, after.id)
            )
        query = query.order_by(*(order if is_ascending else [each.desc() for each in order]))
        with self._reading() as connection:
            return [Job(**row._mapping) for row in connection.execute(query)]

    def remove(self, id: str) -> None:
        """Delete a job, even if a worker has it."""
        with self._writing() as connection:
            connection.execute(delete(JOBS).where(JOBS.c.id == id))

    def stop(self, id: str) -> None:
        """End a job with the frames that it has; one without frames fails."""
        unfinished = and_(JOBS.c.id == id, JOBS.c.status.in_(OPEN))
        with self._writing() as connection:
            nothing = and_(unfinished, JOBS.c.places == "")
            failed = {"status": "failed", "reason": "stopped before the first frame", "ended": self._now(connection)}
            connection.execute(update(JOBS).where(nothing).values(failed | {"lease": None}))
            connection.execute(update(JOBS).where(unfinished).values(is_stopped=True))

    def take(self, lease: str, model: str, max_jobs: int, seconds: float, running: int = 0) -> list[Job]:
        """Take a job, and others that fit into the same batch.

        Jobs are free if they are queued or their lease has expired. The owner served least recently is next, then the
        oldest job.

        Args:
            lease: a new token. If it already holds jobs, because the response was lost, these are returned.
            model: fingerprint of the worker's model.
            max_jobs: maximum number of jobs.
            seconds: length of the lease.
            running: maximum number of jobs of an owner in progress at once, 0 for any number.
        """
        with self._writing("take" if running else "") as connection:
            now = self._now(connection)
            held = select(*JOBS.c).where(JOBS.c.lease == lease).order_by(JOBS.c.created, JOBS.c.id)
            if rows := connection.execute(held).all():
                return [Job(**row._mapping) for row in rows]
            is_lost = and_(JOBS.c.status == "in_progress", JOBS.c.lease_end < now)
            reason = f"{MAX_TRIES} workers died while making it"
            given_up = {"status": "failed", "reason": reason, "ended": now, "lease": None}
            connection.execute(update(JOBS).where(is_lost, JOBS.c.tries >= MAX_TRIES).values(given_up))
            is_free = and_(JOBS.c.model == model, or_(JOBS.c.status == "queued", is_lost))
            others = JOBS.alias()
            served = select(func.max(others.c.taken)).where(others.c.owner == JOBS.c.owner).scalar_subquery()
            free = select(JOBS.c.id, JOBS.c.alike, JOBS.c.places).where(is_free).with_for_update(skip_locked=True)
            turn = (func.coalesce(served, 0.0), JOBS.c.created, JOBS.c.id)
            if running:
                is_at_work = and_(others.c.status == "in_progress", others.c.lease_end >= now)
                is_earlier = tuple_(others.c.created, others.c.id) < tuple_(JOBS.c.created, JOBS.c.id)
                is_first = and_(others.c.status.in_(OPEN), others.c.alike == JOBS.c.alike, is_earlier)
                before = select(func.count()).where(others.c.owner == JOBS.c.owner, or_(is_at_work, is_first))
                free = free.where(before.scalar_subquery() < running)
            first = connection.execute(free.order_by(*turn).limit(1)).first()
            if first is None:
                return []
            alike = (JOBS.c.alike == first.alike, JOBS.c.places == first.places, JOBS.c.id != first.id)
            ids = [first.id]
            if max_jobs > 1:
                more = free.where(*alike).order_by(*turn).limit(max_jobs - 1)
                ids += [row.id for row in connection.execute(more)]
            taking = {"status": "in_progress", "lease": lease, "lease_end": now + seconds, "taken": now}
            connection.execute(update(JOBS).where(JOBS.c.id.in_(ids)).values(taking | {"tries": JOBS.c.tries + 1}))
            return [Job(**row._mapping) for row in connection.execute(held)]

    def renew(self, lease: str, seconds: float) -> None:
        """Extend a lease to end `seconds` from now."""
        with self._writing() as connection:
            end = self._now(connection) + seconds
            connection.execute(update(JOBS).where(JOBS.c.lease == lease).values(lease_end=end))

    def keep(self, lease: str, made: Mapping[str, Progress]) -> dict[str, bool]:
        """Store the progress of jobs.

        Returns:
            The jobs that the lease still holds, and whether each should stop.
        """
        with self._writing() as connection:
            for id, progress in made.items():
                values = progress._asdict() | {"tries": 0}
                connection.execute(update(JOBS).where(JOBS.c.id == id, JOBS.c.lease == lease).values(values))
            held = connection.execute(select(JOBS.c.id, JOBS.c.is_stopped).where(JOBS.c.lease == lease))
            return {row.id: row.is_stopped for row in held}

    def finish(self, lease: str, id: str, reason: str | None = None) -> bool:
        """End a job, as failed if there is a reason; False if the lease no longer holds it."""
        with self._writing() as connection:
            status = "completed" if reason is None else "failed"
            values = {"status": status, "reason": reason, "ended": self._now(connection), "lease": None}
            found = connection.execute(update(JOBS).where(JOBS.c.id == id, JOBS.c.lease == lease).values(values))
            return found.rowcount == 1

    def release(self, lease: str, ids: Collection[str]) -> None:
        """Return jobs to the queue."""
        back = {"status": "queued", "lease": None, "tries": 0}
        with self._writing() as connection:
            connection.execute(update(JOBS).where(JOBS.c.lease == lease, JOBS.c.id.in_(ids)).values(back))

    def counts(self) -> tuple[dict[str, int], float]:
        """Number of jobs by status, and seconds that the oldest queued one has waited."""
        with self._reading() as connection:
            rows = connection.execute(select(JOBS.c.status, func.count()).group_by(JOBS.c.status)).all()
            oldest = connection.scalar(select(func.min(JOBS.c.created)).where(JOBS.c.status == "queued"))
            waited = 0.0 if oldest is None else max(0.0, self._now(connection) - oldest)
        return dict.fromkeys(("queued", "in_progress", "completed", "failed"), 0) | {
            row[0]: row[1] for row in rows
        }, waited

    def others(self, model: str) -> int:
        """Number of jobs that wait for other models."""
        query = select(func.count()).where(JOBS.c.status == "queued", JOBS.c.model != model)
        with self._reading() as connection:
            return int(connection.execute(query).scalar_one())

    def _now(self, connection: Connection) -> float:
        """Seconds since 1970 by one clock for all: the database's, or for SQLite this machine's."""
        if self._engine.name == "sqlite":
            return time.time()
        return float(connection.execute(select(extract("epoch", func.clock_timestamp()))).scalar_one())

    @contextmanager
    def _writing(self, turn: str = "") -> Iterator[Connection]:
        """A write transaction. Those with the same `turn` run one at a time; with SQLite, all do."""
        with self._turn, self._engine.begin() as connection:
            if turn and self._engine.name != "sqlite":
                connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(turn))))
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(reads=True) as connection:
            yield connection


def new_id(kind: str) -> str:
    """An id that cannot be guessed."""
    return f"{kind}_{secrets.token_hex(16)}"


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, **POOL, connect_args={"connect_timeout": BUSY_SECONDS})
    engine = create_engine(parsed, **POOL, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # so that transactions begin as written below
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine
