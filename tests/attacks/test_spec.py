"""What is asked of an attack, resolved: defaults, what does not apply, and which gradient is followed."""

import json

import pytest
import torch
from torch import nn

from advdiff_cli.attacks.bpda import BpdaClassifier
from advdiff_cli.attacks.dispatch import AttackBatch, build_target, run_attack
from advdiff_cli.attacks.fab import fab
from advdiff_cli.attacks.model_passes import attack_cost
from advdiff_cli.attacks.spec import AttackRequest, AttackSpec, resolve
from advdiff_cli.data.rng import RowStreams
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.purification import defended_classifier
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.defense import Defense, EvaluatedModel
from advdiff_cli.purification.defense_spec import DefenseSpec
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, linear_alpha_bar

EPS = 4 / 255


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 8, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(288, 2))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def purifier(ddpm):
    return DiffusionPurifier(read_ddpm(ddpm).requires_grad_(False), 0.05, "ddpm", 2).eval()


@pytest.fixture(scope="module")
def batch(classifier):
    images = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    return images, classifier(images).argmax(1)


def resolved(method="pgd", defended=True, norm="linf", **asked):
    return resolve(method, norm, EPS, AttackRequest(**asked), defended=defended)


def run(model, purifier, spec, images, labels, rows, seed):
    """Attack a classifier, behind a purifier or alone."""
    target = build_target(model, purifier, spec)
    return run_attack(target, spec, AttackBatch(images, labels, rows, rows, seed))


def test_defaults():
    assert resolved(defended=False).parameters() == {
        "method": "pgd",
        "norm": "linf",
        "eps": EPS,
        "loss": "ce",
        "steps": 40,
        "step_size": EPS / 4,
        "restarts": 1,
    }
    assert resolved("fgsm", defended=False).step_size == EPS
    assert {k: resolved().parameters()[k] for k in ("gradient", "eot", "fixed_draw")} == {
        "gradient": "full",
        "eot": 8,
        "fixed_draw": False,
    }
    assert resolved("paper", defended=False).parameters() == {"method": "paper", "norm": "linf", "eps": EPS, "steps": 5}
    assert resolved(gradient="blind").eot is None
    assert resolved("square").gradient is None
    assert resolved("ensemble").attacks == ("apgd-ce", "apgd-margin", "square")
    assert resolved("ensemble", norm="l2").attacks == ("apgd-ce", "apgd-margin")
    assert resolved("ensemble", defended=False).attacks[-1] == "fab"


@pytest.mark.parametrize("method", ["pgd", "fgsm", "apgd", "square", "ensemble", "random"])
@pytest.mark.parametrize("defended", [True, False])
def test_parameters_are_read_back(method, defended):
    spec = resolved(method, defended=defended)
    parameters = {**spec.parameters(), "seed": 0, "t_star": 0.1}
    assert AttackSpec.from_parameters(json.loads(json.dumps(parameters))) == spec


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"defended": False, "eot": 4}, "--eot does not apply to --method pgd without a defense"),
        ({"defended": False, "gradient": "bpda"}, "--gradient does not apply"),
        ({"gradient": "blind", "eot": 4}, "--eot does not apply to --method pgd with --gradient blind"),
        ({"gradient": "bpda", "fixed_draw": True}, "--fixed-draw does not apply"),
        ({"fixed_draw": True, "eot": 4}, "--eot does not apply to --method pgd with --gradient full and --fixed-draw"),
        ({"gradient": "surrogate"}, "needs --attack-sampler-steps"),
        ({"attack_sampler_steps": 1}, "--attack-sampler-steps does not apply"),
        ({"method": "fgsm", "steps": 3}, "--steps does not apply to --method fgsm"),
        ({"method": "apgd", "step_size": 0.1}, "--step-size does not apply to --method apgd"),
        ({"method": "square", "steps": 3}, "--steps does not apply to --method square"),
        ({"method": "square", "norm": "l2"}, "--norm linf"),
        ({"method": "fab"}, "deterministic"),
        ({"method": "paper"}, "--method paper attacks the classifier alone"),
        ({"method": "paper", "defended": False, "norm": "l2"}, "--norm linf"),
    ],
)
def test_what_does_not_apply_is_said(asked, message):
    with pytest.raises(AdvdiffError, match=message):
        resolved(**asked)


