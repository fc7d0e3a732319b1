"""The sequential test: its wealth is a martingale, its decisions hold at any stopping time, and it stops early."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from advdiff_cli.certification.bounds import Threshold, least_fixed_draws, threshold
from advdiff_cli.certification.confidence_sequence import (
    SequentialTest,
    least_sequential_draws,
    log_wealth_above,
    log_wealth_below,
)

ALPHA = 0.001
QS = [0.5, 0.657, 0.92, 0.9827, 1 - 1e-6]


def at(q):
    return Threshold(q, 1 - q)


def above(s, f, q):
    return log_wealth_above(np.array([s]), np.array([f]), at(q))[0]


def below(s, f, q):
    return log_wealth_below(np.array([s]), np.array([f]), at(q))[0]


@pytest.mark.parametrize("log_wealth", [above, below])
@given(s=st.integers(0, 3000), f=st.integers(0, 300), q=st.sampled_from(QS))
def test_wealth_is_a_martingale(log_wealth, s, f, q):
    """Its mean after one more draw, of probability q, is what it was; it begins at 1."""
    assert log_wealth(0, 0, q) == pytest.approx(0, abs=1e-9)
    now, won, lost = log_wealth(s, f, q), log_wealth(s + 1, f, q), log_wealth(s, f + 1, q)
    if now > -5 and np.isfinite([won, lost]).all():  # the integrals do not underflow
        assert np.logaddexp(np.log(q) + won, np.log(1 - q) + lost) == pytest.approx(now, abs=1e-6)


def test_wealth_that_underflows_is_none():
    """A probability of fewer digits than others, here 1e-320 or so, wins nothing."""
    q = 1 - 1e-6
    assert np.isfinite(above(56, 40, q))
    assert above(56, 59, q) == -np.inf


@pytest.mark.parametrize(("s", "f"), [(0, 0), (30, 0), (98, 3), (10, 20)])
@pytest.mark.parametrize("q", [0.5, 0.657, 0.92])
def test_wealth_is_the_integral_of_its_definition(s, f, q):
    def bet(p):
        return (p / q) ** s * ((1 - p) / (1 - q)) ** f * 0.5 * (1 - p) ** -0.5 / (1 - q) ** 0.5

    assert above(s, f, q) == pytest.approx(np.log(quad(bet, q, 1)[0]), abs=1e-6)


@given(s=st.integers(0, 5000), f=st.integers(0, 100), q=st.floats(0.01, 0.999), lower=st.floats(0.001, 1))
def test_what_rejects_a_threshold_rejects_lower_ones(s, f, q, lower):
    if above(s, f, q) >= np.log(2):
        assert above(s, f, q * lower) >= above(s, f, q) - 1e-9


@pytest.mark.parametrize("q", [0.5, 0.9, 0.98])
def test_false_certificates_are_rare_at_any_stopping_time(q):
    """Patches whose probability is the threshold itself, watched at each of 1,000 draws."""
    rng, patches, draws, alpha = np.random.default_rng(7), 4000, 1000, 0.05
    certified = np.zeros(patches, bool)
    for some in np.split(np.arange(patches), 10):
        successes = (rng.random((len(some), draws)) < q).cumsum(1)
        failures = np.arange(1, draws + 1) - successes
        certified[some] = (log_wealth_above(successes, failures, at(q)) >= -math.log(alpha)).any(1)
    assert 0.3 * alpha < certified.mean() < alpha + 3 * math.sqrt(alpha * (1 - alpha) / patches)


def run(outcomes, thresholds, *, max_draws=10_000, chunk=16):
    test = SequentialTest(thresholds, ALPHA, max_draws)
    for start in range(0, len(outcomes), chunk):
        if test.is_decided:
            break
        test.add(outcomes[start : start + chunk])
    return test.decide()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([0.55, 0.9, 0.97, 1.0]), st.integers(1, 400))
def test_decisions_do_not_depend_on_batches(seed, p, chunk):
    outcomes = np.random.default_rng(seed).random(1500) < p
    levels = (at(0.5), at(0.9), at(0.95))
    assert run(outcomes, levels, max_draws=1500, chunk=chunk) == run(outcomes, levels, max_draws=1500, chunk=1500)


def test_the_lower_bound_is_where_the_wealth_reaches_its_goal():
    decided = run(np.arange(300) % 60 != 7, (at(0.99),), max_draws=300)
    assert above(decided.successes, decided.draws - decided.successes, decided.lower) >= -np.log(ALPHA)
    assert above(decided.successes, decided.draws - decided.successes, decided.lower + 1e-6) < -np.log(ALPHA)
    assert run(np.zeros(50, bool), (at(0.5),)).lower == 0


def test_sure_patches_cost_little_more_than_the_least_and_hopeless_ones_tens():
    least = least_fixed_draws(1.304, 0.617, ALPHA)
    q = threshold(1.304, 0.617)
    sure = run(np.ones(5000, bool), (q,))
    assert sure.certified == (True,)
    assert least <= sure.draws <= 1.2 * least
    rng = np.random.default_rng(0)
    hopeless = [run(rng.random(5000) < 0.6, (q,)) for _ in range(200)]
    assert not any(d.certified[0] for d in hopeless)
    assert np.mean([d.draws for d in hopeless]) < 15


def test_it_gives_up_when_the_rest_cannot_decide():
    q = threshold(1.304, 0.617)
    assert run(np.ones(500, bool), (q,), max_draws=460).draws == 1  # 463 would do
    assert run(np.ones(500, bool), (q,), max_draws=500).certified == (True,)


@pytest.mark.parametrize("deviations", [8.0, 9.0, 18.0, 37.0, 40.0])
def test_radii_of_many_deviations_are_refuted_at_once(deviations):
    q = threshold(deviations, 1.0)
    assert run(np.ones(500, bool), (q,)).draws == 1
    assert run(np.zeros(500, bool), (q,)).draws == 1
    assert least_sequential_draws(q, ALPHA, 10_000) is None


def test_the_least_draws_are_those_of_draws_that_agree():
    q = threshold(0.869, 0.617)
    assert least_sequential_draws(q, ALPHA, 500) == run(np.ones(500, bool), (q,)).draws == 98
    assert least_sequential_draws(q, ALPHA, 10**12) == 98
    assert least_sequential_draws(q, ALPHA, 97) is None
    with pytest.raises(ValueError, match="below 1/2"):
        SequentialTest((q,), 0.5, 10)


def test_a_threshold_of_one_is_never_reached():
    assert run(np.ones(500, bool), (Threshold(1.0, 0.0),)).certified == (False,)


def test_several_thresholds_are_decided_together():
    levels = tuple(threshold(r, 0.617) for r in (0.0, 0.25, 0.869, 5.0))
    decided = run(np.random.default_rng(1).random(9000) < 0.97, levels)
    assert decided.certified == (True, True, True, False)
    assert decided.lower >= levels[2].value
