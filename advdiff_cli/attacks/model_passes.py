"""The cost of an attack: passes through the models for each patch, counted before it runs."""

from dataclasses import dataclass, replace

from advdiff_cli.attacks.eot import CANDIDATES, CHOICE_DRAWS
from advdiff_cli.attacks.spec import AttackSpec, Member, Method


@dataclass(frozen=True)
class Cost:
    """Passes for each patch.

    Args:
        forward: Forward passes of the defended classifier.
        gradient: Forward and backward passes of the defended classifier.
        classifier: Forward and backward passes of the classifier alone.
    """

    forward: int = 0
    gradient: int = 0
    classifier: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.gradient + other.gradient, self.classifier + other.classifier)

    def times(self, k: int) -> "Cost":
        """Return k times the cost."""
        return Cost(k * self.forward, k * self.gradient, k * self.classifier)

    def unet_evaluations(self, sampler_steps: int) -> tuple[int, int]:
        """Return U-Net evaluations forward and backward; with several steps, a gradient recomputes each forward."""
        forwards = 2 if sampler_steps > 1 else 1
        return (self.forward + forwards * self.gradient) * sampler_steps, self.gradient * sampler_steps


_MEMBER_METHODS: dict[Member, Method] = {
    "apgd-ce": "apgd",
    "apgd-margin": "apgd",
    "square": "square",
    "fab": "fab",
}


def attack_cost(spec: AttackSpec, *, defended: bool) -> Cost:
    """Return the cost of an attack for each patch."""
    if spec.method == "random":
        return Cost()
    if spec.attacks is not None:
        members = [replace(spec, method=_MEMBER_METHODS[m], attacks=None) for m in spec.attacks]
        parts = [attack_cost(member, defended=defended) for member in members]
        return sum(parts, Cost(forward=len(parts) * CHOICE_DRAWS))
    restarts = spec.restarts or 1
    if not defended or spec.gradient == "blind":
        if spec.method == "square":
            return Cost(forward=spec.queries or 0).times(restarts)
        return Cost(classifier=_iterates(spec)).times(restarts)
    return _through_defense(spec).times(restarts)


def _through_defense(spec: AttackSpec) -> Cost:
    """Return the cost of one restart of an attack through a defense."""
    draws = 1 if spec.fixed_draw else spec.eot or 1
    if spec.method == "square":
        return Cost(forward=(1 if spec.fixed_draw else 2) * draws * (spec.queries or 0))
    if spec.method == "fab":
        return Cost(gradient=spec.steps or 0)
    passes = _iterates(spec) * draws
    choice = 0 if spec.fixed_draw else (min(CANDIDATES, spec.steps or 0) + 1) * CHOICE_DRAWS
    if spec.gradient == "bpda":
        return Cost(forward=passes + choice, classifier=passes)
    return Cost(forward=choice, gradient=passes)


def _iterates(spec: AttackSpec) -> int:
    return (spec.steps or 0) + 1
