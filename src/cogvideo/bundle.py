"""A model on disk: a folder with `bundle.json` and one file a component; the base, which all stages share, once.

`bundle.json` holds the configuration and the name, size and sha256 of each component's file. It is written last and in
one step, so that a folder holds the old bundle or the new one, whatever interrupts a save.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, count
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Int64, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cogvideo.config import CogVideoConfig, from_dict, require
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.models.upscaler import UpscaleChannel, Upscaler
from cogvideo.text import TextTokenizer

FORMAT_VERSION = 1
MANIFEST = "bundle.json"

_MODULES: dict[str, Callable[[CogVideoConfig], nn.Module]] = {
    "base": lambda config: Base(config.transformer),
    "sequential": lambda config: TemporalChannel(config.transformer, config.layout, config.sequential),
    "interpolation": lambda config: TemporalChannel(config.transformer, config.layout, config.interpolation),
    "superres": lambda config: UpscaleChannel(config.transformer, config.layout, config.upscaler),
    "image_tokenizer": lambda config: Autoencoder(config.autoencoder),
    "interpolation_base": lambda config: Base(config.transformer),
    "superres_base": lambda config: Base(config.transformer),
}
"""Components with parameters. A stage has a base of its own only where it differs from the shared one."""

COMPONENTS = (*_MODULES, "cluster_labels", "text")
"""All that a bundle can hold; it may lack any of them."""

Component = nn.Module | Tensor | TextTokenizer
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """The file of one component."""

    file: str
    """Its name in the bundle's folder."""
    num_bytes: int
    """Its size."""
    sha256: str
    """Hash of its content, in hexadecimal."""

    def __post_init__(self) -> None:
        plain = re.fullmatch(r"\w[\w.-]*", self.file) is not None
        require(plain, f"the file name {self.file!r} is refused, expected a plain name inside the bundle")

    @classmethod
    def of(cls, path: Path) -> Entry:
        """The entry of a file as it is now."""
        with path.open("rb") as file:
            return cls(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())

    def check(self, path: Path) -> None:
        """Refuse a file that is missing or incomplete.

        Raises:
            ValueError: no file, or another size.
        """
        require(path.is_file(), f"the bundle is incomplete: there is no file {path}")
        got = path.stat().st_size
        require(got == self.num_bytes, f"{path} has {got} bytes, expected {self.num_bytes}: the copy is incomplete")

    def verify(self, path: Path) -> None:
        """Refuse a file that is not, byte for byte, what was saved.

        Raises:
            ValueError: another hash.
        """
        got = Entry.of(path).sha256
        require(got == self.sha256, f"{path} has the sha256 {got}, expected {self.sha256}: its content was changed")


