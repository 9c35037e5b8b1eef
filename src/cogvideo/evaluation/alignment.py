"""`cogvideo evaluate alignment`: do clips show what their prompts say, and do they move like real ones?

Generated clips are judged together with real ones of the same prompts, and their reconstructions by the tokenizer: a
model of its codes can do no better. Everything that was made stays in the folder; a killed evaluation goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import locate
from cogvideo.config import require
from cogvideo.devices import slowness, usable
from cogvideo.evaluation.making import Making, Shelf, generate, start
from cogvideo.evaluation.motion import STATIC, Movement, measure, movement
from cogvideo.evaluation.reader import FILE, SIZE, resized
from cogvideo.evaluation.subjects import Clip, EmojiSubject, Subject, Verdict, WorldSubject
from cogvideo.files import alone_in, write_text
from cogvideo.media.images import contact_sheet, evenly, write_image
from cogvideo.pipeline import CogVideoPipeline
from cogvideo.runs import RunFolder, provenance

GENERATED, RECONSTRUCTION, REAL = ROWS = ("generated", "reconstruction", "real")
"""Clips that are judged."""
Z95 = 1.959964
"""Quantile of the normal distribution that a 95 % interval ends at."""
SHOWN, FAILURES, COLUMNS = 6, 4, 11
"""Clips of a subject on the contact sheet whatever became of them, more of them that failed, and frames of a row."""


class Judged(NamedTuple):
    """Findings about one row of a subject."""

    verdict: Verdict
    movement: Movement
    """Movement of the clips, against real ones."""


def alignment(
    *,
    model: str,
    out: Path,
    world: int = 500,
    domain: Literal["full", "simple"] = "full",
    emoji: Path | None = None,
    emoji_limit: int | None = None,
    emoji_seed: int = 0,
    making: Making = Making(),  # noqa: B008  # frozen
    batch: int = 8,
    reader: Path | None = None,
    device: str = "auto",
    recipe: Path | None = None,  # read by the command line
) -> None:
    """Measure how well clips show what their prompts say. Run an interrupted command again to continue.

    Prints tables and writes alignment.json (results, findings for each clip, and the protocol) and alignment.png (real
    clips above generated ones, some failures among them). Generated clips stay in the folder.

    Args:
        model: Folder of a bundle, or its ID on the Hugging Face Hub.
        out: Folder for the results.
        world: Number of prompts about the World, half of them with pairs that training never shows; 0 for none.
        domain: Part of the World that prompts are about; the model in the box learns `simple`.
        emoji: Folder with captions.csv, or table, of animations with alpha, such as emoji.
        emoji_limit: Maximum number of prompts about the animations, evenly spread; clips are compared with all.
        emoji_seed: Seed of the animations' data preparation, which determines the backgrounds that were never seen.
        making: How clips are made.
        batch: Clips per pass; only affects the speed.
        reader: File of the World reader; the package's by default.
        device: Device to run on: cpu, cuda, cuda:0, or auto.
        recipe: TOML file with a table of options for this command. Options on the command line take precedence.
    """
    require(out.is_dir() or not out.exists(), f"{out} is a file, expected a folder")
    require(world >= 0, f"world is {world}, expected 0 or more prompts")
    require(emoji_limit is None or emoji_limit > 0, f"emoji_limit is {emoji_limit}, expected a positive number")
    require(batch > 0, f"batch is {batch}, expected a positive number of clips")
    console = Console(highlight=False)
    if slow := slowness(getattr(torch, making.dtype), usable(device)):
        console.print(slow)
    bundle = {name: entry.sha256 for name, entry in Manifest.read(locate(model)).components.items()}
    pipeline = CogVideoPipeline.from_pretrained(model, getattr(torch, making.dtype), usable(device))
    record = making.record(pipeline.model.config)
    subjects: list[Subject] = [WorldSubject(world, domain, making.seed, reader or FILE)] if world else []
    if emoji is not None:
        subjects.append(EmojiSubject(emoji, emoji_limit, making.seed, emoji_seed))
    else:
        console.print("No --emoji is given: animations are left out.")
    require(len(subjects) > 0, "there is nothing to judge: world is 0 and there is no emoji, expected one of them")
    for subject in subjects:
        start(pipeline, subject.prompts, making)  # what cannot be used is refused now
    folder = RunFolder(out)
    with alone_in(out):
        folder.claim({"bundle": bundle, "making": record})
        results = {subject.name: _judge(subject, pipeline, out, making, batch) for subject in subjects}
        _write_sheet(out, subjects, results)
        _write_json(out / "alignment.json", _protocol(model, bundle, record, subjects), results)
    for table in tables(results):
        console.print(table)
    print(f"{out / 'alignment.json'}, {out / 'alignment.png'}")


def _judge(subject: Subject, pipeline: CogVideoPipeline, out: Path, making: Making, batch: int) -> dict[str, Judged]:
    """Every row of a subject; a reconstruction is the best that a model of the tokenizer's codes can do."""
    size, prompts = pipeline.model.config.frame_side, subject.prompts

    def made(numbers: list[int]) -> list[Clip]:
        return generate(pipeline, [prompts[number] for number in numbers], making)

    def reconstructed(numbers: list[int]) -> list[Clip]:
        decoded = (pipeline.model.autoencoder.reconstruct(subject.real(number, size)) for number in numbers)
        return [resized(clip, SIZE) for clip in decoded]

    clips = {REAL: [resized(subject.real(number, size), SIZE) for number in range(len(prompts))]}
    for name, make in ((GENERATED, made), (RECONSTRUCTION, reconstructed)):
        shelf = Shelf(out / name, prompts)
        with _progress(f"{subject.name}: {name}", len(prompts), len(shelf.missing)) as advance:
            shelf.fill(make, batch, advance)
        clips[name] = list(shelf)
    motions = {name: [measure(clip) for clip in each] for name, each in clips.items()}
    return {name: Judged(subject.judge(clips[name]), movement(motions[name], motions[REAL])) for name in ROWS}


