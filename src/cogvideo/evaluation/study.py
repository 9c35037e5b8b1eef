"""Studies on disk: the clips under meaningless names, and trials and answers in SQLite."""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from json import JSONDecodeError
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.progress import track

from cogvideo.config import InputError, from_dict, require
from cogvideo.evaluation.trials import NOISE, QUESTIONS, REAL, Design, Question, Trial
from cogvideo.files import TEMPORARY_SUFFIX, sync
from cogvideo.media.colors import Pixels
from cogvideo.media.video import examine, read_video, write_video

DATABASE, CLIPS = "study.sqlite", "clips"
VERSION = 1
"""Version of the database schema."""
BLOCK = 8
"""Side of the squares in noise clips, in pixels: finer noise makes large files."""
BUSY_SECONDS = 60.0

_TABLES = """
CREATE TABLE design (design TEXT NOT NULL, sources TEXT NOT NULL);
CREATE TABLE prompt (number INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE clip (system TEXT, prompt INTEGER, file TEXT NOT NULL UNIQUE, PRIMARY KEY (system, prompt));
CREATE TABLE rater (number INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE);
CREATE TABLE trial (
  rater INTEGER, place INTEGER, kind TEXT NOT NULL, prompt INTEGER NOT NULL, systems TEXT NOT NULL,
  PRIMARY KEY (rater, place));
CREATE TABLE answer (
  rater INTEGER, place INTEGER, question TEXT, value INTEGER NOT NULL, seconds REAL NOT NULL,
  time TEXT NOT NULL, PRIMARY KEY (rater, place, question));
"""


@dataclass(frozen=True)
class Rater:
    """A rater, and their progress."""

    number: int
    token: str
    """Secret part of the rater's link."""
    num_answered: int
    num_trials: int


@dataclass(frozen=True)
class CurrentTrial:
    """The trial that a rater sees now."""

    place: int
    prompt: str
    clips: tuple[Path, ...]
    """Files from left to right."""


@dataclass(frozen=True)
class Answer:
    """An answered trial."""

    rater: int
    place: int
    trial: Trial
    values: dict[str, int]
    """Values by the name of the question."""
    seconds: float
    """Seconds from showing the clips to the answer."""
    time: str


