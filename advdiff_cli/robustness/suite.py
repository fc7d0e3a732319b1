"""The suite of attacks: from controls and attacks that do not know the defense to attacks that know all of it."""

from dataclasses import dataclass
from typing import Literal

from advdiff_cli.attacks.spec import NO_REQUEST, AttackRequest, AttackSpec, Method, fab_is_installed, resolve

Kind = Literal["control", "black-box", "white-box", "curve", "check"]
Against = Literal["defense", "noise", "nothing"]

EPS_CURVE = (0.5, 1.0, 4.0, 8.0, 64.0)
"""Multiples of 1/255 beside the main eps; the last one should break any model."""


@dataclass(frozen=True)
class Budget:
    """What the attacks of a suite may spend.

    Args:
        patches: Patches that are attacked.
        steps: Attack iterations.
        eot: Draws that each gradient averages.
        queries: Proposals of Square.
        draws: Draws on which every attack is judged.
        certify_draws: Draws that bound the vote of a patch, at most, where it is certified.
    """

    patches: int
    steps: int
    eot: int
    queries: int
    draws: int
    certify_draws: int = 0


PRESETS = {
    "quick": Budget(64, 10, 2, 100, 5, 500),
    "standard": Budget(256, 50, 8, 500, 11, 2000),
    "strong": Budget(512, 100, 16, 5000, 21, 20_000),
}


@dataclass(frozen=True)
class SuiteRow:
    """One row of a suite: a control, an attack or a check.

    Args:
        name: Of the row and of its files.
        kind: What the row is for.
        attack: None for the clean control.
        against: What the attack is made against: the defense; `noise`, NoiseDefense, whose examples are transferred;
            or `nothing`, the classifier alone, which gives the same examples for every defense.
        judged_on: All judging draws, or the first one, which the attack knows.
    """

    name: str
    kind: Kind
    attack: AttackSpec | None = None
    against: Against = "defense"
    judged_on: Literal["all", "first"] = "all"

    @property
    def eps(self) -> float:
        """The radius of the attack's ball in [0, 1] pixels; 0 without an attack."""
        return 0.0 if self.attack is None else self.attack.eps


CLEAN = SuiteRow("clean", "control")


def build_suite(budget: Budget, eps: float, *, defended: bool, transfer: bool = True) -> list[SuiteRow]:
    """Return the rows of the suite, for the l-inf norm.

    Args:
        budget: What attacks may spend.
        eps: Radius of the ball in [0, 1] pixels.
        defended: Whether there is a defense; its noise and its gradient have rows of their own.
        transfer: Whether the defense is not NoiseDefense itself, so that examples can be transferred from it.
    """
    steps, queries = budget.steps, budget.queries
    short = min(steps, max(steps // 4, 8))  # eight steps of eps / 4 reach any point of the ball

    def spec(method: Method, asked: AttackRequest = NO_REQUEST, at: float = eps) -> AttackSpec:
        return resolve(method, "linf", at, asked, defended=defended)

    def through(steps: int | None, loss: Literal["margin"] | None = None) -> AttackRequest:
        exact = {"gradient": "full", "eot": budget.eot} if defended else {}
        return AttackRequest(steps=steps, loss=loss, **exact)  # type: ignore[arg-type]

    square = AttackRequest(queries=queries, eot=max(budget.eot // 4, 1) if defended else None)  # two points a query
    rows = [CLEAN, SuiteRow("random", "control", spec("random"))]
    if defended:
        blind = AttackRequest(steps=max(steps, 40), gradient="blind")
        bpda = AttackRequest(steps=steps, gradient="bpda", eot=budget.eot)
        rows += [SuiteRow("blind", "black-box", spec("pgd", blind)), SuiteRow("bpda", "white-box", spec("pgd", bpda))]
    if defended and transfer:
        rows.append(SuiteRow("transfer", "black-box", spec("apgd", through(steps)), against="noise"))
    rows += [
        SuiteRow("square", "black-box", spec("square", square)),
        SuiteRow("fgsm", "white-box", spec("fgsm", through(None))),
        SuiteRow("pgd-short", "white-box", spec("pgd", through(short))),
        SuiteRow("pgd", "white-box", spec("pgd", through(steps))),
        SuiteRow("apgd-ce", "white-box", spec("apgd", through(steps))),
        SuiteRow("apgd-margin", "white-box", spec("apgd", through(steps, "margin"))),
    ]
    if defended:
        one_draw = AttackRequest(steps=short, gradient="full", eot=1)
        fixed = AttackRequest(steps=steps, gradient="full", fixed_draw=True)
        rows += [
            SuiteRow("pgd-one-draw", "check", spec("pgd", one_draw)),
            SuiteRow("fixed-noise", "check", spec("pgd", fixed), judged_on="first"),
        ]
    elif fab_is_installed():
        rows.append(SuiteRow("fab", "white-box", spec("fab", AttackRequest(steps=steps))))
    curve = [m for m in EPS_CURVE if abs(m / 255 - eps) > 1e-9]
    return rows + [SuiteRow(f"eps-{m:g}", "curve", spec("pgd", through(short), m / 255)) for m in curve]
