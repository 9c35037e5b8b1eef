"""SIGKILL for server, workers, and database at random moments: no accepted job is lost, changed, or run twice."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from cogvideo.web.jobs import Jobs
from cogvideo.web.served import WANTED, ServedModel, pack_codes
from cogvideo.web.storage import Store
from serving import HAS_POSTGRES, PATIENCE, Running, kill_group, make_whole_bundle, postgres, start, wait_for

KILLS = int(os.environ.get("COGVIDEO_KILLS", "12"))
"""Number of kills; each takes a few seconds."""


@pytest.mark.soak
@pytest.mark.skipif(not HAS_POSTGRES, reason="PostgreSQL is not installed")
def test_kills(text_model: bytes, tmp_path: Path) -> None:
    """Guards accepted jobs against the death of any process they depend on."""
    model = make_whole_bundle(tmp_path / "small", text_model)
    random.seed(7)
    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        place = ["--model", model, "--folder", tmp_path / "place", "--queue", database.url]
        commands = {
            "server": ["serve", *place, "--workers", 0, "--waiting", 10_000, "--port", 0],
            "first worker": ["worker", *place, "--lease", 3, "--batch", 4],
            "second worker": ["worker", *place, "--lease", 3, "--batch", 1],
        }
        processes = {name: start(*command) for name, command in commands.items()}
        stack.callback(lambda: [kill_group(process) for process in processes.values()])
        address = [_address(processes["server"])]
        accepted: dict[str, str] = {}
        is_over = Event()
        asking = stack.enter_context(ThreadPoolExecutor(1)).submit(_ask, address, accepted, is_over)
        stack.callback(is_over.set)
        for number in range(KILLS):
            time.sleep(random.uniform(0, 4))
            victim = random.choice([*commands, "database"])
            print(f"{number}: {victim}, {len(accepted)} accepted", flush=True)
            if victim == "database":
                database.kill()
                time.sleep(random.uniform(0, 3))
                database.start()
                continue
            kill_group(processes[victim])
            processes[victim] = start(*commands[victim])
            if victim == "server":
                address[0] = _address(processes[victim])
        is_over.set()
        asking.result()
        for name in ("first worker", "second worker"):  # one may have exited: it started while the database was down
            kill_group(processes[name])
            processes[name] = start(*commands[name])
        jobs = Jobs(database.url)
        wait_for(lambda: _num_open(jobs) == 0, every=1.0, patience=10 * PATIENCE)
        listed = jobs.listed("local", None, 10_000, True)
        assert {job.id for job in listed} == set(accepted.values())
        assert len({job.repeat for job in listed}) == len(listed)
        served, store = ServedModel(str(model)), Store(str(tmp_path / "place" / "files"))
        failed = [job.reason for job in listed if job.status == "failed"]
        print(f"{len(listed)} jobs, failed: {failed}")
        assert all(failed)
        assert len(failed) <= len(listed) // 4
        for job in listed:
            if job.status == "completed":
                whole = jobs.find(job.id, bulky=True)
                assert whole is not None
                assert store.get(job.id, "video")
                request = served.request([WANTED.validate_json(job.work)], None, None)
                expected = {frame.place: pack_codes(frame.codes) for frame in served.pipeline.frames(request)}
                rows = served.unpack(whole.codes)
                assert {place: pack_codes(row[None]) for place, row in zip(whole.done, rows, strict=True)} == expected


def _address(process: Any) -> str:
    return str(process.stdout.readline().strip())


def _num_open(jobs: Jobs) -> int:
    counts, _ = jobs.counts()
    return counts["queued"] + counts["in_progress"]


def _ask(address: list[str], accepted: dict[str, str], is_over: Event) -> None:
    """Request clips, retrying each one until it is accepted."""
    number = 0
    while not is_over.wait(0.5):
        key = f"key {number}"
        body = {"prompt": "a cat", "seed": number, "rounds": number % 3}
        with suppress(httpx.HTTPError), Running(None, address[0]).client() as web:  # type: ignore[arg-type]
            answer = web.post("/v1/videos", json=body, headers={"Idempotency-Key": key}, timeout=10)
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                accepted[key] = answer.json()["id"]
                number += 1
