"""The ladder: from what a defence meets by chance to attacks that know all of it, and how each rung is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from advdiff_cli.attacks.fab import fab_installed
from advdiff_cli.attacks.spec import resolve

Kind = Literal["control", "black-box", "white-box", "curve", "check"]

EPS_CURVE = (0.5, 1.0, 4.0, 8.0, 64.0)
"""Multiples of 1/255 beside the main eps; the last is to break anything."""


@dataclass(frozen=True)
class Preset:
    """How much an attack may spend: patches, iterations, draws a gradient averages, Square's queries, judging draws."""

    patches: int
    steps: int
    eot: int
    queries: int
    draws: int


PRESETS = {
    "quick": Preset(64, 10, 2, 100, 5),
    "standard": Preset(256, 50, 8, 500, 11),
    "strong": Preset(512, 100, 16, 5000, 21),
}


@dataclass(frozen=True)
class Rung:
    """One row of the ladder.

    `settings` are an attack's; none is the clean rung. `before` is what the attack takes for the defence: the defence,
    `noise`, another model whose examples are transferred, or `nothing`, which makes the same examples whatever the
    defence. `judged` is the draws it is judged on: all, or the one it knows.
    """

    name: str
    kind: Kind
    settings: Mapping[str, Any] = field(default_factory=dict)
    before: Literal["defence", "noise", "nothing"] = "defence"
    judged: Literal["all", "first"] = "all"


def ladder(preset: Preset, eps: float, *, defended: bool, substitute: bool = True) -> list[Rung]:
    """Return the rungs of the ladder, l-inf.

    Args:
        preset: What attacks may spend.
        eps: Budget in [0, 1] pixels.
        defended: Whether there is a defence, whose noise and gradient have rungs of their own.
        substitute: Whether NoiseDefense is another model than the defence, from which examples can be transferred.
    """
    transfer = defended and substitute
    s, k = preset.steps, preset.eot
    short = min(s, max(s // 4, 8))  # eight steps of eps/4 reach any point of the ball
    through: dict[str, Any] = {"gradient": "full", "eot": k} if defended else {}

    def rung(name: str, kind: Kind, method: str, at: float = eps, **more: Any) -> Rung:
        options = {name: more.pop(name) for name in ("before", "judged") if name in more}
        return Rung(name, kind, resolve(method, "linf", at, more, defended=defended), **options)

    def point(multiple: float) -> Rung:
        return rung(f"eps-{multiple:g}", "curve", "pgd", multiple / 255, steps=short, **through)

    draws: dict[str, Any] = {"eot": max(k // 4, 1)} if defended else {}  # two points a query, on the same draws
    rungs = [Rung("clean", "control"), rung("random", "control", "random")]
    if defended:
        rungs += [
            rung("blind", "black-box", "pgd", steps=max(s, 40), gradient="blind"),
            rung("bpda", "white-box", "pgd", steps=s, gradient="bpda", eot=k),
        ]
    if transfer:
        rungs.append(rung("transfer", "black-box", "apgd", steps=s, before="noise", **through))
    rungs += [
        rung("square", "black-box", "square", queries=preset.queries, **draws),
        rung("fgsm", "white-box", "fgsm", **through),
        rung("pgd-short", "white-box", "pgd", steps=short, **through),
        rung("pgd", "white-box", "pgd", steps=s, **through),
        rung("apgd-ce", "white-box", "apgd", steps=s, **through),
        rung("apgd-margin", "white-box", "apgd", steps=s, loss="margin", **through),
    ]
    if defended:
        rungs += [
            rung("pgd-one-draw", "check", "pgd", steps=short, gradient="full", eot=1),
            rung("fixed-noise", "check", "pgd", steps=s, gradient="full", fixed_draw=True, judged="first"),
        ]
    elif fab_installed():
        rungs.append(rung("fab", "white-box", "fab", steps=s))
    return rungs + [point(m) for m in EPS_CURVE if abs(m / 255 - eps) > 1e-9]
