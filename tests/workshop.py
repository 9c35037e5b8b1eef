"""The smallest possible inputs of a training run: a bundle with both tokenizers and a dataset of its codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvideo.bundle.format import Manifest
from cogvideo.bundle.model import CogVideo
from cogvideo.config import (
    AutoencoderConfig,
    CogVideoConfig,
    LayoutConfig,
    StageConfig,
    TextConfig,
    TransformerConfig,
    UpscalerConfig,
)
from cogvideo.data.dataset import make_card, write_card
from cogvideo.data.shards import Row, ShardInfo, digest, shard_name, write_shard
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.transformer import Base, initialize
from cogvideo.text import TextTokenizer

NUM_CODES, GRID, RATIO = 40, 4, 2


def small_config(text_model: bytes, hidden: int = 32) -> CogVideoConfig:
    """Return a configuration with two layers and frames of 4 x 4 codes, 16 pixels on a side."""
    text = TextTokenizer(text_model, TextConfig(), NUM_CODES)
    return CogVideoConfig(
        transformer=TransformerConfig(2, hidden, 2, text.num_tokens, NUM_CODES, text.start_of_image, text.pad, 48),
        layout=LayoutConfig(grid=GRID, text_slots=16, image_text_slots=16, frame_position=16),
        sequential=StageConfig(0),
        interpolation=StageConfig(2),
        upscaler=UpscalerConfig(ratio=RATIO, text_slots=16, low_position=17),
        autoencoder=small_autoencoder(NUM_CODES),
    )


def small_autoencoder(num_codes: int) -> AutoencoderConfig:
    """Return a configuration with 4 x 4 pixels per code and one residual block per level."""
    return AutoencoderConfig(
        channels=8,
        encoder_multipliers=(1, 2),
        encoder_blocks=1,
        decoder_multipliers=((1, 1, 2),),
        embedding_dim=8,
        num_codes=num_codes,
        rate=4,
        groups=4,
    )


def make_bundle(folder: Path, text_model: bytes, base: bool = True, **components: Any) -> CogVideo:
    """Save and load a bundle with both tokenizers, and a random base unless the base is to be trained."""
    config = small_config(text_model)
    torch.manual_seed(0)  # for the autoencoder's initialization
    parts: dict[str, Any] = {
        "image_tokenizer": Autoencoder(config.autoencoder),
        "cluster_labels": torch.arange(NUM_CODES) // 5,
        "text": TextTokenizer(text_model, config.text, NUM_CODES),
    }
    if base:
        parts["base"] = Base(config.transformer)
        initialize(parts["base"], config.transformer.num_layers, torch.Generator().manual_seed(1))
    CogVideo(config, **parts, **components).save_pretrained(folder)
    return CogVideo.from_pretrained(folder)


def make_data(
    folder: Path, bundle: Path, num_clips: int = 12, num_frames: int = 33, held_out: int = 4, high: bool = True
) -> Path:
    """Write a dataset of random clips, the last ones held out, as codes of the bundle's tokenizer."""
    manifest = Manifest.read(bundle)
    side = GRID * RATIO
    settings = ShardInfo(
        grid=GRID,
        num_codes=NUM_CODES,
        fps=8.0,
        tokenizer_sha256=manifest.components["image_tokenizer"].sha256,
        settings_sha256=digest({}),
        work_sha256="",
        high_grid=side if high else 0,
    )
    random = np.random.default_rng(7)

    def codes(grid: int) -> np.ndarray:
        return random.integers(0, NUM_CODES, (num_frames, grid, grid), dtype=np.uint16)

    rows = [
        Row(
            f"{number}",
            (f"clip {number} moves",),
            {},
            8.0,
            codes(GRID),
            "train" if number < num_clips - held_out else "validation",
            codes(side) if high else None,
        )
        for number in range(num_clips)
    ]
    folder.mkdir(parents=True)
    write_shard(folder / shard_name(0), rows, settings)
    write_card(folder, make_card(folder, [shard_name(0)], source="made up", tokenizer=str(bundle), settings={}))
    return folder
