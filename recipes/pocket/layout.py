"""Converter of the public animated emoji to training clips: `python recipes/pocket/layout.py GIFS OUT [--all]`.

GIFS is the folder `google-noto-emoji-gifs` of github.com/DeLTa-X-Tunisia/noto-emoji-animation-GIF (commit 9d8c6eaf),
with files such as `001_smile.gif`. Into OUT go clips such as `clips/001_smile.webp`, 128 x 128 pixels with alpha, and
our captions, `captions.csv`: those marked `pocket`, which a small model can tell apart, or all 706. Art: Animated Noto
Emoji by Google (googlefonts.github.io/noto-emoji-animation), CC BY 4.0.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from PIL import Image, ImageSequence

CAPTIONS = Path(__file__).parent / "captions.csv"
SIDE = 128


def layout(source: Path, out: Path, has_all: bool = False) -> list[str]:
    """Write the chosen clips, or all; returns the names of missing ones."""
    (out / "clips").mkdir(parents=True, exist_ok=True)
    missing = []
    rows = chosen(has_all)
    for row in rows:
        name = Path(row["file"])
        path = source / name.with_suffix(".gif").name
        if path.exists():
            convert(path, out / name)
        else:
            missing.append(path.name)
    with (out / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return missing


def chosen(has_all: bool) -> list[dict[str, str]]:
    """Rows of the captions."""
    with CAPTIONS.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if has_all or row["pocket"] == "yes"]


def convert(path: Path, target: Path) -> None:
    """Convert an animation and keep the duration of each frame."""
    with Image.open(path) as image:
        frames = [frame.convert("RGBA") for frame in ImageSequence.Iterator(image)]
        durations = [frame.info.get("duration", 67) for frame in ImageSequence.Iterator(image)]
    small = [frame.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for frame in frames]
    small[0].save(target, save_all=True, append_images=small[1:], duration=durations, loop=0, lossless=True)


if __name__ == "__main__":
    arguments = [each for each in sys.argv[1:] if each != "--all"]
    if len(arguments) != 2:
        sys.exit("usage: python recipes/pocket/layout.py GIFS OUT [--all]")
    missing = layout(Path(arguments[0]), Path(arguments[1]), "--all" in sys.argv)
    if missing:
        sys.exit(f"{len(missing)} animations are missing in {arguments[0]}: {', '.join(missing[:5])} ...")