@pytest.mark.parametrize("gradient", ["full", "bpda"])
def test_the_purifier_computes_at_the_precision_asked_for(classifier, purifier, gradient):
    target = build_target(classifier, purifier, resolved(gradient=gradient), "bf16")
    assert (target.gradient_model or target.model).precision == target.model.precision == "bf16"
    defense = Defense(purifier, DefenseSpec("ddpm", 0.05), None)
    assert EvaluatedModel(classifier, "name", defense, "bf16").module.precision == "bf16"


def test_whose_gradient_is_followed(classifier, purifier):
    assert build_target(classifier, None, resolved(defended=False)).model is classifier
    assert build_target(classifier, purifier, resolved(gradient="blind")).model is classifier
    full = build_target(classifier, purifier, resolved())
    assert isinstance(full.model, DefendedClassifier)
    assert full.gradient_model is None
    assert isinstance(build_target(classifier, purifier, resolved(gradient="bpda")).gradient_model, BpdaClassifier)
    spec = resolved(gradient="surrogate", attack_sampler_steps=1)
    surrogate = build_target(classifier, purifier, spec)
    assert surrogate.gradient_model.purifier.timesteps == [49]
    assert surrogate.model.purifier.timesteps == [49, 0]
    with pytest.raises(AdvdiffError, match="NoiseDefense"):
        build_target(classifier, NoisePurifier(linear_alpha_bar(), 0.04), spec)


SMALL = {
    "pgd": {"steps": 3},
    "fgsm": {},
    "apgd": {"steps": 6},
    "square": {"queries": 8},
    "ensemble": {"steps": 3, "queries": 4},
}


def small(method, gradient, **asked):
    own = {"gradient": gradient} if method != "square" else {}
    own |= {"eot": 2} if gradient != "blind" or method == "square" else {}
    own |= {"attack_sampler_steps": 1} if gradient == "surrogate" and method != "square" else {}
    return resolved(method, **SMALL[method], **own, **asked)


@pytest.mark.parametrize("gradient", ["blind", "bpda", "surrogate", "full"])
@pytest.mark.parametrize("method", SMALL)
def test_no_draw_that_judges_is_seen_and_none_that_chooses_is_climbed(
    classifier, purifier, batch, method, gradient, monkeypatch
):
    opened = []

    class Recorded(RowStreams):
        def __init__(self, seed, purpose, rows, **named):
            opened.append(purpose)
            super().__init__(seed, purpose, rows, **named)

    monkeypatch.setattr(defended_classifier, "RowStreams", Recorded)
    settings = small(method, gradient, restarts=2) if method != "fgsm" else small(method, gradient)
    run(classifier, purifier, settings, *batch, list(range(4)), seed=0)
    random = gradient != "blind" or method == "square"
    chosen = {"pgd", "fgsm", "apgd", "square", "ensemble"} if random else set()
    assert set(opened) == ({"attack"} if random else set()) | ({"attack-choice"} if method in chosen else set()) | (
        {"attack-ensemble"} if random and method == "ensemble" else set()
    )


@pytest.mark.parametrize("gradient", ["blind", "bpda", "surrogate", "full"])
@pytest.mark.parametrize("method", SMALL)
def test_every_method_and_gradient_stays_in_ball_and_box_by_row(classifier, purifier, batch, method, gradient):
    images, labels = batch
    settings = small(method, gradient)
    adv = run(classifier, purifier, settings, images, labels, ["a", "b", "c", "d"], seed=3)
    assert (adv - images).abs().max() <= EPS + 1e-7
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert (adv != images).any()
    if method != "ensemble":
        back = run(classifier, purifier, settings, images.flip(0), labels.flip(0), ["d", "c", "b", "a"], seed=3).flip(0)
        assert torch.equal(adv, back)


@pytest.mark.parametrize("method", SMALL)
def test_an_eps_of_zero_changes_nothing(classifier, purifier, batch, method):
    images, labels = batch
    settings = resolve(method, "linf", 0.0, AttackRequest(**SMALL[method], eot=2), defended=True)
    adv = run(classifier, purifier, settings, images, labels, list(range(4)), seed=0)
    assert torch.equal(adv, images)


