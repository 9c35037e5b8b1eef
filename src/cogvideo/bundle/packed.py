"""A model as the pipeline runs it, on a CPU with packed weights, while the caller's own stays as it is."""

from __future__ import annotations

from functools import cached_property
from typing import TypeVar

from jaxtyping import Int64
from torch import Tensor, nn

from cogvideo.bundle.model import CogVideo
from cogvideo.config import CogVideoConfig
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.models.upscaler import UpscaleChannel, Upscaler
from cogvideo.packing import num_bytes, pack, sharing
from cogvideo.text import TextTokenizer

M = TypeVar("M", bound=nn.Module)
Parts = dict[str, nn.Module]
"""Components by their names."""


class Packed:
    """The stages of a model, each made ready when it is asked for.

    What the model has not loaded is loaded here and packed layer by layer, so that it is in memory once. What it has
    loaded is the caller's, and may change between two clips: of its layers, this object has packed copies.

    Args:
        model: whose stages they are.
        kept: what was loaded here, for the next object.
        offload: keep nothing but what the stage at work needs.
    """

    def __init__(self, model: CogVideo, kept: Parts, offload: bool) -> None:
        self._model, self._kept, self._offload = model, kept, offload
        self._copies: Parts = {}
        for name in [each for each in kept if model.is_loaded(each)]:
            del kept[name]

    @property
    def config(self) -> CogVideoConfig:
        """Sizes and templates."""
        return self._model.config

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts that there are."""
        return self._model.components

    @property
    def text(self) -> TextTokenizer:
        """Captions to tokens."""
        return self._model.text

    @property
    def cluster_labels(self) -> Int64[Tensor, " codes"] | None:
        """Cluster of each code, for cluster sampling."""
        return self._model.cluster_labels

    @property
    def image_model(self) -> Transformer:
        """Draws the first frame."""
        self._keep("base")
        return Transformer(self._packed("base", Base))

    @property
    def sequential(self) -> Transformer:
        """Draws the other key frames."""
        return self._stage("sequential")

    @property
    def interpolation(self) -> Transformer:
        """Draws the frames between."""
        return self._stage("interpolation")

    @cached_property
    def upscaler(self) -> Upscaler:
        """Enlarges codes. It sees many rows at once, for which packing does little: only a shared base is packed."""
        base = self._base_of("superres")
        self._keep(base, "superres", "image_tokenizer")
        packed = self._packed(base, Base) if base == "base" else self._part(base, Base)
        return Upscaler(packed, self._part("superres", UpscaleChannel))

    @property
    def autoencoder(self) -> Autoencoder:
        """Frames to codes and back."""
        return self._part("image_tokenizer", Autoencoder)

    @property
    def num_bytes(self) -> int:
        """Memory of what was loaded here."""
        return sum(map(num_bytes, self._kept.values()))

    def release(self) -> None:
        """Let go of all that was loaded here; it is loaded again when it is next used."""
        self._kept.clear()
        self._copies.clear()

    def _stage(self, name: str) -> Transformer:
        base = self._base_of(name)
        self._keep(base, name)
        return Transformer(self._packed(base, Base), self._packed(name, TemporalChannel))

    def _base_of(self, stage: str) -> str:
        own = f"{stage}_base"
        return own if own in self.components else "base"

    def _keep(self, *names: str) -> None:
        for parts in (self._kept, self._copies) if self._offload else ():
            for name in parts.keys() - set(names):
                del parts[name]

    def _packed(self, name: str, kind: type[M]) -> M:
        part = self._part(name, kind)
        pack(part)
        return part

    def _part(self, name: str, kind: type[M]) -> M:
        is_callers = self._model.is_loaded(name)
        parts = self._copies if is_callers else self._kept
        if name not in parts:
            part = self._model.component(name) if is_callers else self._model.load(name)
            assert isinstance(part, nn.Module)
            parts[name] = sharing(part) if is_callers else part
        part = parts[name]
        assert isinstance(part, kind)
        return part
