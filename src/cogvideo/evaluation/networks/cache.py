"""Fetched weights, in `COGVIDEO_CACHE`, else in `cogvideo` in the user's cache folder (XDG)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cogvideo.config import InputError, require

VARIABLE = "COGVIDEO_CACHE"
DIGESTS = {
    "lpips-vgg": "13dc372fe180a6c00cbd5b9b52f2a897d76fb24334242d50950b963ebf6b7e77",
    "lpips-alexnet": "007c110a0dcbff8843dfa68963415f6d8deed560e66a3ea549470afea73d7f3f",
}
"""Digests of fetched weights. Those of I3D are checked whenever it is loaded."""


def cache_folder() -> Path:
    """The folder of everything that can be fetched or computed again; it may not exist yet."""
    if own := os.environ.get(VARIABLE):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "cogvideo"


def network_path(name: str) -> Path:
    """Path of a network's weights once they are fetched, such as `lpips-vgg`."""
    return cache_folder() / "networks" / f"{name}.safetensors"


def fetched(name: str) -> Path:
    """The same, for weights that must exist; refuses a file with other content."""
    path, command = network_path(name), f"cogvideo fetch {name.partition('-')[0]}"
    require(path.is_file(), f"there is no {path}, expected the weights that `{command}` puts there")
    if name in DIGESTS:
        changed = f"{path} does not have the weights that `{command}` puts there: run that again"
        try:
            found = digest(load_file(path))
        except SafetensorError as error:
            raise InputError(changed) from error
        require(found == DIGESTS[name], changed)
    return path


def digest(tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 of names and values, in the order of the names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.tobytes())
    return found.hexdigest()
