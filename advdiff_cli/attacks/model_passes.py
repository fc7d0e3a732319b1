"""The cost of an attack: passes through the models for each patch, counted before it runs."""

from dataclasses import dataclass

from advdiff_cli.attacks.eot import CANDIDATES, CHOICE_DRAWS
from advdiff_cli.attacks.spec import AttackSpec


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


def attack_cost(spec: AttackSpec, *, defended: bool) -> Cost:
    """Return the cost of an attack, which is no ensemble, for each patch."""
    if spec.method == "random":
        return Cost()
    restarts = spec.restarts or 1
    if not defended or spec.gradient == "blind":
        if spec.method == "square":
            return Cost(forward=spec.queries or 0).times(restarts)
        return Cost(classifier=(spec.steps or 0) + 1).times(restarts)
    return _through_defense(spec).times(restarts)


def _through_defense(spec: AttackSpec) -> Cost:
    """Return the cost of one restart of an attack through a defense."""
    draws = 1 if spec.fixed_draw else spec.eot or 1
    steps, queries = spec.steps or 0, spec.queries or 0
    if spec.method == "square":
        return Cost(forward=queries if spec.fixed_draw else draws * (2 * queries - 1) + CHOICE_DRAWS)
    if spec.method == "fab":
        return Cost(gradient=steps)
    gradients = (steps + (spec.method == "apgd")) * draws
    value = 0 if spec.method == "apgd" else draws  # of the last iterate
    choice = 0 if spec.fixed_draw else (min(CANDIDATES, steps) + 1) * CHOICE_DRAWS
    if spec.gradient == "bpda":
        return Cost(forward=gradients + value + choice, classifier=gradients)
    return Cost(forward=value + choice, gradient=gradients)
