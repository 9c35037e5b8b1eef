"""Evaluation networks against reference implementations, with seeded weights and, where fetched, the trained ones."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cogvideo.evaluation.networks import i3d
from cogvideo.evaluation.networks.c3d import C3D, build_c3d, load_c3d
from cogvideo.evaluation.networks.cache import cache_folder, network_path
from cogvideo.evaluation.networks.i3d import (
    I3D,
    build_i3d,
    check_i3d,
    checkpoint_name,
    load_i3d,
    masked_crc32c,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "networks"
FETCHED = network_path("i3d")
"""Resolved before tests are given an empty cache."""
Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def seeded(name: str, shape: tuple[int, ...], axes: slice) -> NDArray[np.float32]:
    """A tensor as in the golden data; `axes` selects the sizes that make up the fan-in."""
    state = np.random.RandomState(zlib.crc32(name.encode()))  # as in the golden data
    if name.endswith(("/w", "/W")):
        return (state.standard_normal(shape) * np.sqrt(2 / np.prod(shape[axes]))).astype(np.float32)
    if name.endswith("/moving_variance"):
        return (0.5 + state.random_sample(shape)).astype(np.float32)
    return (0.1 * state.standard_normal(shape)).astype(np.float32)


# I3D


@pytest.fixture(scope="module")
def checkpoint() -> Arrays:
    """Seeded weights with the names and layout of the official checkpoint."""
    with torch.device("meta"):
        state = I3D().state_dict()
    found = {}
    for name, tensor in state.items():
        shape = tuple(tensor.permute(2, 3, 4, 1, 0).shape if tensor.ndim == 5 else tensor.shape)
        found[checkpoint_name(name)] = seeded(checkpoint_name(name), shape, slice(None, -1))
    return found


@pytest.mark.parametrize(("key", "frames", "seed", "eps"), [("x11_tf", 11, 1, 1e-3), ("x10_tats", 10, 3, 1e-5)])
def test_i3d_is_that_of_tensorflow(checkpoint: Arrays, key: str, frames: int, seed: int, eps: float) -> None:
    """Checks padding of odd and even lengths, the order of branches, and the normalization constant."""
    clips = torch.rand(1, 3, frames, 224, 224, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    logits = build_i3d(checkpoint, eps)(clips)
    np.testing.assert_allclose(logits, np.load(GOLDEN / "i3d_golden_seeded.npz")[key], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 8, 224, 224), "8 frames, expected at least 9"), ((1, 3, 16, 112, 224), "112 x 224 pixels, expected 224")],
)
def test_clips_that_i3d_cannot_judge_are_refused(shape: tuple[int, ...], message: str) -> None:
    """Refuses clips of the wrong length or size with a clear message, before PyTorch fails in the last pooling."""
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        I3D()(torch.zeros(shape))


def test_checksums_are_those_of_tensorflow() -> None:
    """Catches the wrong CRC, a missing mask or the wrong byte order (RFC 3720, B.4: 32 zeros)."""
    crc = 0x8A9136AA
    assert masked_crc32c(np.zeros((2, 4), np.float32)) == ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


def test_another_network_is_refused(checkpoint: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses any I3D but the official one, even if one number differs; FVD by another I3D has been published."""
    with pytest.raises(ValueError, match=r"x is not the I3D of FVD: 230 of 230 tensors differ, the first is RGB/"):
        check_i3d(checkpoint, "x")
    monkeypatch.setattr(i3d, "_checksums", lambda: {name: masked_crc32c(each) for name, each in checkpoint.items()})
    name = "RGB/inception_i3d/Mixed_4c/Branch_2/Conv3d_0b_3x3/batch_norm/beta"
    changed = checkpoint | {name: checkpoint[name] + np.eye(1, 64, 5, dtype=np.float32)[0]}
    path = tmp_path / "i3d.safetensors"
    save_file(changed, path)
    with pytest.raises(ValueError, match=rf"1 of 230 tensors differ, the first is {name}$"):
        load_i3d(path)
    with pytest.raises(ValueError, match=rf"tensors are missing .1., the first is {name}$"):
        check_i3d({each: tensor for each, tensor in checkpoint.items() if each != name}, "x")
    with pytest.raises(ValueError, match=r"other tensors .1., the first is more"):
        check_i3d(checkpoint | {"more": checkpoint[name]}, "x")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot read"):
        load_i3d(path)


