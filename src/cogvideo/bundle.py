"""A model on disk: a folder with `bundle.json` and one file a component; the base, which all stages share, once.

`bundle.json` holds the configuration and the name, size and sha256 of each component's file. It is written last and in
one step, so that a folder holds the old bundle or the new one, whatever interrupts a save.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
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

        On the CPU and in the stored dtype, weights stay memory-mapped. Else they are copied one tensor at a time: host
        memory peaks at what is loaded plus one tensor.

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
        if not isinstance(part, kind):
            raise ValueError(f"{component} is a {type(part).__name__}, expected a {kind.__name__}")
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
            return _text_tokenizer(path.read_bytes(), config, path)
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
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
    """One tensor of a safetensors file, in a memory map of its own: its pages leave memory together with it."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def check_tensors(component: str, tensors: Mapping[str, Tensor], config: CogVideoConfig, where: object) -> None:
    """Refuse tensors that are not exactly those of the component.

    Args:
        component: one of `COMPONENTS` except `text`.
        tensors: by their names in the module's state; the one of `cluster_labels` is called `labels`.
        config: what names and shapes follow from.
        where: what the message calls the tensors.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape or type, or labels are out of range.
    """
    expected, got = _shapes(component, config), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    prefix = f"{where} does not fit the configuration as {component}"
    missing, extra = few(expected.keys() - got.keys()), few(got.keys() - expected.keys())
    require(expected.keys() == got.keys(), f"{prefix}: missing tensors: {missing}; unexpected tensors: {extra}")
    wrong = [f"{name} {got[name]}, expected {shape}" for name, shape in expected.items() if got[name] != shape]
    require(not wrong, f"{prefix}: wrong shapes: {few(wrong)}")
    labels = component == "cluster_labels"
    odd = [
        f"{name} {each.dtype}"
        for name, each in tensors.items()
        if not (each.dtype == torch.int64 if labels else each.is_floating_point())
    ]
    require(not odd, f"{prefix}: wrong types: {few(odd)}, expected {'torch.int64' if labels else 'floating point'}")
    if labels:
        low, high = (int(bound) for bound in tensors["labels"].aminmax())
        end = config.transformer.num_codes
        require(low >= 0 and high < end, f"{prefix}: labels lie in [{low}, {high}], expected [0, {end})")


