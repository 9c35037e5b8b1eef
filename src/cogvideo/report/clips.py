"""Clips of a dataset as they were in their source, and as their codes are decoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
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


class Clip(NamedTuple):
    """Some frames of a row, evenly chosen."""

    row: Row
    """All of it."""
    original: UInt8[np.ndarray, "shown size size 3"] | None
    """As the encoder saw them; None where the source does not have them any more."""
    decoded: UInt8[np.ndarray, "shown size size 3"] | None
    """As the tokenizer makes them of the codes; None without the tokenizer."""
    psnr: float | None
    """Mean over the frames in dB; None unless both are there."""
    problem: str = ""
    """Why the original is missing although the source is there."""


@dataclass
class Origin:
    """Where a dataset came from, as far as that is still there."""

    card: Card
    """Of the dataset."""
    items: dict[str, Item] = field(default_factory=dict)
    """Those of the source that are asked for, by id."""
    frames: FrameSettings | None = None
    """How they became frames."""
    autoencoder: Autoencoder | None = None
    """The tokenizer that made the codes."""
    missing: list[str] = field(default_factory=list)
    """What is not there, in sentences."""

    def clip(self, row: Row, columns: int) -> Clip:
        """A row with its pictures: `columns` of its frames, or all where there are no more."""
        places = evenly(len(row.codes), columns)
        frames, problem = self._original(row)
        original = None if frames is None else frames[places]
        decoded = None if self.autoencoder is None else _decode(self.autoencoder, row, places)
        seen = None if decoded is None else to_pixels(decoded)
        if original is None or decoded is None:
            return Clip(row, original, seen, None, problem)
        if original.shape[1:3] != decoded.shape[2:]:
            problem = f"the source has frames of {original.shape[1]} pixels, the codes of {decoded.shape[2]}"
            return Clip(row, None, seen, None, problem)
        return Clip(row, original, seen, psnr(_pixels(original), decoded).mean().item())

    def _original(self, row: Row) -> tuple[UInt8[np.ndarray, "frames size size 3"] | None, str]:
        if self.frames is None:
            return None, ""
        if row.id not in self.items:
            return None, "the source has no such clip any more"
        try:
            frames = read_as_encoded(self.items[row.id], self.frames, self.card)
        except VideoError as error:
            return None, f"it cannot be read any more ({error})"
        if len(frames) != len(row.codes):
            return None, f"the source has changed: it gives {len(frames)} frames, the dataset has {len(row.codes)}"
        return frames, ""


def find_origin(card: Card, tokenizer: str, ids: Iterable[str]) -> Origin:
    """Look for the source and the tokenizer of a dataset; what is not found is described in `missing`.

    Args:
        card: of the dataset.
        tokenizer: where to look for it; where the card says unless given.
        ids: of the clips that will be asked for.
    """
    origin = Origin(card)
    try:
        origin.frames = FrameSettings(**card.settings["frames"])
        origin.items = _find_items(card, set(ids))
    except (KeyError, TypeError, AttributeError) as error:
        origin.missing.append(f"Originals: the settings on the card are not those of this version ({error}).")
    except (InputError, OSError) as error:
        origin.missing.append(f"Originals: {error}.")
    if origin.missing:
        origin.frames = None
    try:
        origin.autoencoder = load_tokenizer(card, tokenizer or card.tokenizer)
    except (InputError, OSError) as error:
        hint = "" if tokenizer else " Name it with --tokenizer if it is in another place."
        origin.missing.append(f"Reconstructions: {error}.{hint}")
    return origin


def frame_size(card: Card) -> int | None:
    """Side of a frame in pixels, if the card says it."""
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
    """The source of the one clip of the World that an item or one of its copies is."""
    folder, _, name = id.partition("/")
    number = int(name.partition("~")[0])
    return f"{folder.replace('-', ':')}:{number}:{number + 1}"


def load_tokenizer(card: Card, name: str) -> Autoencoder:
    """The tokenizer that made the codes of a dataset.

    Args:
        card: of the dataset.
        name: folder of a bundle, or its id on the Hugging Face Hub.

    Raises:
        ValueError: there is no such bundle, it is damaged, or its image tokenizer is another one.
    """
    folder = locate(name)
    entry = Manifest.read(folder).components.get(TOKENIZER)
    if entry is None:
        raise InputError(f"the bundle {folder} has no {TOKENIZER}")
    if entry.sha256 != card.tokenizer_sha256:
        expected = f"the codes were made with that of sha256 {card.tokenizer_sha256:.12}"
        raise InputError(f"{folder} holds another image tokenizer (sha256 {entry.sha256:.12}), {expected}")
    return CogVideo.from_pretrained(folder).autoencoder


def read_as_encoded(item: Item, settings: FrameSettings, card: Card) -> UInt8[np.ndarray, "frames size size 3"]:
    """The frames that the codes were made of. With codes for super-resolution, they are means of larger frames.

    Raises:
        VideoError: they cannot be read.
    """
    ratio = card.high_grid // card.grid
    if ratio < 2 or settings.size is None:
        return read_item(item, settings).frames
    return shrink(read_item(item, replace(settings, size=settings.size * ratio)).frames, ratio)


def source_sizes(items: Iterable[Item], settings: FrameSettings | None) -> list[tuple[int, int]]:
    """Width and height of files as they are stored, from the first frame of each; those without are left out."""
    if settings is None:
        return []
    settings = replace(settings, size=None, min_frames=1, max_seconds=1 / settings.fps, loop_to=0.0)
    return [size for item in items if (size := _size(item, settings)) is not None]


def _size(item: Item, settings: FrameSettings) -> tuple[int, int] | None:
    if isinstance(item.media, Rendering):
        return None
    try:
        _, height, width, _ = read_item(item, settings).frames.shape
    except VideoError:
        return None
    return width, height


@torch.inference_mode()
def _decode(
    autoencoder: Autoencoder, row: Row, places: Int64[np.ndarray, " shown"]
) -> Float[Tensor, "shown 3 size size"]:
    codes = torch.from_numpy(row.codes[places].astype(np.int64))
    return autoencoder.decode(codes, chunk=1).float().clamp(0, 1)


def _pixels(frames: UInt8[np.ndarray, "frames height width 3"]) -> Float[Tensor, "frames 3 height width"]:
    return torch.from_numpy(
        rearrange(frames, "frames height width colours -> frames colours height width") / 255
    ).float()
