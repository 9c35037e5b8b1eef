"""Names of the released checkpoints' tensors, in terms of ours."""

from __future__ import annotations

import re

import torch

from cogvideo.config import AutoencoderConfig
from cogvideo.models.autoencoder import Autoencoder

_AUTOENCODER_WORDS = (
    (r"^encoder\.levels\.", "enc.down."),
    (r"^encoder\.", "enc."),
    (r"^decoders\.", "decs."),
    (r"^downsamplers\.(\d+)\.", r"down_samplers.\1.conv_down_sampler.conv."),
    (r"^project\.", "quantize.proj."),
    (r"^codebook\.embedding$", "quantize.embed.weight"),
    (r"\.middle\.before\.", ".mid.block_1."),
    (r"\.middle\.attention\.", ".mid.attn_1."),
    (r"\.middle\.after\.", ".mid.block_2."),
    (r"\.blocks\.", ".block."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.attentions\.", ".attn."),
    (r"\.output\.", ".proj_out."),
    (r"\.(downsample|upsample)\.", r".\1.conv."),
)
"""Pattern of our name -> released words, applied in this order; `_released_level` does the decoders' levels."""


def released_autoencoder_names(config: AutoencoderConfig) -> dict[str, str]:
    """Released tensor name (`ice_image.pt`) -> our parameter name, for every parameter of `Autoencoder(config)`.

    Not named are two tensors that we do not keep, the codebook's running averages `quantize.cluster_size` and
    `quantize.embed_avg`. Shapes are equal.
    """
    with torch.device("meta"):
        ours = list(Autoencoder(config).state_dict())
    return {_released_autoencoder_name(name, config): name for name in ours}


def _released_autoencoder_name(name: str, config: AutoencoderConfig) -> str:
    name = re.sub(r"^decoders\.(\d+)\.levels\.(\d+)\.", lambda match: _released_level(match, config), name)
    for pattern, replacement in _AUTOENCODER_WORDS:
        name = re.sub(pattern, replacement, name)
    return name


def _released_level(match: re.Match[str], config: AutoencoderConfig) -> str:
    """Our decoders' levels run from the coarsest, the released ones count from the finest."""
    decoder, level = int(match[1]), int(match[2])
    finest = len(config.decoder_multipliers[decoder]) - 1
    return f"decs.{decoder}.up.{finest - level}."


_BASE_NAMES = {
    "word_embeddings": "words",
    "position_embeddings": "positions",
    "final_layernorm": "norm",
}
_BLOCK_NAMES = {
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "third_layernorm": "norm3",
    "fourth_layernorm": "norm4",
    "attention.query_key_value": "qkv",
    "attention.dense": "out",
    "mlp.dense_h_to_4h": "mlp_in",
    "mlp.dense_4h_to_h": "mlp_out",
}
_CHANNEL_NAMES = {"query_key_value": "qkv", "dense": "out"}


def released_base_names(num_layers: int) -> dict[str, str]:
    """Released tensor name -> our parameter name of `Base`, for every parameter."""
    names = {f"transformer.{released}.weight": f"{ours}.weight" for released, ours in _BASE_NAMES.items()}
    names["transformer.final_layernorm.bias"] = "norm.bias"
    for layer in range(num_layers):
        for released, ours in _BLOCK_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"transformer.layers.{layer}.{released}.{kind}"] = f"blocks.{layer}.{ours}.{kind}"
    return names


def released_channel_names(num_layers: int) -> dict[str, str]:
    """Released tensor name -> our parameter name of `TemporalChannel`; super-resolution's has no gate."""
    names = {"mixins.extra_position_embedding.position_embeddings.weight": "positions.weight"}
    for layer in range(num_layers):
        names[f"mixins.attention_plus.attn_distribution.{layer}"] = f"blocks.{layer}.gate"
        for released, ours in _CHANNEL_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"mixins.attention_plus.{released}.{layer}.{kind}"] = f"blocks.{layer}.{ours}.{kind}"
    return names