@dataclass(frozen=True)
class Manifest:
    """What `bundle.json` says."""

    config: CogVideoConfig
    """Sizes of all components, also of those that the bundle lacks."""
    components: dict[str, Entry]
    """File of each component, by its name in `COMPONENTS`."""

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the bundle in `folder`.

        Raises:
            ValueError: there is no `bundle.json`, a newer version wrote it, or it does not say what it should.
        """
        path = folder / MANIFEST
        try:
            return cls._parse(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"cannot use {path}: {reason}") from error

    @classmethod
    def _parse(cls, values: Any) -> Manifest:
        require(isinstance(values, dict), f"it holds {values!r:.40}, expected a table")
        version = values.get("format_version")
        require(type(version) is int and version > 0, f"format_version is {version!r}, expected a positive number")
        newer = f"format_version is {version}, expected at most {FORMAT_VERSION}: a newer cogvideo wrote it, upgrade"
        require(version <= FORMAT_VERSION, newer)
        fields = {"format_version", "config", "components"}
        require(values.keys() == fields, f"it has the fields {sorted(values)}, expected {sorted(fields)}")
        entries = values["components"]
        require(isinstance(entries, dict), f"components is {entries!r:.40}, expected a table")
        unknown = sorted(entries.keys() - set(COMPONENTS))
        require(not unknown, f"it has the components {unknown}, expected some of {list(COMPONENTS)}")
        return cls(
            from_dict(CogVideoConfig, values["config"]),
            {component: from_dict(Entry, entry) for component, entry in entries.items()},
        )

    def write(self, folder: Path) -> None:
        """Write `bundle.json` into `folder`."""
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


class CogVideo:
    """A whole system or a part of one: what it has is in `components`, and the rest is refused when it is asked for.

    Everything that is loaded has `requires_grad` False: training turns on what it trains.

    Args:
        config: sizes of all components.
        components: by their names in `COMPONENTS`: `Base`, `TemporalChannel`s (sequential and interpolation),
            `UpscaleChannel` (superres), `Autoencoder` (image_tokenizer), int64 labels, `TextTokenizer`.

    Raises:
        ValueError: there is no component of such a name.
    """

    def __init__(self, config: CogVideoConfig, **components: Component) -> None:
        unknown = sorted(components.keys() - set(COMPONENTS))
        require(not unknown, f"got the components {unknown}, expected some of {list(COMPONENTS)}")
        self.config = config
        self._parts = components
        self._source: _Source | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        verify: bool = True,
    ) -> CogVideo:
        """The model in a folder, or else on the Hugging Face Hub; each component is loaded when it is first used.

        On the CPU and in the stored dtype, weights stay memory-mapped. Else they are copied one tensor at a time, so that
        host memory peaks at what is loaded plus one tensor.

        Args:
            name: folder of a bundle, or id of one on the Hub (`owner/name`).
            dtype: of all weights; as stored unless given.
            device: where tensors go.
            verify: whether to compare the sha256 of a component's file before it is used.

        Raises:
            ValueError: there is no such bundle, it is incomplete or of a newer format, or dtype or device cannot be
                used. What is wrong inside a component is refused when it is loaded.
        """
        folder = _find(name)
        manifest = Manifest.read(folder)
        for entry in manifest.components.values():
            entry.check(folder / entry.file)
        require(dtype is None or dtype.is_floating_point, f"dtype is {dtype}, expected a floating point type")
        model = cls(manifest.config)
        model._source = _Source(folder, manifest, dtype, _usable(device), verify)
        return model

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write a bundle; one that is already in `folder` is replaced in one step, when the new one is complete.

        Components that were not loaded, and keep their dtype, are copied as files.

        Raises:
            ValueError: `folder` is no folder, or a component does not fit the configuration.
            OSError: it cannot be written.
        """
        with writing(Path(folder), self.config) as writer:
            for component in self.components:
                self._save(component, writer)

    def _save(self, component: str, writer: BundleWriter) -> None:
        if component not in self._parts and self._source is not None and self._source.dtype is None:
            writer.copy(component, self._source.folder, self._source.manifest.components[component])
            return
        part = self._part(component)
        if isinstance(part, TextTokenizer):
            require(part.config == self.config.text, f"text has {part.config}, expected {self.config.text}")
            writer.add_text(part.model)
        else:
            writer.add(component, {"labels": part} if isinstance(part, Tensor) else part.state_dict())

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that this model has, loaded or not, in the order of `COMPONENTS`."""
        stored = self._source.manifest.components if self._source is not None else {}
        return tuple(each for each in COMPONENTS if each in self._parts or each in stored)

    @cached_property
    def base(self) -> Base:
        """Parameters of the image model, which the stages share."""
        return self._get("base", Base)

    @cached_property
    def image_model(self) -> Transformer:
        """Text to the first frame."""
        return Transformer(self.base)

    @cached_property
    def sequential(self) -> Transformer:
        """First frame to key frames."""
        return Transformer(self.base, self._get("sequential", TemporalChannel))

    @cached_property
    def interpolation(self) -> Transformer:
        """Frames to those between them."""
        return Transformer(self._base_of("interpolation"), self._get("interpolation", TemporalChannel))

    @cached_property
    def upscaler(self) -> Upscaler:
        """Codes of a frame to those of a larger one."""
        return Upscaler(self._base_of("superres"), self._get("superres", UpscaleChannel))

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Frames to codes and back."""
        return self._get("image_tokenizer", Autoencoder)

    @cached_property
    def cluster_labels(self) -> Int64[Tensor, " codes"] | None:
        """Cluster of each code; None where the tokenizer has none."""
        return self._get("cluster_labels", Tensor) if "cluster_labels" in self.components else None

    @cached_property
    def text(self) -> TextTokenizer:
        """Captions to tokens and back."""
        return self._get("text", TextTokenizer)

    def _base_of(self, stage: str) -> Base:
        own = f"{stage}_base"
        return self._get(own, Base) if own in self.components else self.base

    def _get(self, component: str, kind: type[T]) -> T:
        part = self._part(component)
        require(isinstance(part, kind), f"{component} is a {type(part).__name__}, expected a {kind.__name__}")
        return part

    def _part(self, component: str) -> Component:
        if component not in self._parts:
            where = "this model" if self._source is None else f"the bundle {self._source.folder}"
            there = ", ".join(self.components) or "nothing"
            require(component in self.components, f"{where} has no {component}, it has: {there}")
            assert self._source is not None
            self._parts[component] = self._source.load(component)
        return self._parts[component]