class Study:
    """A study in its folder, made by `create`. Nothing is kept in memory, so several processes may work on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        require((folder / DATABASE).is_file(), f"{folder} holds no study, expected a folder of `cogvideo study new`")
        try:
            with self._opened() as database:
                (version,) = database.execute("PRAGMA user_version").fetchone()
                require(version == VERSION, f"{folder} has version {version} of studies, expected {VERSION}")
                design, sources = map(json.loads, database.execute("SELECT * FROM design").fetchone())
                self.prompts = [text for (text,) in database.execute("SELECT text FROM prompt ORDER BY number")]
                self.clips = {
                    (system, prompt): folder / CLIPS / file
                    for system, prompt, file in database.execute("SELECT system, prompt, file FROM clip")
                }
        except (sqlite3.DatabaseError, TypeError, JSONDecodeError) as error:
            raise InputError(f"{folder / DATABASE} is damaged ({error}), expected a study") from error
        self.design = from_dict(Design, design)
        self.sources: dict[str, str] = sources
        missing = [path.name for path in self.clips.values() if not path.is_file()]
        first = next(iter(missing), "")
        require(not missing, f"{folder / CLIPS} lacks clips ({len(missing)}), the first is {first}: make it again")

    @property
    def questions(self) -> tuple[Question, ...]:
        """The questions of every trial."""
        return QUESTIONS[self.design.questions]

    def add_raters(self, number: int) -> None:
        """Add raters with their trials until there are that many."""
        with self._writing() as database:
            (before,) = database.execute("SELECT count(*) FROM rater").fetchone()
            for rater in range(before, number):
                database.execute("INSERT INTO rater VALUES (?, ?)", (rater, secrets.token_urlsafe(12)))
                trials = enumerate(self.design.trials(rater))
                rows = [(rater, place, each.kind, each.prompt, " ".join(each.systems)) for place, each in trials]
                database.executemany("INSERT INTO trial VALUES (?, ?, ?, ?, ?)", rows)

    def raters(self) -> list[Rater]:
        """All raters, in order."""
        query = """SELECT number, token, (SELECT count(DISTINCT place) FROM answer WHERE rater = number),
            (SELECT count(*) FROM trial WHERE rater = number) FROM rater ORDER BY number"""
        with self._opened() as database:
            return [Rater(*row) for row in database.execute(query)]

    def rater(self, token: str) -> Rater | None:
        """The rater of a link; None if there is none."""
        return next((rater for rater in self.raters() if rater.token == token), None)

    def shown(self, rater: int) -> CurrentTrial | None:
        """A rater's first unanswered trial; None if there is none left."""
        with self._opened() as database:
            place = _next(database, rater)
            if place is None:
                return None
            query = "SELECT prompt, systems FROM trial WHERE rater = ? AND place = ?"
            prompt, systems = database.execute(query, (rater, place)).fetchone()
        return CurrentTrial(
            place, self.prompts[prompt], tuple(self.clips[system, prompt] for system in systems.split())
        )

    def answer(self, rater: int, place: int, values: Mapping[str, int], seconds: float) -> bool:
        """Store a rater's answer, on disk when this returns; False if that trial is not the next one."""
        names = [question.name for question in self.questions]
        require(sorted(values) == sorted(names), f"got answers to {sorted(values)}, expected {sorted(names)}")
        for question in self.questions:
            value = values[question.name]
            require(question.allows(value), f"{question.name} is {value}, expected one of its choices")
        require(0 <= seconds < float("inf"), f"seconds is {seconds}, expected 0 or more")
        time = datetime.now(UTC).isoformat(timespec="seconds")
        with self._writing() as database:
            if _next(database, rater) != place:
                return False
            rows = [(rater, place, name, values[name], seconds, time) for name in names]
            database.executemany("INSERT INTO answer VALUES (?, ?, ?, ?, ?, ?)", rows)
        return True

    def answers(self) -> list[Answer]:
        """All answers, by rater, in order."""
        query = """SELECT rater, place, kind, prompt, systems, seconds, time, question, value
            FROM answer JOIN trial USING (rater, place) ORDER BY rater, place"""
        with self._opened() as database:
            rows = database.execute(query).fetchall()
        found = []
        for (rater, place, kind, prompt, systems, seconds, time), parts in groupby(rows, lambda row: row[:7]):
            trial = Trial(kind, prompt, tuple(systems.split()))
            found.append(Answer(rater, place, trial, {row[7]: row[8] for row in parts}, seconds, time))
        return found

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        path = self.folder / DATABASE
        uri = f"{path.resolve().as_uri()}?mode=rw"  # else a missing file would be created
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as database:
                database.execute("PRAGMA synchronous = EXTRA")  # a commit returns when its data is on disk
                yield database
        except sqlite3.OperationalError as error:
            raise InputError(f"cannot use {path}: {error}") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that excludes other writers; rolled back if the block raises an error."""
        with self._opened() as database:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")


def _next(database: sqlite3.Connection, rater: int) -> int | None:
    """Place of the first unanswered trial."""
    query = """SELECT min(place) FROM trial WHERE rater = ?
        AND NOT EXISTS (SELECT 1 FROM answer
            WHERE answer.rater = trial.rater AND answer.place = trial.place)"""
    (place,) = database.execute(query, (rater,)).fetchone()
    return place


def create(
    folder: Path,
    design: Design,
    prompts: Sequence[str],
    clips: Mapping[str, Sequence[Path]],
    sources: Mapping[str, str],
    size: int | None = None,
) -> None:
    """Make a study. Every clip is re-encoded as mp4 without metadata, so that no file shows which system made it.

    Args:
        folder: folder of the study, which must not exist; it appears when it is complete.
        design: settings of the study.
        prompts: texts of the prompts.
        clips: files by system, in the order of the prompts.
        sources: names of systems for the report.
        size: side in pixels of square clips; None keeps their size.
    """
    require(not folder.exists(), f"{folder} exists, expected a new name: each study has a folder of its own")
    require(folder.parent.is_dir(), f"there is no folder {folder.parent} for the study")
    prefix = f".{folder.name}-"
    with TemporaryDirectory(prefix=prefix, suffix=TEMPORARY_SUFFIX, dir=folder.parent) as temporary:
        inner = Path(temporary) / "study"
        (inner / CLIPS).mkdir(parents=True)
        rows = list(_write_clips(inner / CLIPS, design, clips, size))
        with closing(sqlite3.connect(inner / DATABASE)) as database, database:
            database.executescript(_TABLES)
            database.execute(f"PRAGMA user_version = {VERSION}")
            settings = json.dumps(asdict(design)), json.dumps(dict(sources))
            database.execute("INSERT INTO design VALUES (?, ?)", settings)
            database.executemany("INSERT INTO prompt VALUES (?, ?)", enumerate(prompts))
            database.executemany("INSERT INTO clip VALUES (?, ?, ?)", rows)
        inner.rename(folder)
        sync(folder.parent)


def _write_clips(
    folder: Path, design: Design, clips: Mapping[str, Sequence[Path]], size: int | None
) -> Iterator[tuple[str, int, str]]:
    """Write all clips, and noise as large and as long as the clip it is shown with; yield rows of the database."""
    noisy = {(system, prompt) for prompt, system in design.catches()}
    wanted = [(system, prompt, file) for system, files in clips.items() for prompt, file in enumerate(files)]
    wanted = [each for each in wanted if each[0] != REAL or each[:2] in noisy]
    Random(design.seed).shuffle(wanted)  # else file times would reveal the systems
    for system, prompt, file in track(wanted, "clips", console=Console(stderr=True), transient=True):
        rate = examine(file).fps
        frames = read_video(file, rate, size, start=0.5 / rate).frames  # in the middle of each, whatever the rounding
        yield system, prompt, _write(folder, frames, rate)
        if (system, prompt) in noisy:
            yield NOISE, prompt, _write(folder, _noise(frames.shape, design.seed + prompt), rate)


def _write(folder: Path, frames: Pixels, rate: float) -> str:
    name = f"{secrets.token_hex(8)}.mp4"
    write_video(folder / name, frames, rate)
    return name


def _noise(shape: tuple[int, ...], seed: int) -> Pixels:
    """Squares of random colors that change in every frame."""
    num_frames, height, width, colors = shape
    blocks = (num_frames, -(-height // BLOCK), -(-width // BLOCK), colors)
    squares = np.random.default_rng(seed).integers(256, size=blocks, dtype=np.uint8)
    return squares.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)[:, :height, :width]
