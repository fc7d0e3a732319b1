"""Majority votes over draws of a defense's noise, and whether a vote is decided.

A vote is decided if the majority would be a chance result with probability alpha at most, were the classes equally
likely: PREDICT of Cohen, Rosenfeld and Kolter (2019), with a two-sided binomial test.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Votes:
    """The votes of R draws for each of N patches.

    Args:
        p1: (N, R) probability of class 1.
    """

    p1: NDArray[np.float64]

    @property
    def draws(self) -> int:
        """R, the number of draws."""
        return int(self.p1.shape[1])

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean probability of class 1 (N,)."""
        mean: NDArray[np.float64] = self.p1.mean(1)
        return mean

    @property
    def decision(self) -> NDArray[np.int64]:
        """The class of the majority (N,); where as many draws are for either class, that of the mean probability."""
        twice = 2 * (self.p1 > 0.5).sum(1)
        return np.where(twice == self.draws, self.mean > 0.5, twice > self.draws).astype(np.int64)

    @property
    def share(self) -> NDArray[np.float64]:
        """The share of draws for the decision (N,)."""
        ones: NDArray[np.float64] = (self.p1 > 0.5).mean(1)
        return np.where(self.decision == 1, ones, 1 - ones)

    def abstains(self, alpha: float) -> NDArray[np.bool_]:
        """Return whether each vote is undecided at `alpha` (N,)."""
        ones = (self.p1 > 0.5).sum(1)
        undecided: NDArray[np.bool_] = two_sided_p(np.minimum(ones, self.draws - ones), self.draws) > alpha
        return undecided


def two_sided_p(fewer: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Return the p-values of binomial tests of equal classes, where `fewer` of the draws are for the minority."""
    from scipy.special import bdtr  # a slow import

    p: NDArray[np.float64] = np.minimum(1.0, 2 * bdtr(fewer, draws, 0.5))
    return p


def least_draws(alpha: float) -> int:
    """Return the least number of draws that can decide a vote: all for one class, 2^(1 - draws) <= alpha."""
    return 1 + math.ceil(-math.log2(alpha))
