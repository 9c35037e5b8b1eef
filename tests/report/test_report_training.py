"""The report on training runs: all figures and curves match the files, whatever state these are in."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_report import Page

from cogvideo.bundle.model import CogVideo
from cogvideo.cli import main
from cogvideo.data.frame_store import StoreSettings
from cogvideo.data.frames import FrameSettings
from cogvideo.media.images import write_image
from cogvideo.report.page import RunName
from cogvideo.report.plots import curves, running_mean
from cogvideo.report.runs import Curve
from cogvideo.report.training import report as training
from cogvideo.runs import RunFolder
from cogvideo.training.objectives.tokenizer import TokenizerSettings
from cogvideo.training.session import LoggingConfig
from cogvideo.training.tokenizer import train_tokenizer as tokenizer
from workshop import make_bundle, make_data, small_config

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
NASTY = "<script>alert('x')</script>&\"quoted\""


class Plot:
    """A plot as a reader sees it: points are read off by the axis labels."""

    def __init__(self, panel: str) -> None:
        svg = ElementTree.fromstring(re.search(r"<svg.*?</svg>", panel, re.DOTALL)[0].replace("xlink:", ""))
        (self.caption,) = re.findall(r'<p class="note">([^<]*)</p>', panel)
        entries = re.findall(r'class="swatch( dashed)?" style="color:(.*?)".*?<bdi>(.*?)</bdi> <b>(.*?)</b>', panel)
        self.legend = {name: last for _, _, name, last in entries}
        self.colors = {name: f"{color}{dashed}" for dashed, color, name, _ in entries}
        labels = [(each, "middle" in (each.get("style") or "")) for each in svg.iter("text")]
        self.across = [(float(each.get("x") or ""), value(each.text or "")) for each, is_step in labels if is_step]
        self.up = [(float(each.get("y") or ""), value(each.text or "")) for each, is_step in labels if not is_step]
        self.is_logarithmic = "Logarithmic" in self.caption
        paths = [(each.get("d") or "", each.get("style") or "") for each in svg.iter("path")]
        grid = [float(path.split()[2].split("L")[0]) for path, style in paths if "var(--line)" in style]
        offsets = np.array([at for at, _ in self.up]) - grid
        assert np.ptp(offsets) < 0.02, "labels that are not beside their lines"
        self.up = [(at, figure) for at, (_, figure) in zip(grid, self.up, strict=True)]
        self.lines: dict[str, dict[str, np.ndarray]] = {}
        for name, color in self.colors.items():
            own = [(path, style) for path, style in paths if f"stroke: {color.split()[0]};" in style and "M" in path]
            own = [each for each in own if ("dasharray" in each[1]) == ("dashed" in color) and "C" not in each[0]]
            self.lines[name] = {"thin" if "opacity" in style else "thick": self.read(path) for path, style in own}
        self.num_dots = len(list(svg.iter("use")))

    def read(self, path: str) -> np.ndarray:
        """Steps and values of a path's points."""
        pairs = [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]
        return np.array([[along(x, self.across), self.height(y)] for x, y in pairs])

    def height(self, at: float) -> float:
        if not self.is_logarithmic:
            return along(at, self.up)
        return math.exp(along(at, [(each, math.log(figure)) for each, figure in self.up]))

    def assert_is(self, name: str, kind: str, steps: Iterable[float], values: Iterable[float]) -> None:
        """Assert that a line passes through these points and starts and ends there, to visible precision."""
        points, steps, values = self.lines[name][kind], np.array(list(steps)), np.array(list(values))
        np.testing.assert_allclose(points[[0, -1], 0], steps[[0, -1]], atol=1e-3 * steps.max())
        heights = np.interp(steps, points[:, 0], points[:, 1])
        room = max(values.max() - values.min(), 1e-6 * abs(values).max())
        tolerance = {"rtol": 2e-2} if self.is_logarithmic else {"atol": 1e-2 * room, "rtol": 1e-4}
        np.testing.assert_allclose(heights, values, **tolerance)


