"""Where everything stands in a sequence: the only place that knows text length, frame size, frame order and positions.

Two words for one frame: its `place` is its place in the clip (and decides positions), its `rank` the order in which it
is fed. docs/sequence.md has the drawings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from cogvideo.config import LayoutConfig, UpscalerConfig, require


@dataclass(frozen=True)
class SequenceLayout:
    """Text slots, then frames of `grid x grid` codes in raster order (spec: layout (64, 464, 2064))."""

    text_slots: int
    """Slots of left-padded text."""
    grid: int
    """Side of a frame in codes."""
    frame_position: int
    """Position of slot 0 of the frame at place 0."""
    order: tuple[int, ...]
    """Place of the frame of each rank: the order in which frames are fed."""
    num_bidirectional: int = 0
    """Leading ranks that see themselves and each other in full; all later ranks are causal."""
    loss_places: tuple[int, ...] = (0,)
    """Places of the frames that carry loss in training."""

    @classmethod
    def text_to_image(cls, config: LayoutConfig) -> SequenceLayout:
        """One causal frame after its text."""
        return cls(config.image_text_slots, config.grid, config.frame_position, order=(0,))

    @classmethod
    def sequential(cls, config: LayoutConfig) -> SequenceLayout:
        """Frames in their natural order, all causal; frame 0 belongs to the image model and carries no loss."""
        places = tuple(range(config.num_frames))
        return cls(config.text_slots, config.grid, config.frame_position, places, loss_places=places[1:])

    @classmethod
    def interpolation(cls, config: LayoutConfig, num_given: int | None = None) -> SequenceLayout:
        """Frames at even places first, seen in both directions, then those at odd places, which are generated.

        Args:
            config: sizes.
            num_given: frames at even places; as many as `config.num_frames` holds by default.
        """
        most = (config.num_frames + 1) // 2
        num_given = most if num_given is None else num_given
        require(2 <= num_given <= most, f"got {num_given} given frames to interpolate, expected 2 to {most}")
        given, inserted = tuple(range(0, 2 * num_given - 1, 2)), tuple(range(1, 2 * num_given - 1, 2))
        return cls(
            config.text_slots, config.grid, config.frame_position, given + inserted, num_given, loss_places=inserted
        )

    @property
    def num_frames(self) -> int:
        """Frames of the sequence."""
        return len(self.order)

    @property
    def frame_slots(self) -> int:
        """Slots of one frame."""
        return self.grid**2

    @property
    def length(self) -> int:
        """Slots of text and all frames."""
        return self.text_slots + self.num_frames * self.frame_slots

    @property
    def first_extra_position(self) -> int:
        """Positions from here on use the video channel's own table."""
        return self.frame_position + self.frame_slots

    def loss_slots(self) -> Int64[Tensor, " slots"]:
        """Frame slots (0 is the first slot of rank 0) that carry loss, rank by rank."""
        ranks = [rank for rank, place in enumerate(self.order) if place in self.loss_places]
        return torch.cat([torch.arange(self.frame_slots) + rank * self.frame_slots for rank in ranks])

    def text_positions(self, mask: Bool[Tensor, "batch text"]) -> Int64[Tensor, "batch text"]:
        """Positions from 0 at the first real token; pads stand at 0."""
        return (mask.cumsum(1) - 1).clamp(min=0)

    def frame_positions(self, ranks: range) -> Int64[Tensor, " slots"]:
        """Positions of all slots of the frames of these ranks."""
        places = torch.tensor([self.order[rank] for rank in ranks], dtype=torch.int64)
        slots = self.frame_position + torch.arange(self.frame_slots)
        return (places[:, None] * self.frame_slots + slots).flatten()

    def position(self, rank: int, slot: int) -> int:
        """Position of one slot."""
        return self.frame_position + self.order[rank] * self.frame_slots + slot

    def feed(
        self, codes: Int64[Tensor, "batch frames slots"], start_of_image: int
    ) -> Int64[Tensor, "batch frames*slots"]:
        """The input shift: slot 0 of every frame is fed `<start_of_image>`, slot j > 0 the frame's code j - 1."""
        start = codes.new_full((*codes.shape[:2], 1), start_of_image)
        return torch.cat([start, codes[..., :-1]], dim=2).flatten(1)

    def check_given(self, codes: Int64[Tensor, "batch frames slots"], num_codes: int) -> int:
        """How many frames are given, as the leading ranks.

        Raises:
            ValueError: the shape is wrong, there are too few or too many frames, or a code is no row of the codebook.
        """
        require(
            codes.ndim == 3 and codes.shape[2] == self.frame_slots,
            f"got codes of shape {tuple(codes.shape)}, expected (batch, frames, {self.frame_slots})",
        )
        least, most = self.num_bidirectional, self.num_frames - 1
        require(least <= codes.shape[1] <= most, f"got {codes.shape[1]} given frames, expected {least} to {most}")
        check_code_range(codes, num_codes)
        return codes.shape[1]


