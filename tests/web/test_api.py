"""The API: the official client, rejected requests, keys, ranges, events, and metrics."""

from __future__ import annotations

import base64
import errno
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
from PIL import Image
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from cogvideo.cli import main
from cogvideo.media.video import read_video
from cogvideo.web import uploads
from cogvideo.web.clips import to_png
from cogvideo.web.jobs import Jobs, Limits
from cogvideo.web.keys import Keys
from cogvideo.web.served import ClipRequest, ServedModel
from cogvideo.web.server import application
from cogvideo.web.site import ServerState
from cogvideo.web.storage import Store
from cogvideo.web.worker import Worker
from serving import Running, make_whole_bundle, serving, wait_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text_model: bytes) -> Path:
    return make_whole_bundle(tmp_path_factory.mktemp("model") / "small", text_model)


@pytest.fixture(scope="module")
def served(model: Path) -> ServedModel:
    return ServedModel(str(model))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Server with a worker."""
    with serving(model, tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture
def site(served: ServedModel, tmp_path: Path) -> ServerState:
    """Queue without workers."""
    return ServerState(served, Jobs(f"sqlite:///{tmp_path / 'queue.db'}"), Store(str(tmp_path / "files")))


def client(site: ServerState, key: str = "", **options: Any) -> TestClient:
    """Client of the application in this process."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return TestClient(application(site, ["testserver"]), headers=headers, **options)


