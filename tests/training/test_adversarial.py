"""What a classifier learns from: behind a defense, attacked, and both; batch statistics see no iterate of an attack."""

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from advdiff_cli.attacks.eot import Objective, ObjectiveSpec
from advdiff_cli.attacks.pgd import Ball, iterates
from advdiff_cli.attacks.projections import random_point
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.philox import DeviceStreams
from advdiff_cli.data.rng import RowStreams
from advdiff_cli.models.classifier_config import ClassifierConfig
from advdiff_cli.models.classifiers import Classifier
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.purification.defended_classifier import DefendedClassifier, row_noise
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, linear_alpha_bar
from advdiff_cli.training.adversarial import TrainingInput, consistency_loss
from advdiff_cli.training.optim import build_accelerator
from advdiff_cli.training.recipes import Adversary

EPS = 2 / 255
ROWS = range(100, 108)


@pytest.fixture(scope="module")
def batch(test_x):
    patches = open_patches(test_x)
    return patches.read(range(8)), torch.from_numpy(patches.labels[:8])


@pytest.fixture
def model():
    """A network with batch normalization, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(ClassifierConfig("shufflenet_v2_x0_5", (0.7, 0.5, 0.7), (0.2, 0.2, 0.2))).train()


def noise_purifier(t_star=0.085):
    return NoisePurifier(linear_alpha_bar(), t_star)


def buffers(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def test_a_plain_inputs_is_cross_entropy(model, batch):
    images, labels = batch
    expected = cross_entropy(model(images), labels)
    assert torch.equal(TrainingInput().loss(model, model, images, labels, ROWS), expected)


def test_patches_pass_one_of_the_purifiers_on_noise_of_their_own(batch):
    images, _ = batch
    inputs = TrainingInput((None, noise_purifier()), seed=3)
    noise = row_noise(noise_purifier(), images, list(ROWS), seed=3, purpose="train")
    noised = noise_purifier()(images, noise)
    kinds = set()
    for image, found, alone in zip(images, inputs.purify(images, ROWS), noised, strict=True):
        kinds.add("plain" if torch.equal(found, image) else "noised" if torch.equal(found, alone) else "other")
    assert kinds == {"plain", "noised"}


@pytest.mark.parametrize("noise", ["numpy", "philox"])
def test_attacked_patches_are_the_last_iterate_of_pgd(model, batch, noise):
    images, labels = batch
    inputs = TrainingInput(adversary=Adversary(EPS, 3, "madry"), seed=5, noise=noise)
    found = inputs.perturb(model, images, labels, ROWS)
    of_numpy, of_device = RowStreams(5, "attack-start", ROWS), DeviceStreams(5, "attack-start", ROWS, images.device)
    x_0 = random_point(images, EPS, "linf", of_device if noise == "philox" else of_numpy)
    objective = Objective(model.eval(), labels, ROWS, ObjectiveSpec(seed=5))
    *_, (last, _) = iterates(objective, Ball(images, EPS, "linf", EPS * 2.5 / 3), x_0, 3)
    assert torch.equal(found, last)
    assert (found - images).abs().max() <= EPS + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_classifier_behind_a_purifier_is_attacked_at_the_precision_of_training_on_a_gpu_alone(model, batch, device):
    seen = set()
    hook = model.to(device).backbone.conv5.register_forward_hook(lambda layer, given, made: seen.add(made.dtype))
    images, labels = (t.to(device) for t in batch)
    build_accelerator("bf16", device).prepare(model)  # as in training: its own forward method is then in bf16
    inputs = TrainingInput((noise_purifier().to(device),), Adversary(EPS, 1, "madry"), "bf16")
    adv = inputs.perturb(model, images, labels, ROWS)
    hook.remove()
    assert seen == {torch.bfloat16 if device.type == "cuda" else torch.float32}
    assert adv.dtype == torch.float32


def test_an_l2_adversary_stays_in_its_ball(model, batch):
    images, labels = batch
    adv = TrainingInput(adversary=Adversary(0.5, 3, "madry", norm="l2")).perturb(model, images, labels, ROWS)
    sizes = (adv - images).flatten(1).norm(dim=1)
    assert (sizes <= 0.5 + 1e-5).all()
    assert sizes.max() > 0.4


def test_step_sizes():
    assert [Adversary(EPS, k, "madry").step_size / EPS for k in (1, 2, 10)] == pytest.approx([1.25, 1.25, 0.25])


def test_an_attack_leaves_batch_statistics_alone(model, batch):
    """What the statistics see of an adversarial batch is that batch, once."""
    images, labels = batch
    inputs = TrainingInput(adversary=Adversary(EPS, 3, "madry"))
    before = buffers(model)
    adv = inputs.perturb(model, images, labels, ROWS)
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    model.train()(adv)
    once = buffers(model)
    model.load_state_dict(before, strict=False)
    loss = inputs.loss(model, model, images, labels, ROWS)
    assert model.training
    assert all(torch.equal(once[name], b) for name, b in model.named_buffers())
    assert loss.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_trades_is_clean_cross_entropy_and_the_divergence(model, batch):
    images, labels = batch
    inputs = TrainingInput(adversary=Adversary(EPS, 2, "trades", beta=3.0))
    adv = inputs.perturb(model, images, labels, ROWS)
    model.train()
    start = buffers(model)
    found = inputs.loss(model, model, images, labels, ROWS)
    model.load_state_dict(start, strict=False)
    clean, attacked = (log_softmax(z, 1) for z in model.train()(torch.cat([images, adv])).chunk(2))
    divergence = (clean.exp() * (clean - attacked)).sum(1).mean()
    torch.testing.assert_close(found, cross_entropy(clean, labels) + 3 * divergence)
    assert divergence > 0


def test_the_consistency_loss(batch):
    """With the weight of the entropy, divergence and entropy sum to the cross-entropy of the draws with their mean."""
    _, labels = batch
    logits = torch.randn(3, len(labels), 2, generator=torch.Generator().manual_seed(0))
    mean = logits.softmax(-1).mean(0)
    plain = torch.stack([cross_entropy(z, labels) for z in logits]).mean()
    crossed = torch.stack([cross_entropy(z, mean) for z in logits]).mean()
    torch.testing.assert_close(consistency_loss([*logits], labels, 0.5), plain + 0.5 * crossed)
    divergence = crossed + (mean * mean.log()).sum(-1).mean()
    torch.testing.assert_close(consistency_loss([*logits], labels, 5.0), plain + 0.5 * crossed + 4.5 * divergence)
    same = consistency_loss([logits[0]] * 2, labels, 5.0)
    torch.testing.assert_close(same, consistency_loss([logits[0]], labels, 0.0))


def test_consistency_trains_each_patch_on_two_draws(model, batch):
    images, labels = batch
    inputs = TrainingInput((noise_purifier(),), Adversary(EPS, 2, "madry"), consistency=4.0)
    adv = inputs.perturb(model, images, labels, ROWS)
    draws = [inputs.purify(adv, ROWS, draw) for draw in (0, 1)]
    assert (draws[0] != draws[1]).any(dim=(1, 2, 3)).all()
    model.train()
    start = buffers(model)
    found = inputs.loss(model, model, images, labels, ROWS)
    model.load_state_dict(start, strict=False)
    torch.testing.assert_close(found, consistency_loss(model.train()(torch.cat(draws)).chunk(2), labels, 4.0))


def test_an_adversary_goes_through_the_purifier(model, batch, ddpm):
    images, labels = batch
    purifier = DiffusionPurifier(read_ddpm(ddpm), 0.1, sampler_steps=1).requires_grad_(False).eval()
    adversary = Adversary(EPS, 3, "madry")
    through = TrainingInput((purifier,), adversary).perturb(model, images, labels, ROWS)
    assert not torch.equal(through, TrainingInput(adversary=adversary).perturb(model, images, labels, ROWS))
    defended = DefendedClassifier(purifier, model.eval())
    objective = Objective(defended, labels, ROWS)
    x_0 = random_point(images, EPS, "linf", RowStreams(0, "attack-start", ROWS))
    *_, (last, _) = iterates(objective, Ball(images, EPS, "linf", EPS * 2.5 / 3), x_0, 3)
    assert torch.equal(through, last)


def test_another_row_is_attacked_and_noised_otherwise(model, batch):
    images, labels = batch
    inputs = TrainingInput((noise_purifier(),), Adversary(EPS, 1, "madry"))
    one, other = (inputs.perturb(model, images[:1], labels[:1], [row]) for row in (0, 1))
    assert not torch.equal(one, other)
    assert not torch.equal(*(inputs.purify(images[:1], [row]) for row in (0, 1)))


def test_training_under_a_inputs_end_to_end(advdiff, patches, ddpm, tmp_path):
    train, valid = (patches / "pcam" / f"camelyonpatch_level_2_split_{s}_x.h5" for s in ("train", "valid"))
    command = ["train-classifier", train, "--valid", valid, "-o", tmp_path / "clf", "--arch", "shufflenet_v2_x0_5"]
    command += ["--epochs", 1, "--batch-size", 16, "--precision", "fp32"]
    inputs = ["--augment", "none", "--augment", f"purify:{ddpm}:0.05:2", "--augment", "noise:0.1", "--adversarial"]
    made = advdiff(*command, *inputs, "--attack-steps", 1, "--json").json
    assert set(made["published"]) == {"epoch", "n", "valid_accuracy", "valid_robust_accuracy"}
    told = advdiff("info", tmp_path / "clf", "--json").json["provenance"]["recipe"]["parameters"]
    assert told["adversary"] == {"eps": EPS, "steps": 1, "loss": "madry", "beta": 6.0}
    assert [a and a["t_star"] for a in told["augment"]] == [None, 0.05, 0.1]
    assert told["augment"][1]["sampler_steps"] == 2
    consistent = ["train-classifier", train, "--valid", valid, *command[6:], "-o", tmp_path / "consistent"]
    published = advdiff(*consistent, "--augment", "noise:0.3", "--consistency", 5, "--json").json["published"]
    assert set(published) == {"epoch", "n", "valid_accuracy", "valid_consistent_accuracy"}
    assert published["valid_consistent_accuracy"]["value"] <= published["valid_accuracy"]["value"]
    assert "up to date" in advdiff(*command, *inputs, "--attack-steps", 1).err
    assert "made with other settings" in advdiff(*command, code=1).err
    plain = [*command[:5], tmp_path / "plain", *command[6:]]
    for wrong, says in (
        (["--consistency", 5], "--consistency requires noise"),
        (["--consistency", 5, "--augment", "none", "--augment", "none"], "--consistency requires noise"),
        (["--ema", "1"], "--ema must be at least 0 and below 1, not 1"),
        (["--consistency", 5, "--augment", "noise:0.1", "--adversarial", "--loss", "trades"], "choose one"),
        (["--augment", "noise"], "give none, noise:T"),
        (["--augment", "noise:2"], "t* = 2 is not in"),
        (["--augment", "purify:"], "give none, noise:T"),
        (["--augment", f"purify:{ddpm}:0.05:1.5"], "give none, noise:T"),
        (["--augment", f"purify:{ddpm}:0.05:0"], "at least one U-Net evaluation"),
        (["--augment", "purify:nowhere"], "no diffusion model is called nowhere"),
        (["--eps", "2/255"], "require --adversarial"),
        (["--adversarial", "--norm", "l2"], "--norm l2 needs --eps"),
        (["--adversarial", "--beta", "3"], "--beta requires --loss trades"),
        (["--adversarial", "--eps", "0"], "--eps must be above 0"),
    ):
        assert says in advdiff(*plain, *wrong, code=1).err
    assert not list(tmp_path.glob("plain*"))
