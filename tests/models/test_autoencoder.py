"""The image tokenizer: parity with the released one, and properties of codes, frames, and clusters."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from cogvideo.bundle.convert import released_autoencoder_names
from cogvideo.config import AutoencoderConfig, preset
from cogvideo.models import quantizer
from cogvideo.models.autoencoder import Autoencoder, to_pixels
from cogvideo.models.quantizer import Codebook, cluster_codes
from reference import relative_error

GOLDEN = Path(__file__).parents[1] / "golden"
RUNNING_AVERAGES = {"quantize.cluster_size", "quantize.embed_avg"}
SMALL = AutoencoderConfig(
    channels=8,
    encoder_multipliers=(1, 2),
    encoder_blocks=1,
    decoder_multipliers=((1, 1, 1, 2), (1, 1, 2), (1, 2)),
    embedding_dim=16,
    num_codes=96,
    num_downsamplers=2,
    rate=4,
    groups=4,
    nominal_resolution=32,
    attention_resolution=8,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_frames(batch, height, width, seed=0):
    return torch.rand(batch, 3, height, width, generator=seeded(seed))


@pytest.fixture(scope="module")
def small():
    """Untrained autoencoder whose codebook is filled with its own features, so that many codes are in use."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(SMALL).eval()
    with torch.no_grad():
        features = model.features(random_frames(6, 16, 16, seed=1), rate=4)
        rows = rearrange(features, "batch embedding rows columns -> (batch rows columns) embedding")
        model.codebook.embedding.copy_(rows)
    return model


@pytest.fixture
def without_shape_checks():
    """Disable shape annotations, as they are for users, so that our own checks must catch bad input."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


# Parity with the released tokenizer


@pytest.fixture(scope="module")
def released_shapes():
    return json.loads((GOLDEN / "state_dict_shapes_icetk_vqvae.json").read_text())


@pytest.fixture(scope="module")
def released_case():
    return load_file(GOLDEN / "icetk_vqvae.safetensors")


@pytest.fixture(scope="module")
def released_model(released_shapes):
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    config = preset("cogvideo").autoencoder
    names = released_autoencoder_names(config)
    values = golden.vqvae_weights({name: released_shapes[name] for name in names}, seed=7)
    with torch.device("meta"):
        model = Autoencoder(config)
    model.load_state_dict({names[name]: torch.from_numpy(value) for name, value in values.items()}, assign=True)
    return model.eval()


def test_every_released_tensor_has_one_name_of_ours(released_shapes):
    """Catches a released tensor that is forgotten, named twice, or has a different shape in our model."""
    config = preset("cogvideo").autoencoder
    names = released_autoencoder_names(config)
    with torch.device("meta"):
        ours = {name: list(value.shape) for name, value in Autoencoder(config).state_dict().items()}
    assert names.keys() == released_shapes.keys() - RUNNING_AVERAGES
    assert {ours_name: released_shapes[name] for name, ours_name in names.items()} == ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [4, 8, 16])
@torch.inference_mode()
def test_parity_with_the_released_tokenizer(released_model, released_case, rate, dtype):
    """Catches any deviation from the released computation: padding, level order, attention, normalization, clamping."""
    model = released_model.to(dtype)
    codes = released_case[f"ids_{rate}x"]
    assert torch.equal(model.encode(released_case["image"], rate), codes)
    decoded = model.decode(codes, rate)
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded, released_case[f"decoded_{rate}x"].to(dtype), rtol=0, atol=1e-3)


# Frames and codes


@pytest.mark.parametrize("rate", SMALL.rates)
@torch.inference_mode()
def test_sides_of_codes_and_frames(small, rate):
    """Catches swapped height and width, and a wrong number of downsamplers or wrong decoder for the rate."""
    codes = small.encode(random_frames(2, 16, 32), rate)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 16 // rate, 32 // rate)
    assert small.decode(codes, rate).shape == (2, 3, 16, 32)


@torch.inference_mode()
def test_a_code_belongs_to_its_own_cell(small):
    """Catches rows read as columns, or channels as cells: images would be scrambled, though all shapes are right."""
    frames = random_frames(1, 16, 32)
    codes, features = small.encode(frames), small.features(frames, rate=4)
    vectors = torch.zeros_like(features)
    for row in range(4):
        for column in range(8):
            distances = (small.codebook.embedding - features[0, :, row, column]).norm(dim=1)
            assert codes[0, row, column] == distances.argmin()
            vectors[0, :, row, column] = small.codebook.embedding[codes[0, row, column]]
    assert relative_error(small.decode(codes), small.render(vectors, rate=4)) < 1e-5


@torch.inference_mode()
def test_the_default_rate_is_the_configured_one(small):
    """Guards against a default that ignores the configuration, which would give the video model another grid size."""
    frames = random_frames(2, 16, 16)
    codes = small.encode(frames)
    assert torch.equal(codes, small.encode(frames, rate=4))
    assert torch.equal(small.decode(codes), small.decode(codes, rate=4))


@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
@torch.inference_mode()
def test_chunked_equals_whole(small, chunk):
    """Catches frames lost, repeated, or reordered at chunk borders, including a smaller last chunk."""
    frames = random_frames(5, 16, 24)
    codes = small.encode(frames)
    assert len(codes.unique()) > 20
    assert torch.equal(small.encode(frames, chunk=chunk), codes)
    assert relative_error(small.decode(codes, chunk=chunk), small.decode(codes)) < 1e-5


@torch.inference_mode()
def test_a_frame_does_not_depend_on_its_batch(small):
    """Guards against statistics or attention across frames, which would make a frame's codes depend on its batch."""
    frames = random_frames(4, 16, 16)
    codes = small.encode(frames)
    decoded = small.decode(codes)
    others = torch.cat([frames[2:3], 1 - frames[:2]])
    assert torch.equal(small.encode(others)[0], codes[2])
    assert relative_error(small.decode(codes[2:3])[0], decoded[2]) < 1e-5


