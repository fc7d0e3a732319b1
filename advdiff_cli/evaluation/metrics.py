"""What a classifier makes of a patch set: predictions a patch and a draw, and the figures derived from them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from advdiff_cli.data.patches import PatchSet
from advdiff_cli.evaluation.statistics import Estimate, area, mean_of_two, mean_share, wilson
from advdiff_cli.jobs.memory import batches_that_fit
from advdiff_cli.models.device import onto, spread
from advdiff_cli.models.external import TwoLogits
from advdiff_cli.purification.defended_classifier import DefendedClassifier, finite, judged_at_once

VOTES = (1, 5, 11, 21)  # draws a majority vote is taken over: odd, there are two classes


@dataclass(frozen=True)
class Predictions:
    """The probability of class 1 for each patch under each draw of the defence's noise (N, R), beside its label.

    A deterministic model has one draw; p1 may then be (N,).
    """

    labels: NDArray[np.int64]
    p1: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Make p1 (N, R)."""
        if self.p1.ndim == 1:
            object.__setattr__(self, "p1", self.p1[:, None])

    @property
    def draws(self) -> int:
        """R, the number of draws."""
        return int(self.p1.shape[1])

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each prediction is right (N, R)."""
        right: NDArray[np.bool_] = np.equal(self.p1 > 0.5, self.labels[:, None] == 1)
        return right

    @property
    def share(self) -> NDArray[np.float64]:
        """The share of its draws under which each patch is right (N,)."""
        share: NDArray[np.float64] = self.correct.mean(1)
        return share

    def vote(self, k: int) -> NDArray[np.bool_]:
        """Whether the majority of the first k draws, k odd, is right (N,)."""
        right: NDArray[np.bool_] = self.correct[:, :k].sum(1) * 2 > k
        return right

    @property
    def largest_vote(self) -> NDArray[np.bool_]:
        """Whether the majority of the draws is right (N,), of all but the last where their number is even."""
        return self.vote(self.draws - 1 + self.draws % 2)

    @property
    def decision(self) -> NDArray[np.bool_]:
        """Whether the majority of the draws says class 1 (N,), of all but the last where their number is even."""
        says: NDArray[np.bool_] = np.equal(self.largest_vote, self.labels == 1)
        return says

    def take(self, rows: NDArray[np.int64]) -> "Predictions":
        """Return the predictions of some rows."""
        return Predictions(self.labels[rows], self.p1[rows])


def predict(
    model: nn.Module, patches: PatchSet, device: torch.device, *,
    draws: int = 1, seed: int = 0, first_draw: int = 0,
) -> Iterator[NDArray[np.float64]]:  # fmt: skip
    """Yield p1 (B, R) of one batch of `patches` after another.

    Args:
        model: A classifier (R = 1), or a `DefendedClassifier`.
        patches: What is judged.
        device: Where to compute.
        draws: R, draws of the defence's noise, from the evaluation streams of `seed`, which no attack sees; a row's are
            named by its index in the origin set.
        seed: Of those streams.
        first_draw: The first of the R draws.

    Raises:
        AdvdiffError: a logit is not finite.
    """
    size, n = judged_at_once(model), len(patches)
    batches = (np.minimum(np.arange(s, s + size), n - 1) for s in range(0, n, size))  # full: rows do not depend on N

    def read(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        return rows, onto(patches.read(rows), device)

    @torch.inference_mode()
    def judged(one: tuple[NDArray[np.int64], Tensor]) -> NDArray[np.float64]:
        rows, images = one
        if isinstance(model, DefendedClassifier):
            keys = patches.index[rows].tolist()  # what every set made from these rows carries along
            logits = []
            for draw in range(first_draw, first_draw + draws):
                noise = model.noise(images, rows=keys, seed=seed, purpose="evaluate", draw=draw)
                logits.append(model(images, noise))
        else:
            logits = [model(images)]
        where = [patches.keys[i] for i in rows]
        p1 = torch.stack([finite(z, where, patches.path).cpu().double().softmax(1)[:, 1] for z in logits], 1)
        return p1[: n - int(rows[0])].numpy()

    stateful = any(isinstance(m, TwoLogits) for m in model.modules())  # as modules of others may be
    at_once = 0 if stateful else batches_that_fit(model, *patches.require_shape(), size, device)
    yield from spread(read, judged, batches, at_once)


def auroc(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """Return the area under the ROC curve, ties counted half (Mann-Whitney); NaN where a class is missing."""
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[labels == 1].sum() - positive * (positive + 1) / 2) / (positive * negative))


def figures(p: Predictions) -> dict[str, Estimate]:
    """Return accuracy, balanced accuracy, sensitivity, specificity and AUROC, each with its interval.

    Over several draws each but AUROC is the mean over draws; AUROC is of the mean probability.
    """
    classes = [np.flatnonzero(p.labels == k) for k in (0, 1)]
    both = all(len(rows) for rows in classes)
    missing = Estimate(float("nan"), float("nan"), float("nan"))
    specificity, sensitivity = (mean_share(p.share[rows]) for rows in classes)
    return {
        "accuracy": mean_share(p.share),
        "balanced_accuracy": mean_of_two(specificity, sensitivity) if both else missing,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "auroc": area(auroc(p.labels, p.p1.mean(1)), len(classes[1]), len(classes[0])) if both else missing,
    }


def votes(p: Predictions) -> dict[str, Estimate]:
    """Return the accuracy of majority votes over the first 1, 5, 11, 21 draws, and of all draws being right."""
    found = {f"vote_{k}": p.vote(k) for k in VOTES if k <= p.draws}
    found["all_correct"] = p.share == 1
    return {name: wilson(int(right.sum()), len(right)) for name, right in found.items()}
