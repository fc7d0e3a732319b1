"""A sweep: standard and robust accuracy of a defence at one setting after another, and the one a rule chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from advdiff_cli.evaluation.comparison import difference_of_means
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.statistics import mean_share, shares_difference
from advdiff_cli.robustness.runner import Climb
from advdiff_cli.robustness.suite import Rung

Rule = Literal["mean", "robust"]

RULES: dict[Rule, str] = {
    "mean": "the best mean of standard and robust accuracy",
    "robust": "the least value whose robust accuracy is not significantly (paired, 95 %) below the best",
}
_AXES = {
    "t-star": "noise level t*, fraction of T",
    "eps": "attack budget eps, linf, 1/255",
    "eps-l2": "attack budget eps, l2 of a whole patch",
    "sampler-steps": "U-Net evaluations a patch",
    "ddpm": "training steps",
}
CLEAN = Rung("clean", "control")


def axis(sweep: Mapping[str, Any]) -> str:
    """Return what the values of a sweep, as sweep.json holds it, are."""
    l2 = sweep["over"] == "eps" and sweep["attack"].get("norm") == "l2"
    return _AXES["eps-l2" if l2 else sweep["over"]]


@dataclass(frozen=True)
class Point:
    """One setting of a sweep: its value, what it is called, what a flag takes, and how it is attacked and judged."""

    value: float
    name: str
    told: str
    climb: Climb
    attack: Rung


@dataclass(frozen=True)
class Judged:
    """The predictions of a point's model on clean and on attacked patches."""

    clean: Predictions
    attacked: Predictions


def choose(judged: Sequence[Judged], rule: Rule) -> int:
    """Return which point the rule chooses; points are in ascending order of value, and the first of equals is taken."""
    if rule == "mean":
        return int(np.argmax([j.clean.share.mean() + j.attacked.share.mean() for j in judged]))
    best = judged[int(np.argmax([j.attacked.share.mean() for j in judged]))].attacked
    behind = [shares_difference(j.attacked.share, best.share).low > 0 for j in judged]
    return behind.index(False)


def row(
    point: Point, judged: Judged, undefended: Predictions, undefended_attacked: Predictions | None
) -> dict[str, Any]:  # fmt: skip
    """Return what is told of a point: its cost, both accuracies, and the paired difference from no defence."""
    attacked = undefended_attacked and mean_share(undefended_attacked.share).as_dict()
    return {
        "value": point.value,
        "name": point.name,
        "unet_evaluations": point.climb.subject.sampler_steps,
        "standard": mean_share(judged.clean.share).as_dict(),
        "robust": mean_share(judged.attacked.share).as_dict(),
        "less_undefended": difference_of_means(undefended, judged.clean).as_dict(),
        "undefended_robust": attacked,
        "seconds": point.climb.seconds(CLEAN) + point.climb.seconds(point.attack),
    }


def planned_seconds(points: Sequence[Point], bare: Climb, *, blind: bool) -> float:
    """Return what a sweep that has nothing yet takes: patches that points share are attacked once."""
    costs, done = bare.costs([CLEAN]), set[str]()
    for point in points:
        both = point.climb.costs([CLEAN, point.attack])
        if point.attack.name in done:
            both[1:] = point.climb.costs([CLEAN])  # judged as the clean ones are
        costs += both + (bare.costs([CLEAN]) if blind else [])
        done.add(point.attack.name)
    return float(sum(c["seconds"] for c in costs))
