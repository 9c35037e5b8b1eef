"""FVD of worse and worse clips: `python examples/fvd_monotony.py FOLDER [FOLDER ...] --out fvd.png`.

Clips are blurred, covered with noise, frozen and shuffled, each in three strengths, and compared with themselves. FVD
should rise with each. Needs `cogvideo fetch i3d` and the extra `train`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from cogvideo.evaluation.features import i3d
from cogvideo.evaluation.footage import Reading, draw
from cogvideo.evaluation.networks.cache import fetched
from cogvideo.evaluation.protocols import PROTOCOLS

Frames = UInt8[np.ndarray, "frames height width 3"]
Change = Callable[[Frames, np.random.Generator, float], Frames]


def blurred(frames: Frames, random: np.random.Generator, strength: float) -> Frames:
    """Frames through a Gaussian filter of a radius in pixels."""
    softened = ImageFilter.GaussianBlur(strength)
    return np.stack([np.asarray(Image.fromarray(frame).filter(softened)) for frame in frames])


def noisy(frames: Frames, random: np.random.Generator, strength: float) -> Frames:
    """Frames with noise of a deviation in levels."""
    return (frames + random.normal(0, strength, frames.shape)).round().clip(0, 255).astype(np.uint8)


def frozen(frames: Frames, random: np.random.Generator, strength: float) -> Frames:
    """Clips of which a share of frames, the last ones, repeats the one before."""
    moving = len(frames) - round(strength * (len(frames) - 1))
    return frames[np.minimum(np.arange(len(frames)), moving - 1)]


def shuffled(frames: Frames, random: np.random.Generator, strength: float) -> Frames:
    """Clips of which a share of frames changes places."""
    order = np.arange(len(frames))
    moved = random.choice(len(frames), round(strength * len(frames)), replace=False)
    order[np.sort(moved)] = moved
    return frames[order]


CHANGES: dict[str, tuple[Change, tuple[float, ...]]] = {
    "blur (radius in pixels)": (blurred, (1, 2, 4)),
    "noise (levels)": (noisy, (10, 25, 50)),
    "frozen frames (share)": (frozen, (0.3, 0.6, 1)),
    "shuffled frames (share)": (shuffled, (0.3, 0.6, 1)),
}


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="+", help="folders of clips")
    parser.add_argument("--out", type=Path, default=Path("fvd.png"), help="the picture")
    parser.add_argument("--clips", type=int, default=64, help="clips of each folder at most")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--fps", type=float, default=8, help="frames a second")
    options = parser.parse_args()
    protocol = replace(PROTOCOLS["tats"], frames=options.frames)
    reading = Reading(protocol, options.fps)
    excerpts = [each for source in options.folder for each in draw(source, reading, "start", options.clips, 0).excerpts]
    clips = [reading.read(each, None) for each in excerpts]
    encode = i3d(fetched("i3d"), protocol).load("cpu")

    def features(change: Callable[[Frames, np.random.Generator], Frames]) -> torch.Tensor:
        randoms = [np.random.default_rng(number) for number in range(len(clips))]
        with torch.inference_mode():
            return torch.cat([encode([(change(clip, random),)]) for clip, random in zip(clips, randoms, strict=True)])

    true = features(lambda frames, _: frames)
    figure, axes = plt.subplots(1, len(CHANGES), figsize=(11, 2.6), layout="constrained")
    for axis, (name, (change, strengths)) in zip(axes, CHANGES.items(), strict=True):
        values = [protocol.fvd(true, features(partial(_changed, change, strength))) for strength in strengths]
        print(f"{name:26}", *(f"{strength:g}: {value:.0f}" for strength, value in zip(strengths, values, strict=True)))
        axis.plot([0, *strengths], [0, *values], marker="o")
        axis.set(title=name, ylabel="FVD" if axis is axes[0] else "")
    figure.suptitle(f"FVD of {len(clips)} changed clips against themselves")
    figure.savefig(options.out, dpi=80)


def _changed(change: Change, strength: float, frames: Frames, random: np.random.Generator) -> Frames:
    return change(frames, random, strength)


if __name__ == "__main__":
    main()
