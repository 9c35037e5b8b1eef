"""A model in memory or on disk: the components of a bundle, each loaded on first use."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType
from typing import TypeVar

import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogvideo.bundle.adapters import Adapter, find_adapter
from cogvideo.bundle.format import (
    CHANNELS,
    COMPONENTS,
    MANIFEST,
    SHARED,
    BundleWriter,
    Component,
    Entry,
    Manifest,
    check_tensors,
    file_of,
    module_of,
    owner_of,
    read_tensor,
    text_tokenizer,
    writing,
)
from cogvideo.config import CLIP_SECONDS, CogVideoConfig, InputError, require
from cogvideo.devices import usable
from cogvideo.models.adapters import fuse
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.quantizer import cluster_codes
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.models.upscaler import UpscaleChannel, Upscaler
from cogvideo.text import TextTokenizer

T = TypeVar("T")

CODES_PER_CLUSTER = 40
"""Average size of clusters computed here, as in the released tokenizer: 500 for its 20,000 codes."""

POCKET = "pocket"
"""Name of the model that comes with the package."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types that weights can be loaded as."""


class StageModels(ABC):
    """The models of a system, put together from its components."""

    config: CogVideoConfig

    @property
    @abstractmethod
    def components(self) -> tuple[str, ...]:
        """Names of the available components, loaded or not, in the order of `COMPONENTS`."""

    @property
    @abstractmethod
    def cluster_labels(self) -> Int64[Tensor, " codes"] | None:
        """Cluster of each code, for cluster sampling."""

    @abstractmethod
    def part(self, component: str, kind: type[T]) -> T:
        """A component of this type."""

    def base_of(self, stage: str) -> Base:
        """The base of a stage: its own if it has one, else the shared base."""
        return self.part(self.base_name(stage), Base)

    def base_name(self, stage: str) -> str:
        """The component that is the base of a stage."""
        own = f"{stage}_base"
        return own if own in self.components else "base"

    @property
    def image_model(self) -> Transformer:
        """Text to the first frame."""
        return Transformer(self.base_of("image"))

    @property
    def sequential(self) -> Transformer:
        """First frame to key frames."""
        return Transformer(self.base_of("sequential"), self.part("sequential", TemporalChannel))

    @property
    def interpolation(self) -> Transformer:
        """Frames to the frames between them."""
        return Transformer(self.base_of("interpolation"), self.part("interpolation", TemporalChannel))

    @property
    def upscaler(self) -> Upscaler:
        """Codes of a frame to those of a larger one."""
        return Upscaler(self.base_of("superres"), self.part("superres", UpscaleChannel))

    @property
    def autoencoder(self) -> Autoencoder:
        """Frames to codes and back."""
        return self.part("image_tokenizer", Autoencoder)

    @property
    def text(self) -> TextTokenizer:
        """Captions to tokens and back."""
        return self.part("text", TextTokenizer)


