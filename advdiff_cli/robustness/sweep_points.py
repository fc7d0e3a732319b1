"""The points of a sweep, from its flags: a defence at each value, and how it is attacked."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from advdiff_cli import options
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.purification.defense import Defence, build_defence, load_model

if TYPE_CHECKING:
    from advdiff_cli.robustness.runner import Climb
    from advdiff_cli.robustness.sweep import Point

_DEFAULTS = {
    "t-star": "0.001,0.005,0.01,0.02,0.03,0.04,0.06,0.085,0.1,0.15,0.2,0.25,0.3",
    "eps": "0.5/255,1/255,2/255,4/255,8/255",
    "eps-l2": "0.125,0.25,0.5,1,2",
    "sampler-steps": "1,2,4,8",
}


@dataclass(frozen=True)
class Asked:
    """What every point has in common: the defence's flags and the attack's."""

    defense: Literal["noise", "ddpm"]
    ddpm: str | None
    t_star: float | None
    sampler: str | None
    sampler_steps: int | None
    allow_pickle: bool
    method: str
    norm: str
    eps: float
    attack: dict[str, Any]

    @property
    def blind(self) -> bool:
        """Whether the attack does not know the defence, so that every point is judged on the same examples."""
        return bool(self.attack["gradient"] == "blind")


def refuse_ignored(over: str, gradient: str, settings: dict[str, Any], defense: str, eot: int | None) -> None:
    """Refuse what would be ignored: a setting beside the values that are swept, draws of a blind attack."""
    if over == "ddpm" and defense == "noise":
        raise AdvdiffError("--over ddpm sweeps diffusion models; --defense noise has none")
    if settings.get(over) is not None:
        flag = "-m" if over == "ddpm" else f"--{over}"
        raise AdvdiffError(f"--over {over} takes its values from --values; leave out {flag}")
    if gradient == "blind" and eot is not None:
        raise AdvdiffError("--eot is of an attack through the defence: give --gradient full or bpda")


def build_points(
    over: str, values: str | None, asked: Asked, bare: "Climb", precision: str
) -> "list[Point]":  # fmt: skip
    """Return the points in ascending order of value; `bare` is of the classifier without a defence."""
    from advdiff_cli.attacks.spec import resolve
    from advdiff_cli.robustness.suite import Rung
    from advdiff_cli.robustness.sweep import Point

    l2 = over == "eps" and asked.norm == "l2"
    unit = 255 if over == "eps" and not l2 else 1  # the axis of linf is in 1/255
    text = values or _DEFAULTS.get("eps-l2" if l2 else over)
    if text is None:
        raise AdvdiffError("--over ddpm needs --values: the models, separated by commas")
    points, load = [], cache(load_model)
    for one in text.split(","):
        value, defence = _setting(over, one.strip(), asked, load)
        budget = value if over == "eps" else asked.eps
        value *= unit
        ignored = {"eot", "gradient"} if asked.blind else {"gradient"} if asked.method == "square" else set()
        through = {k: v for k, v in asked.attack.items() if k not in ignored}
        settings = resolve(asked.method, asked.norm, budget, through, defended=not asked.blind)
        name = f"{over}-{value:g}" if over != "ddpm" else Path(one.strip()).name
        shared = asked.blind and over != "eps"
        rung = Rung("adv" if shared else f"adv-{name}", "white-box", settings, "nothing" if asked.blind else "defence")
        purifier = defence.before(bare.subject.classifier, bare.device, precision).purifier
        subject = replace(
            bare.subject, purifier=purifier, defence=defence.parameters, ddpm=defence.model, precision=precision
        )
        told = f"{value:g}/255" if unit == 255 else one.strip() if over == "ddpm" else f"{value:g}"
        points.append(Point(value, name, told, replace(bare, subject=subject, label=f"{name}-"), rung))
    names = [p.name for p in points]
    if len(set(names)) < len(names):
        raise AdvdiffError(f"--values {text}: {next(n for n in names if names.count(n) > 1)} is there twice")
    return sorted(points, key=lambda p: p.value)


def _setting(over: str, text: str, asked: Asked, load: Any) -> tuple[float, Defence]:
    """Return a point's value on the axis, and its defence."""
    a = asked
    settings: list[Any] = [a.defense, a.ddpm, a.t_star, a.sampler, a.sampler_steps]
    if over == "ddpm":
        defence = build_defence("ddpm", text, *settings[2:], allow_pickle=a.allow_pickle, load=load)
        return _training_steps(text), defence
    try:
        value = options.fraction(text)
    except typer.BadParameter:
        raise AdvdiffError(f"--values: {text!r} is no number") from None
    if not 0 < value < float("inf") or (over == "sampler-steps" and value != int(value)):
        raise AdvdiffError(f"--values: {text} is no value of {over}")
    if over == "t-star":
        settings[2] = value
        if a.sampler_steps is not None:  # a low noise level has fewer
            settings[4] = min(a.sampler_steps, max(1, round(value * 1000)))
    elif over == "sampler-steps":
        settings[4] = int(value)
    return value, build_defence(*settings, allow_pickle=a.allow_pickle, load=load)


def _training_steps(name: str) -> float:
    from advdiff_cli.models import registry

    recorded = registry.recorded_recipe(registry.find_ddpm(name)) or {}
    steps = recorded.get("parameters", {}).get("steps")
    if steps is None:
        raise AdvdiffError(f"{name} does not say how many steps it was trained; --over ddpm takes models of train-ddpm")
    return float(steps)
