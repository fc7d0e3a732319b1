"""The suite of attacks: from controls and attacks that do not know the defense to attacks that know all of it."""

from dataclasses import dataclass
from typing import Any, Literal

from advdiff_cli.attacks.spec import NO_REQUEST, AttackRequest, AttackSpec, Method, fab_is_installed, resolve

Kind = Literal["control", "black-box", "white-box", "curve", "check"]
Against = Literal["defense", "noise", "nothing"]

MOMENTUM = 1.0
"""Of PGD through a defense, where earlier gradients are further draws."""

EPS_CURVE = (0.5, 1.0, 4.0, 8.0, 64.0)
"""Multiples of 1/255 beside the main eps; the last one should break any model."""


@dataclass(frozen=True)
class Budget:
    """What the attacks of a suite may spend.

    Args:
        patches: Patches that are attacked.
        steps: Iterations of PGD; half as many of attacks that go on from it, or check it.
        eot: Draws that each gradient of PGD averages; twice as many for APGD, four times for FGSM.
        queries: Proposals of Square through a defense; four times as many without.
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
    "quick": Budget(64, 10, 2, 50, 5, 500),
    "standard": Budget(256, 40, 2, 150, 11, 2000),
    "strong": Budget(512, 100, 8, 2500, 21, 20_000),
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
        after: The row that an attack goes on from. Patches that it broke under every judging draw keep its example and
            are not attacked.
        starts_there: Whether the attack starts at the examples of that row, and not at a point of its own.
    """

    name: str
    kind: Kind
    attack: AttackSpec | None = None
    against: Against = "defense"
    judged_on: Literal["all", "first"] = "all"
    after: str | None = None
    starts_there: bool = False

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
    attacks = _Attacks(budget, defended)
    rows = [CLEAN, SuiteRow("random", "control", attacks.resolve("random", eps)), *attacks.white_box(eps)]
    return [*rows, *attacks.others(eps, transfer=transfer), *attacks.curve(eps)]


@dataclass(frozen=True)
class _Attacks:
    """The attacks of a suite, from what they may spend."""

    budget: Budget
    defended: bool

    @property
    def short(self) -> int:
        """The steps of attacks that are compared with PGD, or of other sizes."""
        return min(self.budget.steps, max(self.budget.steps // 4, 8))  # eight steps of eps / 4 reach all of the ball

    @property
    def refined(self) -> int:
        """The steps of attacks that go on from PGD, or check it."""
        return max(self.budget.steps // 2, 1) if self.defended else self.budget.steps

    def resolve(self, method: Method, eps: float, asked: AttackRequest = NO_REQUEST) -> AttackSpec:
        return resolve(method, "linf", eps, asked, defended=self.defended)

    def _exact(self, method: Method, eps: float, steps: int | None, draws: int, **more: Any) -> AttackSpec:
        """Return an attack with exact gradients, which average `draws` of a defense's noise."""
        through: dict[str, Any] = {"gradient": "full", "eot": draws} if self.defended else {}
        return self.resolve(method, eps, AttackRequest(steps=steps, **through, **more))

    def _pgd(self, eps: float, steps: int, draws: int) -> AttackSpec:
        return self._exact("pgd", eps, steps, draws, momentum=MOMENTUM if self.defended else None)

    def white_box(self, eps: float) -> list[SuiteRow]:
        """Return the attacks with exact gradients, of which the last ones go on from PGD."""
        b = self.budget
        ce, margin = (self._exact("apgd", eps, self.refined, 2 * b.eot, loss=loss) for loss in (None, "margin"))
        return [
            SuiteRow("fgsm", "white-box", self._exact("fgsm", eps, None, 4 * b.eot)),
            SuiteRow("pgd-short", "white-box", self._pgd(eps, self.short, b.eot)),
            SuiteRow("pgd", "white-box", self._pgd(eps, b.steps, b.eot)),
            SuiteRow("apgd-ce", "white-box", ce, after="pgd", starts_there=self.defended),
            SuiteRow("apgd-margin", "white-box", margin, after="apgd-ce", starts_there=self.defended),
        ]

    def others(self, eps: float, *, transfer: bool) -> list[SuiteRow]:
        """Return attacks that know less, and those that check exact gradients; none goes on from another one."""
        b = self.budget
        if not self.defended:
            square = self.resolve("square", eps, AttackRequest(queries=4 * b.queries))
            rows = [SuiteRow("square", "black-box", square)]
            if fab_is_installed():
                rows.append(SuiteRow("fab", "white-box", self.resolve("fab", eps, AttackRequest(steps=b.steps))))
            return rows
        blind = self.resolve("pgd", eps, AttackRequest(steps=max(b.steps, 40), gradient="blind"))
        bpda = self.resolve("pgd", eps, AttackRequest(steps=self.refined, gradient="bpda", eot=b.eot))
        square = self.resolve("square", eps, AttackRequest(queries=b.queries, eot=1))
        fixed = self.resolve("pgd", eps, AttackRequest(steps=self.refined, gradient="full", fixed_draw=True))
        rows = [SuiteRow("blind", "black-box", blind), SuiteRow("bpda", "white-box", bpda)]
        if transfer:
            apgd = self._exact("apgd", eps, self.refined, b.eot)
            rows.append(SuiteRow("transfer", "black-box", apgd, against="noise"))
        return [
            *rows,
            SuiteRow("square", "black-box", square),
            SuiteRow("pgd-one-draw", "check", self._pgd(eps, self.short, 1)),
            SuiteRow("fixed-noise", "check", fixed, judged_on="first"),
        ]

    def curve(self, eps: float) -> list[SuiteRow]:
        """Return attacks of other sizes."""
        sizes = {m: m / 255 for m in EPS_CURVE if abs(m / 255 - eps) > 1e-9}
        return [
            SuiteRow(f"eps-{m:g}", "curve", self._pgd(size, self.short, self.budget.eot)) for m, size in sizes.items()
        ]
