"""Attacks: exact where mathematics allows, and always in the ball and the box."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from advdiff_cli.attacks.ankile2022 import ankile2022
from advdiff_cli.attacks.apgd import apgd
from advdiff_cli.attacks.eot import Objective
from advdiff_cli.attacks.pgd import Ball, iterates, pgd
from advdiff_cli.attacks.projections import project, random_point, round_inside, steepest, surface_counts
from advdiff_cli.data.rng import RowStreams

EPS = 2 / 255


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 81, 2)
        )
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch(model):
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(6, 3, 40, 40, generator=generator) * 255).round() / 255
    return images, model(images).argmax(1)


def path(model, images, labels, eps, steps, step_size, norm):
    objective = Objective(model, labels, list(range(len(images))))
    return iterates(objective, Ball(images, eps, norm, step_size), images, steps)


class Linear(nn.Module):
    """Logits (0, w.x + b): the gradient is w everywhere, and the nearest adversarial is known."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = w, b

    def forward(self, x):
        score = (x * self.w).flatten(1).sum(1) + self.b
        return torch.stack([torch.zeros_like(score), score], 1)


def inside(adv, images, eps, norm):
    delta = (adv - images).flatten(1)
    radius = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    return radius.max() <= eps * (1 + 1e-5) + 1e-7 and adv.min() >= 0 and adv.max() <= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_reaches_the_optimum_of_a_linear_model(norm):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 32, 32, generator=generator)
    images = torch.rand(4, 3, 32, 32, generator=generator) * 0.5 + 0.25  # far from the box
    eps = 0.02 if norm == "linf" else 0.5
    adv = pgd(Linear(w, 0.0), images, torch.zeros(4, dtype=torch.int64), eps=eps, steps=20, norm=norm)
    rise = ((adv - images) * w).flatten(1).sum(1)
    best = eps * (w.abs().sum() if norm == "linf" else w.norm())
    assert torch.allclose(rise, best.expand(4), rtol=1e-3)


def test_one_step_without_random_start_is_fgsm(model, batch):
    images, labels = batch
    x = images.clone().requires_grad_()
    cross_entropy(model(x), labels, reduction="sum").backward()
    expected = (images + EPS * x.grad.sign()).clamp(0, 1)
    *_, (adv, _) = path(model, images, labels, EPS, 1, EPS, "linf")
    assert torch.equal(adv, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@settings(max_examples=15, deadline=None)
@given(eps=st.floats(1e-4, 0.5), seed=st.integers(0, 99))
def test_ball_and_box(model, norm, eps, seed):
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 1])
    adv = pgd(model, images, labels, eps=eps, steps=3, norm=norm, seed=seed)
    assert inside(adv, images, eps, norm)
    start = random_point(images, eps, norm, RowStreams(seed, "x", [0, 1]))
    assert inside(start, images, eps, norm)
    assert (start != images).any()
    far = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    assert inside(project(far, images, eps, norm), images, eps, norm)


def test_the_best_iterate_is_kept_and_restarts_only_add(model, batch):
    images, labels = batch

    def loss(x):
        return cross_entropy(model(x), labels, reduction="none")

    one, three = (pgd(model, images, labels, eps=EPS, steps=5, restarts=r) for r in (1, 3))
    start = random_point(images, EPS, "linf", RowStreams(0, "attack-start", list(range(6))))
    objective = Objective(model, labels, list(range(6)))
    losses = torch.stack([value for _, value in iterates(objective, Ball(images, EPS, "linf", EPS / 4), start, 5)])
    assert torch.allclose(loss(one), losses.amax(0), atol=1e-6)
    assert (loss(three) >= loss(one) - 1e-6).all()


