"""Votes over draws: decisions, ties and abstention."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.votes import Votes, least_draws, two_sided_p


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_p_values_are_those_of_scipy(counts):
    fewer, draws = min(counts[0], counts[1] - counts[0]), counts[1]
    expected = binomtest(counts[0], draws, 0.5).pvalue
    assert two_sided_p(np.array([fewer]), draws)[0] == pytest.approx(expected, rel=1e-9)


def test_decisions_shares_and_abstention():
    ones = np.array([0, 1, 2, 5, 6, 9, 10, 11])
    p1 = np.where(np.arange(11) < ones[:, None], 0.9, 0.2)
    votes = Votes(p1)
    assert votes.decision.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert votes.share * 11 == pytest.approx([11, 10, 9, 6, 6, 9, 10, 11])
    assert votes.mean == pytest.approx(p1.mean(1))
    assert votes.abstains(0.05).tolist() == [False, False, True, True, True, True, False, False]  # 10 of 11: p = 0.012
    assert votes.abstains(0.001).tolist() == [False, *[True] * 6, False]
    assert not votes.abstains(1.0).any()


def test_of_an_even_number_of_draws_the_mean_decides_ties():
    votes = Votes(np.array([[0.9, 0.4], [0.6, 0.1], [0.8, 0.7]]))
    assert votes.decision.tolist() == [1, 0, 1]
    assert votes.share.tolist() == [0.5, 0.5, 1.0]


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_evaluate_counts_the_same_decisions(half, seed):
    for draws in (2 * half, 2 * half + 1):
        p1 = np.random.default_rng(seed).random((20, draws))
        found = Predictions(np.ones(20, np.int64), p1)
        assert (Votes(p1).decision == found.decision).all()
        assert (found.largest_vote == found.decision).all()
    assert (found.largest_vote == found.vote(draws)).all()


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.05, 0.01, 0.001, 1e-9])
def test_the_least_draws_decide_and_fewer_do_not(alpha):
    n = least_draws(alpha)
    assert not Votes(np.ones((1, n))).abstains(alpha).any()
    assert n == 1 or Votes(np.ones((1, n - 1))).abstains(alpha).all()
