"""A sweep: the accuracies of a defense at several values of a setting, and the value that a rule chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.evaluation.comparison import difference_of_means
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.statistics import mean_share, shares_difference
from advdiff_cli.robustness import cost_estimate
from advdiff_cli.robustness.certified_accuracy import CertifiedAccuracy
from advdiff_cli.robustness.runner import SuiteRunner
from advdiff_cli.robustness.suite import CLEAN, SuiteRow

Over = Literal["t-star", "eps", "sampler-steps", "ddpm"]
Rule = Literal["mean", "robust", "certified"]

RULES: dict[Rule, str] = {
    "mean": "the best mean of standard and robust accuracy",
    "robust": "the least value whose robust accuracy is not significantly (paired, 95 %) below the best",
    "certified": "the best certified accuracy",
}
_AXES = {
    "t-star": "noise level t*, fraction of T",
    "eps": "attack budget eps, linf, 1/255",
    "eps-l2": "attack budget eps, l2 of a whole patch",
    "sampler-steps": "U-Net evaluations per patch",
    "ddpm": "training steps",
}


def axis_label(sweep: Mapping[str, Any]) -> str:
    """Return the label of the value axis of a sweep, given the content of sweep.json."""
    l2 = sweep["over"] == "eps" and sweep["attack"].get("norm") == "l2"
    return _AXES["eps-l2" if l2 else sweep["over"]]


@dataclass(frozen=True)
class SweepPoint:
    """One value of a sweep.

    Args:
        value: On the axis.
        name: Of the point and of its files.
        flag_value: As a flag takes it.
        runner: Attacks and judges the defense with this value.
        attack: The attacked row.
    """

    value: float
    name: str
    flag_value: str
    runner: SuiteRunner
    attack: SuiteRow


@dataclass(frozen=True)
class JudgedPoint:
    """The predictions of a point's model on clean and on attacked patches, and what is certified, if it was asked."""

    clean: Predictions
    attacked: Predictions
    certified: CertifiedAccuracy | None = None


@dataclass(frozen=True)
class Criterion:
    """How a point is chosen.

    Args:
        rule: A name in `RULES`.
        max_drop: The share of standard accuracy that a chosen point may cost at most; None for no limit.
    """

    rule: Rule = "mean"
    max_drop: float | None = None

    def parameters(self) -> JsonObject:
        """Return what enters a recipe."""
        return {"rule": self.rule, **({} if self.max_drop is None else {"max_drop": self.max_drop})}

    def describe(self) -> str:
        """Describe the criterion."""
        rule = f"{self.rule}: {RULES[self.rule]}"
        if self.max_drop is None:
            return rule
        return f"{rule}, where standard accuracy drops by {100 * self.max_drop:g} points or less"

    def choose(self, judged: Sequence[JudgedPoint], undefended: Predictions) -> int | None:
        """Return which point is chosen, the first of equal ones; points are in ascending order of value.

        None if every point costs too much, or if the rule is about certificates and nothing is certified.

        Args:
            judged: The points.
            undefended: On clean patches.
        """
        least = -np.inf if self.max_drop is None else undefended.share.mean() - self.max_drop
        allowed = [i for i, j in enumerate(judged) if j.clean.share.mean() >= least - 1e-9]
        chosen = _choose([judged[i] for i in allowed], self.rule) if allowed else None
        return None if chosen is None else allowed[chosen]


def _choose(judged: Sequence[JudgedPoint], rule: Rule) -> int | None:
    if rule == "mean":
        return _first_best([j.clean.share.mean() + j.attacked.share.mean() for j in judged])
    if rule == "certified":
        proved = [0.0 if j.certified is None else j.certified.summary()["value"] for j in judged]
        return _first_best(proved) if any(proved) else None
    best = judged[_first_best([j.attacked.share.mean() for j in judged])].attacked
    below = [shares_difference(j.attacked.share, best.share).low > 0 for j in judged]
    return below.index(False)


def _first_best(means: Sequence[float]) -> int:
    """Return where the largest mean is first; the same number of correct draws need not give the same mean."""
    return int(np.argmax(np.round(means, 9)))


def summarize_point(
    point: SweepPoint, judged: JudgedPoint, undefended: Predictions, undefended_attacked: Predictions | None
) -> JsonObject:
    """Return the cost of a point, both accuracies, and the paired difference from the undefended classifier."""
    attacked = undefended_attacked and mean_share(undefended_attacked.share).as_dict()
    return {
        "value": point.value,
        "name": point.name,
        "unet_evaluations": point.runner.model.sampler_steps,
        "standard": mean_share(judged.clean.share).as_dict(),
        "robust": mean_share(judged.attacked.share).as_dict(),
        "less_undefended": difference_of_means(undefended, judged.clean).as_dict(),
        "undefended_robust": attacked,
        **({} if judged.certified is None else {"certified": judged.certified.summary()}),
        "seconds": point.runner.seconds(CLEAN) + point.runner.seconds(point.attack),
    }


def unet_evaluations(points: Sequence[SweepPoint], undefended: SuiteRunner) -> tuple[int, int]:
    """Return the U-Net evaluations of a sweep for each patch from nothing, forward and backward.

    Points that share attacked patches attack them once.
    """
    attacked = set[str]()
    forward, backward = cost_estimate.unet_evaluations(undefended, CLEAN)
    for point in points:
        rows = [CLEAN, CLEAN if point.attack.name in attacked else point.attack]  # attacked patches are judged the same
        attacked.add(point.attack.name)
        for ahead, behind in (cost_estimate.unet_evaluations(point.runner, row) for row in rows):
            forward, backward = forward + ahead, backward + behind
    return forward, backward
