"""What a classifier makes of a patch set: predictions a patch, and the figures derived from them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import nn

from advdiff_cli.data.patches import PatchSet
from advdiff_cli.evaluation.intervals import Estimate, bootstrap, wilson

BATCH = 64


@dataclass(frozen=True)
class Predictions:
    """The probability of class 1 for each patch (N,), beside its label."""

    labels: NDArray[np.int64]
    p1: NDArray[np.float64]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The predicted classes (N,)."""
        return (self.p1 > 0.5).astype(np.int64)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each prediction is right (N,)."""
        return np.equal(self.predicted, self.labels)

    def take(self, rows: NDArray[np.int64]) -> "Predictions":
        """Return the predictions of some rows."""
        return Predictions(self.labels[rows], self.p1[rows])


@torch.inference_mode()
def predict(model: nn.Module, patches: PatchSet, device: torch.device) -> Iterator[NDArray[np.float64]]:
    """Yield p1 of one batch of `patches` after another, in fp32."""
    for start in range(0, len(patches), BATCH):
        stop = min(start + BATCH, len(patches))
        rows = np.minimum(np.arange(start, start + BATCH), stop - 1)  # the full batch shape: rows do not depend on N
        logits = model(patches.read(rows).to(device)).cpu().double()
        yield logits.softmax(1)[: stop - start, 1].numpy()


def auroc(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """Return the area under the ROC curve, ties counted half (Mann-Whitney); NaN where a class is missing."""
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[labels == 1].sum() - positive * (positive + 1) / 2) / (positive * negative))


def figures(p: Predictions) -> dict[str, Estimate]:
    """Return accuracy, balanced accuracy, sensitivity, specificity and AUROC, each with its interval."""
    hit = {k: (int((p.correct & (p.labels == k)).sum()), int((p.labels == k).sum())) for k in (0, 1)}
    sensitivity, specificity = wilson(*hit[1]), wilson(*hit[0])
    both = bool(hit[0][1] and hit[1][1])
    missing = Estimate(float("nan"), float("nan"), float("nan"))
    return {
        "accuracy": wilson(int(p.correct.sum()), len(p.labels)),
        "balanced_accuracy": bootstrap(lambda rows: _balanced(p.take(rows)), p.labels) if both else missing,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "auroc": bootstrap(lambda rows: auroc(p.labels[rows], p.p1[rows]), p.labels) if both else missing,
    }


def _balanced(p: Predictions) -> float:
    return float(np.mean([p.correct[p.labels == k].mean() for k in (0, 1)]))
