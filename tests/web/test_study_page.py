"""The page for raters: its server under hostile requests, and a rater with a known preference in a real browser."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest

from cogvideo.cli import main
from cogvideo.evaluation import preferences
from cogvideo.evaluation.study import Study
from rating import Server, make_study, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")

STRAY = (
    *("/", "/unknown/", "/unknown/trial", "/%C3%A9/trial", "/static/../study.py", "/static/%2e%2e%2fstudy.py"),
    *("clips/0/2", "clips/1/0", "clips/99999999999999999999/0", "clips/0/-1", "clips/x/0"),
)
BAD = (
    *(b"", b"{", b"[]", b"\xff", b'{"place": 0}', b"[" * 5000, b" " * 20_000),
    b'{"place": "0", "values": {"preference": 1}, "seconds": 1}',
    b'{"place": 0, "values": {"preference": 7}, "seconds": 1}',
    b'{"place": 0, "values": {"preference": 1}, "seconds": 1e999}',
    b'{"place": 0, "values": {}, "seconds": 1}',
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Study with four prompts."""
    return make_study(tmp_path_factory.mktemp("served"), 4, "--catches", "1", "--repeats", "1")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Server of this study for two raters."""
    with serving(folder, raters=2) as running:
        yield running


def test_every_response_has_a_strict_policy(server: Server) -> None:
    """Guards raters' browsers: scripts and clips only come from this server, and nothing is cached, errors included."""
    for path in ("", "trial", "/static/study.js", "/static/page.css", "/unknown", "clips/99/0"):
        headers = server.ask(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80"])
def test_other_hosts_are_refused(server: Server, host: str) -> None:
    """Guards against DNS rebinding: sites elsewhere that point their own name at this machine."""
    assert server.ask("trial", host=host).status == 400
    assert server.ask("trial", host="localhost:1234").status == 200


@pytest.mark.parametrize("path", STRAY)
def test_nothing_else_can_be_had(server: Server, path: str) -> None:
    """Guards against access through unknown links, to package files, and to clips that are not currently shown."""
    answered = server.ask(path)
    assert answered.status == 404
    assert b"Traceback" not in answered.body


def test_clips_can_be_read_in_parts(server: Server) -> None:
    """Checks that the first trial's clips are mp4 files with neutral names, and that ranges are advertised."""
    state = server.ask("trial").json
    assert state["clips"] == ["clips/0/0", "clips/0/1"]
    for clip in state["clips"]:
        answered = server.ask(clip)
        assert (answered.status, answered.headers["content-type"]) == (200, "video/mp4")
        assert answered.headers["accept-ranges"] == "bytes"
        assert answered.body[4:8] == b"ftyp"


@pytest.mark.parametrize("body", BAD)
def test_bad_answers_change_nothing(server: Server, body: bytes) -> None:
    """Guards recorded answers, and the server itself: each bad answer is rejected with a status."""
    assert server.ask("answer", body, rater=1).status in (413, 422)
    assert server.ask("trial", rater=1).json["answered"] == 0


def test_answers_once_and_in_order(server: Server, folder: Path) -> None:
    """Guards against double clicks, the back button, and two windows: the first answer to the next trial counts."""
    assert server.answer(3).status == 409
    assert server.answer(0, 1).json["answered"] == 1
    assert server.answer(0, -1).status == 409
    assert server.ask("unknown", rater=0).status == 404
    assert [(each.place, each.values["preference"]) for each in Study(folder).answers()] == [(0, 1)]
    with serving(folder, raters=2) as second:  # concurrently
        assert second.ask("trial").json["place"] == 1
        assert second.answer(1).status == 200
        assert server.answer(1).status == 409
        assert server.answer(2).status == 200
        assert second.ask("trial").json["place"] == 3


def test_killed_servers_lose_nothing(tmp_path: Path) -> None:
    """Checks that an accepted answer is on disk before the next pair is sent, even if the server is killed."""
    folder = make_study(tmp_path, 3, "--catches", "0", "--repeats", "0")
    for place in range(2):
        with serving(folder) as server:
            assert server.ask("trial").json["place"] == place
            assert server.answer(place).status == 200
            server.process.send_signal(signal.SIGKILL)
    assert len(Study(folder).answers()) == 2


LOOK = """() => [...document.querySelectorAll("video")].map((video) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 32, height: 32 });
  const context = canvas.getContext("2d");
  context.drawImage(video, 0, 0, 32, 32);
  const { data } = context.getImageData(0, 0, 32, 32);
  const reds = [...data].filter((_, place) => place % 4 === 0);
  const mean = reds.reduce((sum, value) => sum + value) / reds.length;
  const isPlain = reds.every((value) => Math.abs(value - mean) < 12);
  return { isPlain, isRed: isPlain && mean > 120, time: video.currentTime, isPlaying: !video.paused };
})"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_known_taste_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the whole study, from clips to report: one rater prefers red three to one, the other just clicks."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    folder = make_study(tmp_path, 28, "--catches", "2", "--repeats", "2")
    with serving(folder, raters=2) as server, playwright.sync_playwright() as driver:
        for place in range(32):
            assert server.answer(place, rater=1).status == 200  # always the left one
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        told: list[str] = []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("response", lambda response: told.append(json.dumps([response.url, response.headers])))
        page.goto(server.links[0])
        rate_all(page)
        browser.close()
    assert not any(word in "".join(told) for word in ("zebra", "walrus", "Error", "error", "refused"))
    monkeypatch.setattr(preferences, "NUM_DRAWS", 100)
    assert main(["study", "report", str(folder)]) == 0
    with (folder / "results.csv").open() as file:
        results = {(row["raters"], row["measure"], row["subject"]): row for row in csv.DictReader(file)}
    red = results["raters who passed", "share", "a > b"]
    assert int(red["answers"]) == 28
    assert float(red["low"]) < 0.75 < float(red["high"])
    gap = 2 * float(results["raters who passed", "strength", "a"]["value"])  # the mean is 0
    assert gap == pytest.approx(math.log(3), abs=0.7)
    assert float(results["all raters", "share", "a > b"]["value"]) < float(red["value"])
    assert "Raters who failed catch trials: 2." in (folder / "report.html").read_text()


def rate_all(page: Any) -> None:
    """Answer every trial by keyboard, as a rater who prefers red with probability 3/4, and anything to noise."""
    taste, lags = Random(5), []
    for place in range(32):
        page.get_by_text(f"{place} of 32", exact=True).wait_for()
        page.locator("[data-question]:enabled").first.wait_for()
        left, right = page.evaluate(LOOK)
        while not (left["isPlaying"] and right["isPlaying"]):
            left, right = page.evaluate(LOOK)
        lags.append(abs(left["time"] - right["time"]))
        if left["isPlain"] and right["isPlain"]:
            wants_left = left["isRed"] == (taste.random() < 0.75)
        else:
            wants_left = left["isPlain"]
        page.keyboard.press("1" if wants_left else "2")
    page.get_by_text("Thank you").wait_for()
    assert median(lags) < 0.1  # in sync
