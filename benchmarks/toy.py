"""A small video system that trains in a minute on a CPU, so that measurements on its codes are meaningful.

In its clips of codes, a block of one texture moves over a background of another; the text names both textures and the
motion.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F

from cogvideo.config import LayoutConfig, StageConfig, TransformerConfig
from cogvideo.generation.decoder import Condition
from cogvideo.layout import SequenceLayout
from cogvideo.models.plans import full_pass
from cogvideo.models.transformer import Base, TemporalChannel, Transformer, initialize
from cogvideo.text import PaddedText

NUM_CODES, TEXTURES, SLOTS = 256, 8, 4
LAYOUT = LayoutConfig(grid=8, num_frames=5, text_slots=SLOTS, image_text_slots=SLOTS, frame_position=SLOTS)
CONFIG = TransformerConfig(4, 128, 4, NUM_CODES + 64, NUM_CODES, NUM_CODES + 1, NUM_CODES, 128)

Stage = tuple[Transformer, SequenceLayout, Condition, Int64[Tensor, "batch frames slots"]]


def toy_clips(count: int, generator: torch.Generator) -> tuple[PaddedText, Int64[Tensor, "batch frames slots"]]:
    """Random clips and their texts; each code is sampled from the few codes of its texture."""

    def choose(most: int) -> Tensor:
        return torch.randint(0, most, (count,), generator=generator)

    block, ground, motion, row, column = choose(TEXTURES), choose(TEXTURES), choose(4), choose(8), choose(8)
    down = torch.tensor([0, 0, 1, -1])[motion][:, None] * torch.arange(LAYOUT.num_frames) + row[:, None]
    right = torch.tensor([1, -1, 0, 0])[motion][:, None] * torch.arange(LAYOUT.num_frames) + column[:, None]
    side = torch.arange(LAYOUT.grid)
    inside = ((side - down[..., None]) % 8 < 3)[..., :, None] & ((side - right[..., None]) % 8 < 3)[..., None, :]
    texture = torch.where(inside, block[:, None, None, None], ground[:, None, None, None])
    shade = (torch.rand(texture.shape, generator=generator) ** 3 * 8).long()
    words = torch.stack([block, TEXTURES + ground, 2 * TEXTURES + motion], 1) + NUM_CODES + 2
    tokens = F.pad(words, (SLOTS - words.shape[1], 0), value=CONFIG.pad)
    return PaddedText(tokens, tokens != CONFIG.pad), (texture * 8 + shade + 64).flatten(2)


def toy_stages(steps: int = 200, batch: int = 4) -> dict[str, Stage]:
    """Sequential and interpolation stages, trained for this number of steps and ready to decode a batch."""
    stages = {}
    for name, window, layout in (
        ("sequential", 0, SequenceLayout.sequential(LAYOUT)),
        ("interpolation", 4, SequenceLayout.interpolation(LAYOUT)),
    ):
        generator = torch.Generator().manual_seed(0)
        model = Transformer(Base(CONFIG), TemporalChannel(CONFIG, LAYOUT, StageConfig(window)))
        for part in model.children():
            initialize(part, CONFIG.num_layers, generator)
        _train(model, layout, steps, generator)
        words, clips = toy_clips(batch, generator)
        given = clips[:, list(layout.order)][:, : max(1, layout.num_bidirectional)]
        nothing = PaddedText(words.tokens[:, -1:].expand(-1, SLOTS).clone(), words.mask)
        stages[name] = (model.requires_grad_(False), layout, Condition(words, nothing, 1.5), given)
    return stages


def _train(model: Transformer, layout: SequenceLayout, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        words, clips = toy_clips(8, generator)
        codes = clips[:, list(layout.order)]
        plan = full_pass(layout, model.window, words.mask, torch.float32, layout.num_frames)
        tokens = torch.cat([words.tokens, layout.feed(codes, CONFIG.start_of_image)], 1)
        frames = layout.frame_positions(range(layout.num_frames)).expand(len(tokens), -1)
        hidden = model(tokens, torch.cat([layout.text_positions(words.mask), frames], 1), plan)
        logits = model.base.logits(hidden[:, layout.text_slots :])
        loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