def value(label: str) -> float:
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    return float(label[:-1]) * units[label[-1]] if label[-1] in units else float(label)


def along(at: float, ticks: list[tuple[float, float]]) -> float:
    (low, first), (high, last) = min(ticks), max(ticks)
    return first + (at - low) / (high - low) * (last - first)


def plots(page: Page, section: str) -> dict[str, Plot]:
    """Plots of a section, by heading."""
    return {
        html.unescape(title): Plot(panel)
        for title, panel in re.findall(r"<h3>([^<]*)</h3>(.*?\n</div>)", part(page, section), re.DOTALL)
        if "<svg" in panel
    }


def part(page: Page, section: str) -> str:
    found = re.search(rf'<section id="{section}".*?</section>', page.source, re.DOTALL)
    assert found is not None, f"there is no section {section}"
    return found[0]


def make_run(
    folder: Path,
    rows: Iterable[Mapping[str, Any]] = (),
    stage: str = "sequential",
    steps: int = 100,
    finished: bool = False,
    **settings: Any,
) -> Path:
    """A run's folder, written by `RunFolder`; `rows` are in the format that it records."""
    run = RunFolder(folder)
    identity = {"stage": stage, "optimization": {"steps": steps, "batch": 16} | settings, "from": "model", "data": "ab"}
    run.claim(identity)
    for row in rows:
        run.report(row)
    if finished:
        held = [row["held_out"] for row in run.rows() if "held_out" in row]
        run.finish(
            {"steps": steps, "held_out": held[-1], "time": {"seconds": 4000.5}, "memory": {"peak_bytes": 2_500_000_000}}
        )
    return folder


def row(step: int, loss: float, **more: float) -> dict[str, float]:
    course = {"learning_rate": 1e-4 * step, "gradient_norm": 1 + 1 / step, "tokens_per_second": 1000.5 + step}
    rest = {"utilization": 0.25 + step / 1000, "seconds": 2.5 * step, "peak_bytes": 2_000_000_000 + step}
    return {"step": step, "loss": loss} | course | rest | more