def test_a_fixed_draw_is_the_evaluations_own(classifier, purifier, batch):
    """The attack on the noise it knows beats, on that noise, the attack that does not know it."""
    images, labels = batch
    defended = DefendedClassifier(purifier, classifier)
    noise = defended.noise(images, rows=[0, 1, 2, 3], seed=9, purpose="evaluate")

    def margin(**asked):
        settings = resolved("apgd", steps=20, loss="margin", **asked)
        adv = run(classifier, purifier, settings, images, labels, [0, 1, 2, 3], seed=9)
        logits = defended(adv, noise)
        return logits.gather(1, 1 - labels[:, None]) - logits.gather(1, labels[:, None])

    assert (margin(fixed_draw=True) >= margin(eot=1) - 1e-6).all()


def test_the_ensemble_is_no_weaker_than_its_members(classifier, batch):
    images, labels = batch

    def margin(method, **asked):
        settings = resolved(method, defended=False, **asked)
        adv = run(classifier, None, settings, images, labels, [0, 1, 2, 3], seed=0)
        logits = classifier(adv)
        return (logits.gather(1, 1 - labels[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)

    worst = margin("ensemble", steps=5, queries=20)
    for members in (margin("apgd", steps=5), margin("apgd", steps=5, loss="margin"), margin("square", queries=20)):
        assert (worst >= members - 1e-6).all()


def test_square_climbs_without_gradients(classifier, batch):
    images, labels = batch
    settings = resolved("square", defended=False, queries=200)
    adv = run(classifier, None, settings, images, labels, [0, 1, 2, 3], seed=0)
    random = images + RowStreams(0, "x", [0, 1, 2, 3]).uniform(3, 40, 40).sign() * EPS
    other = 1 - labels[:, None]
    assert (classifier(adv).gather(1, other) > classifier(random.clamp(0, 1)).gather(1, other)).all()


def test_fab_finds_what_apgd_finds_and_leaves_torch_alone(classifier, batch):
    images, labels = batch
    before = torch.random.get_rng_state()
    adv = fab(classifier, images, labels, eps=0.1, steps=20)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (classifier(adv).argmax(1) != labels).all()
    assert (adv - images).abs().max() <= 0.1 + 1e-7
    assert torch.equal(adv[2:3], fab(classifier, images[2:3], labels[2:3], eps=0.1, steps=20))


def test_fab_takes_a_draw_that_patches_share(classifier, batch):
    images, labels = batch
    defended = DefendedClassifier(NoisePurifier(linear_alpha_bar(), 0.01), classifier)
    noise = defended.noise(images[:1], rows=[0], seed=0, purpose="evaluate")
    shared, each = (defended.fixed(noise.expand(k, *noise.shape[1:])) for k in (1, 4))
    assert torch.equal(*(fab(model, images, labels, eps=0.1, steps=3) for model in (shared, each)))


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("pgd", {"steps": 7, "eot": 2}),
        ("pgd", {"steps": 2, "eot": 3}),
        ("pgd", {"steps": 3, "gradient": "bpda", "eot": 2}),
        ("pgd", {"steps": 3, "fixed_draw": True}),
        ("fgsm", {"eot": 2}),
        ("apgd", {"steps": 6, "eot": 2}),
        ("square", {"queries": 9, "eot": 2}),
    ],
)
def test_the_cost_that_is_told_is_what_an_attack_computes(classifier, ddpm, batch, method, asked):
    unet = read_ddpm(ddpm).requires_grad_(False)
    computed = [0, 0]  # rows of the U-Net: in all, and of those that are differentiated

    def count(module, inputs, output):
        computed[0] += len(output)
        computed[1] += len(output) * output.requires_grad

    unet.register_forward_hook(count)
    spec = resolved(method, **asked)
    run(classifier, DiffusionPurifier(unet, 0.05, "ddpm", 1).eval(), spec, *batch, [0, 1, 2, 3], 0)
    assert tuple(rows / 4 for rows in computed) == attack_cost(spec, defended=True).unet_evaluations(1)
