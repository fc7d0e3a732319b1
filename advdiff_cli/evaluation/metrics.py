"""Predictions over draws of a defense's noise, and the metrics derived from them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.evaluation.statistics import Estimate, auroc_interval, mean_of_two, mean_share, wilson
from advdiff_cli.evaluation.votes import Votes

VOTES = (1, 5, 11, 21)
"""Numbers of draws in a majority vote; odd, since there are two classes."""


@dataclass(frozen=True)
class Predictions:
    """Labels (N,) and the probability p1 of class 1 for each patch under each draw of the noise (N, R).

    A deterministic model has one draw; p1 may then be (N,).
    """

    labels: NDArray[np.int64]
    p1: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Reshape p1 to (N, R)."""
        if self.p1.ndim == 1:
            object.__setattr__(self, "p1", self.p1[:, None])

    @property
    def draws(self) -> int:
        """R, the number of draws."""
        return int(self.p1.shape[1])

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each prediction is correct (N, R)."""
        correct: NDArray[np.bool_] = np.equal(self.p1 > 0.5, self.labels[:, None] == 1)
        return correct

    @property
    def share(self) -> NDArray[np.float64]:
        """The share of draws under which each patch is correct (N,)."""
        share: NDArray[np.float64] = self.correct.mean(1)
        return share

    def vote(self, k: int) -> NDArray[np.bool_]:
        """Return whether the majority of the first k draws is correct (N,); k is odd."""
        correct: NDArray[np.bool_] = self.correct[:, :k].sum(1) * 2 > k
        return correct

    @property
    def largest_vote(self) -> NDArray[np.bool_]:
        """Whether the decision is correct (N,)."""
        correct: NDArray[np.bool_] = np.equal(self.decision, self.labels == 1)
        return correct

    @property
    def decision(self) -> NDArray[np.bool_]:
        """Whether the decision of all draws is class 1 (N,), as `Votes` tells it."""
        ones: NDArray[np.bool_] = np.equal(Votes(self.p1).decision, 1)
        return ones

    def take(self, rows: NDArray[np.int64]) -> "Predictions":
        """Return the predictions of some rows."""
        return Predictions(self.labels[rows], self.p1[rows])

    def first_draws(self, n: int) -> "Predictions":
        """Return the predictions under the first n draws."""
        return Predictions(self.labels, self.p1[:, :n])


def auroc(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """Return the area under the ROC curve, with ties counted half (Mann-Whitney U); NaN if a class is missing."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        return float("nan")
    below, not_above = (np.searchsorted(np.sort(negative), positive, side) for side in ("left", "right"))
    return float((below.sum() + not_above.sum()) / (2 * len(positive) * len(negative)))


def classification_metrics(p: Predictions) -> dict[str, Estimate]:
    """Return accuracy, balanced accuracy, sensitivity, specificity and AUROC, each with its interval.

    Over several draws, AUROC is that of the mean probability, and every other metric is the mean over draws.
    """
    classes = [np.flatnonzero(p.labels == k) for k in (0, 1)]
    both = all(len(rows) for rows in classes)
    missing = Estimate(float("nan"), float("nan"), float("nan"))
    specificity, sensitivity = (mean_share(p.share[rows]) for rows in classes)
    area = auroc(p.labels, p.p1.mean(1))
    return {
        "accuracy": mean_share(p.share),
        "balanced_accuracy": mean_of_two(specificity, sensitivity) if both else missing,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "auroc": auroc_interval(area, len(classes[1]), len(classes[0])) if both else missing,
    }


def vote_accuracies(p: Predictions) -> dict[str, Estimate]:
    """Return the accuracy of majority votes over the first 1, 5, 11, 21 draws, and the share correct in all draws."""
    correct = {f"vote_{k}": p.vote(k) for k in VOTES if k <= p.draws}
    correct["all_correct"] = p.share == 1
    return {name: wilson(int(c.sum()), len(c)) for name, c in correct.items()}
