"""A model as the pipeline runs it: on a CPU with packed weights, without changing the caller's model."""

from __future__ import annotations

from typing import TypeVar

from jaxtyping import Int64
from torch import Tensor, nn

from cogvideo.bundle.model import CogVideo, StageModels
from cogvideo.models.transformer import Base
from cogvideo.packing import num_bytes, pack, sharing

T = TypeVar("T")
Parts = dict[str, nn.Module]
"""Components by their names."""

PACKED = ("base", "sequential", "interpolation", "sequential_base", "interpolation_base")
"""Components to pack. Super-resolution sees many rows at once, for which packing does little."""


class Packed(StageModels):
    """The stages of a model, each prepared on first use.

    Components that the model has not loaded are loaded here and packed layer by layer, so they are in memory only once.
    Loaded ones belong to the caller and may change between clips, so this object packs copies of their layers.

    Args:
        model: model with these stages.
        kept: components that were loaded here, to be reused by the next object.
        offload: keep only the components that the current stage needs.
    """

    def __init__(self, model: CogVideo, kept: Parts, offload: bool) -> None:
        self.config = model.config
        self._model, self._kept, self._offload = model, kept, offload
        self._copies: Parts = {}
        for name in [each for each in kept if model.is_loaded(each)]:
            del kept[name]

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the available components."""
        return self._model.components

    @property
    def cluster_labels(self) -> Int64[Tensor, " codes"] | None:
        """Cluster of each code, for cluster sampling."""
        return self._model.cluster_labels

    @property
    def num_bytes(self) -> int:
        """Bytes of the components loaded here."""
        return sum(map(num_bytes, self._kept.values()))

    def release(self) -> None:
        """Drop everything that was loaded here; it is reloaded on next use."""
        self._kept.clear()
        self._copies.clear()

    def base_of(self, stage: str) -> Base:
        """The base of a stage; with `offload`, drops what only other stages need."""
        needed = {self.base_name(stage), stage}
        if stage == "superres":
            needed.add("image_tokenizer")
        for parts in (self._kept, self._copies) if self._offload else ():
            for name in parts.keys() - needed:
                del parts[name]
        return super().base_of(stage)

    def part(self, component: str, kind: type[T]) -> T:
        """A component of this type, packed if that makes it faster."""
        if component == "text":
            return self._model.part(component, kind)
        is_callers = self._model.is_loaded(component)
        parts = self._copies if is_callers else self._kept
        if component not in parts:
            part = self._model.component(component) if is_callers else self._model.load(component)
            assert isinstance(part, nn.Module)
            parts[component] = sharing(part) if is_callers else part
        found = parts[component]
        if component in PACKED:
            pack(found)
        assert isinstance(found, kind)
        return found
