"""What an attack costs a patch, counted before it runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from advdiff_cli.attacks.eot import CANDIDATES, CHOOSING_DRAWS


@dataclass(frozen=True)
class Cost:
    """Passes a patch: of the defended classifier forward and with its gradient, and of the classifier alone."""

    forward: int = 0
    gradient: int = 0
    classifier: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.gradient + other.gradient, self.classifier + other.classifier)

    def times(self, k: int) -> "Cost":
        """Return k times the cost."""
        return Cost(k * self.forward, k * self.gradient, k * self.classifier)

    def unet(self, sampler_steps: int) -> tuple[int, int]:
        """Return U-Net evaluations forward and backward; a gradient of several steps computes each forward twice."""
        again = 2 if sampler_steps > 1 else 1
        return (self.forward + again * self.gradient) * sampler_steps, self.gradient * sampler_steps


def attack_cost(settings: Mapping[str, Any], *, defended: bool) -> Cost:
    """Return what an attack of these settings (of `attacks.plan.resolve`) costs a patch."""
    method, gradient = settings["method"], settings.get("gradient", "full")
    if method == "random":
        return Cost()
    if method == "ensemble":
        members = {"apgd-ce": "apgd", "apgd-margin": "apgd", "square": "square", "fab": "fab"}
        parts = [attack_cost({**settings, "method": members[m]}, defended=defended) for m in settings["attacks"]]
        return sum(parts, Cost(forward=len(parts) * CHOOSING_DRAWS))
    if method == "square" and not defended:
        return Cost(forward=settings["queries"]).times(settings["restarts"])
    if not defended or gradient == "blind":
        return Cost(classifier=_steps(settings, draws=1) * settings.get("restarts", 1))
    fixed = bool(settings.get("fixed_draw"))
    draws = 1 if fixed else settings["eot"]
    if method == "square":
        return Cost(forward=(1 if fixed else 2) * draws * settings["queries"]).times(settings["restarts"])
    if method == "fab":
        return Cost(gradient=settings["steps"])
    passes = _steps(settings, draws)
    chosen = 0 if fixed else (min(CANDIDATES, settings["steps"]) + 1) * CHOOSING_DRAWS
    if gradient == "bpda":
        return Cost(forward=passes + chosen, classifier=passes).times(settings["restarts"])
    return Cost(forward=chosen, gradient=passes).times(settings["restarts"])


def _steps(settings: Mapping[str, Any], draws: int) -> int:
    tried: int = settings["steps"] + 1
    return tried * draws
