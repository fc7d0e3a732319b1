"""What a climbed ladder says: a row a rung, the worst case, the alarms."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from advdiff_cli.evaluation.comparison import difference_of_means
from advdiff_cli.evaluation.metrics import Predictions, votes
from advdiff_cli.evaluation.statistics import mean_share
from advdiff_cli.robustness.sanity_checks import NOT_TESTED, Gradients, UnitTest, alarms
from advdiff_cli.robustness.suite import Rung


def conclusions(
    rungs: Sequence[Rung], judged: Mapping[str, Predictions], eps: float,
    gradients: Gradients | None = None, tested: UnitTest | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return what is concluded from judged rungs, `clean` among them, and the checks where they were made."""
    clean = judged["clean"]
    names, hardest = worst(rungs, judged, eps)
    found = alarms(rungs, judged, gradients, tested)
    if gradients and not tested:
        found.append(NOT_TESTED)
    return {
        "n": len(clean.labels),
        "positive": int(clean.labels.sum()),
        "draws": clean.draws,
        "rungs": [row(r, judged[r.name], clean) for r in rungs],
        "worst": {"of": names, **row(replace(rungs[0], name="worst"), hardest, clean)},
        "gradients": gradients and gradients.as_dict(),
        "unit_test": tested and tested.as_dict(),
        "alarms": [a.as_dict() for a in found],
    }


def worst(rungs: Sequence[Rung], judged: Mapping[str, Predictions], eps: float) -> tuple[list[str], Predictions]:
    """Return each patch's worst rung at no more than eps, by the share of draws right, as predictions, and the rungs.

    A patch's worst is chosen on the draws that judge it, so that it errs, if at all, against the defence.
    """
    names = [
        r.name for r in rungs
        if r.name in judged and r.judged == "all" and r.settings.get("eps", 0) <= eps * (1 + 1e-9)
    ]  # fmt: skip
    shares = np.stack([judged[name].share for name in names])
    chosen = shares.argmin(0)
    p1 = np.stack([judged[name].p1 for name in names])[chosen, np.arange(shares.shape[1])]
    return names, Predictions(judged[names[0]].labels, p1)


def row(rung: Rung, found: Predictions, clean: Predictions) -> dict[str, Any]:
    """Return what the table says of a rung: accuracy, votes, and the paired difference from the clean control."""
    control = clean.take(np.arange(len(clean.labels))) if found.draws == clean.draws else Predictions(
        clean.labels, clean.p1[:, : found.draws]
    )  # fmt: skip
    return {
        "name": rung.name,
        "kind": rung.kind,
        "attack": dict(rung.settings),
        "draws": found.draws,
        "accuracy": mean_share(found.share).as_dict(),
        **{k: v.as_dict() for k, v in votes(found).items()},
        "clean": mean_share(control.share).as_dict(),
        "difference": difference_of_means(control, found).as_dict(),
    }
