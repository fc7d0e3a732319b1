"""The worst case of a suite: for each patch, the attack that it survives least often."""

from collections.abc import Mapping, Sequence

import numpy as np

from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.robustness.suite import SuiteRow


def worst_case(
    rows: Sequence[SuiteRow], judged: Mapping[str, Predictions], eps: float
) -> tuple[list[str], Predictions]:
    """Return the names of the rows with at most `eps`, and the predictions under each patch's worst of them.

    The worst row has the smallest share of correct draws. It is chosen on the draws that judge it, which is a bias
    against a defense with noise: the larger, the more rows there are and the fewer draws.
    """
    limit = eps * (1 + 1e-9)
    names = [r.name for r in rows if r.name in judged and r.judged_on == "all" and r.eps <= limit]
    shares = np.stack([judged[name].share for name in names])
    chosen = shares.argmin(0)
    p1 = np.stack([judged[name].p1 for name in names])[chosen, np.arange(shares.shape[1])]
    return names, Predictions(judged[names[0]].labels, p1)
