"""`cogvideo data world`: clips of the World as files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal

from cogvideo import world as synthetic
from cogvideo.config import require
from cogvideo.files import write_text
from cogvideo.world.scenes import Scene

FPS = 8.0
"""Frames per second of the files."""
SHEET_ROWS, SHEET_COLUMNS, SHEET_SIZE = 24, 9, 96
"""Maximum number of clips and frames on the contact sheet, and their side."""


def world(
    *,
    out: Path,
    clips: int = 24,
    start: int = 0,
    size: int = 192,
    split: Literal["train", "validation", "held_out", "all"] = "all",
    domain: Literal["full", "simple"] = "full",
) -> None:
    """Write clips of the World: mp4 files, their captions and attributes in captions.jsonl, and a contact sheet.

    The World is a synthetic source of captioned clips, each determined by its number. Training on it needs no files:
    `cogvideo data prepare world:100000` reads its first 100,000 clips directly, `world:5000:6000` a part of them, and
    `world:simple:20000` clips of the simple domain. The folder that this command writes is a source, too.

    Args:
        out: Folder for the files, created if missing. Files of an earlier run are replaced.
        clips: Number of clips.
        start: Number of the first clip.
        size: Side of a frame in pixels, an even number.
        split: Split of the clips; held_out has pairs of attributes that training never shows.
        domain: Part of the World: all of it, or simple scenes with one large figure, which small models can learn.
    """
    from cogvideo.media.images import contact_sheet, write_image  # only a command needs codecs
    from cogvideo.media.video import write_video

    require(clips > 0, f"clips is {clips}, expected a positive number")
    require(start >= 0, f"start is {start}, expected 0 or more")
    fits = synthetic.MIN_SIZE <= size <= synthetic.MAX_SIZE and size % 2 == 0
    require(fits, f"size is {size}, expected an even number from {synthetic.MIN_SIZE} to {synthetic.MAX_SIZE}")
    require(out.is_dir() or not out.exists(), f"{out} is a file, expected a folder")
    table, sheet = out / "captions.jsonl", out / "contact_sheet.png"
    is_free = table.read_bytes().startswith(b'{"file": "world-') if table.exists() else not sheet.exists()
    require(is_free, f"{out} has a captions.jsonl or contact_sheet.png of something else: pass another folder")
    out.mkdir(parents=True, exist_ok=True)
    scenes = list(itertools.islice(synthetic.scenes(split, start, domain), clips))
    for scene in scenes:
        write_video(out / _name(scene), synthetic.render(scene, size, FPS), FPS)
    write_text(table, "".join(json.dumps(_row(scene)) + "\n" for scene in scenes))
    shown = scenes[:SHEET_ROWS]
    rows = [synthetic.render(scene, SHEET_SIZE, FPS) for scene in shown]
    write_image(sheet, contact_sheet(rows, SHEET_COLUMNS, labels=[synthetic.captions(scene)[0] for scene in shown]))
    print(f"{clips} clips, captions.jsonl and contact_sheet.png are in {out}")


def _name(scene: Scene) -> str:
    return f"world-{scene.index:06}.mp4"


def _row(scene: Scene) -> dict[str, Any]:
    """A row of the table that `cogvideo data prepare` reads."""
    row = {"file": _name(scene), "caption": list(synthetic.captions(scene)), "split": synthetic.split(scene)}
    return row | synthetic.attributes(scene)
