"""The format of a bundle: a folder with `bundle.json` and one file per component; the shared base is stored once.

`bundle.json` holds the configuration and the name, size and sha256 of each component's file. It is written last and
atomically, so after any interruption a folder holds either the old bundle or the new one. Saves into one folder take
turns, and each removes the leftovers of killed ones.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cogvideo.config import (
    PRESETS,
    CogVideoConfig,
    InputError,
    check_version,
    from_dict,
    preset,
    require,
    upgraded,
)
from cogvideo.files import named, replacing, sha256_of, sync, wait_for_lock, write_json, write_text
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.transformer import Base, TemporalChannel
from cogvideo.models.upscaler import UpscaleChannel
from cogvideo.text import TextTokenizer

FORMAT_VERSION = 2
MANIFEST = "bundle.json"
SAVING = ".saving-"
"""Prefix of the temporary folder of an unfinished bundle, inside the bundle that it will replace."""
CHANNELS = "channels"
"""Folder of additional video channels in a bundle; each is a bundle that shares everything else with this one."""
TOUCHED = "touched"
"""File in the temporary folder: names of files that the bundle loses or gains, one per line."""

OWN_BASES = ("sequential_base", "interpolation_base", "superres_base")
MODULES: dict[str, Callable[[CogVideoConfig], nn.Module]] = {
    "base": lambda config: Base(config.transformer),
    "sequential": lambda config: TemporalChannel(config.transformer, config.layout, config.sequential),
    "interpolation": lambda config: TemporalChannel(config.transformer, config.layout, config.interpolation),
    "superres": lambda config: UpscaleChannel(config.transformer, config.layout, config.upscaler),
    "image_tokenizer": lambda config: Autoencoder(config.autoencoder),
    **dict.fromkeys(OWN_BASES, lambda config: Base(config.transformer)),
}
"""Components with parameters. A stage has a base of its own only where it differs from the shared one."""

PLAIN_NAME = re.compile(r"\w[\w.-]*")
"""Valid name of a file in a bundle."""

SHARED = ("base", "text", "image_tokenizer")
"""Components that the stages of a bundle have in common."""

COMPONENTS = (*MODULES, "cluster_labels", "text")
"""All components of a bundle, any of which may be missing."""

Component = nn.Module | Tensor | TextTokenizer


@dataclass(frozen=True)
class Entry:
    """The file of one component."""

    file: str
    """Name in the bundle's folder."""
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        plain = PLAIN_NAME.fullmatch(self.file) is not None
        require(plain, f"the file name {self.file!r} is refused, expected a plain name inside the bundle")

    @classmethod
    def of(cls, path: Path) -> Entry:
        """The entry of a file as it is now."""
        return cls(path.name, path.stat().st_size, sha256_of(path))

    def check(self, path: Path) -> None:
        """Refuse a file that is missing or of another size."""
        try:
            got = path.stat().st_size
        except FileNotFoundError:
            raise InputError(f"the bundle is incomplete: there is no file {path}") from None
        require(got == self.num_bytes, f"{path} has {got} bytes, expected {self.num_bytes}: the copy is incomplete")

    def verify(self, path: Path) -> None:
        """Refuse a file that is not, byte for byte, what was saved."""
        got = Entry.of(path).sha256
        require(got == self.sha256, f"{path} has the sha256 {got}, expected {self.sha256}: its content was changed")


