"""Slow, obvious oracles: the rules spelled out, one slot, one sample and one pass at a time.

They do not depend on how the package computes. Frames are identified by their place in the clip, and every mask is a
dense boolean matrix over [text | frame at place 0 | frame at place 1 | ...], whatever the feeding order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Stage = Literal["image", "sequential", "interpolation"]
TEXT = -1
Grid = int | tuple[int, int]
"""Side of a square frame, or rows and columns."""


class Slot(NamedTuple):
    """A slot of the sequence."""

    place: int
    """Place of its frame in the clip, or `TEXT`."""
    index: int
    """Index in its frame, in raster order, or in the text."""


def area_of(grid: Grid) -> int:
    """Return the number of slots of a frame."""
    return grid * grid if isinstance(grid, int) else grid[0] * grid[1]


def all_slots(text_slots: int, num_frames: int, grid: Grid) -> list[Slot]:
    """Return the slots of the text, then of the frames by their place in the clip."""
    text = [Slot(TEXT, index) for index in range(text_slots)]
    return text + [Slot(place, index) for place in range(num_frames) for index in range(area_of(grid))]


# Who sees whom


class Visible(NamedTuple):
    """Which query (row) sees which key (column)."""

    spatial: Tensor
    temporal: Tensor
    """Text has no queries here: its rows are false."""


@lru_cache(maxsize=64)
def visible(
    stage: Stage, num_frames: int, grid: Grid, window: int, shifted: bool, text_mask: tuple[bool, ...]
) -> Visible:
    """Compute the masks of both channels of a block, pair by pair."""
    slots, windows = all_slots(len(text_mask), num_frames, grid), window_labels(grid, window, shifted)
    spatial = [[_sees_spatially(stage, query, key, text_mask) for key in slots] for query in slots]
    temporal = [[_sees_temporally(stage, query, key, text_mask, windows) for key in slots] for query in slots]
    return Visible(torch.tensor(spatial), torch.tensor(temporal))


def _sees_spatially(stage: Stage, query: Slot, key: Slot, text_mask: Sequence[bool]) -> bool:
    if key.place == TEXT:  # text and frames see all text except padding
        return text_mask[key.index]
    if query.place == TEXT:  # text never sees frames
        return False
    if key.place != query.place:
        return False
    if stage == "interpolation" and query.place % 2 == 0:  # given frames see themselves in full
        return True
    return key.index <= query.index


def _sees_temporally(stage: Stage, query: Slot, key: Slot, text_mask: Sequence[bool], windows: Sequence[tuple]) -> bool:
    if query.place == TEXT or stage == "image":
        return False
    if key.place == TEXT:
        return text_mask[key.index]
    if windows[query.index] != windows[key.index]:  # only the same window of each frame
        return False
    not_later = (key.place, key.index) <= (query.place, query.index)
    if stage == "sequential":
        return not_later
    query_is_given, key_is_given = query.place % 2 == 0, key.place % 2 == 0
    if query_is_given:  # given frames see each other in full, but never a generated one
        return key_is_given
    return key_is_given or not_later


def window_labels(grid: Grid, window: int, shifted: bool) -> list[tuple]:
    """Label the window of each slot: roll the frame by minus half a window, cut it, and split windows at the seam.

    Non-square frames are cut at the same distances from the upper left corner.
    """
    if not window:
        return [()] * area_of(grid)
    shift = window // 2 if shifted else 0
    if not isinstance(grid, int):
        rows, columns = grid
        places = product(range(rows), range(columns))
        return [((row + shift) // window, (column + shift) // window) for row, column in places]
    rolled = np.roll(np.arange(grid * grid).reshape(grid, grid), (-shift, -shift), axis=(0, 1))
    labels: dict[int, tuple] = {}
    for row in range(grid):
        for column in range(grid):
            region = (row >= grid - shift, column >= grid - shift)  # these wrapped around from the other edge
            labels[int(rolled[row, column])] = (row // window, column // window, *region)
    return [labels[slot] for slot in range(grid * grid)]


# The transformer


class Drawn(NamedTuple):
    """The result of decoding one sample."""

    codes: Tensor
    """(frames, slots), in the order in which frames are generated."""
    logits: Tensor
    """(frames, slots, codes): guided, before the temperature."""


class Prompt(NamedTuple):
    """The text of one sample."""

    tokens: Sequence[int]
    mask: tuple[bool, ...]
    """True for real text; padding is on the left."""


@dataclass(frozen=True)
class Oracle:
    """The transformer of a stage for one sample, dense and in float64; state dicts use the package's names."""

    stage: Stage
    base: Mapping[str, Tensor]
    channel: Mapping[str, Tensor] | None
    num_layers: int
    num_heads: int
    num_codes: int
    start_of_image: int
    grid: Grid
    num_frames: int
    frame_position: int
    window: int = 0
    table: int = 0
    """Side of the square table of positions if it is larger than the frame, which is centered in it."""

    def hidden(
        self,
        prompt: Prompt,
        codes: Mapping[int, Sequence[int]],
        bonus: float = 0.0,
        drawn: Sequence[int] = (),
        looks: list[Tensor] | None = None,
    ) -> tuple[list[Slot], Tensor]:
        """Return every slot that can be fed, and its row after the last block (rows, hidden).

        Args:
            prompt: text.
            codes: known codes of the frame at each place, from its first code on. Slot 0 is fed `<start_of_image>` and
                slot j code j - 1, so n known codes feed n + 1 slots, and the last code of a frame is never fed.
            bonus: added to scores of text keys.
            drawn: places of frames being generated: only they have the bonus in the temporal channel.
            looks: list that gets the attention of each layer's temporal channel, (heads, rows, rows).
        """
        slots, tokens, positions = self._rows(prompt, codes)
        x = torch.stack([self.base["words.weight"][token].double() for token in tokens])
        x = x + torch.stack([self._position(each).double() for each in positions])
        natural = {slot: row for row, slot in enumerate(all_slots(len(prompt.mask), self.num_frames, self.grid))}
        known = torch.tensor([natural[slot] for slot in slots])
        to_text = torch.tensor([slot.place == TEXT for slot in slots]).double()
        draws = torch.tensor([slot.place in drawn for slot in slots]).double()
        for layer in range(self.num_layers):
            masks = visible(
                self.stage, self.num_frames, self.grid, self.window, bool(self.window) and layer % 2 == 1, prompt.mask
            )
            spatial, temporal = (mask[known][:, known] for mask in masks)
            is_frame = torch.tensor([slot.place != TEXT for slot in slots])
            bonuses = bonus * to_text.expand(len(slots), -1), bonus * draws[:, None] * to_text
            x = self._block(layer, x, is_frame, spatial, temporal, bonuses, looks)
        return slots, x

    def logits(self, x: Tensor, whole_vocabulary: bool = False) -> Tensor:
        """Return logits of image codes (or all tokens): the product with the word embedding, after the final norm."""
        words = self.base["words.weight"].double()
        normed = layer_norm(x, self.base["norm.weight"], self.base["norm.bias"])
        return normed @ (words if whole_vocabulary else words[: self.num_codes]).T

    def frame_logits(self, prompt: Prompt, codes: Mapping[int, Sequence[int]], bonus: float = 0.0) -> dict[int, Tensor]:
        """Return the logits (slots, codes) of each frame."""
        slots, x = self.hidden(prompt, codes, bonus)
        logits = self.logits(x)
        rows = {place: [row for row, slot in enumerate(slots) if slot.place == place] for place in codes}
        return {place: logits[rows[place]] for place in codes}

    def decode(
        self,
        prompt: Prompt,
        given: Mapping[int, Sequence[int]],
        places: Sequence[int],
        noise: Tensor,
        temperature: float = 1.0,
        bonus: float = 0.0,
        unconditional: Prompt | None = None,
        scale: float = 1.0,
    ) -> Drawn:
        """Generate frames slot by slot, with one full pass over everything known for each; guidance adds a second pass.

        Args:
            prompt: text.
            given: codes of given frames, by place.
            places: places of the frames to generate, in order.
            noise: (frames to generate, slots, codes), added to `logits / temperature`; temperature 0 picks the largest.
            temperature: sampling temperature.
            bonus: added to text scores.
            unconditional: text that guidance moves away from.
            scale: guidance scale.
        """
        known: dict[int, list[int]] = {place: list(codes) for place, codes in given.items()}
        logits = []
        for frame, place in enumerate(places):
            known[place] = []
            for slot in range(area_of(self.grid)):
                row = self._next(prompt, known, places, bonus)
                if unconditional is not None:
                    other = self._next(unconditional, known, places, bonus)
                    row = other + scale * (row - other)
                scores = row / temperature + noise[frame, slot] if temperature else row
                known[place].append(int(scores.argmax()))
                logits.append(row)
        codes = torch.tensor([known[place] for place in places])
        return Drawn(codes, torch.stack(logits).view(*codes.shape, -1))

    def _next(self, prompt: Prompt, known: Mapping[int, Sequence[int]], drawn: Sequence[int], bonus: float) -> Tensor:
        _, x = self.hidden(prompt, known, bonus, drawn)
        return self.logits(x[-1:])[0]

    def _rows(self, prompt: Prompt, codes: Mapping[int, Sequence[int]]) -> tuple[list[Slot], list[int], list[int]]:
        slots = [Slot(TEXT, index) for index in range(len(prompt.mask))]
        tokens = list(prompt.tokens)
        first = prompt.mask.index(True)
        positions = [max(index - first, 0) for index in range(len(prompt.mask))]
        for place, known in codes.items():
            for index, token in enumerate([self.start_of_image, *known][: area_of(self.grid)]):
                slots.append(Slot(place, index))
                tokens.append(int(token))
                positions.append(self.frame_position + place * self._rows_of_table + self._row_of_table(index))
        return slots, tokens, positions

    @property
    def _rows_of_table(self) -> int:
        return self.table**2 or area_of(self.grid)

    def _row_of_table(self, index: int) -> int:
        if isinstance(self.grid, int):
            return index
        rows, columns = self.grid
        row, column = index // columns + (self.table - rows) // 2, index % columns + (self.table - columns) // 2
        return row * self.table + column

    def _position(self, position: int) -> Tensor:
        extra = position - (self.frame_position + self._rows_of_table)
        if extra < 0:
            return self.base["positions.weight"][position]
        assert self.channel is not None
        return self.channel["positions.weight"][extra]

    def _block(
        self,
        layer: int,
        x: Tensor,
        is_frame: Tensor,
        spatial: Tensor,
        temporal: Tensor,
        bonuses: tuple[Tensor, Tensor],
        looks: list[Tensor] | None = None,
    ) -> Tensor:
        base = {
            name.removeprefix(f"blocks.{layer}."): value.double()
            for name, value in self.base.items()
            if name.startswith(f"blocks.{layer}.")
        }

        def norm(number: int, value: Tensor) -> Tensor:
            return layer_norm(value, base[f"norm{number}.weight"], base[f"norm{number}.bias"])

        normed = norm(1, x)
        mixed = attention(normed, base, self.num_heads, spatial, bonuses[0])
        if self.channel is not None:
            prefix = f"blocks.{layer}."
            own = {
                name.removeprefix(prefix): value.double()
                for name, value in self.channel.items()
                if name.startswith(prefix)
            }
            gate = 1 / (1 + torch.exp(-own["gate"]))
            other = attention(normed, own, self.num_heads, temporal, bonuses[1], looks)
            mixed = torch.where(is_frame[:, None], gate * mixed + (1 - gate) * other, mixed)
        x = x + norm(3, mixed)
        inner = gelu(norm(2, x) @ base["mlp_in.weight"].T + base["mlp_in.bias"])
        return x + norm(4, inner @ base["mlp_out.weight"].T + base["mlp_out.bias"])