class CogVideo(StageModels):
    """A whole system or a part of one: `components` names what it has; using anything else raises `ValueError`.

    Loaded parameters have `requires_grad` False; training turns it on for what it trains.

    Args:
        config: sizes of all components.
        components: by their names in `COMPONENTS`: `Base`, `TemporalChannel`s (sequential and interpolation),
            `UpscaleChannel` (superres), `Autoencoder` (image_tokenizer), int64 labels, `TextTokenizer`.

    Raises:
        ValueError: a component's name is unknown.
    """

    def __init__(self, config: CogVideoConfig, **components: Component) -> None:
        _check_names(components)
        self.config = config
        self.folder: Path | None = None
        """Folder that the model was loaded from, if any."""
        self.dtype: torch.dtype | None = None
        """Type that weights are loaded as; None for the stored type."""
        self.device = torch.device("cpu")
        """Device that weights are loaded to."""
        self._parts, self._entries = components, dict[str, Entry]()
        self.adapters: list[Adapter] = []
        """Adapters that are fused into components on loading."""
        self._verify = True

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        verify: bool = True,
        adapters: Mapping[str, float] = MappingProxyType({}),
        channel: str | None = None,
    ) -> CogVideo:
        """The model in a folder, or else on the Hugging Face Hub; each component is loaded on first use.

        On the CPU and in the stored dtype, weights stay memory-mapped. Otherwise they are copied one tensor at a time:
        host memory peaks at the loaded weights plus one tensor.

        Args:
            name: folder of a bundle, id of one on the Hub (`owner/name`), or `pocket` for the one in the package.
            dtype: type of all weights; as stored unless given.
            device: device of the tensors.
            verify: compare the sha256 of a component's file before it is used.
            adapters: adapters to add to the weights, by their names in the bundle or their folders, each with its
                scale; 1 is as trained.
            channel: name of one of the bundle's additional video channels, in place of its own.

        Raises:
            ValueError: there is no such bundle, channel or adapter, it is incomplete, of a newer format or was
                trained on another model, or dtype or device cannot be used. Errors inside a component are
                raised when it is loaded.
        """
        folder = locate(name)
        if channel is not None:
            there = [each.parent.name for each in sorted((folder / CHANNELS).glob(f"*/{MANIFEST}"))]
            known = f"{folder} has {', '.join(there) or 'none'}"
            require(
                channel in there, f"there is no channel {channel!r}: {known}; `train sequential --channel` makes one"
            )
            folder = folder / CHANNELS / channel
        manifest = Manifest.complete(folder)
        require(dtype is None or dtype in DTYPES, f"dtype is {dtype!r}, expected one of {DTYPES}")
        model = cls(manifest.config)
        model.folder, model.dtype, model.device = folder, dtype, usable(device)
        model._entries, model._verify = manifest.components, verify
        for adapter, scale in adapters.items():
            model.add(find_adapter(folder, adapter, scale))
        return model

    def add(self, adapters: Sequence[Adapter]) -> None:
        """Add adapters to components that are not loaded yet.

        Raises:
            ValueError: this model lacks a component that an adapter changes, or has other weights than the adapter was
                trained on.
        """
        for each in adapters:
            name = each.component
            require(name in self._entries, f"the adapter {each.folder} changes {name}, which this model lacks")
            each.check(self._entries[name].sha256)
            if name == "base" and "superres" in self._entries:  # super-resolution keeps the unadapted base
                self._entries.setdefault("superres_base", self._entries[name])
            own = self.config.sequential.durations or (CLIP_SECONDS,)
            if name == "sequential" and (more := set(each.durations) - set(own)):
                self.config = self.config.trained_on(name, sorted({*own, *more}, reverse=True))
        self.adapters += adapters

    def _adapters_of(self, component: str) -> list[Adapter]:
        return [each for each in self.adapters if each.component == component]

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write a bundle; an existing one in `folder` is replaced atomically, when the new one is complete.
        Processes that write into one folder take turns.

        Components that were not loaded and keep their dtype are copied as files.

        Raises:
            ValueError: `folder` is not a folder, or a component does not fit the configuration.
            OSError: the bundle cannot be written.
        """
        with writing(Path(folder), self.config) as writer:
            self._write(writer)

    def _write(self, writer: BundleWriter) -> None:
        for component in self.components:
            is_stored = component not in self._parts and not self._adapters_of(component)
            if is_stored and self.folder is not None and self.dtype is None:
                writer.copy(component, self.folder, self._entries[component])
                continue
            part = self.component(component)
            if isinstance(part, TextTokenizer):
                require(part.config == self.config.text, f"text has {part.config}, expected {self.config.text}")
                writer.add_text(part.model)
            else:
                writer.add(component, {"labels": part} if isinstance(part, Tensor) else part.state_dict())

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that this model has, loaded or not, in the order of `COMPONENTS`."""
        return tuple(each for each in COMPONENTS if each in self._parts or each in self._entries)

    def sha256(self, component: str) -> str | None:
        """Hash of a component's file; None if it has no file."""
        return self._entries[component].sha256 if component in self._entries else None

    @property
    def num_bytes(self) -> int:
        """Bytes of all components' files."""
        return sum(entry.num_bytes for entry in self._entries.values())

    @property
    def fingerprint(self) -> str | None:
        """Hash of all components' files and adapters; None if the model does not come from a bundle."""
        if self.folder is None:
            return None
        listed = "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(self._entries.items()))
        listed += "".join(f"{each.component} {each.sha256} {each.scale}\n" for each in self.adapters)
        return hashlib.sha256(listed.encode()).hexdigest()

    def release(self) -> None:
        """Drop the weights that were loaded from a bundle; each component is reloaded on next use."""
        for component in self._entries.keys() & self._parts.keys() - {"text", "cluster_labels"}:
            del self._parts[component]

    @property
    def base(self) -> Base:
        """Parameters of the image model, which the stages share."""
        return self.part("base", Base)

    @cached_property
    def cluster_labels(self) -> Int64[Tensor, " codes"] | None:
        """Cluster of each code: stored ones, else k-means of the codebook; None if there is neither."""
        if "cluster_labels" in self.components:
            return self.part("cluster_labels", Tensor)
        if "image_tokenizer" not in self.components:
            return None
        codes = self.autoencoder.codebook.embedding.detach().float().cpu()
        return cluster_codes(codes, max(1, len(codes) // CODES_PER_CLUSTER), torch.Generator().manual_seed(0))

    def part(self, component: str, kind: type[T]) -> T:
        """A component, refused if it has another type; see `component`."""
        part = self.component(component)
        if not isinstance(part, kind):
            raise InputError(f"{component} is a {type(part).__name__}, expected a {kind.__name__}")
        return part

    def component(self, component: str) -> Component:
        """A component by its name, loaded if necessary.

        Raises:
            ValueError: this model has no component of that name, or its file cannot be used.
        """
        if component not in self._parts:
            self._parts[component] = self.load(component)
        return self._parts[component]

    def is_loaded(self, component: str) -> bool:
        """True if a component is already in memory, where it may have been changed."""
        return component in self._parts

    def load(self, component: str) -> Component:
        """A component read from its file, with this model's adapters; the model does not keep it.

        Raises:
            ValueError: this model has no file for it, or the file differs from what was saved or does not fit the
                configuration.
        """
        where = "this model" if self.folder is None else f"the bundle {self.folder}"
        there = ", ".join(self.components) or "nothing"
        require(component in self._entries, f"{where} has no {component}, it has: {there}")
        assert self.folder is not None
        entry = self._entries[component]
        try:
            return self._load(component, entry, file_of(self.folder, entry))
        except (ValueError, FileNotFoundError, RuntimeError) as error:  # PyTorch reopens the file by name
            if entry in Manifest.complete(self.folder).components.values():
                raise
            raise InputError(f"{component} of the bundle {self.folder} was replaced: load the bundle again") from error

    def _load(self, component: str, entry: Entry, path: Path) -> Component:
        entry.check(path)
        if self._verify:
            entry.verify(path)
        if component == "text":
            return text_tokenizer(path.read_bytes(), self.config, path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file: {error}") from error
        check_tensors(component, tensors, self.config, path)
        tensors = {name: self._place(path, name, tensor) for name, tensor in tensors.items()}
        if component == "cluster_labels":
            return tensors["labels"]
        module = module_of(component, tensors, self.config)
        fuse(module, [each.read(module) for each in self._adapters_of(component)])
        return module.eval()

    def _place(self, path: Path, name: str, mapped: Tensor) -> Tensor:
        """The memory-mapped tensor itself if device and dtype match, else a copy."""
        dtype = self.dtype if self.dtype is not None and mapped.is_floating_point() else mapped.dtype
        if self.device.type == "cpu" and dtype == mapped.dtype:
            return mapped
        return read_tensor(path, name).to(self.device, dtype)


def update(
    folder: str | PathLike[str], config: CogVideoConfig, without: Collection[str] = (), **components: Component
) -> None:
    """Write components into the bundle in `folder`, which keeps its others except those in `without`; creates a bundle
    if there is none.

    Raises:
        ValueError: a component's name is unknown, the bundle has another configuration, a component does not fit it, or
            the file of a kept component is missing.
        OSError: the bundle cannot be written.
    """
    _check_names([*components, *without])
    model, folder = CogVideo(config, **components), Path(folder)
    with writing(folder, config) as writer:  # nobody else changes the bundle meanwhile
        if (there := Manifest.here(folder)) is not None:
            same = there.config.sizes == config.sizes
            require(same, f"the bundle {folder} has a different configuration from the components to be written")
            gone = {*components, *without}
            kept = {name: entry for name, entry in there.components.items() if name not in gone}
            if owner_of(folder) is not None:  # the owner keeps the rest
                kept = {name: each for name, each in kept.items() if name in SHARED or (folder / each.file).exists()}
            model.folder, model._entries = folder, kept
        model._write(writer)


def _check_names(components: Collection[str]) -> None:
    unknown = sorted(set(components) - set(COMPONENTS))
    require(not unknown, f"got the components {unknown}, expected some of {list(COMPONENTS)}")


def locate(name: str | PathLike[str]) -> Path:
    """The folder of a bundle: in the package for `pocket`, else `name` itself, else downloaded from the Hub.

    Raises:
        ValueError: there is no such bundle.
    """
    if name == POCKET:
        folder = Path(__file__).parents[1] / POCKET
        require((folder / MANIFEST).exists(), f"the model in the box is missing, {folder}: install cogvideo again")
        return folder
    require(str(name) != "", "the model has no name, expected a folder, the id of a bundle, or pocket")
    folder = Path(name)
    if folder.is_dir():
        return folder
    hint = "pass the folder of a bundle, the id of one on the Hugging Face Hub (owner/name), or pocket"
    return download(str(name), ("*.json", "*.safetensors", "*.model"), hint)


def download(name: str, patterns: Sequence[str], hint: str) -> Path:
    """Download files of a model from the Hugging Face Hub; returns their folder.

    Args:
        name: id of the model, owner/name.
        patterns: patterns of file names.
        hint: end of the error message.

    Raises:
        ValueError: there is no such model.
    """
    require(re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None, f"there is no folder {name}: {hint}")
    from huggingface_hub import snapshot_download  # its import takes a third of a second; most bundles are folders

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the type depends on its version and HTTP library
        reason = shorten(str(error), 100, placeholder=" ...")
        raise InputError(f"there is no folder {name}, and none came from the Hub ({reason}): {hint}") from error