class _Source(NamedTuple):
    """Where components that are not loaded yet come from, and how they are to be loaded."""

    folder: Path
    manifest: Manifest
    dtype: torch.dtype | None
    device: torch.device
    verify: bool

    def load(self, component: str) -> Component:
        """The component, refused if its file is not what was saved or does not fit the configuration."""
        config, entry = self.manifest.config, self.manifest.components[component]
        path = self.folder / entry.file
        entry.check(path)
        if self.verify:
            entry.verify(path)
        if component == "text":
            return _text_tokenizer(path.read_bytes(), config)
        tensors = self._read(component, path)
        if component == "cluster_labels":
            return tensors["labels"]
        with torch.device("meta"):
            module = _MODULES[component](config)
        module.load_state_dict(tensors, assign=True)
        return module.eval().requires_grad_(False)

    def _read(self, component: str, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118: it is no mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        check_tensors(component, tensors, self.manifest.config, path)
        return {name: self._place(path, name, tensor) for name, tensor in tensors.items()}

    def _place(self, path: Path, name: str, mapped: Tensor) -> Tensor:
        """The memory-mapped tensor itself where it can stay as it is, else a copy."""
        dtype = self.dtype if self.dtype is not None and mapped.is_floating_point() else mapped.dtype
        if self.device.type == "cpu" and dtype == mapped.dtype:
            return mapped
        return read_tensor(path, name).to(self.device, dtype)


def read_tensor(path: Path, name: str) -> Shaped[Tensor, "..."]:
    """One tensor of a safetensors file in a memory map of its own, whose pages leave memory together with the tensor."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def check_tensors(component: str, tensors: Mapping[str, Tensor], config: CogVideoConfig, where: object) -> None:
    """Refuse tensors that are not exactly those of the component.

    Args:
        component: one of `COMPONENTS`, but `text`.
        tensors: by the names in the module's state; those of `cluster_labels` are `labels`.
        config: decides on names and shapes.
        where: what the message calls them.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape or kind, or labels are out of range.
    """
    expected = _shapes(component, config)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    require(
        not missing and not extra,
        f"{where} is no {component} of this configuration: missing {_few(missing)}, unexpected {_few(extra)}",
    )
    wrong = [f"{name} {tuple(tensors[name].shape)}, expected {shape}" for name, shape in expected.items()]
    wrong = [each for each, name in zip(wrong, expected, strict=True) if tensors[name].shape != expected[name]]
    require(not wrong, f"{where} is no {component} of this configuration: wrong shapes {_few(wrong)}")