@dataclass(frozen=True)
class UpscaleLayout:
    """Text, the low codes of one frame (fed as themselves) and its high slots (spec section 4: (96, 496, 4096))."""

    text_slots: int
    """Slots of left-padded text."""
    low_grid: int
    """Side of the low frame in codes."""
    ratio: int
    """High slots a side of one low code."""
    low_position: int
    """Position of the first low code."""

    @classmethod
    def of(cls, layout: LayoutConfig, upscaler: UpscalerConfig) -> UpscaleLayout:
        """The layout of super-resolution for these sizes."""
        return cls(upscaler.text_slots, layout.grid, upscaler.ratio, upscaler.low_position)

    @property
    def high_grid(self) -> int:
        """Side of the high frame in codes."""
        return self.low_grid * self.ratio

    @property
    def low_slots(self) -> int:
        """Low codes of a frame."""
        return self.low_grid**2

    @property
    def high_slots(self) -> int:
        """High codes of a frame."""
        return self.high_grid**2

    def low_positions(self, device: torch.device | None = None) -> Int64[Tensor, " low"]:
        """Positions of the low codes in the base table; high slot i has row i of the added table."""
        return self.low_position + torch.arange(self.low_slots, device=device)


def check_code_range(codes: Tensor, num_codes: int) -> None:
    """Refuse codes that are no row of the codebook."""
    require(codes.dtype == torch.int64, f"got codes of type {codes.dtype}, expected torch.int64")
    if codes.numel():
        low, high = codes.min().item(), codes.max().item()
        require(low >= 0 and high < num_codes, f"got codes from {low} to {high}, expected [0, {num_codes})")


Cells = tuple[Tensor, ...]
"""A partition of a frame's slots into cells; each entry is (cells, area): cells of one size, slots ascending."""


@lru_cache(maxsize=64)
def cells(grid: int, window: int, shifted: bool) -> Cells:
    """The slots that see each other in one block of the temporal channel (paper, shifted-window attention).

    Cyclically shifted windows whose parts may only see the same unrolled region are nothing but another partition: the
    cuts move by half a window and the first and last strip are half as wide. So no mask is needed inside a cell.

    Args:
        grid: side of a frame.
        window: side of a window; 0 is one cell for the whole frame.
        shifted: whether the block shifts its windows by half (odd blocks do).

    Raises:
        ValueError: `grid` is not divisible by `window`.
    """
    require(window == 0 or grid % window == 0, f"grid {grid} is not divisible by window {window}")
    cuts = _cuts(grid, window, shifted)
    slots = torch.arange(grid * grid).view(grid, grid)
    tiles = [slots[top:bottom, left:right].flatten() for top, bottom in cuts for left, right in cuts]
    areas = sorted({len(tile) for tile in tiles}, reverse=True)
    return tuple(torch.stack([tile for tile in tiles if len(tile) == area]) for area in areas)


def kinds(window: int) -> tuple[bool, ...]:
    """Whether windows are shifted, in each kind of block of the temporal channel; blocks take turns."""
    return (False, True) if window else (False,)


def _cuts(grid: int, window: int, shifted: bool) -> list[tuple[int, int]]:
    if window == 0:
        return [(0, grid)]
    edges = [0, *range(window // 2 if shifted else window, grid, window), grid]
    return list(pairwise(edges))


def lag(grid: int, window: int) -> int:
    """Slots by which a frame of a stage must trail the frame before it when both are decoded at once.

    A slot may see every slot of its cell in an earlier frame. Those must have been fed in the same pass at the latest,
    so the frame trails by the largest distance from a slot to the last slot of its cell, over both kinds of blocks.
    """
    return max(int((cell[:, -1:] - cell).max()) for shifted in kinds(window) for cell in cells(grid, window, shifted))