@dataclass(frozen=True)
class Manifest:
    """Content of `bundle.json`."""

    config: CogVideoConfig
    """Sizes of all components, also of missing ones."""
    components: dict[str, Entry]
    """File of each component, by its name in `COMPONENTS`."""

    @classmethod
    def of(cls, target: str) -> Manifest:
        """The manifest of the bundle in a folder, or of a preset, which has no components."""
        if target in PRESETS:
            return cls(preset(target), {})
        expected = f"expected a preset ({', '.join(PRESETS)}) or the folder of a bundle"
        require(Path(target).is_dir(), f"got {target!r}, {expected}")
        return cls.read(Path(target))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the bundle in `folder`."""
        path = folder / MANIFEST
        try:
            return cls._parse(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            hint = ", expected the folder of a bundle" if isinstance(error, FileNotFoundError) else ""
            raise InputError(f"cannot use {path}: {reason}{hint}") from error

    def entry(self, component: str, where: object = "the bundle") -> Entry:
        """The file of a component, refused if there is none."""
        there = ", ".join(self.components) or "nothing"
        require(component in self.components, f"{where} has no {component}, it has: {there}")
        return self.components[component]

    @classmethod
    def _parse(cls, values: Any) -> Manifest:
        fields = check_version(values, FORMAT_VERSION)
        manifest = from_dict(cls, fields | {"config": upgraded(fields.get("config"))})
        unknown = sorted(manifest.components.keys() - set(COMPONENTS))
        require(not unknown, f"it has the components {unknown}, expected some of {list(COMPONENTS)}")
        return manifest

    def write(self, folder: Path) -> None:
        """Write `bundle.json` into `folder`."""
        write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def here(cls, folder: Path) -> Manifest | None:
        """The manifest of the bundle in `folder`, or of the one that a new channel there will belong to, if any."""
        if (folder / MANIFEST).exists():
            return cls._whole(folder)
        owner = owner_of(folder)
        return None if owner is None else cls.read(owner)

    @classmethod
    def complete(cls, folder: Path) -> Manifest:
        """The manifest of a bundle whose files all exist; reread if an update replaces the bundle meanwhile.

        For a channel, it includes what the channel shares.
        """
        manifest = cls._whole(folder)
        while True:
            try:
                for entry in manifest.components.values():
                    entry.check(file_of(folder, entry))
                return manifest
            except ValueError:
                manifest, before = cls._whole(folder), manifest
                if manifest == before:
                    raise

    @classmethod
    def _whole(cls, folder: Path) -> Manifest:
        manifest, owner = cls.read(folder), owner_of(folder)
        if owner is None:
            return manifest
        shared, own = cls.read(owner).components, manifest.components
        for name in SHARED:
            same = name not in own or (name in shared and shared[name].sha256 == own[name].sha256)
            require(same, f"{folder} was trained on a {name} that {owner} no longer has: train it again")
        return replace(manifest, components=shared | {name: own[name] for name in own if name not in SHARED})


def read_tensor(path: Path, name: str) -> Shaped[Tensor, "..."]:
    """One tensor of a safetensors file, in its own memory map, so its pages are freed with it."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def check_tensors(component: str, tensors: Mapping[str, Tensor], config: CogVideoConfig, where: object) -> None:
    """Refuse tensors, called `where` in messages, that are not exactly those of the component.

    Names are those in the module's state dict; the tensor of `cluster_labels` is called `labels`.
    """
    is_labels = component == "cluster_labels"
    if is_labels:
        expected = {"labels": (config.transformer.num_codes,)}
    else:
        with torch.device("meta"):
            state = MODULES[component](config).state_dict()
        expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    prefix = f"{where} does not fit the configuration as {component}"
    missing, extra = few(expected.keys() - got.keys()), few(got.keys() - expected.keys())
    require(expected.keys() == got.keys(), f"{prefix}: missing tensors: {missing}; unexpected tensors: {extra}")
    wrong = [f"{name} {got[name]}, expected {shape}" for name, shape in expected.items() if got[name] != shape]
    require(not wrong, f"{prefix}: wrong shapes: {few(wrong)}")
    types = {name: each.dtype for name, each in tensors.items()}
    right = {name for name, kind in types.items() if (kind == torch.int64 if is_labels else kind.is_floating_point)}
    odd = [f"{name} {kind}" for name, kind in types.items() if name not in right]
    require(not odd, f"{prefix}: wrong types: {few(odd)}, expected {'torch.int64' if is_labels else 'floating point'}")
    if is_labels:
        (low, high), end = map(int, tensors["labels"].aminmax()), config.transformer.num_codes
        require(low >= 0 and high < end, f"{prefix}: labels lie in [{low}, {high}], expected [0, {end})")


def in_half(component: str, module: nn.Module, config: CogVideoConfig) -> nn.Module:
    """Copy of a component on the CPU in float16, as bundles store trained weights; in its own precision, with a
    message, if a value is too large for float16."""
    state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    narrow = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    large = [name for name, tensor in narrow.items() if not bool(tensor.isfinite().all())]
    if large:
        print(f"{component} is not stored in float16: {few(large)} has values beyond 65,504.", file=sys.stderr)
    return module_of(component, state if large else narrow, config)


def module_of(component: str, tensors: Mapping[str, Tensor], config: CogVideoConfig) -> nn.Module:
    """A component that has these tensors as its weights, not copies, and no gradients."""
    with torch.device("meta"):
        module = MODULES[component](config)
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False)


def few(names: Iterable[str]) -> str:
    """The first of many names, for a message."""
    first, *others = sorted(names) or ["none"]
    shown = ", ".join([first, *others[:2]])
    return shown if len(others) < 3 else f"{shown} and {len(others) - 2} more"


def text_tokenizer(model: bytes, config: CogVideoConfig, where: object) -> TextTokenizer:
    try:
        tokenizer = TextTokenizer(model, config.text, config.transformer.num_codes)
        tokenizer.check(config.transformer)
    except InputError as error:
        raise InputError(f"{where} does not fit the configuration as text: {error}") from error
    return tokenizer


