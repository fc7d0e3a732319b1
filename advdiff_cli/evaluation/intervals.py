"""Intervals and paired tests; every level is 95 %.

Wilson 1927 for one 0/1 a patch; percentile bootstrap stratified by label for the rest; exact McNemar; Holm 1979.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

RESAMPLES = 2000
_Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the figure and its interval in percent."""
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def wilson(successes: float, n: int) -> Estimate:
    """Return a proportion with its Wilson interval; NaN throughout where n is 0.

    A patch may count as a fraction, its share of draws: that varies no more than a coin of the same mean, so that the
    interval errs to the wide side.
    """
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    p = successes / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return Estimate(p, 0.0 if p == 0 else centre - half, 1.0 if p == 1 else centre + half)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    labels: NDArray[np.int64],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return a statistic of rows with its percentile bootstrap interval, rows resampled within each label.

    Args:
        statistic: Takes row numbers (N,) and returns a figure.
        labels: (N,) strata.
        resamples: Number of resamples.
        seed: Of the resampling; fixed, so that the same rows give the same interval.
    """
    rng = np.random.default_rng(seed)
    strata = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    draws = [statistic(np.concatenate([rng.choice(s, len(s)) for s in strata])) for _ in range(resamples)]
    low, high = np.percentile(draws, (2.5, 97.5))
    return Estimate(statistic(np.arange(len(labels))), float(low), float(high))


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p-value that two sets of paired outcomes (N,) differ; 1 where none is discordant."""
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def paired_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Estimate:
    """Return mean(second) - mean(first) of paired outcomes, with Newcombe's score interval (1998, method 10).

    Args:
        first: (N,) outcomes, 0 or 1, or shares of draws between them, which enter the table as fractions of a patch.
        second: (N,) of the same patches.
    """
    n = len(first)
    first, second = first.astype(float), second.astype(float)
    a, d = float(np.minimum(first, second).sum()), float((1 - np.maximum(first, second)).sum())
    b, c = float(np.maximum(first - second, 0).sum()), float(np.maximum(second - first, 0).sum())
    one, two = wilson(a + b, n), wilson(a + c, n)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    excess = a * d - b * c
    if excess > 0:  # continuity correction of the correlation
        excess = max(excess - n / 2, 0.0)
    phi = excess / math.sqrt(product) if product > 0 else 0.0
    difference = (c - b) / n

    def half(up: float, down: float) -> float:
        return math.sqrt(max(up**2 - 2 * phi * up * down + down**2, 0.0))

    low = difference - half(two.value - two.low, one.high - one.value)
    high = difference + half(two.high - two.value, one.value - one.low)
    return Estimate(difference, low, high)


def holm(p_values: list[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return [float(p) for p in adjusted]
