"""What holds on any device, and what a GPU must do as a CPU does. `pytest --device cuda` computes on a GPU."""

from contextlib import contextmanager
from itertools import islice

import numpy as np
import pytest
import torch

from advdiff_cli.attacks.eot import Objective, ObjectiveSpec
from advdiff_cli.attacks.pgd import Ball, iterates
from advdiff_cli.certification.smoothing import SmoothedClassifier
from advdiff_cli.data.patches import open_patches
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.models.registry import load_frozen_classifier
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.purifier import DiffusionPurifier

B = 4


@contextmanager
def unsynchronized(device):
    """Fail where a GPU is waited for."""
    try:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def defended(classifier, ddpm, device):
    purifier = DiffusionPurifier(read_ddpm(ddpm), 0.1, sampler_steps=2, noise_kind="philox")
    model = DefendedClassifier(purifier, load_frozen_classifier(str(classifier), device)[0])
    return model.to(device).requires_grad_(False).eval()


@pytest.fixture
def batch(test_x, device):
    return open_patches(test_x).batch(np.arange(B), device)


def test_steps_of_an_attack_do_not_wait(defended, batch, device):
    objective = Objective(defended, batch.labels, batch.index, ObjectiveSpec(eot=2))
    steps = iterates(objective, Ball(batch.images, 2 / 255, "linf", 1 / 255), batch.images, 3)
    next(steps)  # libraries choose their algorithms
    with unsynchronized(device):
        found = list(islice(steps, 2))
    for x, loss in found:
        assert x.device.type == loss.device.type == device.type
        assert 0 < (x - batch.images).abs().max() <= 2 / 255 + 1e-6


def test_draws_of_a_certificate_do_not_wait(defended, batch, device):
    smoothed = SmoothedClassifier(defended, batch.images.shape[-2:], 0)
    noised, noise = smoothed.noised(batch.images[0], 0, range(B))
    with unsynchronized(device), torch.inference_mode():
        again, _ = smoothed.noised(batch.images[0], 0, range(1, B))
        purified = defended.purifier.purify_noised(noised, noise)
    assert torch.equal(again, noised[1:])
    assert purified.isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize("sound", [False, True])
def test_a_gpu_draws_and_decides_as_a_cpu(sound, defended, batch, classifier, ddpm):
    on_cpu = DefendedClassifier(
        DiffusionPurifier(read_ddpm(ddpm), 0.1, sampler_steps=2, noise_kind="philox"),
        load_frozen_classifier(str(classifier), torch.device("cpu"))[0],
    ).eval()
    image = batch.images[0]
    ours, theirs = (SmoothedClassifier(m, image.shape[-2:], 0, sound) for m in (defended, on_cpu))
    noised, _ = ours.noised(image, 7, range(B))
    expected, _ = theirs.noised(image.cpu(), 7, range(B))
    if sound:  # integers, which the two divide by 255 in different ways
        assert torch.equal((noised.cpu() * 255).round(), (expected * 255).round())
    else:  # see philox.py
        assert (noised.cpu() - expected).abs().mean() < 1e-6
        torch.testing.assert_close(noised.cpu(), expected, rtol=0, atol=1e-3)
    noise = defended.noise(batch.images, rows=batch.index, seed=0, purpose="test")
    logits, expected = defended(batch.images, noise).cpu(), on_cpu(batch.images.cpu(), noise.cpu())
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
