"""An attack as the settings that decide its result: what is asked for resolved, aimed at a model, and run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from advdiff_cli.attacks.ankile2022 import paper
from advdiff_cli.attacks.apgd import apgd
from advdiff_cli.attacks.eot import Objective
from advdiff_cli.attacks.fab import fab, fab_installed
from advdiff_cli.attacks.pgd import pgd
from advdiff_cli.attacks.projections import random_surface
from advdiff_cli.attacks.square import square
from advdiff_cli.data.rng import RowKey, RowStreams
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.purification.defended_classifier import DefendedClassifier, StraightThrough
from advdiff_cli.purification.purifier import DiffusionPurifier, Purifier

Gradient = Literal["blind", "bpda", "surrogate", "full"]

SETTINGS: dict[str, dict[str, Any]] = {
    "random": {},
    "pgd": {"loss": "ce", "steps": 40, "step_size": None, "restarts": 1},
    "fgsm": {"loss": "ce"},
    "apgd": {"loss": "ce", "steps": 100, "restarts": 1},
    "square": {"loss": "margin", "queries": 1000, "restarts": 1},
    "fab": {"steps": 100},
    "paper": {"steps": 5},
    "ensemble": {"steps": 100, "queries": 1000, "restarts": 1},
}
"""Method -> its settings and their defaults; a step size of None is eps / 4."""

_EOT = 8


def resolve(method: str, norm: str, eps: float, asked: Mapping[str, Any], *, defended: bool) -> dict[str, Any]:
    """Return the settings of an attack, defaults filled in.

    Args:
        method: A key of SETTINGS.
        norm: `linf` or `l2`.
        eps: Budget in [0, 1] pixels.
        asked: Settings by name; None is not asked for. Beside the method's own: gradient, eot, attack_sampler_steps
            and fixed_draw, which are about a defence.
        defended: Whether a defence stands before the classifier.

    Raises:
        AdvdiffError: a setting does not apply.
    """
    given = {k: v for k, v in asked.items() if v is not None}
    settings = {"method": method, "norm": norm, "eps": eps, **SETTINGS[method]}
    settings |= _about_a_defence(method, given) if defended else {}
    for name in given:
        if name not in settings:
            against = f"--gradient {settings['gradient']}" if "gradient" in settings else "a defence"
            what = f"--method {method} {f'with {against}' if defended else 'without a defence (-m or --defense)'}"
            raise AdvdiffError(f"--{name.replace('_', '-')} does not apply to {what}")
    settings |= given
    deterministic = not defended or settings.get("gradient") == "blind" or bool(settings.get("fixed_draw"))
    if method in ("square", "paper") and norm != "linf":
        raise AdvdiffError(f"--method {method} is for --norm linf")
    if method == "paper" and defended:
        raise AdvdiffError("--method paper attacks the classifier alone: leave out -m and --defense")
    if method == "fab" and not deterministic:
        raise AdvdiffError("--method fab is for deterministic models: give --fixed-draw, or no defence")
    if settings.get("gradient") == "surrogate" and settings["attack_sampler_steps"] is None:
        raise AdvdiffError("--gradient surrogate needs --attack-sampler-steps, fewer than the defence takes")
    if method == "fgsm":
        settings |= {"steps": 1, "step_size": eps, "restarts": 1}
    elif method == "pgd":
        settings["step_size"] = settings["step_size"] or eps / 4
    elif method == "ensemble":
        settings["attacks"] = _members(norm, deterministic)
    return settings


def _about_a_defence(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings about a defence that apply, with their defaults."""
    gradient = given.get("gradient", "full")
    if method == "random":
        return {}
    found = {} if method == "square" else {"gradient": gradient}
    if gradient == "full":
        found["fixed_draw"] = False
    if gradient != "blind" and not given.get("fixed_draw"):
        found["eot"] = _EOT
    if gradient == "surrogate":
        found["attack_sampler_steps"] = None
    return found


def describe(settings: Mapping[str, Any]) -> str:
    """Tell an attack in a few words, from its settings or a recipe's parameters; nothing where there are none."""
    if not settings:
        return ""
    eps = f"{settings['eps'] * 255:g}/255" if settings["norm"] == "linf" else f"{settings['eps']:g}"
    shown = ("steps", "queries", "loss", "gradient", "eot", "attack_sampler_steps")
    told = [f"{k.replace('_', ' ')} {settings[k]}" for k in shown if settings.get(k) is not None]
    told += ["one known draw"] if settings.get("fixed_draw") else []
    return ", ".join([f"{settings['method']} {settings['norm']} {eps}", *told])