def test_gradients_reach_everything_but_the_codebook():
    """Guards against a detached path, which would silently leave part of the tokenizer untrained."""
    model = Autoencoder(replace(SMALL, decoder_multipliers=((1, 1, 1, 2),), rate=8))
    model.render(model.features(random_frames(2, 16, 16), rate=8), rate=8).square().mean().backward()
    without = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    # A key's bias adds the same value to all scores of a query, so its gradient is zero up to rounding.
    assert {name for name in without if not name.endswith("attention.k.bias")} == {"codebook.embedding"}


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("frames", "arguments", "message"),
    [
        (torch.rand(1, 3, 16, 16), {"rate": 3}, r"rate is 3, expected one of \(8, 4, 2\)"),
        (torch.rand(1, 3, 16, 16), {"chunk": 0}, "chunk is 0, expected a positive number"),
        (torch.rand(1, 3, 16, 18), {}, "frames are 16 x 18 pixels, expected sides divisible by the rate 4"),
        (torch.rand(1, 3, 0, 16), {}, "frames are 0 x 16 pixels"),
        (torch.rand(1, 1, 16, 16), {}, r"frames have shape \(1, 1, 16, 16\), expected \(batch, 3"),
        (torch.rand(3, 16, 16), {}, r"frames have shape \(3, 16, 16\), expected \(batch, 3"),
        (torch.ones(1, 3, 16, 16, dtype=torch.uint8), {}, r"frames have dtype torch.uint8, expected floating point"),
    ],
)
def test_refused_frames(small, frames, arguments, message):
    """Guards against obscure errors inside a convolution, and odd grids, for frames that cannot be encoded."""
    with pytest.raises(ValueError, match=message):
        small.encode(frames, **arguments)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("codes", "arguments", "message"),
    [
        (torch.zeros(1, 2, 2, dtype=torch.int64), {"rate": 16}, r"rate is 16, expected one of \(8, 4, 2\)"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), {"chunk": -1}, "chunk is -1, expected a positive number"),
        (torch.full((1, 2, 2), 96), {}, r"got codes from 96 to 96, expected \[0, 96\)"),
        (torch.tensor([[[0, -1]]]), {}, r"got codes from -1 to 0, expected \[0, 96\)"),
        (torch.zeros(4, dtype=torch.int64), {}, r"codes have shape \(4,\), expected \(batch, rows, columns\)"),
        (torch.zeros(1, 2, 2), {}, "got codes of type torch.float32, expected torch.int64"),
    ],
)
def test_refused_codes(small, codes, arguments, message):
    """Guards against codes out of range, such as text token ids, which are undefined behavior on a GPU."""
    with pytest.raises(ValueError, match=message):
        small.decode(codes, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 16}, "rate is 16, expected one of"),
        ({"num_downsamplers": 1}, r"expected rates in \[2, 4\]"),
        ({"decoder_multipliers": ((1, 2), (1, 1, 2))}, "coarsest first"),
        ({"channels": 10}, "channels 10 is not divisible by groups 4"),
    ],
)
def test_refused_configurations(changes, message):
    """Guards against a decoder rate that the encoder never reaches, which would only show as wrong frame sizes."""
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


