"""The patch adversary: shapes, losses, and the adaptive weight, checked against manual calculations."""

import pytest
import torch

from cogvideo.models.adversary import (
    MAX_WEIGHT,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


def seeded(width=4, num_layers=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PatchDiscriminator(width, num_layers)


def frames(side, batch=2, seed=0):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("side", "patches"), [(24, 1), (32, 2), (64, 6)])
def test_patches_are_those_of_patchgan(side, patches):
    """Catches a stride or padding other than PatchGAN's: three stride-2 layers, then two stride-1 layers."""
    assert seeded()(frames(side)).shape == (2, 1, patches, patches)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_least_side_is_exact(num_layers, without_shape_checks):
    """Guards against a cryptic error from inside a convolution when a frame is too small."""
    model = seeded(num_layers=num_layers)
    assert model(frames(model.least_side)).shape[2:] == (1, 1)
    with pytest.raises(ValueError, match="expected at least"):
        model(frames(model.least_side - 1))


def test_a_patch_sees_its_surroundings_alone():
    """Checks that a patch of three layers sees 70 x 70 pixels (arXiv 1611.07004), not the whole frame."""
    model = seeded().double()
    for layer in model.middle:
        layer[1] = torch.nn.Identity()  # batch norm mixes all positions
    x = frames(128, batch=1).double().requires_grad_()
    judged = model(x)
    judged[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


def test_widths_double_up_to_a_bound():
    """Guards against unbounded widths, which would make deep adversaries larger than the autoencoder."""
    model = seeded(width=2, num_layers=5)
    assert [layer[0].out_channels for layer in model.middle] == [4, 8, 16, 16, 16]


def test_weights_start_small():
    """Guards against PyTorch's default initialization, whose first scores are so large that the hinge is flat."""
    model = seeded(width=32)
    assert model.last.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.middle[-1][1].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert not model.last.bias.any()


def test_hinge_losses_are_those_of_the_definition():
    """Catches a swapped sign, which would train the adversary to reward reconstructions."""
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.25, -0.5])
    expected = (sum(max(0.0, 1 - x) for x in real.tolist()) + sum(max(0.0, 1 + x) for x in made.tolist())) / 3 / 2
    real, made = real.view(3, 1, 1, 1), made.view(3, 1, 1, 1)
    assert discriminator_loss(real, made).item() == pytest.approx(expected)
    assert generator_loss(made).item() == pytest.approx(2.25 / 3)


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    """Checks a case computed by hand: the gradients are (2, 3, 6) and (0, 3, 4), their norms 7 and 5."""
    layer = torch.nn.Parameter(torch.ones(3))
    image = (layer * torch.tensor([2.0, 3.0, 6.0])).sum()
    adversary = (layer * torch.tensor([0.0, 3.0, 4.0])).sum()
    weight = adaptive_weight(image, adversary, layer)
    assert weight.item() == pytest.approx(7 / (5 + 1e-4))
    assert not weight.requires_grad
    (image + weight * adversary).backward()  # both graphs are still alive
    torch.testing.assert_close(layer.grad, torch.tensor([2.0, 3.0, 6.0]) + weight * torch.tensor([0.0, 3.0, 4.0]))


def test_the_adaptive_weight_is_bounded():
    """Guards against an unbounded weight when the adversary's gradient vanishes."""
    layer = torch.nn.Parameter(torch.ones(3))
    weight = adaptive_weight((layer * 1e3).sum(), (layer * 0).sum(), layer)
    assert weight.item() == MAX_WEIGHT


@pytest.mark.parametrize("wrong", [{"width": 0}, {"num_layers": 0}])
def test_wrong_sizes_are_refused(wrong):
    """Guards against empty layers, which PyTorch would accept and which score nothing."""
    with pytest.raises(ValueError, match="expected a positive number"):
        PatchDiscriminator(**wrong)