def _shapes(component: str, config: CogVideoConfig) -> dict[str, tuple[int, ...]]:
    if component == "cluster_labels":
        return {"labels": (config.transformer.num_codes,)}
    with torch.device("meta"):
        state = _MODULES[component](config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def few(names: Iterable[str]) -> str:
    """The first of what may be many names, for a message."""
    first, *others = sorted(names) or ["none"]
    shown = ", ".join([first, *others[:2]])
    return shown if len(others) < 3 else f"{shown} and {len(others) - 2} more"


def _text_tokenizer(model: bytes, config: CogVideoConfig, where: object) -> TextTokenizer:
    try:
        tokenizer = TextTokenizer(model, config.text, config.transformer.num_codes)
        tokenizer.check(config.transformer)
    except ValueError as error:
        raise ValueError(f"{where} does not fit the configuration as text: {error}") from error
    return tokenizer


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # unknown to PyTorch, or not in this build or machine
        raise ValueError(f"cannot use the device {str(device)!r}: {str(error).splitlines()[0]}") from error


def _find(name: str | PathLike[str]) -> Path:
    """The folder of a bundle: `name` itself, else a download of the Hub's bundle of that id."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    hint = "pass the folder of a bundle, or the id of one on the Hugging Face Hub (owner/name)"
    require(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None, f"there is no folder {folder}: {hint}")
    from huggingface_hub import snapshot_download  # takes a third of a second, and most bundles are folders

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except Exception as error:  # what it raises depends on its version and on the HTTP library that it uses
        raise ValueError(f"there is no folder {folder}, and none came from the Hub ({error}): {hint}") from error


@contextmanager
def writing(folder: Path, config: CogVideoConfig) -> Iterator[BundleWriter]:
    """A bundle in the making, which replaces the one in `folder` if the `with` block ends without an error.

    Until then it is in a folder `.saving-*` inside, which only a killed process leaves behind.

    Raises:
        ValueError: `folder` is a file.
    """
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        writer = BundleWriter(folder, Path(temporary), config)
        yield writer
        writer.publish()


class BundleWriter:
    """The files of a new bundle; `writing` makes one."""

    def __init__(self, target: Path, temporary: Path, config: CogVideoConfig) -> None:
        self.target = target
        self.temporary = temporary
        self.config = config
        self._written: dict[str, Entry] = {}
        self._kept: dict[str, Entry] = {}

    def path(self, component: str) -> Path:
        """Where the file of a component is until the bundle is complete."""
        return self.temporary / f"{component}.{'model' if component == 'text' else 'safetensors'}"

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components so far."""
        return tuple(each for each in COMPONENTS if each in self._written or each in self._kept)

    def add(self, component: str, tensors: Mapping[str, Tensor], where: object = "the model") -> None:
        """Write tensors, which may be memory-mapped: none is copied unless it is strided.

        Args:
            component: one of `COMPONENTS` except `text`.
            tensors: all that belong to it.
            where: what messages call them.

        Raises:
            ValueError: they are not those of the component.
            OSError: they cannot be written.
        """
        check_tensors(component, tensors, self.config, where)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.path(component))
        except SafetensorError as error:
            raise OSError(errno.EIO, f"cannot write {component} ({error})", str(self.path(component))) from error
        self._written[component] = Entry.of(self.path(component))

    def add_text(self, model: bytes, where: object = "the model") -> None:
        """Write a serialised SentencePiece model.

        Raises:
            ValueError: it is none, or not that of the configuration.
        """
        _text_tokenizer(model, self.config, where)
        self.path("text").write_bytes(model)
        self._written["text"] = Entry.of(self.path("text"))

    def copy(self, component: str, folder: Path, entry: Entry) -> None:
        """Take over a file of another bundle, or leave it where it is if the bundle is being replaced itself.

        Raises:
            ValueError: the file is missing or not what was saved.
        """
        entry.check(folder / entry.file)
        if folder.samefile(self.target):
            self._kept[component] = entry
            return
        shutil.copyfile(folder / entry.file, self.path(component))
        entry.verify(self.path(component))
        self._written[component] = replace(entry, file=self.path(component).name)

    def publish(self) -> None:
        """Put everything in place, `bundle.json` last, then remove the files of the bundle that was replaced.

        New files take names that are free, so the old bundle is whole until its `bundle.json` is replaced.
        """
        old = _files(self.target)
        placed = {name: replace(entry, file=_free(self.target, entry.file)) for name, entry in self._written.items()}
        manifest = Manifest(self.config, placed | self._kept)
        manifest.write(self.temporary)
        for component, entry in placed.items():
            shutil.copymode(self.temporary / MANIFEST, self.path(component))  # safetensors writes for its owner alone
            self.path(component).rename(self.target / entry.file)
        (self.temporary / MANIFEST).replace(self.target / MANIFEST)
        for name in old - {entry.file for entry in manifest.components.values()}:
            (self.target / name).unlink(missing_ok=True)


def _files(folder: Path) -> set[str]:
    """Files of the bundle in a folder; none if there is no bundle, or one that we cannot read."""
    try:
        return {entry.file for entry in Manifest.read(folder).components.values()}
    except ValueError:
        return set()


def _free(folder: Path, file: str) -> str:
    """`base.safetensors`, or `base-2.safetensors` and so on where there is such a file."""
    stem, suffix = file.split(".")
    names = chain([file], (f"{stem}-{number}.{suffix}" for number in count(2)))
    return next(name for name in names if not (folder / name).exists())
