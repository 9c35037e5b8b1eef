"""The public animated emoji as clips to train on: `python recipes/pocket/layout.py GIFS OUT`.

GIFS is the folder `google-noto-emoji-gifs` of github.com/DeLTa-X-Tunisia/noto-emoji-animation-GIF (commit 9d8c6eaf),
whose files are called such as `001_smile.gif`. OUT gets `clips/001_smile.webp`, 128 x 128 pixels with alpha, and
`captions.csv`, our captions. Art: Animated Noto Emoji by Google (googlefonts.github.io/noto-emoji-animation), CC BY
4.0.
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageSequence

CAPTIONS = Path(__file__).parent / "captions.csv"
SIDE = 128


def layout(source: Path, out: Path) -> list[str]:
    """Write all clips that a caption names; the names of those that are missing are returned."""
    (out / "clips").mkdir(parents=True, exist_ok=True)
    missing = []
    with CAPTIONS.open(encoding="utf-8", newline="") as file:
        names = [Path(row["file"]) for row in csv.DictReader(file)]
    for name in names:
        path = source / name.with_suffix(".gif").name
        if path.exists():
            convert(path, out / name)
        else:
            missing.append(path.name)
    shutil.copyfile(CAPTIONS, out / "captions.csv")
    return missing


def convert(path: Path, target: Path) -> None:
    """One animation, frame by frame, each as long as it was."""
    with Image.open(path) as image:
        frames = [frame.convert("RGBA") for frame in ImageSequence.Iterator(image)]
        durations = [frame.info.get("duration", 67) for frame in ImageSequence.Iterator(image)]
    small = [frame.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for frame in frames]
    small[0].save(target, save_all=True, append_images=small[1:], duration=durations, loop=0, lossless=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/pocket/layout.py GIFS OUT")
    missing = layout(Path(sys.argv[1]), Path(sys.argv[2]))
    if missing:
        sys.exit(f"{len(missing)} animations are missing in {sys.argv[1]}: {', '.join(missing[:5])} ...")