def png(level: int = 200) -> bytes:
    return to_png(np.full((20, 30, 3), level, np.uint8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_official_client(server: Running, tmp_path: Path) -> None:
    """Guards existing clients: the official one can create, watch, list, download, remix, extend, and delete."""
    api = server.openai()
    (model,) = api.models.list().data
    assert model.id == "small"
    video = api.videos.create(
        prompt="a cat",
        model=model.id,
        seconds="4",
        size="32x32",
        input_reference=("../../x.png", png(), "image/png"),
        extra_body={"seed": 7, "rounds": 1},
    )
    assert (video.status, video.seconds, video.size, video.progress, video.seed) == ("queued", "4", "32x32", 0, 7)
    done = wait_for(lambda: (now := api.videos.retrieve(video.id)).status == "completed" and now)
    assert (done.progress, done.num_frames, done.error) == (100, 9, None)
    assert done.completed_at >= done.created_at
    content = api.videos.download_content(video.id)
    content.write_to_file(tmp_path / "clip.mp4")
    frames = read_video(tmp_path / "clip.mp4", 2).frames
    assert frames.shape == (9, 32, 32, 3)
    assert api.videos.download_content(video.id, variant="thumbnail").read()[8:12] == b"WEBP"
    assert api.videos.download_content(video.id, variant="spritesheet").read()[:3] == b"\xff\xd8\xff"
    other = api.videos.remix(video.id, prompt="a cat", extra_body={"seed": 8})
    assert (other.prompt, other.seed) == ("a cat", 8)
    assert api.videos.delete(other.id).deleted
    remix = api.videos.remix(video.id, prompt="a dog")
    assert (remix.remixed_from_video_id, remix.seed, remix.prompt) == (video.id, 7, "a dog")
    longer = api.videos.extend(prompt="a cat", seconds="4", video=content.read(), extra_body={"rounds": 1})
    for each, number in ((remix, 9), (longer, 15)):
        ended = wait_for(lambda each=each: (now := api.videos.retrieve(each.id)).status == "completed" and now)
        assert ended.num_frames == number
    listed = [each.id for each in api.videos.list(limit=2, order="asc")]
    assert listed == [video.id, remix.id, longer.id]
    assert api.videos.delete(video.id).deleted
    import openai

    with pytest.raises(openai.NotFoundError, match="there is no such video"):
        api.videos.retrieve(video.id)
    with pytest.raises(openai.UnprocessableEntityError, match="size is '720x1280', expected 32x32 or 16x16"):
        api.videos.create(prompt="a cat", size="720x1280")


def test_frames_as_they_are_finished(server: Running) -> None:
    """Checks live frames: each is announced once and available at once, and clients resume where they left off."""
    with server.client() as web:
        id = web.post("/v1/videos", json={"prompt": "a cat", "rounds": 0}).json()["id"]
        with web.stream("GET", f"/v1/videos/{id}/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            found = events(response)
        frames = [data for name, _, data in found if name == "frame"]
        assert [data["place"] for data in frames] == [0, 1, 2, 3, 4]
        assert [found[-1][0], found[-1][2]["status"], found[-1][1]] == ["video", "completed", "5"]
        assert web.get(frames[3]["url"]).content.startswith(b"\x89PNG")
        with web.stream("GET", f"/v1/videos/{id}/events", headers={"Last-Event-ID": "3"}) as response:
            assert [data.get("place") for _, _, data in events(response)] == [3, 4, None]


def events(response: httpx.Response) -> list[tuple[str, str, Any]]:
    """Name, ID, and data of each event until the stream ends."""
    found, event = [], {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
        elif "data" in event:
            found.append((event["event"], event["id"], json.loads(event["data"])))
            event = {}
    return found


def test_an_end_while_somebody_watches(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Checks Ctrl-C while a page is open: the event stream ends, and nothing is printed to stderr."""
    with serving(model, tmp_path, "--workers", 0) as server, server.client() as web:
        id = web.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
        with web.stream("GET", f"/v1/videos/{id}/events") as response:
            lines = response.iter_lines()
            assert next(lines) == "event: video"
            server.process.send_signal(signal.SIGINT)
            assert list(lines)[-1] == ""
        assert server.process.wait(30) in (0, 130, -signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_ranges_and_variants(server: Running) -> None:
    """Checks players that seek, and files that are created on first request."""
    with server.client() as web:
        id = web.post("/v1/videos", json={"prompt": "a cat", "rounds": 0, "seed": 1}).json()["id"]
        address = f"/v1/videos/{id}/content"
        assert web.get(address).status_code in (404, 200)
        wait_for(lambda: web.get(f"/v1/videos/{id}").json()["status"] == "completed")
        whole = web.get(address)
        size = len(whole.content)
        assert (whole.headers["content-type"], whole.headers["accept-ranges"]) == ("video/mp4", "bytes")
        parts = {"0-0": slice(0, 1), "5-9": slice(5, 10), "7-": slice(7, None), "-4": slice(-4, None)}
        for asked, part in parts.items():
            got = web.get(address, headers={"Range": f"bytes={asked}"})
            assert (got.status_code, got.content) == (206, whole.content[part])
        assert web.get(address, headers={"Range": f"bytes={size}-"}).status_code == 416
        assert web.get(address, headers={"Range": "bytes=0-1,3-4"}).content == whole.content
        for variant, kind in (("gif", "image/gif"), ("webp", "image/webp")):
            for _ in range(2):
                got = web.get(address, params={"variant": variant})
                assert (got.status_code, got.headers["content-type"]) == (200, kind)
            assert b'"seed": 1' in got.content.replace(b'"seed":1', b'"seed": 1')


REFUSED = [
    ({}, "prompt: field required"),
    ({"prompt": ""}, "prompt: string should have at least 1 character, got ''"),
    ({"prompt": " "}, "the prompt is empty: ' '"),
    ({"prompt": "x" * 2001}, "prompt: string should have at most 2000 characters"),
    ({"prompt": "word " * 50}, "tokens, 16 fit: shorten it"),
    ({"prompt": "a\0b"}, "the prompt has a zero byte, expected text"),
    ({"prompt": "x", "rounds": "2"}, "rounds: input should be a valid integer, got '2'"),
    ({"prompt": "x", "rounds": 7}, "rounds: input should be less than or equal to 6, got 7"),
    ({"prompt": "x", "colour": 1}, "colour: unexpected keyword argument, got 1"),
    ({"prompt": "x", "model": "sora-2"}, "model is 'sora-2', expected small"),
    ({"prompt": "x", "size": "9x9"}, "size is '9x9', expected 32x32 or 16x16"),
    ({"prompt": "x", "seconds": "99"}, "seconds is 99, expected 0.5 to 60"),
    ({"prompt": "x", "seconds": 0}, "seconds is 0, expected 0.5 to 60"),
    ({"prompt": "x", "top_p": 7}, "top_p is 7.0"),
    ({"prompt": "x", "input_reference": {"image_url": "http://a/b"}}, "image_url is no data URL"),
    ({"prompt": "x", "input_reference": {"image_url": "data:x;base64,%"}}, "image_url is not valid Base64"),
    (
        {"prompt": "x", "input_reference": {"image_url": "data:x;base64,aGVsbG8="}},
        "the upload cannot be used: no",
    ),
    ({"prompt": "x", "input_reference": {}}, "a reference is empty, expected image_url or video_id"),
    (
        {"prompt": "x", "loop": True, "last_reference": None, "input_reference": "x"},
        "input should be a valid dict",
    ),
]


def test_refusals_are_one_sentence(site: ServerState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards users against cryptic errors, and the queue against clips that cannot be generated."""
    web = client(site)
    for body, message in REFUSED:
        got = web.post("/v1/videos", json=body)
        assert (got.status_code, got.json()["error"]["type"]) == (422, "invalid_request_error"), body
        assert message in got.json()["error"]["message"], body
    last = {"image_url": f"data:image/png;base64,{base64.b64encode(png()).decode()}"}
    got = web.post("/v1/videos", json={"prompt": "x", "last_reference": last})
    assert "expected input_reference, too" in got.json()["error"]["message"]
    assert web.post("/v1/videos", content=b"[1]", headers={"content-type": "application/json"}).status_code == 422
    assert web.post("/v1/videos", content=b"x").status_code == 415
    large = bytes(33 * 2**20)
    for content in (large, (large[start : start + 2**22] for start in range(0, len(large), 2**22))):  # or in chunks
        got = web.post("/v1/videos", content=content, headers={"content-type": "application/json"})
        assert (got.status_code, got.json()["error"]["message"]) == (413, "the request has more than 32 MiB")
    assert site.jobs.listed("local", None, 9, True) == []
    assert list(Path(site.store._root).rglob("*")) == []


def test_limits_and_repeated_requests(site: ServerState) -> None:
    """Guards the queue against a single key, and clients that retry against paying twice."""
    web = client(ServerState(site.served, site.jobs, site.store, None, Limits(waiting=2)))
    asked = {"json": {"prompt": "a cat"}, "headers": {"Idempotency-Key": "one"}}
    first, again = web.post("/v1/videos", **asked), web.post("/v1/videos", **asked)
    assert first.json() == again.json()
    assert web.get(f"/v1/videos/{first.json()['id']}").headers["openai-poll-after-ms"] == "5000"
    changed = web.post("/v1/videos", json={"prompt": "a dog"}, headers={"Idempotency-Key": "one"})
    assert (changed.status_code, "Idempotency-Key" in changed.text) == (422, True)
    assert web.post("/v1/videos", data={"prompt": "a cat"}, files={"input_reference": ("x", png())}).status_code == 200
    full = web.post("/v1/videos", data={"prompt": "a cat"}, files={"input_reference": ("x", png())})
    assert (full.status_code, full.headers["retry-after"]) == (429, "10")
    assert len(list(Path(site.store._root).iterdir())) == 1  # uploads of rejected requests are removed
    assert web.post("/v1/videos", **asked).json() == first.json()


def test_keys_keep_others_out(site: ServerState, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards users against each other: for any request, the videos of other keys do not exist."""
    made = []
    for name in ("ann", "bob"):
        assert main(["key", name, "--folder", str(tmp_path)]) == 0
        made.append(capsys.readouterr().out.strip())
    stored = (tmp_path / "keys").read_text()
    assert not any(key in stored for key in made)
    guarded = ServerState(site.served, site.jobs, site.store, Keys(tmp_path / "keys"))
    ann, bob = (client(guarded, key) for key in made)
    id = ann.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    body = {"prompt": "x", "input_reference": {"video_id": id}}
    for answer in (
        bob.get(f"/v1/videos/{id}"),
        bob.get(f"/v1/videos/{id}/content"),
        bob.get(f"/v1/videos/{id}/events"),
        bob.get(f"/v1/videos/{id}/frames/0"),
        bob.get("/v1/videos", params={"after": id}),
        bob.post(f"/v1/videos/{id}/remix", json={"prompt": "x"}),
        bob.post(f"/v1/videos/{id}/stop"),
        bob.delete(f"/v1/videos/{id}"),
        bob.post("/v1/videos", json=body),
        bob.post("/v1/videos/extensions", json={"prompt": "x", "video": {"id": id}}),
    ):
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, "there is no such video")
    assert bob.get("/v1/videos").json()["data"] == []
    assert [each["id"] for each in ann.get("/v1/videos").json()["data"]] == [id]
    for stranger in (client(guarded), client(guarded, "cv-wrong"), client(guarded, "x y")):
        for path in ("/v1/videos", f"/v1/videos/{id}", "/v1/models", "/metrics"):
            assert stranger.get(path).status_code == 401
        assert stranger.get("/health").status_code == 200
    (tmp_path / "keys").write_text(stored.splitlines()[1])  # ann's key is revoked
    assert (ann.get("/v1/videos").status_code, bob.get("/v1/videos").status_code) == (401, 200)


def test_other_sites_and_names_are_refused(site: ServerState) -> None:
    """Guards a server without keys against web pages open in a browser on this machine."""
    web = client(site)
    assert web.get("/v1/videos", headers={"host": "evil.example"}).status_code == 400
    foreign = ("http://evil.example", "null", "http://testserver.evil.example", "http://testserver:81", "http://[")
    for origin in foreign:
        for kind in ("application/json", "multipart/form-data; boundary=x", "text/plain"):
            headers = {"Origin": origin, "Content-Type": kind}
            assert web.post("/v1/videos", content=b'{"prompt": "x"}', headers=headers).status_code == 403
    assert web.post("/v1/videos", json={"prompt": "x"}, headers={"Origin": "http://testserver"}).status_code == 200
    for answer in (web.get("/v1/videos"), web.get("/nothing"), web.get("/health", headers={"Origin": "null"})):
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


def test_forms_in_odd_charsets(site: ServerState) -> None:
    """Guards against client errors that count as server errors: a form that its charset cannot decode is rejected."""
    form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--b--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=b; charset=undefined"}
    answer = client(site).post("/v1/videos", content=form, headers=kind)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_mistakes_of_the_server_are_counted(site: ServerState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards operators, whose alerts rely on the metrics."""
    web = TestClient(application(site, ["testserver"]), raise_server_exceptions=False)
    monkeypatch.setattr(Jobs, "listed", lambda *_: 1 / 0)
    assert web.get("/v1/videos").status_code == 500
    told = 'cogvideo_requests_total{method="GET",route="/v1/videos",status="500"} 1.0'
    assert told in web.get("/metrics").text


def test_paths_never_come_from_requests(site: ServerState) -> None:
    """Guards against path traversal through IDs, upload names, and field names."""
    web = client(site)
    for id in ("..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "video_" + "0" * 32, "video_%00", "video_" + "A" * 32):
        for tail in ("", "/content", "/frames/0", "/events"):
            assert web.get(f"/v1/videos/{id}{tail}").status_code == 404
    files = {"input_reference": ("../../../../tmp/x\0.png", png(), "image/png"), "../evil": ("/etc/x", b"x")}
    assert web.post("/v1/videos", data={"prompt": "x"}, files=files).status_code == 422
    assert list(Path(site.store._root).rglob("*")) == []


def test_uploads_have_limits(site: ServerState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the server process against images that use up all memory, and files that take forever to decode."""
    bomb = BytesIO()
    Image.new("L", (13_000, 13_000)).save(bomb, "PNG")
    web = client(site)
    for name, value, content, message in (
        ("MAX_MEMORY", 2**29, bomb.getvalue(), "needs more than 512 MiB or 20 seconds to decode"),
        ("CPU_SECONDS", 0, png(), "takes more than 0 seconds to decode"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(uploads, name, value)
            got = web.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": content})
            assert (got.status_code, message in got.text) == (422, True), got.text


def test_only_this_machine_unless_there_are_keys(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a first try: nobody else gets in, and the error says what to do before letting others in."""
    assert main(["serve", "--model", str(model), "--folder", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert f"make a key first, `cogvideo key NAME --folder {tmp_path}`" in capsys.readouterr().err


def test_a_full_disk(site: ServerState, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards users of a full disk: they get a clear error, can still watch clips, and can delete them to make room."""
    web = client(site)
    id = web.post("/v1/videos", json={"prompt": "a cat", "rounds": 0}).json()["id"]
    Worker(site.jobs, site.store, site.served, 8, 1000.0, 0, Event())._work()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(site.store, "put", Mock(side_effect=full))
    monkeypatch.setattr(site.jobs, "remove", Mock(side_effect=OperationalError("", {}, full)))
    got = web.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("x", png())})
    message = "files cannot be written or read now (No space left on device): try again"
    assert (got.status_code, got.json()["error"]["message"], got.headers["retry-after"]) == (503, message, "2")
    assert "503: [Errno 28] No space left" in capsys.readouterr().err
    assert web.get(f"/v1/videos/{id}/content", params={"variant": "gif"}).content.startswith(b"GIF8")
    assert web.delete(f"/v1/videos/{id}").status_code == 503
    assert site.store.get(id, "video") is None


def test_lengths_are_those_of_training(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks clip lengths: by default the longest that key frames were trained on; also others or longer ones."""
    monkeypatch.setattr(served, "config", served.config.trained_on("sequential", (2.0, 1.0)))
    assert served.completed(ClipRequest(prompt="x")).seconds == "2"
    long = served.completed(ClipRequest(prompt="x", seconds="5", rounds=0))
    assert (served.pipeline.num_frames(served.settings(long)), served.fps(long)) == (11, 2)
    with pytest.raises(ValueError, match=r"seconds is 1\.5, expected 2, 1, or a longer one: the key frames"):
        served.completed(ClipRequest(prompt="x", seconds="1.5"))


def test_a_device_that_is_not_there(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a server that accepts requests while all of its workers die at startup."""
    assert main(["serve", "--model", str(model), "--folder", str(tmp_path), "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err


def test_slow_and_broken_clients(server: Running) -> None:
    """Guards the server against clients that connect and send nothing, half a request, or far too much."""
    address = (server.address.split("/")[2].split(":")[0], int(server.address.rsplit(":", 1)[1]))
    body = (
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nContent-Type: application/json\r\n\r\n{"
    )
    halves = [b"", b"GET /hea", body, b"\0\xff\r\n\r\n"]
    open_ones = []
    for number in range(100):
        connection = socket.create_connection(address, timeout=30)
        connection.sendall(halves[number % len(halves)])
        open_ones.append(connection)
    with server.client() as web:
        assert web.get("/health").status_code == 200
        with suppress(httpx.TransportError):  # the server may hang up before everything is sent
            assert web.get("/health", headers={"X-Long": "x" * 2_000_000}).status_code == 400
    for connection in open_ones:
        connection.close()
    with server.client() as web:
        assert web.get("/ready").json() == {"status": "ok"}
        wait_for(lambda: 'route="/v1/videos",status="400"' in web.get("/metrics").text)  # bodies that never arrived
        metrics = web.get("/metrics").text
    assert 'cogvideo_videos{status="queued"}' in metrics
    assert 'status="500"' not in metrics