@contextmanager
def _progress(text: str, total: int, missing: int) -> Iterator[Any]:
    """A bar over clips, of which some are there."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=total - missing)
        yield partial(bar.advance, task)


def tables(results: dict[str, dict[str, Judged]]) -> Iterator[Table]:
    """A table of shares for each subject, with half the width of their 95 % intervals, and one of movement."""
    for subject, rows in results.items():
        table = Table(title=f"{subject}: share that is right (%, 95 % interval)")
        measures = list(next(iter(rows[REAL].verdict.shares.values())))
        for column in ("", "", *measures):
            table.add_column(column, justify="right" if column else "left")
        for row, judged in rows.items():
            for group, shares in judged.verdict.shares.items():
                count = judged.verdict.counts[group]
                table.add_row(row, group, *(_percent(shares[name], count) for name in measures))
        yield table
    table = Table(title="movement, against real clips of the same prompts")
    for column in ("", "", "energy ratio", "static (%)", "flicker (levels)"):
        table.add_column(column, justify="right" if column else "left")
    for subject, rows in results.items():
        for row, (_, (ratio, static, flicker)) in rows.items():
            table.add_row(subject, row, f"{ratio:.2f}", f"{100 * static:.1f}", f"{flicker:.2f}")
    yield table


def _percent(share: float, count: int) -> str:
    low, high = wilson(share, count)
    return f"{100 * share:.1f} ±{50 * (high - low):.1f}"


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent clips, by Wilson's score (1927)."""
    spread = Z95**2 / count
    middle = share + spread / 2
    half = Z95 * sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def _protocol(
    model: str, bundle: dict[str, str], making: dict[str, Any], subjects: Sequence[Subject]
) -> dict[str, Any]:
    """Everything that is needed to measure the same again."""
    return {
        **provenance(),
        "model": model,
        "bundle_sha256": bundle,
        "making": making,
        "static_below": STATIC,
        "subjects": {subject.name: subject.record() for subject in subjects},
        "seeds": {subject.name: [prompt.seed for prompt in subject.prompts] for subject in subjects},
    }


def _write_json(path: Path, protocol: dict[str, Any], results: dict[str, dict[str, Judged]]) -> None:
    """The protocol, shares and movement by subject and row, and findings clip by clip."""
    told: dict[str, dict[str, Any]] = {}
    for subject, rows in results.items():
        told[subject] = {}
        for row, (verdict, moved) in rows.items():
            intervals = {
                group: {name: wilson(share, verdict.counts[group]) for name, share in shares.items()}
                for group, shares in verdict.shares.items()
            }
            figures = {"shares": verdict.shares, "intervals": intervals, "movement": moved._asdict()}
            told[subject][row] = figures | {"clips": verdict.findings}
    write_text(path, json.dumps({"protocol": protocol, "results": told}, indent=1, ensure_ascii=False) + "\n")


def _write_sheet(out: Path, subjects: Sequence[Subject], results: dict[str, dict[str, Judged]]) -> None:
    """Real clips above generated ones: the same prompts each time, then the first of the others that failed."""
    rows, labels = [], []
    for subject in subjects:
        verdict = results[subject.name][GENERATED].verdict
        generated = list(Shelf(out / GENERATED, subject.prompts))
        for number in shown(verdict.right):
            rows += [resized(subject.real(number, SIZE), SIZE), generated[number]]
            labels += [subject.prompts[number].text, verdict.words[number]]
    write_image(out / "alignment.png", contact_sheet(rows, COLUMNS, labels=labels))


def shown(right: Sequence[bool]) -> list[int]:
    """Numbers of clips for the contact sheet: evenly spread ones, then the first failures among the others."""
    spread = evenly(len(right), SHOWN).tolist()
    failed = [number for number, each in enumerate(right) if not each and number not in spread]
    return spread + failed[:FAILURES]
