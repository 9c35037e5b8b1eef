"""Layout of a sequence: the only module that knows text length, frame size, frame order and positions.

The `place` of a frame is its position in the clip, which determines its position embeddings. Its `rank` is
its position in feeding order. docs/sequence.md has diagrams.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from cogvideo.config import FrameShape, LayoutConfig, Sides, UpscalerConfig, both, require, shape_in


@dataclass(frozen=True)
class SequenceLayout(FrameShape):
    """Text slots, then frames of codes in raster order (released sizes: (64, 464, 2064))."""

    text_slots: int
    """Slots of left-padded text."""
    grid: int
    """Side, in codes, of a square frame and of its table of positions."""
    frame_position: int
    """Position of the first row of that table for the frame at place 0."""
    order: tuple[int, ...]
    """Places of the frames in feeding order, one per rank."""
    num_bidirectional: int = 0
    """Number of leading ranks that see themselves and each other in full; later ranks are causal."""
    loss_places: tuple[int, ...] = (0,)
    """Places of the frames that carry loss in training."""
    shape: tuple[int, int] | None = None
    """Rows and columns of a frame; None is the whole grid."""

    @classmethod
    def text_to_image(cls, config: LayoutConfig) -> SequenceLayout:
        """Layout of one causal frame after its text."""
        return cls(config.image_text_slots, config.grid, config.frame_position, order=(0,), shape=config.shape)

    @classmethod
    def sequential(cls, config: LayoutConfig) -> SequenceLayout:
        """Layout of causal frames in temporal order. Frame 0 comes from the image model and carries no loss."""
        places = tuple(range(config.num_frames))
        sizes = config.text_slots, config.grid, config.frame_position
        return cls(*sizes, places, loss_places=places[1:], shape=config.shape)

    @classmethod
    def interpolation(cls, config: LayoutConfig, num_given: int | None = None) -> SequenceLayout:
        """Layout of bidirectional frames at even places, then generated, causal frames at odd places.

        Args:
            config: sizes.
            num_given: frames at even places; by default, all of `config.num_frames`.
        """
        most = (config.num_frames + 1) // 2
        num_given = most if num_given is None else num_given
        require(2 <= num_given <= most, f"got {num_given} given frames to interpolate, expected 2 to {most}")
        given = tuple(range(0, 2 * num_given - 1, 2))
        inserted = tuple(range(1, 2 * num_given - 1, 2))
        sizes = config.text_slots, config.grid, config.frame_position
        return cls(*sizes, given + inserted, num_given, loss_places=inserted, shape=config.shape)

    @property
    def num_frames(self) -> int:
        """Number of frames of the sequence."""
        return len(self.order)

    @property
    def length(self) -> int:
        """Number of slots of text and all frames."""
        return self.text_slots + self.num_frames * self.frame_slots

    @property
    def first_extra_position(self) -> int:
        """First position that uses the video channel's own table."""
        return self.frame_position + self.grid**2

    def loss_slots(self) -> Int64[Tensor, " slots"]:
        """Frame slots (0 is the first slot of rank 0) that carry loss, rank by rank."""
        ranks = [rank for rank, place in enumerate(self.order) if place in self.loss_places]
        return torch.cat([torch.arange(self.frame_slots) + rank * self.frame_slots for rank in ranks])

    def text_positions(self, mask: Bool[Tensor, "batch text"]) -> Int64[Tensor, "batch text"]:
        """Positions of text, counted from 0 at the first real token; padding has position 0."""
        return (mask.cumsum(1) - 1).clamp(min=0)

    def frame_positions(self, ranks: range) -> Int64[Tensor, " slots"]:
        """Positions of all slots of the frames with these ranks."""
        places = torch.tensor([self.order[rank] for rank in ranks], dtype=torch.int64)
        slots = self.frame_position + middle(self.grid, self.sides)
        return (places[:, None] * self.grid**2 + slots).flatten()

    def feed(
        self, codes: Int64[Tensor, "batch frames slots"], start_of_image: int
    ) -> Int64[Tensor, "batch frames*slots"]:
        """Input shift: slot 0 of every frame is fed `<start_of_image>`, slot j > 0 the frame's code j - 1."""
        start = codes.new_full((*codes.shape[:2], 1), start_of_image)
        return torch.cat([start, codes[..., :-1]], dim=2).flatten(1)

    def check_given(self, codes: Int64[Tensor, "batch frames slots"], num_codes: int) -> int:
        """Check given frames, which are the leading ranks, and return their number.

        Raises:
            ValueError: the shape is wrong, there are too few or too many frames, or a code is out of range.
        """
        expected = f"expected (batch, frames, {self.frame_slots})"
        fits = codes.ndim == 3 and codes.shape[2] == self.frame_slots
        require(fits, f"got codes of shape {tuple(codes.shape)}, {expected}")
        least, most = self.num_bidirectional, self.num_frames - 1
        require(least <= codes.shape[1] <= most, f"got {codes.shape[1]} given frames, expected {least} to {most}")
        check_code_range(codes, num_codes)
        return codes.shape[1]


