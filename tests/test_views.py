"""Models under a view: trained on it, defended within it, and refused where they do not fit."""

import json
import shutil

import pytest
import torch

from advdiff_cli.attacks.eot import Objective, ObjectiveSpec
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.view import View
from advdiff_cli.models.classifiers import read_classifier
from advdiff_cli.models.registry import load_ddpm
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.purifier import DiffusionPurifier


@pytest.fixture
def cropped(classifier, tmp_path):
    """The classifier of the tests, reading the center only."""
    folder = shutil.copytree(classifier, tmp_path / "cropped")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"crop": 64}))
    return folder


def test_what_is_not_read_is_neither_purified_nor_attacked(cropped, classifier, ddpm, test_x):
    model, whole = read_classifier(cropped), read_classifier(classifier)
    images = open_patches(test_x).read(range(2))
    torch.testing.assert_close(model(images), whole(images[..., 16:80, 16:80]))
    purifier = DiffusionPurifier(load_ddpm(ddpm), 0.05, sampler_steps=1)
    defended = DefendedClassifier(purifier, model).requires_grad_(False)
    noise = defended.noise(images, rows=[0, 1], seed=0, purpose="evaluate")
    assert noise.shape[-2:] == (64, 64)
    center = images[..., 16:80, 16:80]
    torch.testing.assert_close(defended(images, noise), whole(purifier(center, noise)))
    objective = Objective(defended, torch.tensor([0, 1]), [0, 1], ObjectiveSpec())
    gradient = objective.gradient(images, 0)[1]
    assert gradient[..., 16:80, 16:80].abs().sum() > 0
    gradient[..., 16:80, 16:80] = 0
    assert not gradient.any()


def test_a_pair_is_trained_under_a_view(advdiff, test_x, ddpm, classifier, tmp_path):
    view = ["--crop", 64, "--pool", 2]
    fit = ["--steps", 1, "--batch-size", 4, "--valid", test_x]
    advdiff("train-ddpm", test_x, *fit, *view, "-o", tmp_path / "d")
    card = json.loads((tmp_path / "d" / "advdiff.json").read_text())
    assert (card["crop"], card["pool"]) == (64, 2)
    train = ["train-classifier", test_x, "--valid", test_x, "--arch", "squeezenet1_1", "--epochs", 1]
    train += ["--batch-size", 20, *view, "--augment", f"purify:{tmp_path / 'd'}:0.05:1"]
    advdiff(*train, "-o", tmp_path / "c")
    assert read_classifier(tmp_path / "c").config.view == View(64, 2)
    told = advdiff(*train, "-o", tmp_path / "c")
    assert "up to date" in told.err
    through = ["--t-star", "0.05", "--sampler-steps", 1, "--limit", 4]
    advdiff("evaluate", test_x, "-c", tmp_path / "c", "-m", tmp_path / "d", *through, "--draws", 1)
    made = tmp_path / "proved.csv"
    told = advdiff(
        *("certify", test_x, "-c", tmp_path / "c", "-m", tmp_path / "d", *through, "--n", 10, "-o", made, "--json")
    ).json
    assert told["parameters"]["dimension"] == 3 * 64 * 64

    unfit = "trained on the central 64x64 pixels, averaged in squares of 2, and cannot purify the whole patch"
    assert unfit in advdiff("purify", test_x, "-m", tmp_path / "d", *through, "-o", tmp_path / "p.h5", code=1).err
    evaluate = ["evaluate", test_x, *through, "--draws", 1]
    assert unfit in advdiff(*evaluate, "-c", classifier, "-m", tmp_path / "d", code=1).err
    other = "cannot purify the central 64x64 pixels, averaged in squares of 2"
    assert other in advdiff(*evaluate, "-c", tmp_path / "c", "-m", ddpm, code=1).err
    unfit_training = [*train[:-1], f"purify:{ddpm}:0.05:1", "-o", tmp_path / "e"]
    assert other in advdiff(*unfit_training, code=1).err
    assert "smaller than the center crop" in advdiff(*train[:-4], "--crop", 128, "-o", tmp_path / "e", code=1).err
    assert "cannot be averaged" in advdiff(*train[:-2], "--crop", 33, "-o", tmp_path / "e", code=1).err
