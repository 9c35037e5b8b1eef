"""The World reader: a small classifier of what a clip of the World shows, to compare it with its caption.

It predicts the object, its color, the action, direction, speed and background, and also what helps to tell these apart:
the size, and the object and color of a second figure. `cogvideo train reader` trains it; its weights come with the
package. The input is 17 frames, 4 per second, of 64 x 64 pixels, to which all clips can be reduced.

Models train only on the split `train`. The reader trains on all splits, but on no clip numbered below `FIRST_TRAINING`:
its test clips and those that models are judged on have lower numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cogvideo import world
from cogvideo.config import InputError, from_dict, require
from cogvideo.files import replacing
from cogvideo.media.colors import Pixels
from cogvideo.world.scenes import Split

NUM_FRAMES, FPS, SIZE = 17, 4.0, 64
"""Frames of a clip, their rate, and their side in pixels."""
ATTRIBUTES = ("object", "colour", "action", "direction", "speed", "background")
"""Attributes that clips are judged by."""
LABELS: dict[str, tuple[str, ...]] = {
    "object": world.OBJECTS,
    "colour": tuple(world.COLORS),
    "action": tuple(world.ACTS),
    "direction": tuple(dict.fromkeys(chain.from_iterable(act.directions for act in world.ACTS.values()))),
    "speed": world.SPEEDS,
    "background": tuple(world.PLACES),
    "size": world.SIZES,
    "other_object": ("", *world.OBJECTS),
    "other_colour": ("", *world.COLORS),
}
"""Values of each attribute; empty for a second figure that is not there."""
TEMPORAL_ATTRIBUTES = ("action", "direction", "speed")
"""Attributes that cannot be seen in a single frame."""
FILE = Path(__file__).with_name("world_reader.safetensors")
"""The weights that come with the package."""
NUM_MOMENTS = 5
"""Length in time where attributes are predicted."""
BATCH = 32
"""Clips per batch."""
ALL = "all right"
"""Name of the share of clips with every attribute right."""
FIRST_PROMPT, FIRST_TEST, FIRST_TRAINING = 500_000, 900_000, 1_000_000
"""First numbers of the clips whose captions are prompts, of the reader's test clips, and of its training clips."""
NUM_SEARCHED = 30_000
"""Numbers searched for unseen scenes; in the simple World, these have 570 different scenes of `validation`."""


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes."""

    widths: tuple[int, int, int, int] = (32, 64, 128, 160)
    """Channels at 32 x 32, 16 x 16, 8 x 8 and 4 x 4 positions of a frame."""
    blocks: tuple[int, int, int, int] = (0, 2, 2, 1)
    """Number of residual blocks at these sizes."""
    hidden: int = 128
    """Width of the hidden layer that reads all frames in order."""

    def __post_init__(self) -> None:
        require(min(self.widths) > 0, f"widths are {self.widths}, expected positive numbers")
        require(min(self.blocks) >= 0, f"blocks are {self.blocks}, expected 0 or more")
        require(self.hidden > 0, f"hidden is {self.hidden}, expected a positive number")


class Block(nn.Module):
    """A residual block that looks at neighbors in space, then in time: a (2+1)D convolution (arXiv 1711.11248)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.space = nn.Sequential(*_active(width), nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1), bias=False))
        self.time = nn.Sequential(*_active(width), nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0)))

    def forward(
        self, x: Float[Tensor, "batch width time rows columns"]
    ) -> Float[Tensor, "batch width time rows columns"]:
        return x + self.time(self.space(x))


