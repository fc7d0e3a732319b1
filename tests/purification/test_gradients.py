"""Gradients through the defense: exact whatever is recomputed, and the mean of the draws' own."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from advdiff_cli.attacks.bpda import BpdaClassifier
from advdiff_cli.attacks.eot import Objective, ObjectiveSpec
from advdiff_cli.data.rng import RowStreams
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.card import DdpmCard
from advdiff_cli.models.ddpm import Ddpm, read_ddpm
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, linear_alpha_bar

ROWS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def model(ddpm):
    return read_ddpm(ddpm).requires_grad_(False)


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 6, 5, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 2))
    return net.eval().requires_grad_(False)


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1


def gradient(defended, images, noise):
    x = images.clone().requires_grad_()
    return torch.autograd.grad(defended(x, noise)[:, 1].sum(), x)[0]


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 2), ("ddpm", 5), ("ddim", 3)])  # one step is not checkpointed
def test_checkpointing_changes_nothing(model, classifier, images, sampler, steps):
    defended = DefendedClassifier(DiffusionPurifier(model, 0.1, sampler, steps), classifier)
    noise = defended.noise(images, rows=ROWS, seed=0, purpose="x")
    checkpointed = gradient(defended, images, noise)
    defended.purifier.use_checkpoints = False
    assert torch.equal(checkpointed, gradient(defended, images, noise))
    assert checkpointed.abs().sum() > 0


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of much that is its own
def test_a_compiled_unet_has_the_same_gradient_and_the_forward_pass_stays_as_it_is(
    ddpm, classifier, images, monkeypatch
):
    model = read_ddpm(ddpm).requires_grad_(False)
    names = list(model.state_dict())
    defended = DefendedClassifier(DiffusionPurifier(model, 0.1, "ddpm", 1), classifier)
    noise = defended.noise(images, rows=ROWS, seed=0, purpose="x")
    expected, logits = gradient(defended, images, noise), defended(images, noise)
    compiler, calls = torch.compile, []

    def traced(task, **options):  # all of torch.compile but the minute of C++
        compiled = compiler(task, backend="aot_eager", **options)
        return lambda *arguments: calls.append(task) or compiled(*arguments)

    monkeypatch.setattr(torch, "compile", traced)
    model.compile_unet()
    probed = len(calls)
    assert torch.allclose(
        gradient(defended, images, noise), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )
    assert len(calls) == probed + 1
    with torch.no_grad():
        assert torch.equal(defended(images, noise), logits)
    assert len(calls) == probed + 1
    assert list(model.state_dict()) == names
    other = copy.deepcopy(defended)
    for weight in other.purifier.ddpm.unet.parameters():
        weight.data.zero_()
    assert not torch.allclose(gradient(other, images, noise), expected, rtol=0.1)


def test_a_machine_that_cannot_compile_says_so(ddpm, monkeypatch):
    def broken(task, **_):
        def run(*_):
            raise RuntimeError("no C++ compiler found\nand much more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        AdvdiffError, match=r"cannot compile on this machine \(no C\+\+ compiler found\); leave the option out"
    ):
        read_ddpm(ddpm).compile_unet()


def test_bf16_bends_the_gradient_a_little(model, classifier, images):
    """The classifier and the pixels stay in fp32, forward and backward, through checkpoints too."""
    purifier = DiffusionPurifier(model, 0.1, "ddpm", 2)
    full, half = (DefendedClassifier(purifier, classifier, precision) for precision in ("fp32", "bf16"))
    noise = full.noise(images, rows=ROWS, seed=0, purpose="x")
    assert half.purify(images, noise).dtype == half(images, noise).dtype == torch.float32
    one, other = gradient(full, images, noise), gradient(half, images, noise)
    assert not torch.equal(one, other)
    assert torch.cosine_similarity(one.flatten(1), other.flatten(1)).min() > 0.99


class Network(nn.Module):
    """A smooth noise predictor that stands where the U-Net does."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t, return_dict=False):
        return (torch.tanh(self.mix(x)) * (1 + t.view(-1, 1, 1, 1) / 1000),)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_finite_differences_agree(model, sampler, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network().double()
    network.config = model.unet.config
    tiny = Ddpm(network, model.scheduler, replace(DdpmCard(), max_t=0.3))
    tiny.alpha_bar = tiny.alpha_bar.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # Ddpm returns float32 whatever it computes in
    purifier = DiffusionPurifier(tiny, 0.1, sampler, 2)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.3  # far from the clips
    noise = torch.randn(1, 2, 3, 4, 4, generator=generator, dtype=torch.float64) * 0.1
    assert torch.autograd.gradcheck(lambda x: purifier(x, noise), x.requires_grad_())


def test_the_gradient_is_the_mean_of_the_draws_own(model, classifier, images):
    defended = DefendedClassifier(DiffusionPurifier(model, 0.1, "ddpm", 2), classifier)
    labels = torch.tensor([0, 1, 1])
    loss, mean = Objective(defended, labels, ROWS, ObjectiveSpec(eot=3, seed=5)).gradient(images, step=2)
    x = images.clone().requires_grad_()
    draws = [defended(x, defended.noise(images, rows=ROWS, seed=5, purpose="attack", draw=d)) for d in (6, 7, 8)]
    losses = torch.stack([nn.functional.cross_entropy(z, labels, reduction="none") for z in draws]).mean(0)
    assert torch.allclose(mean, torch.autograd.grad(losses.sum(), x)[0], rtol=1e-4, atol=1e-8)
    assert torch.allclose(loss, losses.detach(), atol=1e-6)


def test_bpda_is_the_defense_forward_and_the_identity_backward(model, classifier, images):
    purifier = DiffusionPurifier(model, 0.1, "ddpm", 2)
    defended, through = DefendedClassifier(purifier, classifier), BpdaClassifier(purifier, classifier)
    noise = defended.noise(images, rows=ROWS, seed=0, purpose="x")
    assert torch.equal(through(images, noise), defended(images, noise))
    seen = purifier(images, noise).requires_grad_()
    (expected,) = torch.autograd.grad(classifier(seen)[:, 1].sum(), seen)
    assert torch.equal(gradient(through, images, noise), expected)


def test_rows_own_their_noise(classifier, images):
    defended = DefendedClassifier(NoisePurifier(linear_alpha_bar(), 0.04), classifier)
    noise = defended.noise(images, rows=ROWS, seed=1, purpose="evaluate", draw=2)
    assert torch.equal(noise[1:2], defended.noise(images[1:2], rows=["b"], seed=1, purpose="evaluate", draw=2))
    assert torch.equal(noise[:, 0], RowStreams(1, "evaluate", ROWS, draw=2).normal(3, 40, 40))
    assert not torch.equal(noise, defended.noise(images, rows=ROWS, seed=1, purpose="evaluate", draw=3))


def test_fixed_noise_makes_a_function(classifier, images):
    defended = DefendedClassifier(NoisePurifier(linear_alpha_bar(), 0.04), classifier)
    fixed = defended.fixed(defended.noise(images, rows=ROWS, seed=1, purpose="evaluate"))
    assert torch.equal(fixed(images), fixed(images))
    assert not torch.equal(defended(images), defended(images))
    shared = defended.fixed(fixed.frozen[:1])
    assert torch.allclose(shared(images)[:1], fixed(images)[:1], atol=1e-6)
    assert len(shared(images[:2])) == 2
