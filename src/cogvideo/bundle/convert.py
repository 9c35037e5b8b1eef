"""Conversion of released checkpoints to a bundle, through one table of names that is strict both ways.

Every released tensor is used or explicitly dropped, and every one of ours is filled. Checkpoints are memory-mapped, one
file at a time.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from cogvideo.bundle.format import BundleWriter, check_tensors, few, read_tensor, writing
from cogvideo.config import AutoencoderConfig, CogVideoConfig, InputError, TransformerConfig, preset, require
from cogvideo.models.autoencoder import Autoencoder

COMPARED_AT_ONCE = 1 << 18
"""Number of elements compared at once, in float64: 2 MiB per tensor."""


class Conversion(NamedTuple):
    """Result of `convert`."""

    components: tuple[str, ...]
    differing: dict[str, dict[str, float]]
    """For stages with a base of their own, each differing tensor's largest difference from the shared base."""

    def summary(self) -> str:
        """Description of what was stored, and why."""
        lines = [f"components: {', '.join(self.components)}"]
        for stage, tensors in self.differing.items():
            lines.append(f"{stage} keeps its own base: {len(tensors)} tensors differ from the shared one")
            lines += [f"  {name}: by at most {largest:.3g}" for name, largest in tensors.items()]
        return "\n".join(lines)


def convert(
    out: Path,
    /,
    *,
    stage1: Path | None = None,
    stage2: Path | None = None,
    dsr: Path | None = None,
    ice: Path | None = None,
    clusters: Path | None = None,
    config: CogVideoConfig | None = None,
) -> Conversion:
    """Convert the released checkpoints, or some of them, to a bundle.

    A base that several checkpoints share is stored once. Host memory stays below the largest file plus its largest
    tensor.

    Args:
        out: Folder for the bundle; an existing bundle is replaced once the new one is complete.
        stage1: Folder of the sequential stage (`cogvideo-stage1`).
        stage2: Folder of the interpolation stage (`cogvideo-stage2`).
        dsr: Folder of super-resolution (`cogview2-dsr`).
        ice: Folder of the tokenizers, with `ice_text.model` and `ice_image.pt`.
        clusters: File with the cluster of each image code (`cluster_label2.npy`).
        config: Sizes; by default from the checkpoints, and from the preset `cogvideo` otherwise.
    """
    folders = {"sequential": stage1, "interpolation": stage2, "superres": dsr}
    stages = [ReleasedCheckpoint.find(name, folder) for name, folder in folders.items() if folder is not None]
    require(bool(stages) or ice is not None, "nothing to convert, expected at least one of stage1, stage2, dsr, ice")
    config = _derive(stages) if config is None else config
    for stage in stages:
        stage.check(config)
    with writing(out, config) as writer:
        if clusters is not None:
            writer.add("cluster_labels", {"labels": _read_labels(clusters)}, clusters)
        if ice is not None:
            _add_tokenizers(writer, ice)
        differing = {stage.component: _add_stage(writer, stage) for stage in stages}
    conversion = Conversion(writer.components, {stage: tensors for stage, tensors in differing.items() if tensors})
    print(conversion.summary())
    return conversion