def held(step: int, **losses: float) -> dict[str, Any]:
    names = {name.replace("_", " ").strip(): loss for name, loss in losses.items()}
    return {
        "step": step,
        "held_out": {name.lstrip("r"): {"loss": loss, "frame_1": 9.0} for name, loss in names.items()},
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(out: Path, *folders: Path) -> Page:
    training(folders, out=out)
    return Page(out)


def overview(page: Page) -> dict[tuple[str, str], dict[str, str]]:
    """The table of all runs, by name and stage."""
    head, *rows = page.tables[0]
    return {(each[0], each[1]): dict(zip(head, each, strict=True)) for each in rows}


def number(text: str) -> float:
    return float(text.replace(",", "").replace("%", "").split()[0])


# Real runs


@pytest.fixture(scope="module")
def real(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles in which the sequential stage and a tokenizer were trained for a few steps."""
    folder = tmp_path_factory.mktemp("real")
    make_bundle(folder / "start", train_text_model())
    make_data(folder / "data", folder / "start")
    options = "--steps 8 --batch 4 --report-every 1 --evaluate-every 4 --sample-every 4 --checkpoint-every 8"
    places = ["--data", str(folder / "data"), "--init", str(folder / "start"), "--out", str(folder / "model")]
    assert main(["train", "sequential", *places, *options.split()]) == 0
    CogVideo(small_config(train_text_model())).save_pretrained(folder / "codes")
    few = StoreSettings(num_frames=12, num_held_out=4, frames_per_clip=4, clips=FrameSettings(min_frames=1, size=24))
    quick = TokenizerSettings(
        steps=8, batch=2, warmup=1, plain_steps=2, start_vectors=2, adversary_start=4, adversary_width=4
    )
    tokenizer(("world:12",), out=folder / "codes", settings=quick, frames=few, logging=LoggingConfig(evaluate_every=4))
    return folder


def test_a_real_run_is_shown_as_it_is_in_its_files(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks every figure of a real training run: table, curves, held-out losses, settings, contact sheet."""
    capsys.readouterr()
    assert main(["train", "report", str(real / "model"), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'page.html'}, with 1 run\n"
    page, run = Page(tmp_path / "page.html"), real / "model" / ".sequential-run"
    rows, report = lines(run), json.loads((run / "report.json").read_text())
    trained, held_out = [each for each in rows if "loss" in each], [each for each in rows if "held_out" in each]
    assert len(trained) == 8
    shown = overview(page)["model", "sequential"]
    assert shown["steps"] == "8 of 8"
    assert shown["finished"] == "yes"
    assert number(shown["loss"]) == pytest.approx(trained[-1]["loss"], abs=1e-4)
    means = [np.mean([rate["loss"] for rate in each["held_out"].values()]) for each in held_out]
    assert number(shown["held out"]) == pytest.approx(means[-1], abs=1e-4)
    assert number(shown["best"]) == pytest.approx(min(means), abs=1e-4)
    assert shown["best"].endswith(f" at {(4, 8)[int(np.argmin(means))]}")
    assert number(shown["tokens/s"]) == pytest.approx(trained[-1]["tokens_per_second"], rel=1e-3)
    assert number(shown["utilization"]) == pytest.approx(100 * trained[-1]["utilization"], abs=0.06)
    assert number(shown["time"]) == pytest.approx(report["time"]["seconds"], rel=5e-3)
    scale = {"MB": 1e6, "GB": 1e9}[shown["memory"].split()[1]]
    assert number(shown["memory"]) * scale == pytest.approx(report["memory"]["peak_bytes"], rel=5e-3)
    drawn, steps = plots(page, "sequential"), [each["step"] for each in trained]
    parts = [name for name in trained[0] if name.startswith("frame")]
    assert len(parts) == 4
    named = {f"Loss, {name.replace('_', ' ')}": name for name in parts}
    named |= {"Loss": "loss", "Learning rate": "learning_rate", "Gradient norm": "gradient_norm"}
    named |= {"Tokens per second": "tokens_per_second"}
    for title, name in named.items():
        drawn[title].assert_is("model", "thick", steps, [each[name] for each in trained])
        assert number(drawn[title].legend["model"] or "") == pytest.approx(trained[-1][name], rel=1e-3)
    for rate in held_out[0]["held_out"]:
        losses = [each["held_out"][rate]["loss"] for each in held_out]
        drawn[f"Held out, {rate}"].assert_is("model", "thick", [4, 8], losses)
    assert page.rows()["optimization.batch"] == ["4"]
    (sheet,) = page.all("img")
    assert sheet["alt"] == "Contact sheet of model after 8 steps"
    with Image.open(run / "samples" / "step-00000008.png") as picture:
        assert (int(sheet["width"] or 0), int(sheet["height"] or 0)) == picture.size
        seen = Image.open(io.BytesIO(base64.b64decode((sheet["src"] or "").partition(",")[2])))
        assert np.abs(np.asarray(seen, float) - np.asarray(picture.convert("RGB"), float)).mean() < 8


def test_a_tokenizer_is_judged_by_its_quality(real: Path, tmp_path: Path) -> None:
    """Checks runs without a single loss: PSNR takes its place, and the highest is best."""
    page, run = written(tmp_path / "page.html", real / "codes"), real / "codes" / ".tokenizer-run"
    rows, report = lines(run), json.loads((run / "report.json").read_text())
    trained, held_out = [each for each in rows if "psnr" in each], [each for each in rows if "held_out" in each]
    values = [each["held_out"]["psnr"] for each in held_out]
    assert values[-1] == pytest.approx(report["held_out"]["psnr"])
    shown, drawn = overview(page)["codes", "tokenizer"], plots(page, "tokenizer")
    assert shown["steps"] == "8 of 8"
    assert number(shown["loss"]) == pytest.approx(trained[-1]["psnr"], rel=1e-4)
    assert number(shown["held out"]) == pytest.approx(values[-1], rel=1e-4)
    assert number(shown["best"]) == pytest.approx(max(values), rel=1e-4)
    drawn["Held out, PSNR in dB"].assert_is("codes", "thick", [4, 8], values)
    steps = [each["step"] for each in trained]
    drawn["PSNR in dB"].assert_is("codes", "thick", steps, [each["psnr"] for each in trained])
    some = [(each["step"], each["adversary"]) for each in trained if "adversary" in each]
    drawn["Adversary"].assert_is("codes", "thick", *zip(*some, strict=True))
    assert page.all("img")[0]["alt"] == "Contact sheet of codes after 8 steps"


def test_page_is_whole_and_needs_nothing_else(real: Path, tmp_path: Path) -> None:
    """Catches broken HTML, scripts, external pictures, styles or fonts, and pictures without a description."""
    page = written(tmp_path / "page.html", real)
    assert {name for _, name in overview(page)} == {"sequential", "tokenizer"}
    without_pictures = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", page.source)
    assert re.search(r"https?:|//[a-z]|@import|url\((?!#)", without_pictures) is None
    assert not page.all("script")
    assert not page.all("link")
    assert all((each["src"] or "").startswith("data:image/webp;base64,") for each in page.all("img"))
    assert all(each["alt"] for each in page.all("img"))
    pictures = [each for _, each in page.elements if each.get("role") == "img"]
    assert len(pictures) > 15
    assert all(each["aria-label"] for each in pictures)
    ids = [each["id"] for _, each in page.elements if "id" in each]
    assert {each["href"] for each in page.all("a")} <= {f"#{id}" for id in ids}
    assert "prefers-color-scheme: dark" in page.source


def test_same_bytes_in_every_process(real: Path, tmp_path: Path) -> None:
    """Catches times, temporary names and hash order on the page; runs the command the way users do."""
    training((real,), out=tmp_path / "one.html")
    command = [sys.executable, "-m", "cogvideo", "train", "report", str(real), "--out", "other.html"]
    environment = ENVIRONMENT | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "written: other.html, with 2 runs\n", "")
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "one.html").read_bytes()


# Multiple runs


def test_runs_of_a_stage_share_plots_and_stages_do_not(tmp_path: Path) -> None:
    """Catches plots that mix stages, and curves with the name or color of another run."""
    losses = {"a": 3.0, "b": 2.5, "c": 2.0}
    for number, (name, loss) in enumerate(losses.items()):
        rows = [row(step, loss + 4 / step) for step in range(10, 20 * number + 40, 10)]
        make_run(tmp_path / name / ".sequential-run", rows)
    make_run(tmp_path / "b" / ".image-run", [row(10, 9.0), row(20, 8.5)], stage="image")
    page = written(tmp_path / "page.html", tmp_path)
    assert list(overview(page)) == [("b", "image"), ("a", "sequential"), ("b", "sequential"), ("c", "sequential")]
    assert list(plots(page, "image")["Loss"].lines) == ["b"]
    for title in ("Loss", "Learning rate", "Gradient norm", "Tokens per second"):
        plot = plots(page, "sequential")[title]
        assert plot.colors == {name: f"var(--line-{number})" for number, name in enumerate("abc")}
    plot = plots(page, "sequential")["Loss"]
    for number, (name, loss) in enumerate(losses.items()):
        steps = range(10, 20 * number + 40, 10)
        plot.assert_is(name, "thick", steps, [loss + 4 / step for step in steps])


def test_a_colour_stays_with_its_run(tmp_path: Path) -> None:
    """Catches runs without a figure that shift the colors of others, and a ninth run that looks like the first."""
    for number in range(10):
        rows = [row(10, 3.0), held(10, r2_fps=3.0) if number == 9 else row(20, 2.9)]
        make_run(tmp_path / f"run-{number}" / ".sequential-run", rows)
    page = written(tmp_path / "page.html", tmp_path)
    drawn = plots(page, "sequential")
    assert drawn["Held out, 2 fps"].colors == {"run-9": "var(--line-1) dashed"}
    assert len(set(drawn["Loss"].colors.values())) == 10
    assert drawn["Held out, 2 fps"].num_dots == 1, "a single point that nobody sees"


def test_held_out_losses_by_rate_and_their_mean(tmp_path: Path) -> None:
    """Catches a best step that is not that of the mean over all frame rates, or is the last of two equal ones."""
    rows = [held(10, r1_fps=3.0, r2_fps=5.0), held(20, r1_fps=2.0, r2_fps=4.0), held(30, r1_fps=1.0, r2_fps=5.0)]
    page = written(tmp_path / "page.html", make_run(tmp_path / ".sequential-run", [row(10, 4.0), *rows]))
    (shown,) = overview(page).values()
    assert (shown["held out"], shown["best"]) == ("3", "3 at 20")
    drawn = plots(page, "sequential")
    name = tmp_path.name
    drawn["Held out, mean over the frame rates"].assert_is(name, "thick", [10, 20, 30], [4, 3, 3])
    drawn["Held out, 1 fps"].assert_is(name, "thick", [10, 20, 30], [3, 2, 1])
    drawn["Held out, 2 fps"].assert_is(name, "thick", [10, 20, 30], [5, 4, 5])
    assert drawn["Held out, 2 fps"].num_dots == 3


def test_what_differs_is_told(tmp_path: Path) -> None:
    """Lists exactly the settings in which compared runs differ, or states that there are none."""
    make_run(tmp_path / "a" / ".sequential-run", learning_rate=3e-4, seed=0)
    make_run(tmp_path / "b" / ".sequential-run", learning_rate=1e-4, seed=0, ema=0.9)
    page = written(tmp_path / "page.html", tmp_path)
    heads, *rows = page.tables[1]
    assert heads == ["", "a", "b"]
    assert rows == [["optimization.learning_rate", "0.0003", "0.0001"], ["optimization.ema", "–", "0.9"]]
    assert ["optimization.seed", "0"] in page.tables[2]
    make_run(tmp_path / "c" / ".image-run", stage="image")
    make_run(tmp_path / "d" / ".image-run", stage="image")
    assert "These runs have the same settings." in part(written(tmp_path / "page.html", tmp_path), "image")


def test_a_run_is_shown_once(tmp_path: Path) -> None:
    """Shows a run once, even if given directly, by its bundle, by the folder above and by a symlink."""
    run = make_run(tmp_path / "all" / "model" / ".sequential-run", [row(10, 3.0)])
    (tmp_path / "link").symlink_to(run)
    page = written(tmp_path / "page.html", run, run.parent, run.parents[1], tmp_path / "link", run)
    assert list(overview(page)) == [("model", "sequential")]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    """Prevents two runs of the same name; a run of another stage in the same bundle does not make names longer."""
    for path in ("x/model/.sequential-run", "y/model/.sequential-run"):
        make_run(tmp_path / path)
    page = written(tmp_path / "page.html", tmp_path / "x", tmp_path / "y")
    assert list(overview(page)) == [("x/model", "sequential"), ("y/model", "sequential")]
    make_run(tmp_path / "x/model/.image-run", stage="image")
    page = written(tmp_path / "page.html", tmp_path / "x")
    assert list(overview(page)) == [("model", "image"), ("model", "sequential")]


def test_users_texts_stay_texts(tmp_path: Path) -> None:
    """Prevents HTML injection through names of folders, frame rates, figures or settings."""
    name = NASTY.replace("/", "")
    rows = [row(10, 3.0, **{NASTY: 1.0, "frame_1": 2.0}), {"step": 10, "held_out": {NASTY: {"loss": 2.0}}}]
    make_run(tmp_path / name / ".sequential-run", rows, **{NASTY: NASTY})
    make_run(tmp_path / "other" / ".sequential-run")
    page = written(tmp_path / "page.html", tmp_path)
    assert not page.all("script")
    assert overview(page)[name, "sequential"]["loss"] == "3"
    assert f"Held out, {NASTY}" in [heading for _, heading in page.headings]
    assert page.rows()[f"optimization.{NASTY}"] == [json.dumps(NASTY), "–"]


# Curves


def test_long_runs_are_small_quick_and_keep_what_stands_out(tmp_path: Path) -> None:
    """Keeps pages of long runs small and quick to generate, without losing a spike of a single step."""
    generator, num = np.random.default_rng(0), 100_000
    losses = 2 + 3 * np.exp(-np.arange(num) / 2e4) + generator.normal(0, 0.1, num)
    losses[61_803] = 9.5
    run = make_run(tmp_path / ".sequential-run", steps=num)
    rows = (row(step, loss, frame_1=loss, frame_2=loss) for step, loss in enumerate(losses.tolist(), 1))
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    clocks = [time.process_time()]
    assert len([json.loads(line) for line in (run / "metrics.jsonl").open()]) == num
    clocks.append(time.process_time())
    page = written(tmp_path / "page.html", run)
    assert time.process_time() - clocks[1] < 50 * (clocks[1] - clocks[0])  # usually 5 times as long
    assert len(page.source) < 200_000
    plot = plots(page, "sequential")["Loss"]
    thin, thick = plot.lines[tmp_path.name]["thin"], plot.lines[tmp_path.name]["thick"]
    assert max(len(thin), len(thick)) < 3000
    peak = thin[thin[:, 1].argmax()]
    np.testing.assert_allclose(peak, [61_804, 9.5], rtol=3e-3)
    assert "mean over 2,000 steps" in plot.caption
    for step, height in thick[::50]:  # mean of steps at most 1,000 away
        near = losses[max(round(step) - 1001, 0) : round(step) + 1000]
        assert height == pytest.approx(near.mean(), abs=0.05)
    np.testing.assert_allclose(thick[[0, -1], 0], [1, num], atol=100)


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(-1e3, 1e3)), min_size=1, max_size=80), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_running_mean_is_that_of_the_points_near(points: list[tuple[int, float]], window: int) -> None:
    """Catches means over points outside the window, or over a fixed number of points regardless of their spacing."""
    points.sort()
    steps, heights = zip(*points, strict=True)
    means = running_mean(Curve(np.array(steps), np.array(heights)), window).values
    for step, mean in zip(steps, means, strict=True):
        near = [height for other, height in points if abs(other - step) <= window / 2]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-6)


