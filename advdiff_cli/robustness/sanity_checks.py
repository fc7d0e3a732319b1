"""Alarms: signs that an attack is weak rather than a defence strong (Carlini et al. 2019, arXiv:1902.06705).

An alarm about two figures fails when the paired 95 % interval excludes zero in the wrong direction, and warns when only
the point estimate is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Self

from advdiff_cli.evaluation.comparison import difference_of_means
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.statistics import Estimate, mean_share
from advdiff_cli.robustness.suite import EPS_CURVE, Rung

Status = Literal["pass", "warn", "fail"]

_MASKED = 0.05  # the share of patches without a gradient above which an attack on it says nothing
_STRONGEST = ("pgd", "apgd-ce", "apgd-margin")  # the rungs that white-box attacks are judged by
_PASSED = 0.95  # the share of examples known to exist that an attack must find
_AGREEING = 0.1  # the cosine of two halves of a gradient below which more draws are worth their price


@dataclass(frozen=True)
class Alarm:
    """One check, what came of it and why."""

    name: str
    status: Status
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


@dataclass(frozen=True)
class Gradients:
    """What the gradients at clean patches look like.

    `zero` is the share that is zero or not finite, `cosine` how far two halves of the draws agree.
    """

    zero: Estimate
    cosine: Estimate | None
    probabilities: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Return what `as_dict` gave the fields of."""
        cosine = fields["cosine"]
        return cls(Estimate(**fields["zero"]), cosine and Estimate(**cosine), fields["probabilities"])


@dataclass(frozen=True)
class UnitTest:
    """Patches n that have an example which exists, and the shares of them that the attack and chance break."""

    n: int
    broken: Estimate
    by_chance: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Return what `as_dict` gave the fields of."""
        return cls(fields["n"], Estimate(**fields["broken"]), Estimate(**fields["by_chance"]))


NOT_TESTED = Alarm("the attack passes its unit test", "warn", "not tested: no example could be planted")


def not_above(
    name: str, stronger: str, weaker: str, judged: Mapping[str, Predictions], *, equal: bool = True
) -> Alarm | None:
    """Compare the accuracy under what should be the stronger attack with that under the weaker one.

    Unless `equal`, the same accuracy is a warning too where there was any to lose.
    """
    if stronger not in judged or weaker not in judged:
        return None
    d = difference_of_means(judged[weaker], judged[stronger])
    wrong = d.value > 0 or (not equal and d.value == 0 and judged[weaker].share.mean() > 0)
    status: Status = "fail" if d.low > 0 else "warn" if wrong else "pass"
    return Alarm(name, status, f"accuracy under {stronger} less under {weaker}: {d} points")


def alarms(
    rungs: Sequence[Rung], judged: Mapping[str, Predictions], gradients: Gradients | None, tested: UnitTest | None
) -> list[Alarm]:
    """Return every alarm that the judged rungs allow, in a fixed order."""
    white = [name for name in _STRONGEST if name in judged]
    black = [r.name for r in rungs if r.kind == "black-box" and r.name in judged]
    best = min(white, key=lambda name: judged[name].share.mean()) if white else ""
    curve = sorted((r.settings["eps"], r.name) for r in rungs if r.kind == "curve" or r.name == "pgd-short")
    found = [
        not_above("iterative beats single-step", "pgd", "fgsm", judged),
        not_above("more steps do not help the defence", "pgd", "pgd-short", judged),
        not_above("more draws do not help the defence", "pgd-short", "pgd-one-draw", judged),
        not_above(
            "knowing the noise helps the attack", "fixed-noise", "pgd", _first_draw(judged, "fixed-noise", "pgd")
        ),
        *(
            not_above("a larger eps is worse", more, less, judged, equal=False)
            for (_, less), (_, more) in pairwise(curve)
        ),
        *(not_above("white-box beats black-box", best, name, judged) for name in black),
        *(not_above("no attack beats exact gradients", best, name, judged) for name in ("bpda", "fab")),
        not_above("white-box beats chance", best, "random", judged, equal=False),
        _breaks(f"eps-{EPS_CURVE[-1]:g}", judged),
        *(_of_gradients(gradients) if gradients else []),
        _of_test(tested) if tested else None,
    ]
    return [a for a in found if a is not None]


def _first_draw(judged: Mapping[str, Predictions], *names: str) -> dict[str, Predictions]:
    return {k: Predictions(judged[k].labels, judged[k].p1[:, 0]) for k in names if k in judged}


def _breaks(name: str, judged: Mapping[str, Predictions]) -> Alarm | None:
    if name not in judged:
        return None
    accuracy = mean_share(judged[name].share)
    status: Status = "fail" if accuracy.low > 0.5 else "warn" if accuracy.value > 0.1 else "pass"
    return Alarm("a huge eps breaks anything", status, f"accuracy under {name}: {accuracy} %")


def _of_gradients(g: Gradients) -> list[Alarm]:
    zero: Status = "fail" if g.zero.value > _MASKED else "warn" if g.zero.value > 0 else "pass"
    found = [Alarm("gradients lead somewhere", zero, f"patches whose gradient is zero or not finite: {g.zero} %")]
    if g.cosine is not None:
        low: Status = "fail" if g.cosine.low <= 0 else "warn" if g.cosine.value < _AGREEING else "pass"
        text = f"cosine of two halves of the draws: {g.cosine.value:.2f} [{g.cosine.low:.2f}, {g.cosine.high:.2f}]"
        found.append(Alarm("halves of the gradient agree", low, text))
    logits = "rows of outputs lie in [0, 1] and sum to 1: probabilities" if g.probabilities else "outputs are logits"
    return [*found, Alarm("outputs are logits", "fail" if g.probabilities else "pass", logits)]


def _of_test(t: UnitTest) -> Alarm:
    status: Status = "fail" if t.broken.high < _PASSED else "warn" if t.broken.value < _PASSED else "pass"
    if t.by_chance.value > _MASKED and status == "pass":
        status = "warn"
    text = f"examples known to exist that the attack found: {t.broken} %, chance {t.by_chance} %, n = {t.n}"
    return Alarm("the attack passes its unit test", status, text)
