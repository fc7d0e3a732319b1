"""Paired comparisons of evaluated sets that hold the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.patch_source import RowFingerprints
from advdiff_cli.data.provenance import JsonObject, Provenance
from advdiff_cli.data.row_fingerprints import shared_rows
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.metrics import Predictions, classification_metrics, vote_accuracies
from advdiff_cli.evaluation.statistics import Estimate, holm, mcnemar, shares_difference


@dataclass(frozen=True)
class EvaluatedSet:
    """Predictions on a patch set.

    Args:
        name: Of the set.
        origins: (N, 32) the fingerprint of the patch that each row was first made from.
        index: (N,) rows in the set of these patches.
        predictions: Of the N rows.
        history: The recipes that led to the set.
    """

    name: str
    origins: RowFingerprints
    index: NDArray[np.int64]
    predictions: Predictions
    history: list[Provenance] = field(default_factory=list)

    def as_dict(self) -> JsonObject:
        """Return the set as `evaluate --json` prints it."""
        p = self.predictions
        votes = vote_accuracies(p) if p.draws > 1 else {}
        return {
            "data": self.name,
            "n": len(p.labels),
            "positive": int(p.labels.sum()),
            "draws": p.draws,
            **{k: v.as_dict() for k, v in {**classification_metrics(p), **votes}.items()},
            "history": self.history,
        }


def compare(*groups: Sequence[EvaluatedSet]) -> list[JsonObject]:
    """Compare the accuracy of each pair of sets within a group, on the rows that both hold, if there are any.

    Each comparison has the difference (second - first) with its interval, the p-value of McNemar's exact test, and the
    p-value adjusted by Holm's method over all pairs of all groups. Over several draws, the difference is that of the
    means over draws, and the test is on majority votes.

    Raises:
        AdvdiffError: Two sets label a row differently.
    """
    found = []
    for first, second in (pair for sets in groups for pair in combinations(sets, 2)):
        a, b = shared_rows((first.origins, first.index), (second.origins, second.index))
        if len(a):
            found.append(_compare_pair(first, second, a, b))
    for row, adjusted in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = adjusted
    return found


def difference_of_means(first: Predictions, second: Predictions) -> Estimate:
    """Return mean(second) - mean(first) over draws of paired patches, with its interval."""
    return shares_difference(first.share, second.share)


def _compare_pair(first: EvaluatedSet, second: EvaluatedSet, a: NDArray[np.int64], b: NDArray[np.int64]) -> JsonObject:
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
