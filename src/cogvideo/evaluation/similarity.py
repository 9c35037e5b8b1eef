"""CLIPSIM: agreement of frames with captions, by CLIP. Needs the package transformers.

The cosine between the embeddings of caption and frame, averaged over frames, then over captions, then over clips. The
metric of GODIVA and NÜWA; Video LDM and LaVie take CLIP ViT-B/32 and one random caption for each video of MSR-VTT.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor

from cogvideo.bundle.model import download
from cogvideo.config import InputError, require
from cogvideo.data.engines import Machines
from cogvideo.data.shards import digest
from cogvideo.evaluation.comparison import ComparedClips, check_alike
from cogvideo.evaluation.features import Encode, ExcerptPixels, Judge, extract, one_thread
from cogvideo.evaluation.footage import Reading, draw
from cogvideo.files import sha256_of

PATTERNS = ("*.json", "*.txt", "*.safetensors", "pytorch_model*.bin")
"""Files of a CLIP model on the Hub: no code."""
VIT_B32 = {"patch_size": 32, "image_size": 224, "num_hidden_layers": 12, "hidden_size": 768}
"""Sizes of the network that defines CLIPSIM; the defaults of its configuration."""
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of colors in CLIP's training images, in [0, 1]."""
TEXT_BATCH = 64
CaptionChoice = Literal["random", "all"]
"""Captions of a clip that are used."""


def locate_clip(name: str) -> Path:
    """Folder of a CLIP model: a local one, or one from the Hugging Face Hub."""
    folder = Path(name)
    if not folder.is_dir():
        folder = download(name, PATTERNS, "pass the folder of a CLIP model, or the id of one on the Hugging Face Hub")
    require((folder / "config.json").is_file(), f"{folder} has no config.json, expected a CLIP model of transformers")
    require(len(_weights(folder)) > 0, f"{folder} has no weights, expected model.safetensors")
    return folder


def _weights(folder: Path) -> list[Path]:
    """Files with the weights that transformers would load."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def fingerprint(folder: Path) -> str:
    """Hash of configuration and weights."""
    return digest([sha256_of(file) for file in (folder / "config.json", *_weights(folder))])


def is_vit_b32(folder: Path) -> bool:
    """True if a CLIP model has the sizes of ViT-B/32."""
    sizes = VIT_B32 | json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vision_config", {})
    return all(sizes[name] == size for name, size in VIT_B32.items())


def judge(folder: Path) -> Judge:
    """The image encoder of a CLIP model: embeddings of all frames of a clip, one after the other."""
    return Judge(("clip", fingerprint(folder)), partial(_load_images, folder))


def _load_images(folder: Path, device: str) -> Encode:
    model = _load(folder, device)
    size = model.config.vision_config.image_size

    def encode(clips: ExcerptPixels) -> Tensor:
        pixels = torch.stack([to_clip(frame, size) for (frames,) in clips for frame in frames])
        pooled = model.vision_model(pixel_values=pixels.to(device)).pooler_output
        embeddings = F.normalize(model.visual_projection(pooled), dim=-1)
        return rearrange(embeddings, "(clips frames) width -> clips (frames width)", clips=len(clips))

    return encode


def to_clip(frame: UInt8[np.ndarray, "_ _ 3"], size: int) -> Float[Tensor, "3 size size"]:
    """A frame as CLIP expects it: shorter side resized to `size` (bicubic), center crop, normalized colors."""
    from PIL import Image

    height, width = frame.shape[:2]
    rows, columns = (int(size * each / min(height, width)) for each in (height, width))
    resized = np.array(Image.fromarray(frame).resize((columns, rows), Image.Resampling.BICUBIC))
    top, left = (rows - size) // 2, (columns - size) // 2
    colors = torch.from_numpy(resized[top : top + size, left : left + size]) / 255
    return rearrange((colors - MEAN) / STD, "rows columns colors -> colors rows columns")


class Texts(NamedTuple):
    """Captions as CLIP sees them."""

    embeddings: Float[Tensor, "texts width"]
    """Unit vectors."""
    num_cut: int
    """Number of captions that were too long for CLIP and were truncated."""


def embed(folder: Path, texts: Sequence[str], device: str) -> Texts:
    """Embeddings of captions by the text encoder of a CLIP model."""
    transformers: Any = import_module("transformers")
    model = _load(folder, device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot use the tokenizer of {folder}: {_first_line(error)}") from error
    longest = model.config.text_config.max_position_embeddings
    num_cut = sum(len(ids) > longest for ids in tokenizer(list(texts), verbose=False)["input_ids"])
    found = []
    for start in range(0, len(texts), TEXT_BATCH):
        part = list(texts[start : start + TEXT_BATCH])
        rows = tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
        with torch.inference_mode():
            pooled = model.text_model(rows["input_ids"], rows["attention_mask"]).pooler_output
            found.append(F.normalize(model.text_projection(pooled), dim=-1).cpu())
    return Texts(torch.cat(found), num_cut)


def _load(folder: Path, device: str) -> Any:
    """A CLIP model. Its files are read as tensors and JSON, and nothing in them is executed."""
    transformers: Any = import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = transformers.CLIPModel.from_pretrained(
            folder, local_files_only=True, weights_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(f"cannot use {folder}: {_first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    require(not missing, f"{folder} lacks {len(missing)} weights of CLIP, such as {''.join(missing[:1])}")
    return model.float().to(device).eval()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Similarity:
    """CLIPSIM of sources."""

    folder: Path
    reading: Reading
    """Way to read clips, with captions."""
    machines: Machines
    captions: CaptionChoice
    """Captions that are used: a random one of each clip, or all."""
    seed: int

    def measure(self, source: str) -> SourceSimilarity:
        """Similarities of the clips of a source."""
        drawn = draw(source, self.reading, "start", self.reading.protocol.clips, self.seed)
        check_alike(drawn.excerpts, self.reading.protocol)
        captions = self._chosen([each.footage.captions for each in drawn.excerpts])
        clips = [(each,) for each in drawn.excerpts]
        frames = extract(f"frames of {source}", judge(self.folder), clips, self.reading, self.machines)
        with one_thread():
            texts = embed(self.folder, [text for each in captions for text in each], self.machines.kind)
            found = similarities(frames, texts.embeddings, [len(each) for each in captions])
        return SourceSimilarity(ComparedClips.of_excerpts(source, drawn, drawn.excerpts), found, texts.num_cut)

    def _chosen(self, captions: Sequence[Sequence[str]]) -> list[Sequence[str]]:
        if self.captions == "all":
            return list(captions)
        random = np.random.default_rng(self.seed)
        return [(each[int(random.integers(len(each)))],) for each in captions]


class SourceSimilarity(NamedTuple):
    """CLIPSIM of a source."""

    side: ComparedClips
    similarities: Float[Tensor, "clips 1"]
    """Mean over frames and captions."""
    num_cut: int


def similarities(
    frames: Float[Tensor, "clips features"], texts: Float[Tensor, "texts width"], counts: Sequence[int]
) -> Float[Tensor, "clips 1"]:
    """Mean cosine of the frames and captions of each clip; a clip's frames and captions are consecutive."""
    width = texts.shape[1]
    clips = rearrange(frames.double(), "clips (frames width) -> clips frames width", width=width)
    pairs = zip(clips, torch.split(texts.double(), list(counts)), strict=True)
    return torch.stack([(clip @ captions.T).mean() for clip, captions in pairs])[:, None]
