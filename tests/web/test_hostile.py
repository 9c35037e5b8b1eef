"""Corrupt images and videos, and malformed requests: none breaks the server, and files stay where they belong."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies
from starlette.testclient import TestClient

from cogvideo.media.video import write_video
from cogvideo.web.clips import to_png
from cogvideo.web.jobs import Jobs
from cogvideo.web.served import ServedModel
from cogvideo.web.server import application
from cogvideo.web.site import ServerState
from cogvideo.web.storage import Store
from serving import make_whole_bundle, serving

FUZZ = int(os.environ.get("COGVIDEO_FUZZ", "3000"))
"""Approximate number of random requests in all long tests together."""
NAME = re.compile(r"video_[0-9a-f]{32}/(given|last)\.npy")
EDITS = strategies.lists(strategies.tuples(strategies.floats(0, 1), strategies.binary(max_size=8)), max_size=3)

pytestmark = pytest.mark.soak


def edited(content: bytes, edits: list[tuple[float, bytes]], end: float) -> bytes:
    """Content with some bytes overwritten and the end cut off."""
    changed = bytearray(content)
    for place, more in edits:
        start = int(place * len(content))
        changed[start : start + len(more)] = more
    return bytes(changed[: 1 + int(end * len(content))])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text_model: bytes) -> Path:
    return make_whole_bundle(tmp_path_factory.mktemp("model") / "small", text_model)


def test_broken_media(model: Path, tmp_path: Path) -> None:
    """Guards the server against files that are not what they seem, with names that point elsewhere."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    whole = [to_png(frames[0])]
    for suffix in ("mp4", "gif", "webp"):
        write_video(tmp_path / f"clip.{suffix}", frames, 8)
        whole.append((tmp_path / f"clip.{suffix}").read_bytes())
    files = tmp_path / "files"
    site = ServerState(ServedModel(str(model)), Jobs(f"sqlite:///{tmp_path / 'queue.db'}"), Store(str(files)))
    web = TestClient(application(site, ["testserver"]))
    there = sorted(tmp_path.iterdir())
    statuses: list[int] = []
    names = strategies.sampled_from(["x.png", "../../../x", "/etc/passwd", "x\0.mp4", "http://a/b.m3u8", ""])

    @settings(max_examples=FUZZ // 20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategies.sampled_from(whole), EDITS, strategies.floats(0, 1.2), names, strategies.booleans())
    def check(content: bytes, edits: list[tuple[float, bytes]], end: float, name: str, is_video: bool) -> None:
        path, field = ("/v1/videos/extensions", "video") if is_video else ("/v1/videos", "input_reference")
        upload = {field: (name, edited(content, edits, end))}
        statuses.append(web.post(path, data={"prompt": "x", "rounds": "0"}, files=upload).status_code)
        assert statuses[-1] in (200, 400, 422, 429)

    check()
    print(f"{len(statuses)} uploads, {statuses.count(200)} accepted")
    assert {200, 422} <= {*statuses}
    written = {path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()}
    assert all(NAME.fullmatch(each) for each in written)
    assert {*tmp_path.iterdir()} - {*there} <= {files}


def test_requests_that_are_none(model: Path, tmp_path: Path) -> None:
    """Guards the server against clients that do not speak HTTP."""
    body = b'{"prompt": "a cat"}'
    heads = [
        b"GET /v1/videos?limit=2 HTTP/1.1\r\nHost: localhost\r\nRange: bytes=0-1\r\nConnection: close\r\n\r\n",
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: 19\r\n\r\n" + body,
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        b'3c\r\n--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b--\r\n\r\n0\r\n\r\n',
    ]
    statuses: list[bytes] = []
    with serving(model, tmp_path, "--workers", 0, "--waiting", 10_000) as server:
        address = ("127.0.0.1", int(server.address.rsplit(":", 1)[1]))

        @settings(max_examples=FUZZ // 10, deadline=None, suppress_health_check=list(HealthCheck))
        @given(strategies.sampled_from(heads), EDITS, strategies.floats(0, 1.2))
        def check(head: bytes, edits: list[tuple[float, bytes]], end: float) -> None:
            with socket.create_connection(address, timeout=60) as client, suppress(ConnectionError, TimeoutError):
                client.sendall(edited(head, edits, end))
                client.settimeout(0.5)  # incomplete requests get no answer for a while
                answer = client.recv(2**16)
                statuses.append(answer[9:12])
                assert not statuses[-1].startswith(b"5"), answer

        check()
        with server.client() as web:
            assert web.get("/ready").status_code == 200
    print(f"{len(statuses)} requests: { {each: statuses.count(each) for each in {*statuses}} }")
    assert {b"200", b"400"} <= {*statuses}
    assert {path.name for path in tmp_path.iterdir()} <= {"queue.db", "queue.db-shm", "queue.db-wal", "files"}