@pytest.fixture(scope="module")
def trained() -> I3D:
    """The network of FVD; skips if it was not fetched."""
    if not FETCHED.is_file():
        pytest.skip(f"there is no {FETCHED}: `cogvideo fetch i3d`")
    return load_i3d(FETCHED)


@pytest.mark.parametrize(("frames", "seed"), [(10, 1), (11, 2)])
def test_trained_logits_are_those_of_jax(trained: I3D, frames: int, seed: int) -> None:
    """Guards FVD: every feature must match the reference implementation."""
    state = np.random.RandomState(seed)  # as in the golden data
    clips = torch.from_numpy((state.rand(1, frames, 224, 224, 3) * 2 - 1).astype(np.float32))
    expected = np.load(GOLDEN / "i3d_trained_golden.npz")[f"uniform_seed{seed}_T{frames}"]
    np.testing.assert_allclose(trained(clips.permute(0, 4, 1, 2, 3)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("frames", "distance"), [(10, 569.771), (16, 152.9025), (30, 151.3926)])
def test_black_is_as_far_from_white_as_published(trained: I3D, frames: int, distance: float) -> None:
    """Checks the network end to end: the distance from black to white must be the published one."""
    black, white = (trained(torch.full((1, 3, frames, 224, 224), value)).double() for value in (-1.0, 1.0))
    assert (black - white).square().sum().item() == pytest.approx(distance, abs=0.01)


# C3D


@pytest.fixture(scope="module")
def mean() -> NDArray[np.float32]:
    """A stand-in for the mean clip, as in the golden data."""
    state = np.random.RandomState(7)  # as in the golden data
    return (100 + 10 * state.standard_normal((3, 16, 128, 128))).astype(np.float32)


def test_c3d_is_that_of_chainer(mean: NDArray[np.float32]) -> None:
    """Checks pooling that rounds sizes up, resizing with aligned corners, and the channel order."""
    with torch.device("meta"):
        state = C3D().state_dict()
    arrays = {}
    for name, tensor in state.items():
        if name != "mean":
            _, layer, kind = name.split(".")
            theirs = f"{layer}/{'W' if kind == 'weight' else 'b'}"
            arrays[theirs] = seeded(f"c3d/{theirs}", tuple(tensor.shape), slice(1, None))
    state21 = np.random.RandomState(21)  # as in the golden data
    clips = torch.from_numpy((state21.random_sample((2, 3, 16, 128, 128)) * 2 - 1).astype(np.float32))[:1]
    expected = np.load(GOLDEN / "c3d_golden_seeded.npz")["fc8"][:1]
    logits = build_c3d(arrays, mean, "seeded")(clips).numpy()
    assert np.linalg.norm(logits - expected) < 1e-5 * np.linalg.norm(expected)


def test_files_that_are_not_c3d_are_refused(mean: NDArray[np.float32], tmp_path: Path) -> None:
    """Handles untrusted weights: missing arrays are named, and nothing in a file is executed."""
    np.savez(tmp_path / "mean.npz", mean=mean)
    np.savez(tmp_path / "none.npz", **{"c3d/conv1a/W": np.zeros((64, 3, 3, 3, 3), np.float32)})
    np.savez(tmp_path / "small.npz", **{"conv1a/W": np.zeros((64, 3, 3, 3), np.float32)})
    np.savez(tmp_path / "pickled.npz", objects=np.array([{}], object))
    (tmp_path / "text.npz").write_text("text")
    for name, message in {
        "none": "none.npz is not C3D: conv1a/b is missing",
        "small": r"conv1a/W has the shape \(64, 3, 3, 3\), expected \(64, 3, 3, 3, 3\)",
        "pickled": "expected an archive of NumPy arrays",
        "text": "expected an archive of NumPy arrays",
        "nowhere": "No such file",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_c3d(tmp_path / f"{name}.npz", tmp_path / "mean.npz")
    with pytest.raises(ValueError, match=r"has 0 arrays of .*, expected the mean clip alone"):
        load_c3d(tmp_path / "none.npz", tmp_path / "none.npz")


# Cache


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"COGVIDEO_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/cogvideo"),
        ({"HOME": "/home/me"}, "/home/me/.cache/cogvideo"),
    ],
)
def test_the_cache_is_where_the_user_wants_it(
    environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lets users move the cache, such as on shared machines with small home folders."""
    for name in ("COGVIDEO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)
