"""The smoothed classifier: against the truth of a linear one, its noise, and what breaks the proof."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from advdiff_cli.certification.certificate import Certifier, Procedure
from advdiff_cli.certification.smoothing import SmoothedClassifier
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.classifier_config import ClassifierConfig
from advdiff_cli.models.classifiers import Classifier
from advdiff_cli.models.ddpm import build_ddpm
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, linear_alpha_bar

SIDE, SIGMA = 32, 0.4


class OnlyNoise(nn.Module):
    """A purifier that returns noised patches as they are: with a linear classifier, the truth is known."""

    sigma, noise_kind = SIGMA, "numpy"

    def noise_shape(self, height, width):
        return (1, 3, height, width)

    def purify_noised(self, noised, noise):
        return noised


class Linear(Classifier):
    """Class 1 where w x > b."""

    def __init__(self, view=None):
        super().__init__(ClassifierConfig("squeezenet1_1", (0.0,) * 3, (1.0,) * 3, **(view or {})))
        side = SIDE
        generator = torch.Generator().manual_seed(1)
        self.w = torch.randn((3, side, side), generator=generator)
        self.b = 0.0

    def classify(self, images):
        one = (images * self.w).sum((1, 2, 3)) - self.b
        return torch.stack([-one, one], 1)


def at_distance(model, radius):
    """Return a patch whose view is at this l2 distance from the boundary of a linear classifier, on the side of 1."""
    image = torch.full((3, SIDE * model.config.view.pool, SIDE * model.config.view.pool), 0.5)
    read = model.config.view.apply(image[None])[0]
    length = model.w.norm()
    model.b = float((read * model.w).sum() - radius * length)
    return image


def smooth(model, shape=(SIDE, SIDE), **more):
    return SmoothedClassifier(DefendedClassifier(OnlyNoise(), model).eval(), shape, 0, **more)


def certify(smoothed, image, procedure, row=0, batch=256):
    certifier, begun = Certifier(procedure, smoothed.sigma, smoothed.distance), 0
    while not certifier.is_decided:
        certifier.add(smoothed.votes(image, row, range(begun, begun + batch)).numpy())
        begun += batch
    return certifier.certify()


def test_radii_are_below_the_truth_and_approach_it():
    """The vote of a linear classifier changes at the same distance as the classifier itself."""
    model, truth = Linear(), 0.5
    image, smoothed = at_distance(model, truth), smooth(model)
    share = smoothed.votes(image, 99, range(4000)).double().mean().item()
    assert share == pytest.approx(norm.cdf(truth / SIGMA), abs=0.02)
    radii = {n: [certify(smoothed, image, Procedure(10, n, 0.001), k).radius for k in range(6)] for n in (100, 2000)}
    assert all(0 < r < truth for n in radii for r in radii[n])
    assert truth - np.mean(radii[2000]) < 0.5 * (truth - np.mean(radii[100]))
    wrong = [certify(smoothed, image, Procedure(10, 500, 0.001, (truth * 1.001,)), row).radius for row in range(20)]
    assert max(wrong) < truth


@pytest.mark.parametrize("mode", ["fixed", "sequential"])
def test_what_is_certified_depends_on_the_side_of_the_boundary(mode):
    targets = None if mode == "fixed" else (0.0, 0.2)
    model = Linear()
    near = certify(smooth(model), at_distance(model, 0.01), Procedure(10, 300, 0.001, targets))
    assert near.abstain
    assert near.radius == 0
    other = certify(smooth(model), at_distance(model, -0.6), Procedure(10, 300, 0.001, targets))
    assert (other.decision, other.abstain) == (0, False)
    assert 0.2 <= other.radius < 0.6


def test_an_average_of_pixels_counts_as_often_as_its_side():
    """The nearest change of a patch that moves its 2 x 2 averages by r is of length 2 r."""
    model = Linear({"crop": 64, "pool": 2})
    smoothed = smooth(model, (64, 64))
    assert smoothed.dimension == 3 * 64 * 64
    assert smoothed.sigma == pytest.approx(2 * SIGMA, rel=1e-5)
    found = certify(smoothed, at_distance(model, 0.5), Procedure(10, 2000, 0.001))
    assert 0.8 < found.radius < 1.0


def test_noise_beyond_the_view_is_not_added():
    model = Linear({"crop": SIDE})
    smoothed, image = smooth(model, (96, 96)), torch.full((3, 96, 96), 0.5)
    assert smoothed.noised(image, 0, range(2))[0].shape == (2, 3, SIDE, SIDE)
    changed = image.clone()
    changed[:, :32] = 0
    assert torch.equal(smoothed.noised(image, 0, range(2))[0], smoothed.noised(changed, 0, range(2))[0])


def test_sigma_is_that_of_the_schedule():
    """In [0, 1] pixels: 0.17, 0.36, 0.48, 0.62 at t* 0.1, 0.2, 0.25, 0.3 on data in [-1, 1]; twice that on [0, 1]."""
    for t_star, sigma in ((0.1, 0.17), (0.2, 0.36), (0.25, 0.48), (0.3, 0.62)):
        noise = NoisePurifier(linear_alpha_bar(), t_star)
        assert noise.sigma == pytest.approx(sigma, abs=0.006)
        whole = DiffusionPurifier(build_ddpm("tiny", 32, 1.0, 0), t_star, sampler_steps=1)
        assert whole.sigma == pytest.approx(noise.sigma)
        half = DiffusionPurifier(build_ddpm("tiny", 32, 1.0, 0, (0.0, 1.0)), t_star, sampler_steps=1)
        assert half.sigma == pytest.approx(2 * noise.sigma)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["ddpm", "noise"])
@torch.no_grad()
def test_what_is_certified_is_what_is_deployed(kind, steps):
    """Noised patches pass the same purifier, up to the rounding of x + sigma n."""
    purifier = NoisePurifier(linear_alpha_bar(), 0.2)
    if kind == "ddpm":
        purifier = DiffusionPurifier(build_ddpm("tiny", 32, 1.0, 0), 0.2, sampler_steps=steps).eval()
    images = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    noise = torch.randn((4, *purifier.noise_shape(32, 32)), generator=torch.Generator().manual_seed(1))
    apart = purifier.purify_noised(images + purifier.sigma * noise[:, 0], noise)
    torch.testing.assert_close(apart, purifier(images, noise), atol=1e-4, rtol=0)


def test_sound_noise_gives_exact_sums():
    model = Linear()
    smoothed = smooth(model, sound=True)
    image = torch.randint(0, 256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)) / 255
    noised, _ = smoothed.noised(image, 0, range(64))
    whole = (noised.double() * 255).round()
    assert torch.equal((whole / 255).float(), noised)
    drawn = whole - (image.double() * 255).round()
    assert drawn.std().item() == pytest.approx(255 * SIGMA, rel=0.01)
    again, _ = smoothed.noised(image.flip(0), 0, range(64))
    assert torch.equal((again.double() * 255).round() - (image.flip(0).double() * 255).round(), drawn)
    assert 0 < smoothed.distance < 1e-6
    with pytest.raises(AdvdiffError, match="is not of 8-bit pixels, which --sound needs"):
        smoothed.noised(image + 0.001, 0, range(2))


def test_sound_noise_of_averaged_pixels():
    model = Linear({"crop": 64, "pool": 2})
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)) / 255
    noised, _ = smooth(model, (64, 64), sound=True).noised(image, 0, range(8))
    sums = noised.double() * 255 * 4
    torch.testing.assert_close(sums, sums.round(), atol=1e-3, rtol=0)


def test_what_breaks_the_proof_is_refused(ddpm):
    from advdiff_cli.models.registry import load_ddpm

    purifier = DiffusionPurifier(load_ddpm(ddpm), 0.2, sampler_steps=1)
    defended = DefendedClassifier(purifier, Linear()).eval()
    SmoothedClassifier(defended, (96, 96), 0)
    with pytest.raises(AdvdiffError, match="denoised in windows"):
        SmoothedClassifier(defended, (512, 512), 0)
    with pytest.raises(AdvdiffError, match="whose sides are multiples of 8"):
        SmoothedClassifier(defended, (90, 90), 0)
    defended.classifier.train()
    with pytest.raises(AdvdiffError, match="training mode"):
        SmoothedClassifier(defended, (96, 96), 0)


class Unsteady(nn.Module):
    """A classifier that depends on more than the patch."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, images):
        self.calls += 1
        one = images.mean((1, 2, 3))
        shift = {"batch": one.mean(), "calls": self.calls, "size": len(images), "steady": 0.0}[self.kind]
        return torch.stack([-one, one + shift], 1)


@pytest.mark.parametrize("kind", ["batch", "calls", "size", "steady"])
def test_a_classifier_depends_on_the_patch_alone(kind):
    smoothed = smooth(Unsteady(kind))
    image = torch.rand((3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    image[:, : SIDE // 2] *= 0.1
    if kind == "steady":
        smoothed.check_independence(image)
        return
    with pytest.raises(AdvdiffError, match="depends on the patch alone"):
        smoothed.check_independence(image)


def test_no_decision_without_a_finite_logit():
    model = Linear()
    model.w = model.w * math.inf
    with pytest.raises(AdvdiffError, match="the logits of row 7 are not finite"):
        smooth(model).votes(torch.full((3, SIDE, SIDE), 0.5), 7, range(2))
