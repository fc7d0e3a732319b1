"""Noise on the grid: its distribution is that of rounded normal numbers, and it is drawn exactly."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, norm

from advdiff_cli.certification.grid_noise import GridNoise
from advdiff_cli.data import philox
from advdiff_cli.data.rng import stream
from advdiff_cli.errors import AdvdiffError


@pytest.mark.parametrize("scale", [0.3, 7.0, 157.3])
def test_values_are_those_of_the_whole_table(scale):
    """The lookup by first bits finds what a search of all tails finds."""
    noise, shape = GridNoise(scale), (200, 200)
    drawn = noise.draw(stream(0, "test"), shape)
    bits = stream(0, "test").integers(2**64, size=shape, dtype=np.uint64)
    exact = len(noise._tails) - np.searchsorted(noise._tails, bits >> np.uint64(1), side="right")
    np.testing.assert_array_equal(np.abs(drawn), exact)
    few = 2 * norm.sf((np.arange(1, 4) - 0.5) / scale)
    np.testing.assert_allclose(noise._tails[::-1][:3] / 2.0**63, few, rtol=1e-13, atol=2.0**-63)
    negative = drawn < 0
    assert not (negative & (bits % np.uint64(2) == 1)).any()


@pytest.mark.parametrize("scale", [2.0, 40.0])
def test_distribution_is_that_of_rounded_normal_numbers(scale):
    drawn = GridNoise(scale).draw(stream(1, "test"), (400_000,))
    edge = int(2.5 * scale)
    values = np.arange(-edge, edge + 1)
    expected = norm.cdf((values + 0.5) / scale) - norm.cdf((values - 0.5) / scale)
    counts = np.array([(drawn == v).sum() for v in values])
    rest = len(drawn) - counts.sum()
    found = chisquare([*counts, rest], len(drawn) * np.array([*expected, 1 - expected.sum()]))
    assert found.pvalue > 1e-3
    assert drawn.std() == pytest.approx(np.sqrt(scale**2 + 1 / 12), rel=5e-3)


def test_values_drawn_on_a_device_are_those_of_the_table():
    noise, keys = GridNoise(7.0), philox.row_keys(0, "test", [0, 1], [0, 0], device=torch.device("cpu"))
    drawn = noise.normal_on_device(keys, 50_001)
    words = philox.integers(keys, 100_004)[:, :100_002].view(2, 50_001, 2).numpy().astype(np.uint64)
    uniform = (words[..., 0] << np.uint64(31)) | (words[..., 1] >> np.uint64(1))
    exact = len(noise._tails) - np.searchsorted(noise._tails, uniform, side="right")
    np.testing.assert_array_equal(drawn.abs().numpy(), exact)
    assert drawn.std().item() == pytest.approx(np.sqrt(49 + 1 / 12), rel=1e-2)
    assert abs(drawn.mean().item()) < 0.1
    assert (drawn == drawn.round()).all()


def test_distance_from_normal_is_negligible():
    assert 0 < GridNoise(157.3).total_variation(3 * 96 * 96) < 1e-6


def test_draws_have_streams_of_their_own():
    noise = GridNoise(5.0)
    three = noise.normal(0, "test", 4, range(3), (2, 5))
    np.testing.assert_array_equal(three[1:], noise.normal(0, "test", 4, (1, 2), (2, 5)))
    assert (three == three.round()).all()
    assert not (three[0] == three[1]).all()


def test_noise_too_large_for_exact_sums_is_refused():
    with pytest.raises(AdvdiffError, match="too large for exact sums"):
        GridNoise(1e6)
