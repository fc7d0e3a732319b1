"""Confidence intervals at 95 %, and paired tests.

- A proportion of patches: Wilson 1927; the difference of two: Newcombe 1998.
- A mean over draws: Agresti & Coull 1998; the difference of two: Bonett & Price 2012.
- The mean of two figures: Zou & Donner 2008. The area under the ROC curve: Newcombe 2006.
- Everything else: percentile bootstrap, stratified by label.
- Paired outcomes: McNemar's exact test. Several tests: Holm 1979.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the value and its interval in percent."""
        if self.low is None or self.low != self.low:
            return f"{100 * self.value:.1f} [no interval]"
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def as_dict(self) -> dict[str, float | None]:
        """Return the fields, with None for NaN, since JSON has no NaN."""
        return {name: None if value != value else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, float | None]) -> Self:
        """Return the estimate of `as_dict`."""
        return cls(**{name: float("nan") if value is None else value for name, value in fields.items()})


def wilson(successes: int, n: int) -> Estimate:
    """Return a proportion with its Wilson interval; all NaN if n is 0."""
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    share, scale = successes / n, 2 * (n + _Z**2)  # in this order of operations, scipy's, for the same last digits
    center, half = (2 * n * share + _Z**2) / scale, _Z / scale * math.sqrt(4 * n * share * (1 - share) + _Z**2)
    return Estimate(share, center - half if successes else 0.0, center + half if successes < n else 1.0)


def mean_share(shares: NDArray[np.float64]) -> Estimate:
    """Return the mean of (N,) shares in [0, 1], one for each patch.

    If every share is 0 or 1, the interval is Wilson's. Otherwise it is Agresti and Coull's (1998), with 1.96^2 / 2
    added successes and as many added failures, and the variance of the shares.
    """
    n = len(shares)
    if np.isin(shares, (0, 1)).all():
        return wilson(int(shares.sum()), n)
    added = _Z**2 / 2
    low, high = _around(float(shares.sum()) + added, float((shares**2).sum()) + added, n + 2 * added)
    return Estimate(float(shares.mean()), max(low, 0.0), min(high, 1.0))


def _around(total: float, squares: float, n: float) -> tuple[float, float]:
    """Return the Wald interval of a mean, from the sums of n values and of their squares."""
    mean = total / n
    half = _Z * math.sqrt(max(squares / n - mean**2, 0.0) / n)
    return mean - half, mean + half


def mean_of_two(one: Estimate, other: Estimate) -> Estimate:
    """Return the mean of two independent estimates, with an interval made of theirs (Zou & Donner 2008)."""
    value = (one.value + other.value) / 2
    below = math.hypot(one.value - one.low, other.value - other.low) / 2
    above = math.hypot(one.high - one.value, other.high - other.value) / 2
    return Estimate(value, value - below, value + above)


def auroc_interval(value: float, positive: int, negative: int) -> Estimate:
    """Return an area under the ROC curve with its score interval (Newcombe 2006, method 5).

    The variance is that of Hanley and McNeil (1982) at the ends of the interval, for two samples of equal size.
    """
    from scipy.optimize import brentq  # a slow import

    half = (positive + negative) / 2 - 1

    def excess(end: float) -> float:
        within = 1 + half * (1 - end) / (2 - end) + half * end / (1 + end)
        return (end - value) ** 2 - _Z**2 * end * (1 - end) * within / (positive * negative)

    nearly = 1e-12  # at 0 and 1 the variance is 0, so that they solve the equation without being the ends
    low = 0.0 if value <= nearly else float(brentq(excess, 0.0, min(value, 1 - nearly)))
    high = 1.0 if value >= 1 - nearly else float(brentq(excess, max(value, nearly), 1.0))
    return Estimate(value, low, high)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    labels: NDArray[np.int64],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return a statistic with its percentile bootstrap interval; rows are resampled within each label.

    Where no label has two rows, there is nothing to resample, and the interval is NaN.
    So it is if the statistic of any resample is NaN.

    Args:
        statistic: Takes row numbers (N,) and returns a number.
        labels: (N,) strata.
        resamples: Number of resamples.
        seed: Fixed, so that the same rows always give the same interval.
    """
    rng = np.random.default_rng(seed)
    strata = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    value = statistic(np.arange(len(labels)))
    if len(strata) == len(labels):
        return Estimate(value, float("nan"), float("nan"))
    draws = [statistic(np.concatenate([rng.choice(s, len(s)) for s in strata])) for _ in range(resamples)]
    low, high = np.percentile(draws, (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Return the two-sided p-value of McNemar's exact test on paired outcomes (N,); 1 without discordant pairs."""
    from scipy.special import bdtr  # a slow import

    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    discordant = only_first + only_second
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), discordant, 0.5)))


def paired_difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Estimate:
    """Return mean(second) - mean(first) of paired outcomes (N,), with Newcombe's score interval (1998, method 10)."""
    n = len(first)
    a, b = int((first & second).sum()), int((first & ~second).sum())
    c, d = int((~first & second).sum()), int((~first & ~second).sum())
    one, two = wilson(a + b, n), wilson(a + c, n)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    excess = float(a * d - b * c)
    if excess > 0:  # continuity correction of the correlation
        excess = max(excess - n / 2, 0.0)
    phi = excess / math.sqrt(product) if product else 0.0
    difference = two.value - one.value

    def half(up: float, down: float) -> float:
        return math.sqrt(max(up**2 - 2 * phi * up * down + down**2, 0.0))

    low = difference - half(two.value - two.low, one.high - one.value)
    high = difference + half(two.high - two.value, one.value - one.low)
    return Estimate(difference, low, high)


def shares_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Estimate:
    """Return mean(second) - mean(first) of paired shares (N,).

    If every share is 0 or 1, the interval is Newcombe's. Otherwise it is Bonett and Price's (2012), with one added
    patch that changes each way, and the variance of the changes.
    """
    if np.isin([first, second], (0, 1)).all():
        return paired_difference(first == 1, second == 1)
    change = second - first
    low, high = _around(float(change.sum()), float((change**2).sum()) + 2, len(change) + 2)
    return Estimate(float(change.mean()), max(low, -1.0), min(high, 1.0))


def holm(p_values: list[float]) -> list[float]:
    """Return p-values adjusted for multiple testing by Holm's step-down method."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return [float(p) for p in adjusted]