@given(st.lists(st.floats(-3e38, 3e38), min_size=1, max_size=5), st.booleans())  # figures are float32
@settings(max_examples=30, deadline=None)
@example([1e-38, 3e38], False)
def test_axes_of_any_values(heights: list[float], from_zero: bool) -> None:
    """Guards against values that crash the page, and axes without labels."""
    curve = Curve(np.arange(len(heights)), np.array(heights))
    panel = curves("image", "Loss", {RunName("a", 0): curve}, from_zero=from_zero)
    assert panel.svg.count("text-anchor: end") >= 1


def test_axes_by_what_they_show(tmp_path: Path) -> None:
    """Starts axes of speeds at zero, and shows gradient norms from 0.01 to 100 on a logarithmic one."""
    norms = [100.0, 10.0, 0.5, 0.01]
    rows = [row(10 * place, 3.0, gradient_norm=norm) for place, norm in enumerate(norms, 1)]
    drawn = plots(written(tmp_path / "page.html", make_run(tmp_path / ".image-run", rows, "image")), "image")
    assert min(figure for _, figure in drawn["Tokens per second"].up) == 0
    assert not drawn["Loss"].is_logarithmic
    assert drawn["Gradient norm"].is_logarithmic
    drawn["Gradient norm"].assert_is(tmp_path.name, "thick", [10, 20, 30, 40], norms)


