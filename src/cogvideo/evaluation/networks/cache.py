"""Location of fetched weights: `COGVIDEO_CACHE`, else `cogvideo` in the user's cache folder (XDG)."""

from __future__ import annotations

import os
from pathlib import Path

from cogvideo.config import require

VARIABLE = "COGVIDEO_CACHE"


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
    """The same, for weights that must exist."""
    path, command = network_path(name), f"cogvideo fetch {name.partition('-')[0]}"
    require(path.is_file(), f"there is no {path}, expected the weights that `{command}` puts there")
    return path
