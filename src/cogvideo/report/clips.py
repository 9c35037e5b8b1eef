"""Clips of a dataset with their frames: as they are in the source, and as they are decoded from their codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import CogVideo, locate
from cogvideo.config import InputError
from cogvideo.data.dataset import Card
from cogvideo.data.frames import FrameSettings, read_item, shrink
from cogvideo.data.shards import Row
from cogvideo.data.sources import Item, Rendering, SourceOptions, list_source
from cogvideo.media.images import evenly
from cogvideo.media.metrics import psnr
from cogvideo.media.video import VideoError
from cogvideo.models.autoencoder import Autoencoder, to_pixels

TOKENIZER = "image_tokenizer"
GAP = 2
"""Pixels between frames."""

Frames = UInt8[np.ndarray, "frames size size 3"]


class Clip(NamedTuple):
    """A row with some of its frames, evenly spaced."""

    row: Row
    original: Frames | None
    """Frames as the encoder saw them; None where the source no longer has them."""
    decoded: Frames | None
    """Frames as the tokenizer decodes the codes; None without the tokenizer."""
    psnr: float | None
    """Mean over the frames in dB; None unless both are there."""
    problem: str = ""
    """Why the original is missing although the source is there."""

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
class Origin:
    """Source and tokenizer of a dataset, as far as they are still there."""

    card: Card
    items: dict[str, Item] = field(default_factory=dict)
    """Items of the source that are needed, by id."""
    frames: FrameSettings | None = None
    """How they became frames; None without the source."""
    autoencoder: Autoencoder | None = None
    missing: list[str] = field(default_factory=list)
    """Descriptions of what is not there."""

    def clip(self, row: Row, columns: int) -> Clip:
        """A row with `columns` of its frames, or all where there are no more."""
        places = evenly(len(row.codes), columns)
        frames, problem = self._original(row)
        original = None if frames is None else frames[places]
        if self.autoencoder is None:
            return Clip(row, original, None, None, problem)
        decoded = _decode(self.autoencoder, row.codes[places])
        if original is None:
            return Clip(row, None, to_pixels(decoded), None, problem)
        if original.shape[1:3] != decoded.shape[2:]:
            problem = f"the source has frames of {original.shape[1]} pixels, the codes of {decoded.shape[2]}"
            return Clip(row, None, to_pixels(decoded), None, problem)
        pixels = torch.from_numpy(rearrange(original, "frames height width c -> frames c height width") / 255).float()
        return Clip(row, original, to_pixels(decoded), psnr(pixels, decoded).mean().item())

    def _original(self, row: Row) -> tuple[Frames | None, str]:
        if self.frames is None:
            return None, ""
        if row.id not in self.items:
            return None, "the source no longer has this clip"
        try:
            frames = read_as_encoded(self.items[row.id], self.frames, self.card)
        except VideoError as error:
            return None, f"it can no longer be read ({error})"
        if len(frames) != len(row.codes):
            return None, f"the source has changed: it gives {len(frames)} frames, the dataset has {len(row.codes)}"
        return frames, ""

    def sizes(self, ids: Iterable[str]) -> list[tuple[int, int]]:
        """Width and height of items as they are stored, from the first frame of each that can be read."""
        if self.frames is None:
            return []
        settings = replace(self.frames, size=None, min_frames=1, max_seconds=1 / self.frames.fps, loop_to=0.0)
        found = []
        for item in (self.items[id] for id in ids if id in self.items):
            if not isinstance(item.media, Rendering):
                try:
                    _, height, width, _ = read_item(item, settings).frames.shape
                except VideoError:
                    continue
                found.append((width, height))
        return found


def find_origin(card: Card, tokenizer: str, ids: Iterable[str]) -> Origin:
    """Look for the source and the tokenizer of a dataset; `missing` describes what is not found.

    Args:
        card: card of the dataset.
        tokenizer: where to look for the tokenizer; empty for the place on the card.
        ids: ids of the clips that are needed.
    """
    origin = Origin(card)
    try:
        frames = FrameSettings(**card.settings["frames"])
        origin.items = _find_items(card, set(ids))
        origin.frames = frames
    except (KeyError, TypeError, AttributeError) as error:
        origin.missing.append(f"Originals: the settings on the card are not those of this version ({error}).")
    except (InputError, OSError) as error:
        origin.missing.append(f"Originals: {error}.")
    try:
        origin.autoencoder = load_tokenizer(card, tokenizer or card.tokenizer)
    except (InputError, OSError) as error:
        hint = "" if tokenizer else " If it was moved, pass --tokenizer."
        origin.missing.append(f"Reconstructions: {error}.{hint}")
    return origin


def frame_size(card: Card) -> int | None:
    """Side of a frame in pixels, if the card has it."""
    frames = card.settings.get("frames")
    return frames.get("size") if isinstance(frames, dict) else None


def _find_items(card: Card, ids: set[str]) -> dict[str, Item]:
    values = card.settings["source"].items()
    settings: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values}
    options = SourceOptions(**settings)
    sources = [card.source]
    if card.source.startswith("world:"):  # five million captions take minutes to make
        sources = sorted(set(map(_world_source, ids)))
    items = (item for source in sources for item in list_source(source, options).items)
    return {item.id: item for item in items if item.id in ids}


def _world_source(id: str) -> str:
    """The source of one clip of the World, by the id of the clip or of a copy."""
    folder, _, name = id.partition("/")
    number = int(name.partition("~")[0])
    return f"{folder.replace('-', ':')}:{number}:{number + 1}"


def load_tokenizer(card: Card, name: str) -> Autoencoder:
    """The tokenizer that made the codes of a dataset.

    Args:
        card: card of the dataset.
        name: folder of a bundle, or its id on the Hugging Face Hub.

    Raises:
        ValueError: there is no such bundle, it is damaged, or it has another image tokenizer.
    """
    folder = locate(name)
    entry = Manifest.read(folder).components.get(TOKENIZER)
    if entry is None:
        raise InputError(f"the bundle {folder} has no {TOKENIZER}")
    if entry.sha256 != card.tokenizer_sha256:
        expected = f"the codes were made with the one of sha256 {card.tokenizer_sha256:.12}"
        raise InputError(f"{folder} holds another image tokenizer (sha256 {entry.sha256:.12}), {expected}")
    return CogVideo.from_pretrained(folder).autoencoder


def read_as_encoded(item: Item, settings: FrameSettings, card: Card) -> Frames:
    """The frames that were encoded. With codes for super-resolution, they are means of larger frames.

    Raises:
        VideoError: they cannot be read.
    """
    ratio = card.high_grid // card.grid
    if ratio < 2 or settings.size is None:
        return read_item(item, settings).frames
    return shrink(read_item(item, replace(settings, size=settings.size * ratio)).frames, ratio)


@torch.inference_mode()
def _decode(autoencoder: Autoencoder, codes: np.ndarray) -> Float[Tensor, "frames 3 size size"]:
    return autoencoder.decode(torch.from_numpy(codes.astype(np.int64)), chunk=1).float().clamp(0, 1)