def test_rows_do_not_depend_on_batch_or_order(model, batch):
    images, labels = batch
    whole = pgd(model, images, labels, eps=EPS, steps=5, rows=list("abcdef"))
    back = pgd(model, images.flip(0), labels.flip(0), eps=EPS, steps=5, rows=list("fedcba")).flip(0)
    assert torch.equal(whole, back)
    apart = [pgd(model, images[i : i + 1], labels[i : i + 1], eps=EPS, steps=5, rows=["abcdef"[i]]) for i in range(6)]
    assert torch.allclose(whole, torch.cat(apart), atol=1e-5)


def test_the_papers_attack_is_its_codes_one_patch_at_a_time(model, batch):
    images, labels = batch
    for image, label, found in zip(images, labels, ankile2022(model, images, labels, eps=EPS), strict=True):
        delta = torch.zeros_like(image[None], requires_grad=True)
        adam = torch.optim.Adam([delta], lr=1e5)
        for _ in range(5):
            loss = -nn.CrossEntropyLoss()(model(image[None] + delta).softmax(1), label[None])
            adam.zero_grad()
            loss.backward()
            adam.step()
            delta.data.clamp_(-EPS, EPS)
        expected = (image + delta.detach()[0]).clamp(0, 1)
        assert torch.allclose(found, expected, atol=1e-7)
    assert surface_counts(ankile2022(model, images, labels, eps=EPS), images, EPS, "linf")[0] > 0


def test_images_outside_the_box_are_misuse(model):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        pgd(model, torch.full((1, 3, 40, 40), 1.5), torch.tensor([0]), eps=EPS)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rounding_stays_in_the_ball_and_on_the_grid(norm, batch):
    images, _ = batch
    eps = EPS if norm == "linf" else 0.3
    points = random_point(images, eps, norm, RowStreams(0, "x", list(range(6))))
    rounded = round_inside(points, images, eps, norm)
    assert inside(rounded, images, eps, norm)
    levels = (rounded * 255).numpy()
    assert np.abs(levels - levels.round()).max() < 1e-4
    assert (rounded - points).abs().max() <= (0.5 if norm == "linf" else 1.0) / 255 + 1e-6


def test_surface_share_counts_what_was_perturbed(batch):
    images = torch.full((1, 3, 40, 40), 0.5)
    points = images.clone()
    points[0, 0] += EPS
    points[0, 1, :20] += EPS / 2
    on_surface, perturbed = surface_counts(points, images, EPS, "linf")
    assert (on_surface, perturbed) == (1600, 2400)


def test_momentum_adds_earlier_gradients(model, batch):
    """Dong et al. 2018, equations 6 and 7, step by step."""
    images, labels = batch
    objective, ball = Objective(model, labels, list(range(len(images)))), Ball(images, EPS, "linf", EPS / 4)
    x, direction = images, torch.zeros_like(images)
    for found, _ in iterates(objective, ball, images, 4, 0.9):
        assert torch.equal(found, x)
        _, gradient = objective.gradient(x, 0)
        direction = 0.9 * direction + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        x = project(x + EPS / 4 * direction.sign(), images, EPS, "linf")
    *_, (plain, _) = path(model, images, labels, EPS, 4, EPS / 4, "linf")
    assert not torch.equal(plain, found)


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_an_attack_that_starts_at_an_example_ends_at_no_worse_one(attack, model, batch):
    images, labels = batch
    start = pgd(model, images, labels, eps=EPS, steps=3)
    adv = attack(model, images, labels, eps=EPS, steps=5, start=start)
    assert inside(adv, images, EPS, "linf")
    before, after = (cross_entropy(model(x), labels, reduction="none") for x in (start, adv))
    assert (after >= before).all()
    assert (after > before).any()


def test_a_tiny_gradient_still_makes_a_unit_step():
    gradient = torch.tensor([1.0, 1e-13, 1e-30, 0.0]).view(-1, 1, 1, 1) * torch.ones(4, 3, 5, 5)
    lengths = steepest(gradient, "l2").flatten(1).norm(dim=1)
    assert lengths.tolist() == pytest.approx([1, 1, 1, 0])
