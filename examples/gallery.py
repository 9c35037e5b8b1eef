"""The moving picture at the top of the README: `python examples/gallery.py docs/gallery.webp [MODEL]`.

It shows sixteen prompts that training never sees, with the first seed of each, without selection, failures included.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from cogvideo.pipeline import CogVideoPipeline

PROMPTS = (
    "a yellow face blinks, then opens its mouth into a happy smile, on a purple background",
    "slowly, a purple parcel jumps twice, then shoots up and away, on a beach",
    "a green snake flicks its tongue, on a purple background",
    "A large violet fish quickly falls from high up, bounces a few times and stops, on a winter day.",
    "a brown monkey covers its eyes with its hands, on a yellow background",
    "A huge red box under water spins in the air, lands and topples over to the right, unhurriedly.",
    "a brown owl tilts its head, on a black background",
    "a huge violet car in a meadow slides in from the left, bounces twice and leaves on the right, in a hurry",
    "slowly, a pink star in a room bounces twice on its way from left to right through the picture",
    "a golden bell swings and rings, on a brown background",
    "At the bottom of the sea, a big red heart gets bigger and bigger, then bursts into pieces, in a hurry.",
    "a blue fish swims back and forth, on a pink background",
    "on a green meadow, a huge orange pyramid rises high up and sinks again, moving right, in a hurry",
    "a green frog face catches a fly, on a pink background",
    "A huge pink mushroom in a living room makes two small jumps and flies up like a rocket, all slowly.",
    "two sticks play a red drum, on a white background",
)
SIDE, QUALITY = 144, 80
"""Pixels of a side of each clip, and the quality of WebP: together they keep the file below 3 MB."""


def main(path: Path, model: str) -> None:
    """Write the picture: four rows of four clips."""
    pipeline, clips = CogVideoPipeline.from_pretrained(model), []
    for prompt in PROMPTS:
        made = pipeline(prompt, generator=torch.Generator().manual_seed(1))
        clips.append([np.asarray(Image.fromarray(frame).resize((SIDE, SIDE))) for frame in made.frames[0]])
    grid = rearrange(np.array(clips), "(rows columns) time h w rgb -> time (rows h) (columns w) rgb", rows=4)
    first, *others = map(Image.fromarray, grid)
    duration = round(1000 / made.fps)
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0, quality=QUALITY, method=6)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python examples/gallery.py PICTURE.webp [MODEL]")
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else "pocket")
