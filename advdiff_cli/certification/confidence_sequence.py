"""Sequential tests of a probability: draw until a threshold is decided, with an error that holds at any stopping time.

After s successes and f failures, the wealth of a bettor against "p <= q" is the likelihood ratio

    W_q(s, f) = integral from q to 1 of (p / q)^s ((1 - p) / (1 - q))^f pi_q(p) dp,   pi_q(p) ~ (1 - p)^(b - 1)

It is a nonnegative martingale with mean 1 if p = q, and a supermartingale if p < q, so that it ever reaches 1 / alpha
with probability at most alpha (Ville 1939; Robbins 1970). The density pi_q lies above q, where the bets are meant to
win: the Beta mixture of Voracek 2024 (arXiv:2406.17830), which covers [0, 1], needs a third more draws. For
alpha < 1/2, W_q >= 1 / alpha implies W_q' >= 1 / alpha for every q' < q (docs/certificates.md), so that the q that are
not rejected are an interval [L, 1], and one error alpha covers all thresholds of a patch together.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaln

from advdiff_cli.certification.bounds import Threshold

Counts = NDArray[np.int64]

_SHAPE = 0.5  # b; 1 is uniform, and smaller values bet more on probabilities near 1
_FUTILITY = 0.01  # the probability that a threshold which could be certified is given up, at most
_BISECTIONS = 60


def log_wealth_above(successes: Counts, failures: Counts, q: Threshold) -> NDArray[np.float64]:
    """Return log W_q of the bet that p is above q, for counts (N,)."""
    if q.complement <= 0:
        return np.full(np.shape(successes), -np.inf)
    a, b = successes + 1.0, failures + _SHAPE
    tail = betainc(b, a, q.complement)  # 1 - I_q(a, b)
    null = successes * math.log1p(-q.complement) + (failures + _SHAPE) * math.log(q.complement)
    wealth: NDArray[np.float64] = math.log(_SHAPE) + betaln(a, b) + _log_or_nothing(tail) - null
    return wealth


def log_wealth_below(successes: Counts, failures: Counts, q: Threshold) -> NDArray[np.float64]:
    """Return the log of the wealth of the bet that p is below q, for counts (N,)."""
    if q.complement <= 0:
        return np.full(np.shape(successes), np.inf)
    a, b = successes + _SHAPE, failures + 1.0
    null = failures * math.log(q.complement) + (successes + _SHAPE) * math.log1p(-q.complement)
    wealth: NDArray[np.float64] = math.log(_SHAPE) + betaln(a, b) + _log_or_nothing(betainc(a, b, q.value)) - null
    return wealth


def _log_or_nothing(tail: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the log of probabilities; -inf, which wins nothing, of those too small to have all digits."""
    with np.errstate(divide="ignore"):
        return np.where(tail < np.finfo(np.float64).tiny, -np.inf, np.log(tail))


@dataclass(frozen=True)
class Decision:
    """How a sequence of draws was decided.

    Args:
        draws: Draws that were needed.
        successes: Of them.
        certified: For each threshold, whether the probability is above it.
        lower: A lower bound of the probability.
    """

    draws: int
    successes: int
    certified: tuple[bool, ...]
    lower: float


def least_sequential_draws(q: Threshold, alpha: float, max_draws: int) -> int | None:
    """Return how many draws certify a threshold if all succeed; None if `max_draws` do not."""
    if q.complement <= 0:
        return None

    def certify(draws: int) -> bool:
        return bool(log_wealth_above(np.array([draws]), np.array([0]), q)[0] >= -math.log(alpha))

    return bisect_left(range(max_draws), True, key=lambda k: certify(k + 1)) + 1 if certify(max_draws) else None


class SequentialTest:
    """Decides for each of some thresholds whether a probability is above it, taking draws in order."""

    def __init__(self, thresholds: tuple[Threshold, ...], alpha: float, max_draws: int) -> None:
        """Begin a test.

        Args:
            thresholds: What is to be decided.
            alpha: The probability that any threshold is called certified which is not, at most; below 1/2.
            max_draws: Give up after so many draws.

        Raises:
            ValueError: `alpha` is outside (0, 1/2).
        """
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must be above 0 and below 1/2, not {alpha}")
        self._thresholds, self._max_draws = thresholds, max_draws
        self._goal = -math.log(alpha)
        self._draws = self._successes = 0
        self._certified = [False] * len(thresholds)
        self._refuted = [False] * len(thresholds)

    @property
    def is_decided(self) -> bool:
        """Whether no further draw is needed."""
        decided = (c or r for c, r in zip(self._certified, self._refuted, strict=True))
        return self._draws >= self._max_draws or all(decided)

    def add(self, outcomes: NDArray[np.bool_]) -> None:
        """Take further draws (N,), in order; those after the decision are ignored."""
        outcomes = outcomes[: self._max_draws - self._draws]
        if self.is_decided or not len(outcomes):
            return
        successes = self._successes + np.cumsum(outcomes, dtype=np.int64)
        draws = self._draws + np.arange(1, len(outcomes) + 1)
        won, lost = self._histories(successes, draws)
        undecided = ~(won | lost).all(0)
        stop = len(draws) if undecided.all() else int(np.argmin(undecided)) + 1
        self._certified = won[:, stop - 1].tolist()
        self._refuted = lost[:, stop - 1].tolist()
        self._draws, self._successes = int(draws[stop - 1]), int(successes[stop - 1])

    def _histories(self, successes: Counts, draws: Counts) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return whether each threshold is certified, and refuted or out of reach, by each draw (K, N)."""
        failures, left = draws - successes, self._max_draws - draws
        won, lost = [], []
        for q, certified, refuted in zip(self._thresholds, self._certified, self._refuted, strict=True):
            above = log_wealth_above(successes, failures, q) >= self._goal
            below = log_wealth_below(successes, failures, q) >= -math.log(_FUTILITY)
            below |= log_wealth_above(successes + left, failures, q) < self._goal  # not even if all the others succeed
            won.append(np.logical_or.accumulate(above) | certified)
            lost.append((np.logical_or.accumulate(below) | refuted) & ~won[-1])
        return np.array(won), np.array(lost)

    def decide(self) -> Decision:
        """Return the decision."""
        failures = self._draws - self._successes
        lower = _lower_bound(self._successes, failures, self._goal)
        reached = [q.value for q, c in zip(self._thresholds, self._certified, strict=True) if c]
        return Decision(self._draws, self._successes, tuple(self._certified), max([lower, *reached]))


def _lower_bound(successes: int, failures: int, goal: float) -> float:
    """Return the largest q, rounded down, whose wealth reaches the goal; 0 if there is none."""
    s, f = np.array([successes]), np.array([failures])
    low, high = 0.0, successes / (successes + failures + _SHAPE)  # above it no wealth reaches 1 / alpha
    if not successes:
        return 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        won = middle > 0 and log_wealth_above(s, f, Threshold(middle, 1 - middle))[0] >= goal
        low, high = (middle, high) if won else (low, middle)
    return low
