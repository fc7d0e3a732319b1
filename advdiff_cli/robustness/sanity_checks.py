"""Sanity checks: signs that an attack is weak rather than a defense strong (Carlini et al. 2019, arXiv:1902.06705).

A check of two accuracies fails if the paired 95 % interval excludes zero in the wrong direction, and warns if only the
estimate is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal

from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.evaluation.comparison import difference_of_means
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.statistics import mean_share
from advdiff_cli.robustness.binarization import BinarizationResult
from advdiff_cli.robustness.certified_accuracy import BrokenCertificates
from advdiff_cli.robustness.gradient_checks import GradientFindings
from advdiff_cli.robustness.suite import EPS_CURVE, SuiteRow

Status = Literal["pass", "warn", "fail"]

_MAX_ZERO = 0.05  # the share of patches without a gradient above which attacks say nothing
_STRONGEST = ("pgd", "apgd-ce", "apgd-margin")  # the rows that stand for white-box attacks
_MIN_FOUND = 0.95  # the share of planted examples that an attack must find
_MIN_COSINE = 0.1  # of the gradients of two halves of the draws; below, more draws are worth their cost


@dataclass(frozen=True)
class SanityCheck:
    """A check, its status and the reason."""

    name: str
    status: Status
    reason: str

    def as_dict(self) -> JsonObject:
        """Return the fields."""
        return asdict(self)


NOT_TESTED = SanityCheck("the attack passes its unit test", "warn", "not tested: no example could be planted")


def not_above(
    name: str, stronger: str, weaker: str, judged: Mapping[str, Predictions], *, equal: bool = True
) -> SanityCheck | None:
    """Check that the accuracy under an attack that should be stronger is not above that under a weaker one.

    Unless `equal`, the same accuracy is a warning too, if it is above zero.
    """
    if stronger not in judged or weaker not in judged:
        return None
    d = difference_of_means(judged[weaker], judged[stronger])
    value = round(d.value, 9)  # the same number of correct draws need not give the same mean
    wrong = value > 0 or (not equal and value == 0 and judged[weaker].share.mean() > 0)
    status: Status = "fail" if d.low > 0 else "warn" if wrong else "pass"
    return SanityCheck(name, status, f"accuracy under {stronger} less under {weaker}: {d} points")


def sanity_checks(
    rows: Sequence[SuiteRow],
    judged: Mapping[str, Predictions],
    gradients: GradientFindings | None,
    tested: BinarizationResult | None,
) -> list[SanityCheck]:
    """Return every check that the judged rows allow, in a fixed order."""
    white = [name for name in _STRONGEST if name in judged]
    black = [r.name for r in rows if r.kind == "black-box" and r.name in judged]
    best = min(white, key=lambda name: judged[name].share.mean()) if white else ""
    curve = sorted((r.eps, r.name) for r in rows if r.kind == "curve" or r.name == "pgd-short")
    first_draw = {k: judged[k].first_draws(1) for k in ("fixed-noise", "pgd") if k in judged}
    found = [
        not_above("iterative beats single-step", "pgd", "fgsm", judged),
        not_above("more steps do not help the defense", "pgd", "pgd-short", judged),
        not_above("more draws do not help the defense", "pgd-short", "pgd-one-draw", judged),
        not_above("knowing the noise helps the attack", "fixed-noise", "pgd", first_draw),
        *(
            not_above("a larger eps is worse", larger, smaller, judged, equal=False)
            for (_, smaller), (_, larger) in pairwise(curve)
        ),
        *(not_above("white-box beats black-box", best, name, judged) for name in black),
        *(not_above("no attack beats exact gradients", best, name, judged) for name in ("bpda", "fab")),
        not_above("white-box beats chance", best, "random", judged, equal=False),
        _breaks_anything(f"eps-{EPS_CURVE[-1]:g}", judged),
        *(_of_gradients(gradients) if gradients else []),
        _of_unit_test(tested) if tested else None,
    ]
    return [check for check in found if check is not None]


def _breaks_anything(name: str, judged: Mapping[str, Predictions]) -> SanityCheck | None:
    if name not in judged:
        return None
    accuracy = mean_share(judged[name].share)
    status: Status = "fail" if accuracy.low > 0.5 else "warn" if accuracy.value > 0.1 else "pass"
    return SanityCheck("a huge eps breaks anything", status, f"accuracy under {name}: {accuracy} %")


def _of_gradients(g: GradientFindings) -> list[SanityCheck]:
    zero: Status = "fail" if g.zero.value > _MAX_ZERO else "warn" if g.zero.value > 0 else "pass"
    reason = f"patches whose gradient is zero or not finite: {g.zero} %"
    found = [SanityCheck("gradients are not zero", zero, reason)]
    if g.cosine is not None:
        low: Status = "fail" if g.cosine.low <= 0 else "warn" if g.cosine.value < _MIN_COSINE else "pass"
        reason = f"cosine of two halves of the draws: {g.cosine.value:.2f} [{g.cosine.low:.2f}, {g.cosine.high:.2f}]"
        found.append(SanityCheck("halves of the gradient agree", low, reason))
    reason = "outputs are in [0, 1] and sum to 1: probabilities" if g.probabilities else "outputs are logits"
    return [*found, SanityCheck("outputs are logits", "fail" if g.probabilities else "pass", reason)]


def of_certificates(broken: BrokenCertificates, alpha: float) -> SanityCheck | None:
    """Check that no attack within the radius of a certificate breaks it; None if nothing is certified."""
    if not broken.certified:
        return None
    status: Status = "fail" if not broken.is_by_chance(alpha) else "warn" if broken.broken else "pass"
    reason = f"{broken.certified} patches certified, {broken.suspects} votes under attack taken again, "
    return SanityCheck("no attack breaks a certificate", status, f"{reason}{broken.broken} patches broken")


def _of_unit_test(t: BinarizationResult) -> SanityCheck:
    status: Status = "fail" if t.broken.high < _MIN_FOUND else "warn" if t.broken.value < _MIN_FOUND else "pass"
    if t.by_chance.value > _MAX_ZERO and status == "pass":
        status = "warn"
    reason = f"planted examples that the attack found: {t.broken} %, chance {t.by_chance} %, n = {t.n}"
    return SanityCheck("the attack passes its unit test", status, reason)
