"""Clips of a dataset with their frames: as in the source, and as decoded from their codes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8

from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import CogVideo, locate
from cogvideo.config import InputError, Sides, both, require, size_text, times
from cogvideo.data.dataset import Card
from cogvideo.data.frames import FrameSettings, read_item, shrink
from cogvideo.data.shards import Row
from cogvideo.data.sources import Item, SourceOptions, list_source
from cogvideo.media.colors import Pixels
from cogvideo.media.images import evenly
from cogvideo.media.metrics import psnr
from cogvideo.media.video import VideoError
from cogvideo.models.autoencoder import Autoencoder, to_pixels
from cogvideo.world.scenes import Scene

TOKENIZER = "image_tokenizer"
GAP = 2
"""Pixels between frames."""


class ShownClip(NamedTuple):
    """A row with some of its frames, evenly spaced."""

    row: Row
    original: Pixels | None = None
    """Frames as the encoder saw them; None if the source no longer has them."""
    decoded: Pixels | None = None
    """Frames as the tokenizer decodes the codes; None without the tokenizer."""
    psnr: float | None = None
    """Mean over the frames in dB; None unless both exist."""
    problem: str = ""
    """Why the original is missing although the source exists."""

    @property
    def parts(self) -> str:
        """Rows of `sheet` in words, from top to bottom."""
        names = ["the original"] * (self.original is not None) + ["the reconstruction"] * (self.decoded is not None)
        return " and ".join(names) or "neither the original nor the reconstruction"

    @property
    def sheet(self) -> UInt8[np.ndarray, "height width 4"] | None:
        """One picture of all frames, with transparent gaps in between; None if there are no frames."""
        rows = [frames for frames in (self.original, self.decoded) if frames is not None]
        if not rows:
            return None
        opaque = np.pad(np.stack(rows), [(0, 0)] * 4 + [(0, 1)], constant_values=255)
        spaced = np.pad(opaque, [(0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)])
        return rearrange(spaced, "rows columns height width c -> (rows height) (columns width) c")


@dataclass
class DatasetOrigin:
    """Source and tokenizer of a dataset, as far as they are still there."""

    card: Card
    items: dict[str, Item] = field(default_factory=dict)
    """Items of the source that are needed, by id."""
    frames: FrameSettings | None = None
    """Settings that turned them into frames; None without the source."""
    autoencoder: Autoencoder | None = None
    missing: list[str] = field(default_factory=list)

    @torch.inference_mode()
    def clip(self, row: Row, columns: int) -> ShownClip:
        """A row with `columns` of its frames, or all if there are no more."""
        places = evenly(len(row.codes), columns)
        clip = ShownClip(row)
        try:
            if self.frames is not None:
                clip = clip._replace(original=self._original(row, self.frames)[places])
        except InputError as error:
            clip = clip._replace(problem=str(error))
        if self.autoencoder is None:
            return clip
        codes = torch.from_numpy(row.codes[places].astype(np.int64))
        decoded = self.autoencoder.decode(codes, chunk=1).float().clamp(0, 1)
        clip = clip._replace(decoded=to_pixels(decoded))
        if clip.original is None:
            return clip
        size, other = (size_text((width, height)) for height, width in (clip.original.shape[1:3], decoded.shape[2:]))
        if size != other:
            problem = f"the source has frames of {size} pixels, the codes of {other}"
            return clip._replace(original=None, problem=problem)
        pixels = torch.from_numpy(rearrange(clip.original, "frames height width c -> frames c height width") / 255)
        return clip._replace(psnr=psnr(pixels.float(), decoded).mean().item())

    def _original(self, row: Row, settings: FrameSettings) -> Pixels:
        """The frames of a row that were encoded."""
        require(row.id in self.items, "the source no longer has this clip")
        try:
            frames = read_as_encoded(self.items[row.id], settings, self.card)
        except VideoError as error:
            raise InputError(f"it can no longer be read ({error})") from error
        got, expected = len(frames), len(row.codes)
        require(got == expected, f"the source has changed: it gives {got} frames, the dataset has {expected}")
        return frames

    def sizes(self, ids: Iterable[str]) -> list[tuple[int, int]]:
        """Stored width and height of items, from the first frame of each readable one."""
        if self.frames is None:
            return []
        settings = replace(self.frames, size=None, min_frames=1, max_seconds=1 / self.frames.fps, loop_to=0.0)
        found = []
        for item in (self.items[id] for id in ids if id in self.items):
            if not isinstance(item.media, Scene):
                try:
                    _, height, width, _ = read_item(item, settings).frames.shape
                except VideoError:
                    continue
                found.append((width, height))
        return found


def find_origin(card: Card, tokenizer: str, ids: Iterable[str]) -> DatasetOrigin:
    """Look for some clips of the source, and for the tokenizer, the one on the card unless another is given."""
    origin = DatasetOrigin(card)
    try:
        frames = FrameSettings(**card.settings["frames"] | {"size": frame_size(card)})
        origin.items = _find_items(card, set(ids))
        origin.frames = frames
    except (KeyError, TypeError, AttributeError) as error:
        origin.missing.append(f"Originals: the settings on the card are not those of this version ({error}).")
    except (InputError, OSError) as error:
        origin.missing.append(f"Originals: {error}.")
    try:
        origin.autoencoder = _load_tokenizer(card, tokenizer or card.tokenizer)
    except (InputError, OSError) as error:
        hint = "" if tokenizer else " If it was moved, pass --tokenizer."
        origin.missing.append(f"Reconstructions: {error}.{hint}")
    return origin


def frame_size(card: Card) -> Sides | None:
    """Size of a frame in pixels, if the card has it."""
    frames = card.settings.get("frames")
    size = frames.get("size") if isinstance(frames, dict) else None
    return tuple(size) if isinstance(size, list) else size


def _find_items(card: Card, ids: set[str]) -> dict[str, Item]:
    values = card.settings["source"].items()
    settings: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values}
    options = SourceOptions(**settings)
    sources = [card.source]
    if card.source.startswith("world:"):  # five million captions take minutes to make
        parts = (re.split("[/~]", id) for id in ids)  # such as world-simple/000012~3
        numbered = {(folder.replace("-", ":"), int(number)) for folder, number, *_ in parts}
        sources = [f"{folder}:{number}:{number + 1}" for folder, number in sorted(numbered)]
    items = (item for source in sources for item in list_source(source, options).items)
    return {item.id: item for item in items if item.id in ids}


def _load_tokenizer(card: Card, name: str) -> Autoencoder:
    """The tokenizer that made the codes of a dataset, from a folder or an id on the Hugging Face Hub."""
    folder = locate(name)
    entry = Manifest.read(folder).entry(TOKENIZER, f"the bundle {folder}")
    expected = f"the codes were made with the one of sha256 {card.tokenizer_sha256:.12}"
    got = f"{folder} holds another image tokenizer (sha256 {entry.sha256:.12})"
    require(entry.sha256 == card.tokenizer_sha256, f"{got}, {expected}")
    return CogVideo.from_pretrained(folder).autoencoder


def read_as_encoded(item: Item, settings: FrameSettings, card: Card) -> Pixels:
    """The frames that were encoded. With codes for super-resolution, they are means of larger frames."""
    ratio = both(card.high_grid)[0] // both(card.grid)[0]
    if ratio < 2 or settings.size is None:
        return read_item(item, settings).frames
    return shrink(read_item(item, replace(settings, size=times(settings.size, ratio))).frames, ratio)
