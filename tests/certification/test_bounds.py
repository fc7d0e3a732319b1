"""Bounds and radii: against statsmodels and scipy on the same counts, anchors of the schedule, and rounding."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from statsmodels.stats.proportion import proportion_confint

from advdiff_cli.certification.bounds import (
    certified_radius,
    clopper_pearson,
    least_fixed_draws,
    linf_as_l2,
    round_down,
    threshold,
)
from advdiff_cli.purification.purifier import NoisePurifier, linear_alpha_bar

EPS = 2 / 255


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize(("successes", "n"), [(0, 10), (7, 10), (10, 10), (990, 1000), (9_999, 10_000), (51, 100)])
def test_bound_is_that_of_statsmodels_and_scipy(successes, n, alpha):
    bound = clopper_pearson(successes, n, alpha)
    assert bound == pytest.approx(proportion_confint(successes, n, alpha=2 * alpha, method="beta")[0], abs=1e-9)
    peer = binomtest(successes, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert bound == pytest.approx(peer, abs=1e-9)
    if bound > 0.5:
        assert certified_radius(bound, 0.5) == pytest.approx(0.5 * norm.ppf(bound), abs=1e-9)
        assert certified_radius(bound, 0.5) < 0.5 * norm.ppf(bound)


@given(st.floats(0, 6), st.floats(0.05, 3))
def test_a_radius_is_never_rounded_up(radius, sigma):
    q = threshold(radius, sigma)
    assert q.value >= norm.cdf(radius / sigma)
    assert q.complement <= norm.sf(radius / sigma)
    if norm.cdf(radius / sigma) < 1 - 1e-6:
        assert certified_radius(norm.cdf(radius / sigma), sigma) <= radius * (1 + 1e-12)
        assert certified_radius(q.value, sigma) == pytest.approx(radius, abs=1e-6)


def test_noise_that_is_not_quite_normal_certifies_less():
    assert certified_radius(0.9, 1.0, distance=1e-3) < certified_radius(0.9, 1.0)
    assert threshold(1.0, 1.0, distance=1e-3).value == pytest.approx(norm.cdf(1.0) + 1e-3)
    assert certified_radius(0.5, 1.0) == certified_radius(0.3, 1.0) == 0
    assert certified_radius(0.5004, 1.0, distance=1e-3) == 0


@given(st.floats(0, 1e3), st.integers(1, 9))
def test_decimals_are_rounded_down(value, digits):
    rounded = round_down(value, digits)
    assert rounded <= value < rounded + 10.0**-digits * (1 + 1e-6)


@pytest.mark.parametrize(
    ("side", "pool", "l2", "least"),
    [
        (96, 1, 1.304, (48_035, 2_226, 397)),
        (64, 1, 0.869, (881, 200, 84)),
        (48, 1, 0.652, (195, 78, 45)),
        (96, 2, 0.652, (195, 78, 45)),
        (32, 1, 0.435, (58, 35, 26)),
    ],
)
def test_what_linf_2_needs(side, pool, l2, least):
    """The l2 radius after pooling, and the least draws that prove it at t* 0.2, 0.25 and 0.3."""
    in_patch = linf_as_l2(EPS, 3 * side**2)
    assert in_patch / pool == pytest.approx(l2, abs=5e-4)
    for t_star, n in zip((0.2, 0.25, 0.3), least, strict=True):
        sigma = pool * NoisePurifier(linear_alpha_bar(), t_star).sigma
        found = least_fixed_draws(in_patch, sigma, 0.001)
        assert found == pytest.approx(n, rel=2e-3)
        assert certified_radius(clopper_pearson(found, found, 0.001), sigma) >= in_patch * (1 - 1e-8)
        assert certified_radius(clopper_pearson(found - 1, found - 1, 0.001), sigma) < in_patch


def test_ten_draws_prove_nothing_at_a_small_alpha():
    assert clopper_pearson(9, 9, 0.001) < 0.5 < clopper_pearson(10, 10, 0.001)
    with pytest.raises(ValueError, match="too many standard deviations"):
        least_fixed_draws(100.0, 1.0, 0.001)
    assert least_fixed_draws(0.0, 1.0, 0.001) == math.ceil(math.log(0.001) / math.log(0.5))
