"""A defended classifier answers the same whatever mode an attack library asks for."""

import copy

import pytest
import torch
from torch import nn

from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.purifier import NoisePurifier, linear_alpha_bar


@pytest.fixture
def batch_normed():
    """A classifier in training mode, whose answers and statistics change with every batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))
    with torch.no_grad():
        net(torch.rand(2, 3, 32, 32))
    return net.train()


@pytest.mark.parametrize("outer", [lambda m: m, nn.Sequential, lambda m: m.fixed(torch.zeros(1, 1, 3, 32, 32))])
def test_training_mode_never_reaches_what_is_frozen(batch_normed, outer):
    images, noise = torch.rand(4, 3, 32, 32) * 3 - 1, torch.randn(4, 1, 3, 32, 32)
    defended = DefendedClassifier(NoisePurifier(linear_alpha_bar(), 0.05), batch_normed)
    assert not any(m.training for m in defended.modules())
    before, state = defended(images, noise), copy.deepcopy(defended.state_dict())
    model = outer(defended)
    found = model.training  # what torchattacks does: attack in eval mode, then restore the mode that it found
    model.eval()
    model(images)
    model.train(found)
    model.train()
    model(images)
    assert not any(m.training for m in defended.modules())
    assert torch.equal(defended(images, noise), before)
    assert all(torch.equal(v, state[k]) for k, v in defended.state_dict().items())