@contextmanager
def writing(folder: Path, config: CogVideoConfig) -> Iterator[BundleWriter]:
    """Writer of a bundle that replaces the one in `folder` if the `with` block ends without an error.

    Until then its files are in a folder `.saving-*` inside, which remains only if the process is killed. Other writers
    of the same bundle wait.
    """
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(folder):
        _clear(folder)
        try:
            writer = BundleWriter(folder, Path(mkdtemp(prefix=SAVING, dir=folder)), config)
            yield writer
            writer.publish()
        finally:
            _clear(folder)


def _clear(folder: Path) -> None:
    """Remove leftovers of saves, however they ended: their folders, and files that they touched but the bundle lacks,
    unless the bundle cannot be read."""
    for leftover in named(folder, f"{SAVING}*"):
        touched, files = leftover / TOUCHED, _files(folder)
        if touched.exists() and (files or not (folder / MANIFEST).exists()):
            names = touched.read_text(encoding="utf-8").splitlines()
            for name in sorted({name for name in names if PLAIN_NAME.fullmatch(name)} - files):
                (folder / name).unlink(missing_ok=True)
        shutil.rmtree(leftover)


class BundleWriter:
    """Writer of the files of a new bundle; `writing` creates it."""

    def __init__(self, target: Path, temporary: Path, config: CogVideoConfig) -> None:
        self.target, self.temporary, self.config = target, temporary, config
        self._written: dict[str, Entry] = {}
        self._kept: dict[str, Entry] = {}

    def path(self, component: str) -> Path:
        """File of a component until the bundle is complete."""
        return self.temporary / f"{component}.{'model' if component == 'text' else 'safetensors'}"

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components so far."""
        return tuple(each for each in COMPONENTS if each in self._written or each in self._kept)

    def add(self, component: str, tensors: Mapping[str, Tensor], where: object = "the model") -> None:
        """Write the tensors of a component, which may be memory-mapped: only strided ones are copied."""
        check_tensors(component, tensors, self.config, where)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.path(component))
        except SafetensorError as error:
            raise OSError(errno.EIO, f"cannot write {component} ({error})", str(self.path(component))) from error
        self._written[component] = Entry.of(self.path(component))

    def add_text(self, model: bytes, where: object = "the model") -> None:
        """Write a serialized SentencePiece model, refused unless it fits the configuration."""
        text_tokenizer(model, self.config, where)
        with replacing(self.path("text")) as file:
            file.write(model)
        self._written["text"] = Entry.of(self.path("text"))

    def copy(self, component: str, folder: Path, entry: Entry) -> None:
        """Copy a file of another bundle; if that is the bundle being replaced, keep its file in place."""
        file = file_of(folder, entry)
        entry.check(file)
        if folder.samefile(self.target):
            self._kept[component] = entry
            return
        shutil.copyfile(file, self.path(component))
        entry.verify(self.path(component))
        self._written[component] = replace(entry, file=self.path(component).name)

    def publish(self) -> None:
        """Put everything in place, `bundle.json` last.

        New files get unused names, so the old bundle stays intact until its `bundle.json` is replaced.
        """
        placed = {name: replace(entry, file=_free(self.target, entry.file)) for name, entry in self._written.items()}
        manifest = Manifest(self.config, placed | self._kept)
        touched = _files(self.target) | {entry.file for entry in placed.values()}
        write_text(self.temporary / TOUCHED, "".join(f"{name}\n" for name in sorted(touched)))
        manifest.write(self.temporary)
        for component, entry in placed.items():
            sync(self.path(component))
            shutil.copymode(self.temporary / MANIFEST, self.path(component))  # safetensors lets only the owner read
            self.path(component).rename(self.target / entry.file)
        sync(self.target)
        (self.temporary / MANIFEST).replace(self.target / MANIFEST)
        sync(self.target)


def owner_of(folder: Path) -> Path | None:
    """The bundle that a channel's folder belongs to; None for any other folder."""
    group = folder.absolute().parent
    return group.parent if group.name == CHANNELS and (group.parent / MANIFEST).exists() else None


def file_of(folder: Path, entry: Entry) -> Path:
    """Path of an entry's file; files that a channel shares are in the bundle that it belongs to."""
    owner, own = owner_of(folder), folder / entry.file
    return own if owner is None or own.exists() else owner / entry.file


def _files(folder: Path) -> set[str]:
    """Files of the bundle in a folder; none if there is no readable bundle."""
    try:
        return {entry.file for entry in Manifest.read(folder).components.values()}
    except InputError:
        return set()


def _free(folder: Path, file: str) -> str:
    """Unused file name: `base.safetensors`, else `base-2.safetensors` and so on."""
    stem, suffix = file.split(".")
    names = chain([file], (f"{stem}-{number}.{suffix}" for number in count(2)))
    folders = [each for each in (folder, owner_of(folder)) if each is not None]
    return next(name for name in names if not any((each / name).exists() for each in folders))
