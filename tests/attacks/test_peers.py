"""The attacks against foolbox and pyautoattack from one start, on a classifier and on a defense of frozen noise."""

import foolbox
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import nn

from advdiff_cli.attacks.apgd import apgd
from advdiff_cli.attacks.eot import Objective
from advdiff_cli.attacks.pgd import Ball, iterates
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.purifier import DiffusionPurifier

EPS = 2 / 255


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(9),
            nn.Flatten(),
            nn.Linear(8 * 81, 2),
        )
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch(classifier):
    images = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    return images, classifier(images).argmax(1)


@pytest.fixture(scope="module")
def frozen(classifier, ddpm):
    """A defense of frozen noise, the same for any batch."""
    defended = DefendedClassifier(DiffusionPurifier(read_ddpm(ddpm).requires_grad_(False), 0.1, "ddpm", 3), classifier)
    noise = torch.randn(1, *defended.purifier.noise_shape(40, 40), generator=torch.Generator().manual_seed(3))
    return defended.fixed(noise).eval()


@pytest.fixture(params=["undefended", "frozen"])
def model(request, classifier, frozen):
    return {"undefended": classifier, "frozen": frozen}[request.param]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_is_foolbox_step_for_step(model, batch, norm):
    images, labels = batch
    eps, size = (EPS, EPS / 4) if norm == "linf" else (0.5, 0.1)
    attack = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    peer_model = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")  # it would move the model to a GPU
    for steps in (1, 4, 10):
        peer = attack(abs_stepsize=size, steps=steps, random_start=False)
        theirs, _, _ = peer(peer_model, images, labels, epsilons=eps)
        objective = Objective(model, labels, list(range(len(images))))
        *_, (ours, _) = iterates(objective, Ball(images, eps, norm, size), images, steps)
        assert (ours - theirs).abs().max() <= (0 if norm == "linf" else 1e-6), steps


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("linf", 8 / 255), ("l2", 0.5)])
def test_apgd_is_pyautoattack_s(model, batch, norm, eps):
    images, labels = batch
    peer = APGDAttack(model, n_iter=20, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, loss="ce", device="cpu")
    peer.init_hyperparam(images)
    theirs = peer.attack_single_run(images, labels, x_init=images.clone())[0]
    ours = apgd(model, images, labels, eps=eps, steps=20, norm=norm, random_start=False)
    assert torch.equal(ours, theirs)
