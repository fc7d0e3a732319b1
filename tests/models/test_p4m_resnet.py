"""The equivariance of p4m_resnet15."""

import pytest
import torch

from advdiff_cli.models.p4m_resnet import GroupBatchNorm, GroupConv, P4mResNet, transform

SYMMETRIES = range(8)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = P4mResNet()
        model.train()(torch.rand(16, 3, 32, 32))  # running statistics that are not the identity
    return model


@pytest.mark.parametrize("training", [False, True])
def test_logits_are_the_same_for_all_symmetries(network, training):
    images = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    network.train(training)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    with torch.no_grad():
        logits = network(images)
        for g in SYMMETRIES:
            torch.testing.assert_close(network(transform(images, g)), logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(network(images.roll(5, 1)), logits)
    network.load_state_dict(state)


def test_a_feature_map_turns_and_permutes_with_its_input():
    lift, conv = GroupConv(3, 2, 5, lifting=True), GroupConv(2, 3, 3)
    images = torch.rand(2, 3, 9, 9)
    found = conv(lift(images)).unflatten(1, (8, 3))
    for g in SYMMETRIES:
        turned = conv(lift(transform(images, g))).unflatten(1, (8, 3))
        for h in SYMMETRIES:
            (k,) = (k for k in SYMMETRIES if torch.equal(transform(transform(images, h), g), transform(images, k)))
            torch.testing.assert_close(turned[:, k], transform(found[:, h], g))


def test_the_statistics_are_of_all_orientations():
    norm = GroupBatchNorm(3)
    x = torch.randn(4, 24, 5, 5) * 3 + 1
    per_channel = norm(x).unflatten(1, (8, 3)).transpose(1, 2).flatten(2).transpose(0, 1).flatten(1)
    torch.testing.assert_close(per_channel.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(per_channel.var(1, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)


def test_filters_are_kept_until_the_weights_change():
    conv = GroupConv(2, 2, 3).requires_grad_(False)
    with torch.inference_mode():
        first = conv.filters()
        assert conv.filters() is first
    x = torch.rand(1, 16, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(conv(x).sum(), x)
    assert gradient.abs().sum() > 0
    conv.weight.mul_(2)
    torch.testing.assert_close(conv.filters(), 2 * first)
    conv.requires_grad_(True)
    conv(x).sum().backward()
    assert conv.weight.grad.abs().sum() > 0


def test_images_of_other_sides(network):
    with pytest.raises(ValueError, match="patches of 40x48"):
        network(torch.rand(1, 3, 40, 48))
    with pytest.raises(ValueError, match="16 does not divide"):
        network(torch.rand(1, 3, 40, 40))
