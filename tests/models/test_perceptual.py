"""LPIPS from torchvision's and its authors' file formats, with random weights; pyramids and edges."""

import math
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from cogvideo.evaluation.networks.cache import network_path
from cogvideo.models.perceptual import edge_distance, load_lpips, pyramid_distance

NETWORKS = Path(__file__).parents[1] / "golden" / "networks"
FETCHED = {name: network_path(f"lpips-{name}") for name in ("vgg", "alexnet")}
"""Resolved before tests get an empty cache."""


class Reference(NamedTuple):
    """Layers of a network's `features` in torchvision, and the layers that LPIPS compares."""

    convolutions: dict[int, tuple[int, int, int, int, int]]  # inputs, outputs, kernel, stride, padding
    poolings: dict[int, int]  # kernel; the stride is 2
    compared: tuple[int, ...]


REFERENCES = {
    "vgg": Reference(
        {
            0: (3, 64, 3, 1, 1),
            2: (64, 64, 3, 1, 1),
            5: (64, 128, 3, 1, 1),
            7: (128, 128, 3, 1, 1),
            10: (128, 256, 3, 1, 1),
            12: (256, 256, 3, 1, 1),
            14: (256, 256, 3, 1, 1),
            17: (256, 512, 3, 1, 1),
            19: (512, 512, 3, 1, 1),
            21: (512, 512, 3, 1, 1),
            24: (512, 512, 3, 1, 1),
            26: (512, 512, 3, 1, 1),
            28: (512, 512, 3, 1, 1),
        },
        {4: 2, 9: 2, 16: 2, 23: 2},
        (3, 8, 15, 22, 29),
    ),
    "alexnet": Reference(
        {
            0: (3, 64, 11, 4, 2),
            3: (64, 192, 5, 1, 2),
            6: (192, 384, 3, 1, 1),
            8: (384, 256, 3, 1, 1),
            10: (256, 256, 3, 1, 1),
        },
        {2: 3, 5: 3},
        (1, 4, 7, 9, 11),
    ),
}


def frames(batch, side, seed=0):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def random_features(network):
    """Random weights that preserve the magnitude of features, under torchvision's names."""
    by = torch.Generator().manual_seed(0)
    state = {}
    for index, (before, after, kernel, _, _) in REFERENCES[network].convolutions.items():
        size = math.sqrt(2 / (kernel**2 * before))
        state[f"features.{index}.weight"] = torch.randn(after, before, kernel, kernel, generator=by) * size
        state[f"features.{index}.bias"] = torch.randn(after, generator=by) * 0.1
    return state


def random_heads(network):
    """Random weights, non-negative like the trained ones, under the names of LPIPS 0.1."""
    by = torch.Generator().manual_seed(1)
    convolutions = REFERENCES[network].convolutions
    widths = [convolutions[index - 1][1] for index in REFERENCES[network].compared]
    return {f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1, generator=by) for n, width in enumerate(widths)}


@pytest.fixture(scope="module")
def vgg():
    return random_features("vgg")


@pytest.fixture(scope="module")
def heads():
    return random_heads("vgg")


