"""Radii of randomized smoothing, and bounds on the probability of a class.

The vote over draws of x + sigma n is constant within the l2 radius

    r = sigma Phi^-1(p)                                          Cohen, Rosenfeld & Kolter 2019, theorem 1

of x, where p is the probability of the winning class; for two classes the bound is exact. A lower bound of p gives a
lower bound of r. Everything is rounded so that a radius is never too large.
"""

import math
from dataclasses import dataclass

from scipy.special import betaincinv, ndtr, ndtri

_ROUNDING = 1e-10  # relative, and 1e-12 absolute; special functions in float64 are accurate to about 1e-13
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Threshold:
    """The probability of a class at which a radius is certified.

    Args:
        value: The probability q, in [0.5, 1].
        complement: 1 - q, which is accurate where q is near 1.
    """

    value: float
    complement: float


def threshold(radius: float, sigma: float, *, distance: float = 0.0) -> Threshold:
    """Return the probability of the winning class above which `radius` is certified.

    Args:
        radius: In l2, at least 0.
        sigma: Standard deviation of the noise, in the units of `radius`.
        distance: Twice the total variation between the noise that is drawn and a normal distribution: once for the
            draws that are counted, and once for those on the perturbed patch.
    """
    z = radius / sigma * (1 + _ROUNDING) + _SMALLEST
    return Threshold(min(float(ndtr(z)) + distance, 1.0), max(float(ndtr(-z)) - distance, 0.0))


def certified_radius(probability: float, sigma: float, *, distance: float = 0.0) -> float:
    """Return the l2 radius that a lower bound of the winning class's probability certifies; 0 at 0.5 or below.

    Args:
        probability: The lower bound.
        sigma: Standard deviation of the noise.
        distance: As for `threshold`.
    """
    bound = probability - distance
    if bound <= 0.5:
        return 0.0
    return max(0.0, sigma * (float(ndtri(bound)) * (1 - _ROUNDING) - _SMALLEST))


def linf_as_l2(eps: float, dimension: int) -> float:
    """Return the radius of the l2 ball that holds the l-inf ball of radius `eps` in `dimension` values."""
    return eps * math.sqrt(dimension)


def clopper_pearson(successes: int, n: int, alpha: float) -> float:
    """Return the one-sided lower bound of a probability at confidence 1 - alpha (Clopper & Pearson 1934)."""
    return float(betaincinv(successes, n - successes + 1, alpha)) if successes else 0.0


def least_fixed_draws(radius: float, sigma: float, alpha: float) -> int:
    """Return the least n whose draws, all for one class, certify `radius` by Clopper-Pearson: q^n <= alpha.

    Raises:
        ValueError: No number of draws does, in float64.
    """
    complement = threshold(radius, sigma).complement
    if complement == 0:
        raise ValueError(f"radius {radius} is too many standard deviations {sigma}")
    return max(1, math.ceil(math.log(alpha) / math.log1p(-complement)))


def round_down(value: float, digits: int) -> float:
    """Return the largest number of so many decimal digits that is not above `value`."""
    scale = 10.0**digits
    rounded: float = math.floor(value * scale) / scale
    return rounded if rounded <= value else rounded - 1 / scale
