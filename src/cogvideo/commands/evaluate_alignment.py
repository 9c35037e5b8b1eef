"""`cogvideo evaluate alignment`: from options to subjects, and tables of results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from cogvideo.commands.terminal import table
from cogvideo.config import require
from cogvideo.evaluation.alignment import REAL, RowFindings, evaluate
from cogvideo.evaluation.making import ClipOptions
from cogvideo.evaluation.preferences import wilson
from cogvideo.evaluation.reader import FILE
from cogvideo.evaluation.subjects import EmojiSubject, Subject, WorldSubject


def alignment(
    *,
    model: str,
    out: Path,
    world: int = 500,
    domain: Literal["full", "simple"] = "full",
    emoji: Path | None = None,
    emoji_limit: int | None = None,
    emoji_seed: int = 0,
    making: ClipOptions = ClipOptions(),  # noqa: B008  # frozen
    batch: int = 8,
    reader: Path | None = None,
    device: str = "auto",
) -> None:
    """Measure how well clips show what their prompts say. Run an interrupted command again to continue.

    Prints tables and writes alignment.json (results, findings for each clip, and the protocol) and alignment.png (real
    clips above generated ones, including some failures). Generated clips stay in the folder.

    Args:
        model: Folder of a bundle, or its ID on the Hugging Face Hub.
        out: Folder for the results.
        world: Number of prompts about the World, half of them with pairs that training never shows; 0 for none.
        domain: Part of the World that prompts are about; the model in the box learns `simple`.
        emoji: Folder with captions.csv, or table, of animations with alpha, such as emoji.
        emoji_limit: Maximum number of prompts about the animations, evenly spread; clips are compared with every
            animation.
        emoji_seed: Seed of the animations' data preparation, which determines the backgrounds that were never seen.
        making: Generation options.
        batch: Clips per pass; only affects the speed.
        reader: File of the World reader; the package's by default.
        device: Device to run on: cpu, cuda, cuda:0, or auto.
    """
    require(out.is_dir() or not out.exists(), f"{out} is a file, expected a folder")
    require(world >= 0, f"world is {world}, expected 0 or more prompts")
    require(emoji_limit is None or emoji_limit > 0, f"emoji_limit is {emoji_limit}, expected a positive number")
    require(batch > 0, f"batch is {batch}, expected a positive number of clips")
    console, pipeline = Console(highlight=False), making.pipeline(model, device)
    subjects: list[Subject] = [WorldSubject(world, domain, making.seed, reader or FILE)] if world else []
    if emoji is not None:
        subjects.append(EmojiSubject(emoji, emoji_limit, making.seed, emoji_seed))
    else:
        console.print("Without --emoji, animations are left out.")
    require(len(subjects) > 0, "there is nothing to judge: world is 0 and there is no emoji, expected one of them")
    for each in _tables(evaluate(pipeline, model, subjects, making, batch, out)):
        console.print(each)
    print(f"{out / 'alignment.json'}, {out / 'alignment.png'}")


def _tables(results: dict[str, dict[str, RowFindings]]) -> Iterator[Table]:
    """A table of shares for each subject, with half the width of their 95% intervals, and one of movement."""
    for subject, rows in results.items():
        measures = list(next(iter(rows[REAL].verdict.shares.values())))
        shown = []
        for row, judged in rows.items():
            for group, shares in judged.verdict.shares.items():
                count = judged.verdict.counts[group]
                shown.append([row, group, *(_percent(shares[name], count) for name in measures)])
        yield table(f"{subject}: correct (%, 95% interval)", ["", "", *measures], shown, 2)
    moved = [
        [subject, row, f"{ratio:.2f}", f"{100 * static:.1f}", f"{flicker:.2f}"]
        for subject, rows in results.items()
        for row, (_, (ratio, static, flicker)) in rows.items()
    ]
    heads = ["", "", "energy ratio", "static (%)", "flicker (levels)"]
    yield table("Motion, compared with real clips of the same prompts", heads, moved, 2)


def _percent(share: float, count: int) -> str:
    low, high = wilson(share, count)
    return f"{100 * share:.1f} ±{50 * (high - low):.1f}"