def test_figures_that_are_none_are_left_out(tmp_path: Path) -> None:
    """Leaves out NaN and infinity, which would break the axis or be drawn at zero."""
    rows = [row(10, 3.0), row(20, math.nan), row(30, math.inf), row(40, 2.0)]
    page = written(tmp_path / "page.html", make_run(tmp_path / ".image-run", rows, "image"))
    plots(page, "image")["Loss"].assert_is(tmp_path.name, "thick", [10, 40], [3, 2])


# Runs in any state


def test_a_killed_run_is_shown_as_far_as_it_went(tmp_path: Path) -> None:
    """Handles a half-written line without a traceback, and does not call the run finished."""
    run = make_run(tmp_path / ".sequential-run", [row(10, 3.0), row(20, 2.5)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    page = written(tmp_path / "page.html", run)
    (shown,) = overview(page).values()
    assert (shown["steps"], shown["loss"], shown["finished"]) == ("20 of 100", "2.5000", "no")
    assert (shown["held out"], shown["best"], shown["memory"]) == ("–", "–", "2 GB")
    assert shown["time"] == "50 s"
    assert "Held out" not in plots(page, "sequential")


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    """Prevents a division by zero or an empty axis before the first line, and with a single line."""
    run = make_run(tmp_path / ".sequential-run")
    page = written(tmp_path / "page.html", run)
    (shown,) = overview(page).values()
    assert (shown["steps"], shown["loss"], shown["finished"]) == ("0 of 100", "–", "no")
    assert "Nothing has been measured yet." in page.text
    assert plots(page, "sequential") == {}
    RunFolder(run).report(row(1, 3.25))
    drawn = plots(written(tmp_path / "page.html", run), "sequential")["Loss"]
    assert drawn.num_dots == 1


def test_a_finished_run_takes_what_its_report_says(tmp_path: Path) -> None:
    """Takes time and memory from the report of a finished run, not from its last line."""
    rows = [row(100, 3.0), held(100, rall=2.5)]
    page = written(tmp_path / "page.html", make_run(tmp_path / ".image-run", rows, "image", finished=True))
    (shown,) = overview(page).values()
    assert (shown["time"], shown["memory"], shown["finished"]) == ("66.7 min", "2.5 GB", "yes")
    assert "Held out" in plots(page, "image")


def test_the_last_contact_sheet_is_shown(tmp_path: Path) -> None:
    """Shows the sheet of the highest step, not the last by name, and shrinks it to keep the page small."""
    run = make_run(tmp_path / ".image-run", [row(10, 3.0)], "image")
    (run / "samples").mkdir()
    for step, colour in ((99_999_999, 10), (100_000_000, 200)):
        write_image(run / "samples" / f"step-{step:08}.png", np.full((3000, 1500, 3), colour, np.uint8))
    (run / "samples" / "step-999999999.mp4").write_bytes(b"")
    page = written(tmp_path / "page.html", run)
    (sheet,) = page.all("img")
    assert sheet["alt"] == f"Contact sheet of {tmp_path.name} after 100,000,000 steps"
    assert (sheet["width"], sheet["height"]) == ("1000", "2000")
    picture = Image.open(io.BytesIO(base64.b64decode((sheet["src"] or "").partition(",")[2])))
    assert abs(np.asarray(picture).mean() - 200) < 2
    assert len(page.source) < 200_000


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", b"{", "Expecting"),
        ("run.json", b"\xff\xfe", "decode"),
        ("run.json", b'{"stage": "cooking"}', "it is a run of 'cooking', expected one of tokenizer, image"),
        ("run.json", b'{"stage": "image"}', "'optimization' is missing"),
        ("metrics.jsonl", b'{"step": 1}\nnonsense\n{"step": 3}\n', "Expecting"),
        ("metrics.jsonl", b"\xff\xfe\n", "decode"),
        ("metrics.jsonl", b'{"loss": 1}\n', "expected the number of a step in every line"),
        ("metrics.jsonl", b'{"step": 1, "loss": "low"}\n', "could not convert string to float: 'low'"),
        ("metrics.jsonl", b'{"step": 1, "held_out": {"all": {}}}\n', "'loss' is missing"),
        ("report.json", b'{"steps": 8, ', "Expecting"),
        ("report.json", b'{"steps": 8}', "'held_out' is missing"),
        ("samples/step-00000010.png", b"\x89PNG\r\n\x1a\nnothing", "cannot identify image file"),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    """Names the damaged file in one line, without a traceback, and keeps the old page."""
    run = make_run(tmp_path / ".image-run", [row(10, 3.0)], "image")
    before = written(tmp_path / "page.html", tmp_path).source
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        training((tmp_path,), out=tmp_path / "page.html")
    assert str(error.value).count(f"cannot use {run / file}: ") == 1
    assert len(str(error.value).splitlines()) == 1
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == before


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Leaves out a damaged run with a warning instead of failing."""
    runs = [make_run(tmp_path / name / ".image-run", [row(10, 3.0)], "image") for name in "ab"]
    (runs[0] / "report.json").write_text("{")
    assert len(overview(written(tmp_path / "page.html", *runs))) == 1
    told = capsys.readouterr().err
    assert re.fullmatch(rf"One run is left out: cannot use {re.escape(str(runs[0]))}/report.json: .*\n", told)


def cut(png: bytes) -> bytes:
    return png[:9000]


def with_another_length(png: bytes) -> bytes:
    """Corrupt the length of the pixel chunk, for which Pillow raises a SyntaxError."""
    return png[:35] + b"\0\x20" + png[37:]


@pytest.mark.parametrize("damage", [cut, with_another_length])
def test_damaged_pictures_are_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """Detects truncated and corrupted contact sheets whose headers are intact."""
    run = make_run(tmp_path / ".image-run", [row(10, 3.0)], "image")
    sheet = run / "samples" / "step-00000010.png"
    sheet.parent.mkdir()
    write_image(sheet, np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8))
    sheet.write_bytes(damage(sheet.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"cannot use {sheet}: ")):
        training((run,), out=tmp_path / "page.html")


def test_old_page_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """Replaces the page atomically, so that an open reader or a full disk never has half of it."""
    out, run = tmp_path / "page.html", make_run(tmp_path / ".image-run", stage="image")
    before = written(out, run).source
    (tmp_path / "opened.html").hardlink_to(out)
    RunFolder(run).report(row(10, 3.0))
    assert written(out, run).source != before
    assert (tmp_path / "opened.html").read_text(encoding="utf-8") == before
    assert sorted(each.name for each in tmp_path.iterdir()) == [".image-run", "opened.html", "page.html"]


def test_folders_without_runs(tmp_path: Path) -> None:
    """Refuses folders without runs and invalid output paths, with an error that says why."""
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path / "model" / ".image-run", stage="image")
    for folder, message in (("empty", "there is no run in"), ("nowhere", "there is no folder")):
        with pytest.raises(ValueError, match=rf"{message} .*{folder}, expected the folder of a run, such as"):
            training((run, tmp_path / folder), out=tmp_path / "page.html")
    with pytest.raises(ValueError, match="there is no run, expected one or several folders"):
        training((), out=tmp_path / "page.html")
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "none" / "page.html", "there is no folder")):
        with pytest.raises(ValueError, match=message):
            training((run,), out=out)
    assert not (tmp_path / "page.html").exists()
