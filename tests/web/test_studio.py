"""The studio in a real browser, with a real server and worker: every action, reloads, restarts, keys."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from cogvideo.cli import main
from cogvideo.web.clips import kept
from serving import Running, make_whole_bundle, serving, wait_for

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
PATIENCE = 120_000
"""Timeout in milliseconds for any action on a busy machine."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text_model: bytes) -> Path:
    """Small model with the bundled model's name, for which the page has examples."""
    return make_whole_bundle(tmp_path_factory.mktemp("model") / "pocket", text_model)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Empty page, on which the policy must not block anything and no script may fail."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(f"error: {error}"))
    page.on("dialog", lambda dialog: dialog.accept())
    yield page
    page.close()
    assert not [each for each in told if "Content Security Policy" in each or "error: " in each]


def generate(page: Any, prompt: str, rounds: int = 0) -> None:
    """Fill in and submit the form by keyboard. At the small size, frames do not depend on the super-resolution seed."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.evaluate("document.querySelector('details').open = true")
    page.get_by_label("Frames").select_option(str(rounds))
    page.get_by_label("Size").select_option("16x16")
    page.keyboard.press("Control+Enter")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Running `cogvideo studio` that has opened a browser."""
    folder = tmp_path_factory.mktemp("served")
    script, opened = folder / "browser", folder / "opened"
    script.write_text(f"#!/bin/sh\necho $1 > {opened}\n")
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER", f"{script} %s")
        with serving(model, folder, command="studio") as running:
            wait_for(lambda: opened.is_file() and opened.read_text().strip() == running.address)
            yield running