class ReleasedCheckpoint(NamedTuple):
    """A released folder: `model_config.json`, `latest` and `<iteration>/mp_rank_00_model_states.pt`."""

    component: str
    """Our component that the added tensors belong to."""
    file: Path
    settings: dict[str, Any]

    @classmethod
    def find(cls, component: str, folder: Path) -> ReleasedCheckpoint:
        """Find the checkpoint in a folder; refuses missing files, and models split into several."""
        settings = _read_settings(folder / "model_config.json")
        with _reading(folder / "latest"):
            iteration = folder / (folder / "latest").read_text("utf-8", "replace").strip()
        files = sorted(iteration.glob("mp_rank_*_model_states.pt"))
        require(bool(files), f"there is no file {iteration / 'mp_rank_00_model_states.pt'}")
        got = f"{iteration} holds a model split into {len(files)} files, expected only {files[0].name}"
        advice = "merge them first, with the tool that split them (SwissArmyTransformer)"
        require(len(files) == 1, f"{got}: {advice}")
        return cls(component, files[0], settings)

    def sizes(self) -> TransformerConfig:
        """Sizes from tensors and settings; tokens from the preset `cogvideo`."""
        tensors = _read_module(self.file)
        names = [f"transformer.{kind}_embeddings.weight" for kind in ("word", "position")]
        missing = [name for name in names if name not in tensors or tensors[name].ndim != 2]
        require(not missing, f"{self.file} has no matrix {few(missing)}")
        (vocab_size, hidden), (num_positions, _) = (tensors[name].shape for name in names)
        layers = {match[1] for name in tensors if (match := re.match(r"transformer\.layers\.(\d+)\.", name))}
        sizes = {"vocab_size": vocab_size, "num_positions": num_positions, "num_layers": len(layers)}
        heads = self.settings["num_attention_heads"]
        try:
            return replace(preset("cogvideo").transformer, hidden=hidden, num_heads=heads, **sizes)
        except InputError as error:
            raise InputError(f"{self.file} is not a released checkpoint: {error}") from error

    def check(self, config: CogVideoConfig) -> None:
        """Refuse a checkpoint whose settings or tensors do not match the configuration."""
        for key, ours in _SETTINGS.items():
            got, expected = self.settings.get(key), getattr(config.transformer, ours)
            where = self.file.parent.parent / "model_config.json"
            require(got is None or got == expected, f"{key} is {got} in {where}, expected {expected}")
        base, added = self.load(config.transformer.num_layers)
        check_tensors("base", base, config, self.file)
        check_tensors(self.component, added, config, self.file)

    def load(self, num_layers: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Memory-mapped tensors of the base and of the added channel, by our names; all must be used or dropped."""
        base, added = released_base_names(num_layers), released_channel_names(num_layers)
        dropped = {name for name, ours in added.items() if ours.endswith(".gate") and self.component == "superres"}
        added = {name: ours for name, ours in added.items() if name not in dropped}
        tensors = _read_module(self.file)
        _require_names(self.file, set(tensors), base.keys() | added.keys(), dropped)
        return _rename(tensors, base), _rename(tensors, added)


def _derive(stages: list[ReleasedCheckpoint]) -> CogVideoConfig:
    """Sizes that all checkpoints share, in the preset `cogvideo`."""
    released = preset("cogvideo")
    sizes = {stage.file: stage.sizes() for stage in stages}
    different = [f"{file} is {size}" for file, size in sizes.items()] if len(set(sizes.values())) > 1 else []
    require(not different, f"expected checkpoints of one model, got different ones: {'; '.join(different)}")
    return replace(released, transformer=next(iter(sizes.values()), released.transformer))


def _add_stage(writer: BundleWriter, stage: ReleasedCheckpoint) -> dict[str, float]:
    """Write what the stage adds, and its base if not stored yet; return the tensors that differ between bases."""
    base, added = stage.load(writer.config.transformer.num_layers)
    writer.add(stage.component, added, stage.file)
    if "base" not in writer.components:
        writer.add("base", base, stage.file)
        return {}
    differences = {name: _largest_difference(read_tensor(writer.path("base"), name), base[name]) for name in base}
    differing = {name: largest for name, largest in differences.items() if largest != 0}
    if differing:
        writer.add(f"{stage.component}_base", base, stage.file)
    return differing


def _largest_difference(first: Shaped[Tensor, "..."], second: Shaped[Tensor, "..."]) -> float:
    """Largest difference; NaN if either tensor has a NaN, so that broken tensors never pass as equal."""
    pieces = (torch.split(tensor.flatten(), COMPARED_AT_ONCE) for tensor in (first, second))
    differences = [(a.double() - b.double()).abs().max() for a, b in zip(*pieces, strict=True)]
    return float(torch.stack(differences).max())


def _add_tokenizers(writer: BundleWriter, folder: Path) -> None:
    file, names = folder / "ice_image.pt", released_autoencoder_names(writer.config.autoencoder)
    tensors = _read_module(file)
    _require_names(file, set(tensors), set(names), _RUNNING_AVERAGES)
    with _reading(folder / "ice_text.model"):
        text = (folder / "ice_text.model").read_bytes()
    writer.add_text(text, folder / "ice_text.model")
    writer.add("image_tokenizer", _rename(tensors, names), file)


def _read_labels(file: Path) -> Shaped[Tensor, "..."]:
    with _reading(file):
        labels = np.load(file, allow_pickle=False)
    require(isinstance(labels, np.ndarray) and labels.dtype.kind in "iu", f"{file} is not an array of integers")
    return torch.from_numpy(labels.astype(np.int64))


def _read_module(file: Path) -> dict[str, Tensor]:
    """Released tensors of a file, memory-mapped, without running code in the file."""
    with _reading(file):
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict):
        raise InputError(f"{file} has no table 'module', expected a released checkpoint")
    tensors = {name: each for name, each in module.items() if isinstance(name, str) and isinstance(each, Tensor)}
    others = [str(name) for name in module if name not in tensors]
    require(not others, f"{file} holds entries that are not tensors: {few(others)}")
    return tensors


def _read_settings(file: Path) -> dict[str, Any]:
    with _reading(file):
        settings = json.loads(file.read_bytes())
    heads = settings.get("num_attention_heads") if isinstance(settings, dict) else None
    require(type(heads) is int, f"num_attention_heads is {heads!r} in {file}, expected a number")
    return settings


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn errors of readers into one line that names the file."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise InputError(f"cannot read {file}: it holds more than tensors and numbers, and may contain code") from error
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        raise InputError(f"cannot read {file}: {reason}") from error


def _require_names(file: Path, got: set[str], used: set[str], dropped: set[str]) -> None:
    missing, unknown = used - got, got - used - dropped
    wrong = f"missing {few(missing)}; unknown {few(unknown)}"
    require(not missing and not unknown, f"{file} does not have the tensors of the released model: {wrong}")


def _rename(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {ours: tensors[released] for released, ours in names.items()}


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
"""Pattern of our name -> released words, applied in this order, after the levels of decoders."""


def released_autoencoder_names(config: AutoencoderConfig) -> dict[str, str]:
    """Released tensor name (`ice_image.pt`) -> our parameter name, for every parameter of `Autoencoder(config)`.

    Shapes are equal. Two tensors that we do not keep have no name: the codebook's running averages
    `quantize.cluster_size` and `quantize.embed_avg`.
    """

    def released_level(match: re.Match[str]) -> str:
        """Our decoder levels count from the coarsest, the released ones from the finest."""
        finest = len(config.decoder_multipliers[int(match[1])]) - 1
        return f"decs.{match[1]}.up.{finest - int(match[2])}."

    names = {}
    with torch.device("meta"):
        ours = list(Autoencoder(config).state_dict())
    for name in ours:
        released = re.sub(r"^decoders\.(\d+)\.levels\.(\d+)\.", released_level, name)
        for pattern, replacement in _AUTOENCODER_WORDS:
            released = re.sub(pattern, replacement, released)
        names[released] = name
    return names


_BASE_NAMES = {"word_embeddings": "words", "position_embeddings": "positions", "final_layernorm": "norm"}
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
_RUNNING_AVERAGES = {"quantize.cluster_size", "quantize.embed_avg"}
"""Tensors used only to train the codebook, which are dropped."""
_SETTINGS = {"num_layers": "num_layers", "hidden_size": "hidden", "num_attention_heads": "num_heads"}
"""Key of `model_config.json` -> our field."""
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
