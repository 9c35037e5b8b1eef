"""The picture at the top of the README: `python examples/gallery.py docs/gallery.png [MODEL]`.

It shows twelve prompts with the first seed of each, without selection, failures included.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from cogvideo.media.images import contact_sheet, write_image
from cogvideo.pipeline import CogVideoPipeline

PROMPTS = (
    "a yellow face blinks, then opens its mouth into a happy smile, on a light blue background",
    "a red heart beats, on a white background",
    "a green crocodile snaps its jaws, on a pink background",
    "a brown monkey covers its ears with its hands, on a purple background",
    "a golden trophy bounces with confetti, on a green background",
    "a blue dolphin leaps, on a brown background",
    "a large red ball bounces in from the left, bounces twice and leaves on the right, on a beach, slowly",
    "a large yellow star grows and bursts, at night, slowly",
    "quickly, a large blue car crosses the picture from right to left in three hops, in the desert",
    "a large green balloon zigzags up like a bubble, at sunset, all slowly",
    "a large purple heart swings on a string like a pendulum, first to the left, in a room, slowly",
    "a large white moon rises on the left and sets on the right, in a city, taking its time",
)


def main(path: Path, model: str) -> None:
    """Generate the clips and write the picture."""
    pipeline = CogVideoPipeline.from_pretrained(model)
    rows = []
    for prompt in PROMPTS:
        clips = pipeline(prompt, generator=torch.Generator().manual_seed(1))
        rows.append(clips.frames[0])
    write_image(path, contact_sheet(rows, 5, labels=PROMPTS))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python examples/gallery.py PICTURE [MODEL]")
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else "pocket")
