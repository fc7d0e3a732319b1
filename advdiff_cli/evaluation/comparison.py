"""Paired comparisons between evaluated sets that hold the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.metrics import Predictions, figures, votes
from advdiff_cli.evaluation.statistics import Estimate, holm, mcnemar, shares_difference


@dataclass(frozen=True)
class Evaluated:
    """Predictions on a set, with what its rows are called: origin and index."""

    name: str
    origin: str
    index: NDArray[np.int64]
    predictions: Predictions
    history: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return n, the count of each label, every figure with its interval, votes, and how the set was made."""
        labels = self.predictions.labels
        return {
            "data": self.name,
            "n": len(labels),
            "positive": int(labels.sum()),
            "draws": self.predictions.draws,
            **{k: v.as_dict() for k, v in figures(self.predictions).items()},
            **({k: v.as_dict() for k, v in votes(self.predictions).items()} if self.predictions.draws > 1 else {}),
            "history": self.history,
        }


def compare(*groups: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Return a paired comparison of accuracy for each pair of sets of one group and origin, on the rows both hold.

    Each has the difference (second - first) with its interval, McNemar's exact p, and p Holm-adjusted over all pairs
    of all groups. Over several draws the difference is of the means over draws, and McNemar's test is of the majority
    votes.

    Raises:
        AdvdiffError: two sets label a row differently.
    """
    found = []
    for first, second in (pair for sets in groups for pair in combinations(sets, 2)):
        if first.origin != second.origin:
            continue
        _, a, b = np.intersect1d(first.index, second.index, return_indices=True)
        if len(a):
            found.append(_paired(first, second, a, b))
    for row, adjusted in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = adjusted
    return found


def difference_of_means(first: Predictions, second: Predictions) -> Estimate:
    """Return mean(second) - mean(first) over draws of paired patches, with its interval."""
    return shares_difference(first.share, second.share)


def _paired(first: Evaluated, second: Evaluated, a: NDArray[np.int64], b: NDArray[np.int64]) -> dict[str, Any]:
    one, other = first.predictions.take(a), second.predictions.take(b)
    if not np.array_equal(one.labels, other.labels):
        raise AdvdiffError(f"{first.name} and {second.name} label the same rows differently")
    before, after = one.largest_vote, other.largest_vote
    return {
        "first": first.name,
        "second": second.name,
        "n": len(a),
        "difference": difference_of_means(one, other).as_dict(),
        "only_first_right": int((before & ~after).sum()),
        "only_second_right": int((~before & after).sum()),
        "p": mcnemar(before, after),
    }
