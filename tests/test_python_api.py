"""The names that `advdiff_cli` offers to Python."""

import subprocess
import sys

import pytest
import torch

import advdiff_cli


def test_names_are_imported_when_they_are_used():
    code = (
        "import sys, advdiff_cli; assert not {'torch', 'numpy'} & set(sys.modules); "
        "from advdiff_cli import open_patches; assert 'torch' not in sys.modules; "
        "assert 'load_ddpm' in advdiff_cli.__all__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(advdiff_cli, name) for name in advdiff_cli.__all__)
    with pytest.raises(AttributeError, match="no attribute nonesuch"):
        _ = advdiff_cli.nonesuch


def test_a_defended_classifier_is_attacked(test_x):
    from advdiff_cli import DefendedClassifier, DiffusionPurifier, load_classifier, load_ddpm, open_patches, pgd

    patches = open_patches(test_x)
    images, labels = patches.read([0, 1]), torch.from_numpy(patches.labels[:2])
    purifier = DiffusionPurifier(load_ddpm("synthetic-ddpm"), t_star=0.1, sampler_steps=1)
    model = DefendedClassifier(purifier, load_classifier("synthetic-classifier"))
    adversarial = pgd(model, images, labels, eps=2 / 255, steps=2)
    assert (adversarial - images).abs().max() <= 2 / 255 + 1e-6
    assert model(adversarial).shape == (2, 2)