def knows_the_defence(settings: Mapping[str, Any]) -> bool:
    """Tell whether an attack of these settings queries or differentiates a defence."""
    return "eot" in settings or bool(settings.get("fixed_draw"))


def _members(norm: str, deterministic: bool) -> list[str]:
    found = ["apgd-ce", "apgd-margin"] + (["square"] if norm == "linf" else [])
    return found + (["fab"] if deterministic and fab_installed() else [])


@dataclass(frozen=True)
class Target:
    """What an attack maximises the loss of, and whose gradient it follows where that is another's."""

    model: nn.Module
    follow: DefendedClassifier | None = None


def aim(
    classifier: nn.Module, purifier: Purifier | None, settings: Mapping[str, Any], precision: str = "fp32"
) -> Target:
    """Return the target of an attack with these settings on a classifier behind a purifier, or on it alone."""
    gradient = settings.get("gradient", "full")
    if purifier is None or gradient == "blind":
        return Target(classifier)
    defended = DefendedClassifier(purifier, classifier, precision).eval()
    if gradient == "bpda":
        return Target(defended, StraightThrough(purifier, classifier, precision).eval())
    if gradient == "surrogate":
        if not isinstance(purifier, DiffusionPurifier):
            raise AdvdiffError("--gradient surrogate is of a diffusion model's sampler; NoiseDefense has none")
        fewer = purifier.with_steps(settings["attack_sampler_steps"])
        return Target(defended, DefendedClassifier(fewer, classifier, precision).eval())
    return Target(defended)


def run(
    target: Target, settings: Mapping[str, Any], images: Tensor, labels: Tensor, rows: Sequence[RowKey], seed: int,
    index: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Return adversarial images (B, 3, H, W), in the ball and in [0, 1].

    Args:
        target: Of `aim`.
        settings: Of `resolve`.
        images: (B, 3, H, W) float in [0, 1].
        labels: (B,) int64.
        rows: What names each image; with `seed`, its streams.
        seed: Of every stream.
        index: Each image's index in the origin set, which names the draws that judge it; a fixed draw is one of them.
    """
    model, follow = target.model, target.follow
    if settings.get("fixed_draw") and isinstance(model, DefendedClassifier):
        noise = model.noise(images, rows=rows if index is None else index, seed=seed, purpose="evaluate")
        model, follow = model.fixed(noise), None
    s, eps = settings, settings["eps"]
    streams: dict[str, Any] = {"seed": seed, "rows": rows, "eot": s.get("eot", 1)}

    def one(name: str, loss: Any) -> Tensor:
        if name == "random":
            return random_surface(images, eps, s["norm"], RowStreams(seed, "attack-random", rows))
        if name in ("pgd", "fgsm"):
            return pgd(
                model, images, labels, eps=eps, steps=s["steps"], step_size=s["step_size"], norm=s["norm"], loss=loss,
                follow=follow, restarts=s["restarts"], start=name == "pgd", **streams,
            )  # fmt: skip
        if name == "apgd":
            return apgd(
                model, images, labels, eps=eps, steps=s["steps"], norm=s["norm"], loss=loss, follow=follow,
                restarts=s["restarts"], **streams,
            )  # fmt: skip
        if name == "paper":
            return paper(model, images, labels, eps=eps, steps=s["steps"])
        if name == "fab":
            return fab(model, images, labels, eps=eps, steps=s["steps"], norm=s["norm"])
        return square(
            model, images, labels, eps=eps, queries=s["queries"], loss=loss, restarts=s["restarts"], **streams
        )

    if s["method"] != "ensemble":
        return one(s["method"], s.get("loss"))
    losses = {"apgd-ce": "ce", "apgd-margin": "margin", "square": "margin", "fab": None}
    found = [one(name.partition("-")[0], losses[name]) for name in s["attacks"]]
    judged = Objective(model, labels, loss="margin", seed=seed, rows=rows)
    return judged.best(found, "attack-ensemble")[0]