@pytest.fixture(scope="module")
def files(vgg, heads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(heads, folder / "heads.pth")
    return folder / "vgg16.pth", folder / "heads.pth"


@pytest.fixture(scope="module")
def lpips(files):
    return load_lpips(*files)


def oracle(network, features, heads, frames, others):
    """LPIPS layer by layer, as torchvision runs `features` and the paper compares them."""
    reference = REFERENCES[network]

    def compared(x):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = ((2 * x - 1) - shift[:, None, None]) / scale[:, None, None]
        kept = []
        for layer in range(reference.compared[-1] + 1):
            if layer in reference.convolutions:
                *_, stride, padding = reference.convolutions[layer]
                weight, bias = features[f"features.{layer}.weight"], features[f"features.{layer}.bias"]
                x = F.conv2d(x, weight, bias, stride=stride, padding=padding)
            elif layer in reference.poolings:
                x = F.max_pool2d(x, kernel_size=reference.poolings[layer], stride=2)
            else:
                x = x.clamp_min(0)
            if layer in reference.compared:
                kept.append(x)
        return kept

    total = 0
    for number, (a, b) in enumerate(zip(compared(frames), compared(others), strict=True)):
        a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        weight = heads[f"lin{number}.model.1.weight"].flatten()
        total = total + torch.einsum("bchw,c->bhw", (a - b) ** 2, weight).mean((1, 2))
    return total


@pytest.mark.parametrize("network", REFERENCES)
@torch.inference_mode()
def test_it_is_lpips(network, tmp_path):
    """Catches a level compared before its ReLU, a wrong normalization, or swapped tensor names."""
    features, heads = random_features(network), random_heads(network)
    save_file(features | heads, tmp_path / "lpips.safetensors")
    x, y = frames(2, 40), frames(2, 40, seed=1)
    model = load_lpips(tmp_path / "lpips.safetensors", network=network)
    torch.testing.assert_close(model(x, y), oracle(network, features, heads, x, y), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("network", "distances"), [("vgg", (0.5686, 0.4217)), ("alexnet", (0.7219, 0.1376))])
@torch.inference_mode()
def test_the_published_distances_are_found(network, distances):
    """Checks the downloaded weights against the distances that their authors publish for these images."""
    path = FETCHED[network]
    if not path.is_file():
        pytest.skip(f"there is no {path}: `cogvideo fetch lpips`")
    images = [torch.from_numpy(np.array(Image.open(NETWORKS / f"ex_{name}.png"))) for name in ("ref", "p0", "p1")]
    reference, *others = (image.permute(2, 0, 1)[None] / 255 for image in images)
    model = load_lpips(path, network=network)
    assert [model(reference, other).item() for other in others] == pytest.approx(distances, abs=1e-4)


@torch.inference_mode()
def test_equal_frames_have_no_distance(lpips):
    """Catches a normalization that differs between the two inputs."""
    assert lpips(frames(2, 16), frames(2, 16)).tolist() == [0, 0]


def test_gradients_reach_the_frames_alone(lpips):
    """Checks that the autoencoder can learn from gradients of the frames while the weights stay fixed."""
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(x, frames(1, 16)).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_features_that_are_all_zero_have_no_direction(files, vgg, tmp_path):
    """Guards against 0 / 0 in the distance, or its gradient, where all features are zero."""
    silent = {name: tensor * 0 - (0.1 if name.endswith("bias") else 0) for name, tensor in vgg.items()}
    torch.save(silent, tmp_path / "silent.pth")
    x = frames(1, 16).requires_grad_()
    distance = load_lpips(tmp_path / "silent.pth", files[1])(x, frames(1, 16, seed=1))
    distance.sum().backward()
    assert distance.tolist() == [0]
    assert x.grad.isfinite().all()


def test_the_classifier_is_left_out_and_safetensors_are_read(files, vgg, heads, tmp_path):
    """Checks torchvision's file, most of which is an unused classifier, and files converted to safetensors."""
    shapes = {"classifier.0": (4096, 25088), "classifier.3": (4096, 4096), "classifier.6": (1000, 4096)}
    whole = dict(vgg)
    for name, shape in shapes.items():
        whole[f"{name}.weight"] = torch.zeros(1).expand(shape)  # one number on disk
        whole[f"{name}.bias"] = torch.zeros(shape[0])
    torch.save(whole, tmp_path / "vgg16-397923af.pth")
    save_file(heads, tmp_path / "heads.safetensors")
    x, y = frames(1, 16), frames(1, 16, seed=1)
    model = load_lpips(tmp_path / "vgg16-397923af.pth", tmp_path / "heads.safetensors")
    assert torch.equal(model(x, y), load_lpips(*files)(x, y))


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda heads: heads | {"lin5.model.1.weight": torch.zeros(1)},
            r"it has other tensors \(1\), the first is lin5",
        ),
        (lambda heads: dict(list(heads.items())[1:]), r"tensors are missing \(1\), the first is lin0.model.1.weight"),
        (
            lambda heads: heads | {"lin0.model.1.weight": torch.zeros(1, 64)},
            r"shape \(1, 64\), expected \(1, 64, 1, 1\)",
        ),
        (lambda heads: {"state": heads}, "does not hold a table of tensors"),
        (lambda heads: [1, 2], "does not hold a table of tensors"),
        (lambda heads: {"a": Evil()}, "it is not a file of tensors"),
    ],
)
def test_files_with_something_else_are_refused(files, heads, content, message, tmp_path, capsys):
    """Guards against loading another network's weights as LPIPS, and against files that run code."""
    path = tmp_path / "heads.pth"
    torch.save(content(heads), path)
    with pytest.raises(ValueError, match=message) as error:
        load_lpips(files[0], path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.pth", b""), ("x.pth", b"text"), ("x.safetensors", b"text"), ("x.pth", pickle.dumps({"a": 1}, 2))],
)
def test_files_that_are_none_are_refused(files, name, content, tmp_path):
    """Checks that an interrupted download, or a web server's error page, gives a clear error."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot read"):
        load_lpips(files[0], tmp_path / name)


def test_missing_files_and_other_networks_are_refused(files, vgg, heads, tmp_path):
    """Checks that a missing file, or weights of the other network, give a clear error."""
    with pytest.raises(ValueError, match="No such file"):
        load_lpips(files[0], tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"is not VGG-16 with LPIPS's heads for it: tensors are missing \(5\)"):
        load_lpips(files[0])
    with pytest.raises(ValueError, match=r"AlexNet .* tensors are missing \(6\), the first is features.3"):
        load_lpips(*files, network="alexnet")


def test_small_frames_are_refused(lpips):
    """Guards against frames so small that the last level is empty, with NaN as its mean."""
    with pytest.raises(ValueError, match="15 pixels, expected at least 16"):
        lpips(frames(1, 15), frames(1, 15))


def test_pyramids_are_means_of_means():
    """Checks that levels are halvings of the frames, all with the same weight."""
    x, y = frames(1, 8), frames(1, 8, seed=1)
    total = 0.0
    for size in (1, 2, 4):
        values = []
        for colour in range(3):
            for row in range(0, 8, size):
                for column in range(0, 8, size):
                    part = (slice(row, row + size), slice(column, column + size))
                    values.append(abs((x[0, colour][part].mean() - y[0, colour][part].mean()).item()))
        total += sum(values) / len(values)
    assert pyramid_distance(x, y, 3).item() == pytest.approx(total / 3, rel=1e-5)


def test_edges_are_steps_between_neighbours():
    """Checks the distance against differences between neighboring pixels; a constant offset has no edges."""
    x, y = frames(1, 4), frames(1, 4, seed=1)
    down = [
        abs((x - y)[0, c, r + 1, k] - (x - y)[0, c, r, k]).item() for c in range(3) for r in range(3) for k in range(4)
    ]
    across = [
        abs((x - y)[0, c, k, r + 1] - (x - y)[0, c, k, r]).item() for c in range(3) for r in range(3) for k in range(4)
    ]
    assert edge_distance(x, y).item() == pytest.approx((sum(down) / 36 + sum(across) / 36) / 2, rel=1e-5)
    assert edge_distance(x, x + 0.3).item() == pytest.approx(0, abs=1e-6)
