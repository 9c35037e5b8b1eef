"""Adapters on disk, in PEFT's format: `adapters/NAME/` in a bundle, or any folder, with a folder for each component.

`adapters/NAME/base/` has `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads and writes; so do
`sequential/` and `interpolation/`. Our own metadata identifies the weights that an adapter was trained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cogvideo.bundle.format import Entry, owner_of
from cogvideo.config import InputError, require
from cogvideo.files import replacing, write_json
from cogvideo.models.adapters import DOWN, MATRICES, UP, Delta

ADAPTERS, OWN = "adapters", "own"
"""Folder of adapters in a bundle, and the default name of an adapter."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTED = ("base", "sequential", "interpolation")
"""Components that adapters can change."""
_FACTS = "cogvideo"
"""Key of our metadata, a single one because the order of several in the file is random."""
_PREFIX = "base_model.model."
"""Prefix of PEFT's tensor names."""
_PLAIN = {"bias": "none", "use_dora": False, "use_rslora": False, "alpha_pattern": {}, "fan_in_fan_out": False}
"""PEFT settings that change what is added, with the only values supported here."""


class Adapter(NamedTuple):
    """Files of the adapter of one component."""

    component: str
    folder: Path
    scale: float

    @property
    def weights(self) -> Path:
        """File of its matrices."""
        return self.folder / WEIGHTS

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that were written with the adapter; PEFT writes none."""
        with _opened(self.weights) as file:
            return dict(json.loads((file.metadata() or {}).get(_FACTS, "{}")))

    @property
    def sha256(self) -> str:
        """Hash of the file of the matrices."""
        return Entry.of(self.weights).sha256

    @property
    def durations(self) -> list[float]:
        """Seconds of the sequences that the adapter was trained on; empty if unknown."""
        return list(self.facts.get("durations", []))

    def check(self, sha256: str) -> None:
        """Refuse an adapter that was trained on weights with another hash, if it records one."""
        known = self.facts.get("component_sha256", sha256)
        require(
            known == sha256,
            f"the adapter {self.folder} was trained on another {self.component} (sha256 {known:.12}) than this "
            f"model's (sha256 {sha256:.12}): pass the model that it was trained on",
        )

    def read(self, module: nn.Module) -> Delta:
        """Matrices to add to a component."""
        try:
            config = json.loads((self.folder / CONFIG).read_bytes())
            scale = self.scale * config["lora_alpha"] / config["r"]
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise InputError(f"cannot use {self.folder / CONFIG}: {error!r}, expected PEFT's settings") from error
        odd = [f"{name} {config[name]}" for name, value in _PLAIN.items() if (config.get(name) or value) != value]
        require(not odd, f"{self.folder / CONFIG} has {', '.join(odd)}, expected plain LoRA")
        with _opened(self.weights) as file:
            tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._check_tensors(tensors, module)
        return Delta(tensors, scale)

    def _check_tensors(self, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        layers = {name: each for name, each in module.named_modules() if isinstance(each, nn.Linear)}
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition(".lora_")
            is_known = name in layers and f"lora_{kind}" in (DOWN, UP) and tensor.ndim == 2
            require(is_known, f"{self.weights} has {key}, expected matrices of layers that {self.component} has")
            down, up = tensors.get(f"{name}.{DOWN}"), tensors.get(f"{name}.{UP}")
            shape = None if down is None or up is None else (up.shape[0], down.shape[1])
            fits = down is not None and up is not None and up.shape[1] == down.shape[0]
            expected = tuple(layers[name].weight.shape)
            require(fits and shape == expected, f"{self.weights} does not fit {name} of {self.component} {expected}")


def scales(adapters: Iterable[str]) -> dict[str, float]:
    """Scales by name, from texts `NAME` or `NAME:SCALE`.

    Raises:
        ValueError: a scale is not a number.
    """
    found = {}
    for each in adapters:
        name, colon, scale = each.rpartition(":")
        try:
            found[name if colon else each] = float(scale) if colon else 1.0
        except ValueError:
            raise InputError(f"adapter is {each!r}, expected NAME or NAME:SCALE") from None
    return found


def adapters_in(folder: Path, scale: float = 1.0) -> list[Adapter]:
    """Files of the adapter in a folder, one entry per component that it changes."""
    return [Adapter(each, folder / each, scale) for each in ADAPTED if (folder / each / CONFIG).is_file()]


def find_adapter(bundle: Path, name: str, scale: float) -> list[Adapter]:
    """Files of an adapter, given its name in a bundle or its folder.

    Raises:
        ValueError: there is no such adapter, or the scale is not a number.
    """
    require(math.isfinite(scale), f"the scale of the adapter {name} is {scale}, expected a finite number")
    groups = [each / ADAPTERS for each in (bundle, owner_of(bundle)) if each is not None]
    places = [*(group / name for group in groups), Path(name)]
    folder = next((each for each in places if name and each.is_dir()), None)
    if folder is None:
        there = [each.name for group in groups for each in sorted(group.glob("*")) if each.is_dir()]
        known = f"one of {', '.join(there)}, or a folder" if there else f"a folder, since {bundle} has no adapters"
        raise InputError(f"there is no adapter {name!r}, expected {known}")
    found = adapters_in(folder, scale)
    expected = f"expected one with {CONFIG} in at least one of the folders {', '.join(ADAPTED)}"
    require(len(found) > 0, f"{folder} is not an adapter, {expected}")
    return found


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the adapter of one component.

    Args:
        folder: folder of the component.
        tensors: both matrices of each layer, by their names in the component.
        facts: `component_sha256`, hash of the weights to which it applies, and `durations` in seconds of the clips.

    Raises:
        OSError: the adapter cannot be written.
    """
    rank = len(next(each for name, each in tensors.items() if name.endswith(DOWN)))
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,  # PEFT would look it up on the Hub
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name for name in MATRICES if name in layers],
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config | _PLAIN)
    named = {f"{_PREFIX}{name}": each.contiguous() for name, each in tensors.items()}
    with replacing(folder / WEIGHTS) as file:
        file.write(save(named, {_FACTS: json.dumps(facts)}))


def _opened(path: Path) -> Any:
    """Open a safetensors file."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot use {path}: {error}, expected the weights of an adapter") from error