def click(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def wait_for_frames(page: Any, number: int) -> None:
    page.locator(".strip img").nth(number - 1).wait_for()


def wait_for_end(page: Any, number: int, before: str = "nothing") -> str:
    """ID of the clip that is opened after `before`, once it is complete and shows all of its frames."""
    page.wait_for_url(lambda url: "#video" in url and "," not in url and not url.endswith(before), timeout=PATIENCE)
    id = page.url.partition("#")[2]
    page.locator(f".clip[data-id='{id}'][data-status=completed]").wait_for()
    wait_for_frames(page, number)
    assert page.locator(".strip span").count() == number
    return id


def download(page: Any, name: str) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        click(page, name)
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def picture() -> dict[str, Any]:
    content = BytesIO()
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(content, "PNG")
    return {"name": "x.png", "mimeType": "image/png", "buffer": content.getvalue()}


def drop(page: Any, place: str, file: dict[str, Any]) -> None:
    """Drop a file from outside the browser."""
    script = """([name, type, bytes]) => {
        const dropped = new DataTransfer();
        dropped.items.add(new File([Uint8Array.from(bytes)], name, { type }));
        return dropped;
    }"""
    dropped = page.evaluate_handle(script, [file["name"], file["mimeType"], list(file["buffer"])])
    page.locator(place).dispatch_event("drop", {"dataTransfer": dropped})


def test_every_action(server: Running, page: Any) -> None:
    """Checks the page: every action sends what was entered to the server, and the results are shown."""
    with server.client() as web:

        def state(id: str) -> dict[str, Any]:
            return web.get(f"/v1/videos/{id}").json()

        def frame(id: str, place: int) -> bytes:
            return web.get(f"/v1/videos/{id}/frames/{place}").content

        page.goto(server.address)
        click(page, "a blue dolphin leaps, on a brown background")
        assert page.get_by_label("Prompt", exact=True).input_value() == "a blue dolphin leaps, on a brown background"
        page.get_by_label("Seed").fill("7")
        generate(page, "a cat")
        cat = wait_for_end(page, 5)
        assert (state(cat)["prompt"], state(cat)["seed"], state(cat)["options"]["rounds"]) == ("a cat", 7, 0)
        assert page.locator("canvas").evaluate("each => each.width") == 16
        before = page.get_by_label("Frame", exact=True).input_value()  # advances while the clip plays
        page.wait_for_function("before => document.querySelector('.place').value !== before", arg=before)
        assert page.locator(".strip span").nth(4).get_by_title("Frame 5", exact=True).count() == 1
        for kind, beginning in (("mp4", b"ftyp"), ("gif", b"GIF8"), ("webp", b"WEBP")):
            name, content = download(page, kind)
            assert (name, beginning in content[:12]) == (f"a-cat-7.{kind}", True)
            assert b'"prompt": "a cat"' in content
        page.get_by_label("Frame", exact=True).press("End")
        click(page, "Continue from here")
        drop(page, "[data-name=last_reference]", picture())
        page.get_by_alt_text("x.png").wait_for()
        generate(page, "a dog")
        dog = wait_for_end(page, 5, cat)
        assert frame(dog, 0) == frame(cat, 4)
        assert frame(dog, 4) != frame(cat, 0)
        click(page, "Use as last frame")
        assert page.get_by_alt_text("of an earlier clip").count() == 2
        click(page, "Remove the first frame")
        click(page, "Remove the last frame")
        page.locator(".strip img").nth(2).drag_to(page.locator("[data-name=last_reference]"))
        page.get_by_alt_text("Frame 3 of an earlier clip").wait_for()
        page.get_by_label("First frame", exact=True).set_input_files(picture())
        page.get_by_alt_text("x.png").wait_for()
        click(page, "Remove the first frame")
        drop(page, "#history", picture())  # anywhere on the page
        page.locator("[data-name=input_reference]").get_by_alt_text("x.png").wait_for()
        click(page, "Remove the first frame")
        click(page, "Remove the last frame")
        click(page, "Again with another seed")
        again = wait_for_end(page, 5, dog)
        assert state(again)["seed"] != state(dog)["seed"]
        assert (state(again)["prompt"], frame(again, 0)) == ("a dog", frame(dog, 0))
        click(page, "Vary the prompt")
        page.get_by_text("Change the prompt").wait_for()
        page.get_by_label("Prompt", exact=True).fill("a bird")
        click(page, "Vary the prompt")
        bird = wait_for_end(page, 5, again)
        assert (state(bird)["prompt"], state(bird)["seed"]) == ("a bird", state(again)["seed"])
        click(page, "Extend")
        long = wait_for_end(page, 8, bird)
        assert [frame(long, place) for place in range(5)] == [frame(bird, place) for place in range(5)]
        click(page, "Delete")
        page.locator(".clip").wait_for(state="detached")
        assert web.get(f"/v1/videos/{long}").status_code == 404
        page.locator(".tile").nth(4).wait_for(state="detached")
        page.get_by_label("Samples").fill("3")
        page.get_by_label("Loop").check()
        given = {"Guidance": 2.0, "First temperature": 0.9, "Top-k": 30, "Top-p": 0.8, "Negative prompt": "a dog"}
        for name, value in given.items():
            page.get_by_label(name, exact=True).fill(str(value))
        generate(page, "a cat")
        page.locator(".clip[data-status=completed]").nth(2).wait_for()
        seeds = [state(id)["seed"] for id in page.url.partition("#")[2].split(",")]
        assert seeds == [7, 8, 9]
        page.get_by_role("button", name="Choose").nth(1).click()
        chosen = wait_for_end(page, 4)
        assert (state(chosen)["seed"], state(chosen)["options"]["loop"]) == (8, True)
        names = [name.lower().replace(" ", "_").replace("-", "_").replace("_prompt", "") for name in given]
        assert [state(chosen)["options"][name] for name in names] == [*given.values()]
        page.go_back()
        page.locator(".clip").nth(2).wait_for()
        page.keyboard.press("Escape")
        page.locator(".clip").first.wait_for(state="detached")
        page.locator(f".tile[href='#{cat}']").click()
        assert wait_for_end(page, 5) == cat
        page.get_by_label("Prompt", exact=True).fill("word " * 50)
        click(page, "Generate Ctrl Enter")
        page.get_by_role("alert").filter(has_text="16 fit: shorten it").wait_for()


def test_a_clip_in_the_middle(server: Running, browser: Any, page: Any) -> None:
    """Checks clips in progress: they survive a reload, appear in another browser, and stop on request. The worker is
    suspended, since its model generates clips in the time a page takes to load."""
    (worker,) = workers_of(server)
    with server.client() as web:  # a long clip: the page offers at most 33 frames
        clip = web.post("/v1/videos", json={"prompt": "a cat", "rounds": 5}).json()["id"]
        page.goto(f"{server.address}#{clip}")
        wait_for_frames(page, 2)
        page.get_by_text(re.compile(r"of 129 frames, \d+ (s|min) left")).wait_for()
        worker.suspend()
        page.reload()
        wait_for_frames(page, 2)
        assert page.get_by_label("Prompt", exact=True).input_value() == "a cat"
        with browser.new_page() as other:
            other.goto(page.url)
            wait_for_frames(other, 2)
            click(other, "Stop and keep")
            worker.resume()
            other.locator(".clip[data-status=completed]").wait_for()
        page.locator(".clip[data-status=completed]").wait_for()
        video = web.get(f"/v1/videos/{clip}").json()
    assert 2 <= len(video["finished_frames"]) < 129
    for done in ([0], [0, 1, 2], [0, 4, 8, 2], [0, 4, 8, 12, 16, 2, 6, 10], [0, 4, 8, 12, 16, 2, 10, 6, 14, 1]):
        step = page.evaluate("async (done) => (await import('/static/clip.js')).stepOf(done)", done)
        assert step == kept(done, 17).step  # so that stopped clips play as fast as others


SUITS = """() => {
    const seen = [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility());
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const linear = (share) => (share <= 0.04 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
    const light = (color) => {
        const [red, green, blue] = channels(color).map((value) => linear(value / 255));
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const paper = (each) => {
        const color = getComputedStyle(each).backgroundColor;
        return channels(color)[3] === 0 ? paper(each.parentElement) : color;
    };
    const contrast = (each) => {
        const [low, high] = [light(getComputedStyle(each).color), light(paper(each))].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const hasText = (each) => [...each.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    const name = (each) => `${each.tagName} ${each.className} ${each.textContent}`;
    return {
        faint: seen.filter((each) => hasText(each) && contrast(each) < 4.5).map(name),
        wide: seen.filter((each) => each.getBoundingClientRect().right > innerWidth).map(name),
        small: seen.filter((each) => each.matches("button, select, summary") && each.offsetHeight < 24).map(name),
    };
}"""
"""Finds text with low contrast, elements beyond the edge of the screen, and buttons too small to tap."""
FOCUS = """() => {
    const { tagName, ariaLabel, textContent } = document.activeElement;
    const name = tagName === "BODY" ? tagName : ariaLabel ?? textContent.trim();
    return [name, getComputedStyle(document.activeElement).outlineStyle];
}"""
"""Name and outline style of the element that has the keyboard focus."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_suits_everybody(server: Running, page: Any, scheme: str) -> None:
    """Guards people with a phone, in dark mode, with low vision, without a mouse, or with a screen reader."""
    page.set_viewport_size({"width": 360, "height": 700})
    page.emulate_media(color_scheme=scheme)
    with server.client() as web:
        clip = web.post("/v1/videos", json={"prompt": "a cat", "rounds": 0, "size": "16x16"}).json()["id"]
        page.goto(f"{server.address}#{clip}")
        wait_for_end(page, 5)
        page.evaluate("document.querySelector('details').open = true")
        web.delete(f"/v1/videos/{clip}")
    click(page, "Extend")
    told = page.get_by_role("alert").filter(has_text="there is no such video")
    told.wait_for()
    assert 0 <= told.bounding_box()["y"] < 700  # visible, however far down the button is
    assert page.evaluate(SUITS) == {"faint": [], "wide": [], "small": []}
    kinds = "button|textbox|link|slider|checkbox|combobox|spinbutton|img"
    parts = re.findall(rf"- ({kinds})\b(.*)", page.locator("body").aria_snapshot())
    assert len(parts) > 25
    assert [part for part in parts if not part[1].startswith(' "')] == []
    page.get_by_label("Prompt", exact=True).focus()
    reached = {}
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(FOCUS)
        reached[name] = outline
    assert [name for name, outline in reached.items() if outline == "none" and name != "BODY"] == []
    for name in ("Generate Ctrl Enter", "Pause", "Frame", "Extend", "Continue from here", "mp4", "Delete", "a cat"):
        assert name in reached


def workers_of(server: Running) -> list[psutil.Process]:
    """Worker processes of a server."""
    children = psutil.Process(server.process.pid).children()
    return [each for each in children if "spawn_main" in " ".join(each.cmdline())]


@pytest.mark.soak
def test_a_server_that_dies(model: Path, page: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks recovery: the page asks for its key once, and continues by itself when its server comes back."""
    assert main(["key", "ann", "--folder", str(tmp_path)]) == 0
    key = capsys.readouterr().out.strip()
    options = ("--lease", 1)
    with serving(model, tmp_path, *options) as server:
        page.goto(server.address)
        for each in ("wrong", key):
            page.get_by_role("textbox", name="Key").fill(each)
            click(page, "Enter")
        page.get_by_text("model pocket").wait_for()
        generate(page, "a cat", rounds=3)
        wait_for_frames(page, 2)
    page.get_by_text("The server does not answer").wait_for()
    port = server.address.rsplit(":", 1)[1]
    with serving(model, tmp_path, *options, "--port", port) as server:
        page.get_by_text("The server does not answer").wait_for(state="hidden")
        id = wait_for_end(page, 33)
        assert server.client().get(f"/v1/videos/{id}").status_code == 401
        with server.client(key) as web:
            assert web.get(f"/v1/videos/{id}").json()["status"] == "completed"
        page.reload()
        assert wait_for_end(page, 33) == id


def test_examples_are_known() -> None:
    """Guards first impressions: the bundled model was trained on the prompts that the page suggests."""
    root = Path(__file__).parents[2]
    with (root / "recipes/pocket/captions.csv").open() as file:
        known = [row["caption"] for row in csv.DictReader(file) if row["pocket"]]
    shown = (root / "examples/gallery.py").read_text() + (root / "README.md").read_text()
    prompts = re.findall(r'"(.+)"', (root / "src/cogvideo/web/static/examples.js").read_text())
    assert len(prompts) > 5
    for prompt in prompts:
        caption, on, background = prompt.partition(", on a ")
        is_emoji = background.endswith(" background")
        assert caption in known if on and is_emoji else prompt in shown, prompt
