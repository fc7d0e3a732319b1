"""The points of a sweep: a defense for each value, and the attack on it."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from advdiff_cli.attacks.spec import AttackRequest, Method, Norm, resolve
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models import registry
from advdiff_cli.models.precision import Precision
from advdiff_cli.purification.defense import DdpmLoader, Defense, build_defense, load_named_ddpm
from advdiff_cli.purification.defense_spec import DefenseRequest
from advdiff_cli.purification.equations import noise_levels
from advdiff_cli.robustness.runner import SuiteRunner
from advdiff_cli.robustness.suite import Against, SuiteRow
from advdiff_cli.robustness.sweep import Over, SweepPoint

DEFAULT_VALUES = {
    "t-star": "0.001,0.005,0.01,0.02,0.03,0.04,0.06,0.085,0.1,0.15,0.2,0.25,0.3",
    "eps": "0.5/255,1/255,2/255,4/255,8/255",
    "eps-l2": "0.125,0.25,0.5,1,2",
    "sampler-steps": "1,2,4,8",
}


@dataclass(frozen=True)
class SweepRequest:
    """What a sweep varies, and what all of its points share.

    Args:
        over: The setting that is varied.
        values: Its values, separated by commas; None takes the default ones.
        defense: The defense, without the setting that is varied.
        method: Of the attack.
        norm: Of the ball.
        eps: Radius of the ball in [0, 1] pixels, unless it is varied.
        attack: Further settings of the attack, its gradient among them.
    """

    over: Over
    values: str | None
    defense: DefenseRequest
    method: Method
    norm: Norm
    eps: float
    attack: AttackRequest

    @property
    def blind(self) -> bool:
        """Whether the attack does not know the defense, so that all points are judged on the same examples."""
        return self.attack.gradient == "blind"

    @property
    def unit(self) -> int:
        """The factor of the axis: eps in the l-inf norm is shown as a multiple of 1/255."""
        return 255 if self.over == "eps" and self.norm == "linf" else 1

    def value_list(self) -> list[str]:
        """Return the values as text.

        Raises:
            AdvdiffError: There are none.
        """
        l2 = self.over == "eps" and self.norm == "l2"
        text = self.values or DEFAULT_VALUES.get("eps-l2" if l2 else self.over)
        if text is None:
            raise AdvdiffError("--over ddpm needs --values: the models, separated by commas")
        return [one.strip() for one in text.split(",")]


def build_points(request: SweepRequest, undefended: SuiteRunner, precision: Precision) -> list[SweepPoint]:
    """Return the points in ascending order of value.

    Args:
        request: What is varied.
        undefended: Runs the classifier without a defense.
        precision: Of the purifiers.

    Raises:
        AdvdiffError: A value is invalid or repeated, or does not fit the model.
    """
    load = cache(load_named_ddpm)
    points = [_point(request, text, undefended, precision, load) for text in request.value_list()]
    names = [p.name for p in points]
    if len(set(names)) < len(names):
        repeated = next(n for n in names if names.count(n) > 1)
        if request.over == "ddpm":
            raise AdvdiffError(f"--values: two models are called {repeated}; give each folder a name of its own")
        raise AdvdiffError(f"--values: {repeated} is repeated")
    return sorted(points, key=lambda p: p.value)


def _point(
    request: SweepRequest, text: str, undefended: SuiteRunner, precision: Precision, load: DdpmLoader
) -> SweepPoint:
    over = request.over
    value, defense = (_model_point if over == "ddpm" else _number_point)(request, text, load)
    eps = value if over == "eps" else request.eps
    value *= request.unit
    asked = request.attack
    if request.blind:
        asked = replace(asked, gradient=None, eot=None)
    elif request.method == "square":
        asked = replace(asked, gradient=None)
    spec = resolve(request.method, request.norm, eps, asked, defended=not request.blind)
    name = Path(text).name if over == "ddpm" else f"{over}-{value:g}"
    shared = request.blind and over != "eps"
    against: Against = "nothing" if request.blind else "defense"
    row = SuiteRow("adv" if shared else f"adv-{name}", "white-box", spec, against)
    model = undefended.model.behind(defense, undefended.device, precision)
    flag_value = f"{value:g}/255" if request.unit == 255 else text if over == "ddpm" else f"{value:g}"
    return SweepPoint(value, name, flag_value, replace(undefended, model=model, label=f"{name}-"), row)


def _model_point(request: SweepRequest, text: str, load: DdpmLoader) -> tuple[float, Defense]:
    """Return the training steps of the diffusion model called `text`, and the defense with it."""
    defense = build_defense(replace(request.defense, defense="ddpm", ddpm=text), load)
    recorded = registry.recorded_recipe(registry.find_ddpm(text)) or {}
    steps = recorded.get("parameters", {}).get("steps")
    if steps is None:
        raise AdvdiffError(f"{text} does not record its training steps; --over ddpm takes models of train-ddpm")
    return float(steps), defense


def _number_point(request: SweepRequest, text: str, load: DdpmLoader) -> tuple[float, Defense]:
    """Return the value that `text` gives, and the defense with it."""
    over, defense = request.over, request.defense
    value = parse_value(text)
    if not 0 < value < float("inf") or (over == "sampler-steps" and value != int(value)):
        raise AdvdiffError(f"--values: {text} is not a valid {over}")
    if over == "t-star":
        defense = replace(defense, t_star=value)
        if defense.sampler_steps is not None and defense.defense == "ddpm":  # a low noise level has fewer levels
            levels = noise_levels(value, load(defense.model_name, defense.allow_pickle)[0].timesteps)
            defense = replace(defense, sampler_steps=min(defense.sampler_steps, levels))
    elif over == "sampler-steps":
        defense = replace(defense, sampler_steps=int(value))
    return value, build_defense(defense, load)


def parse_value(text: str) -> float:
    """Return a number, or a fraction such as 2/255.

    Raises:
        AdvdiffError: The text is neither.
    """
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise AdvdiffError(f"--values: {text!r} is not a number") from None
