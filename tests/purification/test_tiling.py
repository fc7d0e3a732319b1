"""Windows over large images: what is pointwise comes out as from the whole, and no seam shows at their borders."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.models.registry import find_ddpm
from advdiff_cli.purification import tiling
from advdiff_cli.purification.purifier import DiffusionPurifier
from advdiff_cli.purification.tiling import OVERLAP, WINDOW, predict_in_windows, window_starts


@given(length=st.integers(WINDOW // 8, 600).map(lambda n: 8 * n))
@settings(max_examples=60)
def test_windows_cover_and_overlap(length):
    found = window_starts(length, WINDOW, 8)
    assert found[0] == 0
    assert found[-1] == length - WINDOW
    assert all(a % 8 == 0 for a in found)
    assert all(0 < b - a <= WINDOW - OVERLAP + 8 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("size", [(392, 96), (96, 1000), (520, 648)])
def test_a_pointwise_prediction_is_that_of_the_whole(size):
    images = torch.rand(2, 3, *size, requires_grad=True)
    seen = []

    def predict(x):
        seen.append(tuple(x.shape))
        return x.square() + 1

    found = predict_in_windows(predict, images, 8)
    assert torch.allclose(found, images.square() + 1, atol=1e-6)
    assert {s[0] for s in seen} == {tiling.BATCH}
    assert all(max(s[2:]) <= WINDOW for s in seen)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert torch.allclose(gradient, 2 * images, atol=1e-5)


def test_small_images_pass_whole():
    images = torch.rand(2, 3, 384, 96)
    assert torch.equal(predict_in_windows(lambda x: x + 1, images, 8), images + 1)


def test_no_seam_shows(monkeypatch):
    """At the borders of windows, columns differ no more from their neighbors than elsewhere; hard cuts would show."""
    rng = np.random.default_rng(0)
    tissue = gaussian_filter(rng.standard_normal((3, 96, 640)), (0, 4, 4))
    images = torch.from_numpy(tissue / np.abs(tissue).max() * 0.5 + 0.5).float()[None]
    purifier = DiffusionPurifier(read_ddpm(find_ddpm("pcam-ddpm")), 0.25, "ddpm", 1)
    noise = torch.randn(1, *purifier.noise_shape(96, 640), generator=torch.Generator().manual_seed(0))

    def seam():
        """How much rougher the clean estimate is at the borders: mean absolute step there over that of all columns."""
        with torch.inference_mode():
            found = purifier(images, noise)
        steps = (found[..., 1:] - found[..., :-1]).abs().mean((0, 1, 2))
        borders = [
            e for a in window_starts(640, WINDOW, purifier.ddpm.multiple) for e in (a, a + WINDOW) if 0 < e < 640
        ]
        return float(steps[[b - 1 for b in borders]].mean() / steps.mean())

    blended = seam()
    monkeypatch.setattr(tiling, "_ramp", lambda side: (torch.arange(side) >= OVERLAP).float() + 1e-9)
    assert blended < 1.05
    assert seam() > 1.1