def attention(
    x: Tensor,
    weights: Mapping[str, Tensor],
    num_heads: int,
    seen: Tensor,
    bonus: Tensor,
    looks: list[Tensor] | None = None,
) -> Tensor:
    """Softmax attention, head by head; rows that see nothing yield only the bias."""
    hidden = x.shape[1]
    q, k, v = (x @ weights["qkv.weight"].T + weights["qkv.bias"]).split(hidden, dim=1)
    width, heads, shares = hidden // num_heads, [], []
    for head in range(num_heads):
        own = slice(head * width, (head + 1) * width)
        scores = q[:, own] @ k[:, own].T / math.sqrt(width) + bonus
        powers = torch.where(seen, torch.exp(scores - scores.max()), torch.zeros_like(scores))
        shares.append(powers / powers.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny))
        heads.append(shares[-1] @ v[:, own])
    if looks is not None:
        looks.append(torch.stack(shares))
    return torch.cat(heads, dim=1) @ weights["out.weight"].T + weights["out.bias"]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalize to mean 0 and variance 1, then scale and shift."""
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(1, keepdim=True) + eps) * weight.double() + bias.double()


def gelu(x: Tensor) -> Tensor:
    """The tanh form, with the released constants."""
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)))


# Samplers


def top_k(logits: Sequence[float], k: int) -> list[float]:
    """Return the probabilities if only the k likeliest codes may be sampled."""
    best = sorted(range(len(logits)), key=lambda code: -logits[code])[:k]
    total = sum(math.exp(logits[code]) for code in best)
    return [math.exp(logits[code]) / total if code in best else 0.0 for code in range(len(logits))]


def top_p(logits: Sequence[float], p: float) -> list[float]:
    """Return the probabilities if codes are kept, likeliest first, until their total probability reaches p."""
    whole = sum(math.exp(each) for each in logits)
    kept: list[int] = []
    for code in sorted(range(len(logits)), key=lambda code: -logits[code]):
        kept.append(code)
        if sum(math.exp(logits[each]) for each in kept) / whole >= p:
            break
    total = sum(math.exp(logits[code]) for code in kept)
    return [math.exp(logits[code]) / total if code in kept else 0.0 for code in range(len(logits))]


def cluster_probabilities(
    logits: Sequence[float], labels: Sequence[int], k: int, temperature: float, inside: float
) -> list[float]:
    """Return the probabilities of cluster sampling: first one of the k likeliest clusters, then a code in it."""
    weights = [math.exp(each / temperature) for each in logits]
    best = _best_clusters(weights, labels, k)
    second = [math.exp(each / temperature / inside) for each in logits]
    result = []
    for code, own in enumerate(labels):
        if own not in best:
            result.append(0.0)
            continue
        share = best[own] / sum(best.values())
        result.append(share * second[code] / sum(second[other] for other, label in enumerate(labels) if label == own))
    return result


def draw_by_clusters(
    logits: Sequence[float],
    labels: Sequence[int],
    k: int,
    temperature: float,
    inside: float,
    num_draws: int,
    random: np.random.Generator,
) -> np.ndarray:
    """Simulate the procedure: pick one of the k likeliest clusters, then one of its codes. Returns counts by code."""
    best = _best_clusters([math.exp(each / temperature) for each in logits], labels, k)
    counts = np.zeros(len(logits), dtype=int)
    shares = np.array(list(best.values()))
    for cluster in random.choice(list(best), size=num_draws, p=shares / shares.sum()):
        members = [code for code, label in enumerate(labels) if label == cluster]
        weights = np.exp([logits[code] / temperature / inside for code in members])
        counts[members[np.searchsorted(weights.cumsum() / weights.sum(), random.random(), side="right")]] += 1
    return counts


def _best_clusters(weights: Sequence[float], labels: Sequence[int], k: int) -> dict[int, float]:
    sums: dict[int, float] = {}
    for weight, label in zip(weights, labels, strict=True):
        sums[label] = sums.get(label, 0.0) + weight
    return dict(sorted(sums.items(), key=lambda item: -item[1])[:k])


# Rounding


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, divided by that of the exact values.

    Rounding is relative to the terms of a sum, so the relative error of a single result near zero has no bound.
    """
    return float((found.double() - exact.double()).norm() / exact.double().norm())