@dataclass(frozen=True)
class UpscaleLayout:
    """Text, the unshifted low codes of one frame, and its high slots (spec section 4: (96, 496, 4096))."""

    text_slots: int
    """Slots of left-padded text."""
    low_grid: int
    """Side, in codes, of a square low frame and of its table of positions."""
    ratio: int
    """Side of one low code in high slots."""
    low_position: int
    """Position of the first row of that table."""
    shape: tuple[int, int] | None = None
    """Rows and columns of the low frame; None is the whole grid."""

    @classmethod
    def of(cls, layout: LayoutConfig, upscaler: UpscalerConfig) -> UpscaleLayout:
        """Layout of super-resolution for these sizes."""
        return cls(upscaler.text_slots, layout.grid, upscaler.ratio, upscaler.low_position, layout.shape)

    def shaped(self, sides: Sides) -> UpscaleLayout:
        """Copy for low frames of these rows and columns."""
        return replace(self, shape=shape_in(self.low_grid, sides))

    @property
    def low_sides(self) -> tuple[int, int]:
        """Rows and columns of the low frame."""
        return self.shape or (self.low_grid, self.low_grid)

    @property
    def high_sides(self) -> tuple[int, int]:
        """Rows and columns of the high frame."""
        rows, columns = self.low_sides
        return rows * self.ratio, columns * self.ratio

    @property
    def high_grid(self) -> int:
        """Side, in codes, of a square high frame and of the added table of positions."""
        return self.low_grid * self.ratio

    @property
    def length(self) -> int:
        """Number of slots of text, low codes and high codes."""
        return self.text_slots + self.low_slots + self.high_slots

    @property
    def low_slots(self) -> int:
        """Number of low codes of a frame."""
        rows, columns = self.low_sides
        return rows * columns

    @property
    def high_slots(self) -> int:
        """Number of high codes of a frame."""
        return self.low_slots * self.ratio**2

    def low_positions(self, device: torch.device | None = None) -> Int64[Tensor, " low"]:
        """Positions of the low codes in the base table."""
        return self.low_position + middle(self.low_grid, self.low_sides, device=device)

    def high_positions(self, device: torch.device | None = None) -> Int64[Tensor, " high"]:
        """Rows of the high slots in the added table."""
        return middle(self.low_grid, self.low_sides, self.ratio, device)


def middle(
    grid: int, sides: tuple[int, int], ratio: int = 1, device: torch.device | None = None
) -> Int64[Tensor, " slots"]:
    """Indices of the slots of a centered frame in a square table of positions, row by row.

    So in frames of any shape, a code has the same neighbors, and the center of the picture the same positions.

    Args:
        grid: side of the table, in low codes.
        sides: rows and columns of the frame, in low codes.
        ratio: side of one low code in slots.
        device: device of the result.
    """
    rows, columns = (
        torch.arange((grid - side) // 2 * ratio, ((grid - side) // 2 + side) * ratio, device=device) for side in sides
    )
    return (rows[:, None] * grid * ratio + columns).flatten()


def check_code_range(codes: Tensor, num_codes: int) -> None:
    """Refuse codes outside the codebook."""
    require(codes.dtype == torch.int64, f"got codes of type {codes.dtype}, expected torch.int64")
    if codes.numel():
        low, high = codes.min().item(), codes.max().item()
        require(low >= 0 and high < num_codes, f"got codes from {low} to {high}, expected [0, {num_codes})")


Cells = tuple[Tensor, ...]
"""Partition of a frame's slots into cells. Each entry, (cells, area), has cells of one size, slots sorted."""


@lru_cache(maxsize=64)
def cells(sides: Sides, window: int, shifted: bool) -> Cells:
    """Group the slots that see each other in one temporal block (paper, shifted-window attention).

    Cyclically shifted windows whose slots only see their own unrolled region are just another partition: cuts
    move by half a window, and the outer strips are half as wide. So no mask is needed inside a cell.

    Args:
        sides: rows and columns of a frame; the last windows may be cut off.
        window: side of a window; 0 makes the whole frame one cell.
        shifted: shift the windows by half, as odd blocks do.
    """
    rows, columns = both(sides)
    first = window // 2 if shifted else window
    down, across = (pairwise([0, *(range(first, side, window) if window else ()), side]) for side in (rows, columns))
    slots = torch.arange(rows * columns).view(rows, columns)
    tiles: dict[int, list[Tensor]] = {}
    for (top, bottom), (left, right) in product(down, across):
        tile = slots[top:bottom, left:right].flatten()
        tiles.setdefault(len(tile), []).append(tile)
    return tuple(torch.stack(tiles[area]) for area in sorted(tiles, reverse=True))


def kinds(window: int) -> tuple[bool, ...]:
    """Values of `shifted` for the kinds of temporal blocks, which alternate."""
    return (False, True) if window else (False,)


def lag(sides: Sides, window: int) -> int:
    """Number of slots by which a frame must trail the previous frame when both are decoded in parallel.

    A slot may see every slot of its cell in an earlier frame, and those must be fed in the same pass or
    before. So the lag is the largest distance from a slot to the last slot of its cell, in any kind of block.
    """
    return max(int((cell[:, -1:] - cell).max()) for shifted in kinds(window) for cell in cells(sides, window, shifted))