# Codebook


@pytest.mark.parametrize("distances_per_pass", [1, 1000, 2**24])
def test_nearest_code_is_the_closest_row(monkeypatch, distances_per_pass):
    """Catches a wrong expansion of the distance, and codes shifted at the boundary between passes."""
    monkeypatch.setattr(quantizer, "DISTANCES_PER_PASS", distances_per_pass)
    codebook = Codebook(num_codes=300, embedding_dim=8).double()
    vectors = torch.randn(2, 7, 9, 8, generator=seeded(), dtype=torch.float64)
    expected = torch.cdist(vectors.flatten(0, 2), codebook.embedding).argmin(1).view(2, 7, 9)
    assert torch.equal(codebook.nearest(vectors), expected)


def test_nearest_code_in_half_precision():
    """Guards against bfloat16 distances under autocast, with which codes would differ between training and use."""
    codebook = Codebook(num_codes=2000, embedding_dim=64)
    vectors = torch.randn(500, 64, generator=seeded())
    codes = codebook.nearest(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codebook.nearest(vectors), codes)


def test_lookup_and_nearest_are_inverse():
    """Checks that each code stands for its own row."""
    codebook = Codebook(num_codes=300, embedding_dim=8)
    codes = torch.randint(300, (3, 5, 4), generator=seeded())
    assert torch.equal(codebook.nearest(codebook.lookup(codes)), codes)


# Clusters of codes


def test_clusters_are_deterministic_and_leave_the_global_generator_alone():
    """Guards against clusters that change between runs, which would change every sample generated with them."""
    rows = torch.randn(400, 8, generator=seeded(1))
    state = torch.get_rng_state()
    labels = cluster_codes(rows, 20, seeded())
    assert torch.equal(labels, cluster_codes(rows, 20, seeded()))
    assert not torch.equal(labels, cluster_codes(rows, 20, seeded(5)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("num_codes", "num_clusters"), [(400, 20), (50, 50), (50, 49), (30, 1)])
def test_each_row_is_in_the_cluster_of_its_nearest_centre(num_codes, num_clusters):
    """Catches stopping before convergence, wrong means, and an empty cluster (whose probability is always zero)."""
    rows = torch.randn(num_codes, 8, generator=seeded(1))
    labels = cluster_codes(rows, num_clusters, seeded())
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(num_clusters))
    centres = torch.stack([rows[labels == cluster].mean(0) for cluster in range(num_clusters)])
    distances = torch.cdist(rows.double(), centres.double())
    own = distances.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(own, distances.amin(1), rtol=1e-5, atol=0)


def test_separated_groups_are_found():
    """Guards against a poor start (several centers in one group), which would merge groups that are far apart."""
    truth = torch.arange(8).repeat_interleave(25)
    centres = 50 * torch.randn(8, 6, generator=seeded(1))
    labels = cluster_codes(centres[truth] + 0.1 * torch.randn(200, 6, generator=seeded(2)), 8, seeded())
    assert len({(int(mine), int(group)) for mine, group in zip(labels, truth, strict=True)}) == 8


def test_no_cluster_is_empty_when_rows_are_equal():
    """Guards against empty clusters or division by zero for equal rows, such as a collapsed codebook's dead codes."""
    rows = torch.randn(3, 4, generator=seeded()).repeat(10, 1)
    assert cluster_codes(rows, 12, seeded()).unique().tolist() == list(range(12))
    assert cluster_codes(torch.zeros(6, 4), 6, seeded()).unique().tolist() == list(range(6))


@pytest.mark.parametrize("num_clusters", [0, 7])
def test_refused_numbers_of_clusters(num_clusters):
    """Guards against zero clusters, and against more clusters than codes, which could not all be used."""
    with pytest.raises(ValueError, match=rf"num_clusters is {num_clusters}, expected a number in \[1, 6\]"):
        cluster_codes(torch.zeros(6, 4), num_clusters, seeded())


def test_pixels_are_clamped_and_rounded() -> None:
    """Guards against values outside [0, 1] that wrap around, and against truncation instead of rounding."""
    frames = torch.tensor([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.2]).view(1, 1, 2, 3).expand(1, 3, 2, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (1, 2, 3, 3)
    assert pixels[0, ..., 0].flatten().tolist() == [0, 0, 0, 1, 255, 255]
