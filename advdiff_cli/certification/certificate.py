"""The certificate of a patch: the class that draws choose, and the radius that further draws prove."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.certification.bounds import certified_radius, clopper_pearson, threshold
from advdiff_cli.certification.confidence_sequence import SequentialTest


@dataclass(frozen=True)
class Procedure:
    """How a patch is certified.

    Args:
        n0: Draws that choose the class.
        n: Draws that bound its probability; at most, if there are `targets`.
        alpha: The probability that a certificate of a patch is wrong, at most.
        targets: l2 radii to be decided together, by as few draws as that takes; None for exactly n draws.
    """

    n0: int
    n: int
    alpha: float
    targets: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Certificate:
    """What is proved about a patch.

    Args:
        decision: The class, 0 or 1.
        radius: No perturbation of at most this l2 length changes the decision of the vote over infinitely many draws.
        abstain: Whether not even the decision on the patch itself is proved.
        draws: Draws in all, those that chose the class included.
        successes: Of the other draws, those for the class.
    """

    decision: int
    radius: float
    abstain: bool
    draws: int
    successes: int


class Certifier:
    """Certifies one patch, given the decisions of draw after draw."""

    def __init__(self, procedure: Procedure, sigma: float, distance: float = 0.0) -> None:
        """Begin a certificate.

        Args:
            procedure: How.
            sigma: Standard deviation of the noise in pixels of the patch, rounded down.
            distance: As for `threshold`.
        """
        self._how, self._sigma, self._distance = procedure, sigma, distance
        self._seen = self._ones = 0  # of the draws that choose
        self._draws = self._successes = 0
        targets = procedure.targets or ()
        levels = tuple(threshold(r, sigma, distance=distance) for r in targets)
        sequential = procedure.targets is not None
        self._test = SequentialTest(levels, procedure.alpha, procedure.n) if sequential else None

    @property
    def is_decided(self) -> bool:
        """Whether no further draw is needed."""
        if self._seen < self._how.n0:
            return False
        return self._draws == self._how.n if self._test is None else self._test.is_decided

    @property
    def decision(self) -> int:
        """The class of the majority of the first n0 draws."""
        return int(2 * self._ones > self._how.n0)

    def add(self, votes: NDArray[np.bool_]) -> None:
        """Take further draws (N,), whether each decides for class 1; those after the decision are ignored."""
        choosing = votes[: self._how.n0 - self._seen]
        self._seen += len(choosing)
        self._ones += int(choosing.sum())
        outcomes = (votes[len(choosing) :] == (self.decision == 1))[: self._how.n - self._draws]
        if self._test is not None:
            self._test.add(outcomes)
            return
        self._draws += len(outcomes)
        self._successes += int(outcomes.sum())

    def certify(self) -> Certificate:
        """Return the certificate."""
        how = self._how
        if self._test is None:
            lower = clopper_pearson(self._successes, self._draws, how.alpha)
            return self._certificate(lower, [], self._draws, self._successes)
        found = self._test.decide()
        reached = [r for r, certified in zip(how.targets or (), found.certified, strict=True) if certified]
        return self._certificate(found.lower, reached, found.draws, found.successes)

    def _certificate(self, lower: float, reached: Sequence[float], draws: int, successes: int) -> Certificate:
        radius = max([certified_radius(lower, self._sigma, distance=self._distance), *reached])
        abstain = lower - self._distance <= 0.5 and not reached
        return Certificate(self.decision, radius, abstain, self._seen + draws, successes)
