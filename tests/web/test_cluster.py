"""Ray Serve on a local cluster: the same clips, and workers that are replaced."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from cogvideo.web.jobs import Jobs
from cogvideo.web.served import WANTED, ServedModel, pack_codes
from serving import make_whole_bundle, serving, wait_for

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(find_spec("grpc_reflection") is None, reason="Ray Serve is not installed"),
]


def replicas(name: str) -> set[psutil.Process]:
    """Processes of a deployment."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if f"cogvideo:{name}" in " ".join(process.cmdline()):
                found.add(process)
    return found


def test_a_cluster(text_model: bytes, tmp_path: Path) -> None:
    """Checks clips on a cluster: a killed worker is replaced, and no process remains when the command ends."""
    model = make_whole_bundle(tmp_path / "small", text_model)
    before = replicas("")
    with serving(model, tmp_path / "place", "--ray", "--lease", 3) as server, server.client() as web:
        id = web.post("/v1/videos", json={"prompt": "a cat", "seed": 7}).json()["id"]
        wait_for(lambda: len(web.get(f"/v1/videos/{id}").json()["finished_frames"]) > 2, every=0.01)
        (worker,) = replicas("Work") - before
        os.kill(worker.pid, signal.SIGKILL)
        with web.stream("GET", f"/v1/videos/{id}/events") as events:
            assert sum(line == "event: frame" for line in events.iter_lines()) == 33
        assert web.get("/v1/videos", headers={"host": "evil.example"}).status_code == 400
        job = Jobs(f"sqlite:///{tmp_path / 'place' / 'queue.db'}").find(id, bulky=True)
        assert job is not None
        assert job.status == "completed"
        server.process.terminate()
        assert server.process.wait(120) == 0
    assert not replicas("") - before
    served = ServedModel(str(model))
    request = served.request([WANTED.validate_json(job.work)], None, None)
    expected = {frame.place: pack_codes(frame.codes) for frame in served.pipeline.frames(request)}
    codes = served.unpack(job.codes)
    assert {place: pack_codes(row[None]) for place, row in zip(job.done, codes, strict=True)} == expected