class Reader(nn.Module):
    """Scores of the values of each attribute.

    Convolutions halve the frame size four times, with residual blocks in between; the first and the last also halve
    time, from 17 frames to 9 and 5 moments. Looks are predicted from the mean and maximum over space and time, events
    from a hidden layer that sees the mean and maximum over space at each moment, in order. Batch norm learns shapes in
    half as many steps as group norm; in evaluation its statistics are fixed, and no clip depends on another.
    """

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        last = len(config.blocks) - 1
        for stage, (before, after) in enumerate(pairwise((3, *config.widths))):
            time, stride = (3, 2) if stage in (0, last) else (1, 1)
            halving = nn.Conv3d(before, after, (time, 3, 3), (stride, 2, 2), (time // 2, 1, 1))
            layers += [*(_active(before) if stage else []), halving]
            layers += [Block(after) for _ in range(config.blocks[stage])]
        width = config.widths[-1]
        self.body = nn.Sequential(*layers, *_active(width))
        self.hidden = nn.Linear(2 * NUM_MOMENTS * width, config.hidden)
        inputs = {name: config.hidden if name in TEMPORAL_ATTRIBUTES else 2 * width for name in LABELS}
        self.heads = nn.ModuleDict({name: nn.Linear(inputs[name], len(each)) for name, each in LABELS.items()})

    def forward(self, clips: Float[Tensor, "batch 3 17 64 64"]) -> dict[str, Float[Tensor, "batch _"]]:
        """Scores by attribute; pixels are in [0, 1]."""
        features = self.body(2 * clips - 1)
        moments = torch.cat([features.mean((3, 4)), features.amax((3, 4))], 1)
        happens = F.silu(self.hidden(moments.flatten(1)))
        return self._looks(features) | {name: self.heads[name](happens) for name in TEMPORAL_ATTRIBUTES}

    def looks(self, clips: Float[Tensor, "batch 3 frames 64 64"]) -> dict[str, Float[Tensor, "batch _"]]:
        """Scores of attributes that a single frame shows, from clips of any length, including single frames."""
        return self._looks(self.body(2 * clips - 1))

    def _looks(self, features: Float[Tensor, "batch width time rows columns"]) -> dict[str, Float[Tensor, "batch _"]]:
        pooled = torch.cat([features.mean((2, 3, 4)), features.amax((2, 3, 4))], 1)
        return {name: self.heads[name](pooled) for name in LABELS if name not in TEMPORAL_ATTRIBUTES}

    @torch.inference_mode()
    def read(self, clips: UInt8[np.ndarray, "batch 17 64 64 3"]) -> list[dict[str, str]]:
        """The most likely values of each clip, by attribute."""
        device = self.hidden.weight.device
        chosen: dict[str, list[int]] = {name: [] for name in LABELS}
        for start in range(0, len(clips), BATCH):
            scores = self(to_input(clips[start : start + BATCH], device))
            for name, each in scores.items():
                chosen[name] += each.argmax(-1).tolist()
        return [{name: LABELS[name][chosen[name][clip]] for name in LABELS} for clip in range(len(clips))]

    def save(self, path: Path) -> None:
        """Write sizes and half-precision weights, atomically."""
        state = {name: each.detach().cpu().contiguous() for name, each in self.state_dict().items()}
        tensors = {name: each.half() if each.is_floating_point() else each for name, each in state.items()}
        described = {"reader": json.dumps({"config": asdict(self.config), "labels": LABELS})}
        with replacing(path) as file:
            file.write(save(tensors, described))

    @classmethod
    def load(cls, path: Path = FILE) -> Reader:
        """The reader from a file, in single precision."""
        require(path.is_file(), f"there is no reader {path}: `cogvideo train reader --out {path}` makes one")
        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {}).get("reader", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise InputError(f"cannot use the reader {path}: {error}") from error
        require(described is not None, f"{path} is not a reader, expected a file of `cogvideo train reader`")
        ours = json.loads(json.dumps(LABELS))
        require(described["labels"] == ours, f"the reader {path} was trained on another World: train it again")
        reader = cls(from_dict(ReaderConfig, described["config"]))
        reader.load_state_dict(tensors)
        return reader.eval()


def _active(width: int) -> list[nn.Module]:
    return [nn.BatchNorm3d(width), nn.SiLU()]


def to_input(
    clips: UInt8[np.ndarray, "batch frames size size 3"], device: torch.device
) -> Float[Tensor, "batch 3 frames size size"]:
    """Pixels in [0, 1]."""
    pixels = torch.from_numpy(clips).to(device, torch.float32) / 255
    return rearrange(pixels, "batch frames rows columns colors -> batch colors frames rows columns")


def readable(frames: Pixels, fps: float = 8.0) -> UInt8[np.ndarray, "17 64 64 3"]:
    """A clip of four seconds as the reader expects it: 4 frames per second, each pixel the mean of those it covers."""
    stride = round(fps / FPS)
    require(
        stride >= 1 and stride * FPS == fps, f"clips have {fps:g} frames per second, expected a multiple of {FPS:g}"
    )
    expected = stride * (NUM_FRAMES - 1) + 1
    require(len(frames) == expected, f"a clip has {len(frames)} frames, expected {expected} at {fps:g} per second")
    return resized(frames[::stride], SIZE)


def resized(frames: Pixels, size: int) -> UInt8[np.ndarray, "frames {size} {size} 3"]:
    """Frames at another size: each pixel is the mean of those it covers."""
    if frames.shape[1:3] == (size, size):
        return np.ascontiguousarray(frames)
    pixels = rearrange(torch.from_numpy(np.ascontiguousarray(frames)).float(), "t h w colors -> t colors h w")
    made = F.interpolate(pixels, (size, size), mode="area").round().byte()
    return rearrange(made, "t colors h w -> t h w colors").contiguous().numpy()


def labels(scenes: Sequence[world.Scene]) -> dict[str, Int64[Tensor, " scenes"]]:
    """Label indices of the scenes' true values, by attribute."""
    return {
        name: torch.tensor([LABELS[name].index(getattr(scene, name)) for scene in scenes], dtype=torch.int64)
        for name in LABELS
    }


def render(scene: world.Scene) -> UInt8[np.ndarray, "17 64 64 3"]:
    """A scene as the reader expects it."""
    return world.render(scene, SIZE, FPS, NUM_FRAMES)


def unseen_scenes(number: int, start: int, domain: str = "full") -> list[world.Scene]:
    """Scenes that no model is trained on, numbered from `start`: half with held-out pairs, half of `validation`."""
    held_out = _different("held_out", number // 2, start, domain)
    return [*held_out, *_different("validation", number - number // 2, start, domain)]


def _different(split: Split, number: int, start: int, domain: str) -> list[world.Scene]:
    """The first scenes of a split that look different from each other."""
    found: dict[world.Scene, world.Scene] = {}
    for scene in world.scenes(split, start, domain):
        if len(found) == number or scene.index >= start + NUM_SEARCHED:
            break
        found.setdefault(replace(scene, index=0), scene)
    require(len(found) == number, f"the World has {len(found)} unseen {domain} scenes of {split}, expected {number}")
    return list(found.values())


def right(reading: Mapping[str, str], scene: world.Scene) -> dict[str, bool]:
    """Whether each attribute of a clip matches its scene, and last, whether all do."""
    each = {name: reading[name] == getattr(scene, name) for name in ATTRIBUTES}
    return each | {ALL: all(each.values())}


def accuracies(readings: Sequence[Mapping[str, str]], scenes: Sequence[world.Scene]) -> dict[str, dict[str, float]]:
    """Share of right readings, by group of scenes and attribute; groups without a clip are left out."""
    results = [right(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
    return {
        group: {name: sum(results[place][name] for place in places) / len(places) for name in (*ATTRIBUTES, ALL)}
        for group, places in groups(scenes).items()
    }


def groups(scenes: Sequence[world.Scene]) -> dict[str, list[int]]:
    """Indices of the scenes in each nonempty group."""
    held_out = {place for place, scene in enumerate(scenes) if world.is_held_out(scene)}
    every = range(len(scenes))
    others = [place for place in every if place not in held_out]
    places = {"all clips": [*every], "held-out pairs": sorted(held_out), "other clips": others}
    return {name: group for name, group in places.items() if group}
