"""The specification of an attack: the settings that decide its result, resolved from what is asked for."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from typing import Literal, cast

from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.errors import AdvdiffError

Method = Literal["pgd", "fgsm", "apgd", "square", "fab", "ensemble", "random", "paper"]
Norm = Literal["linf", "l2"]
LossName = Literal["ce", "margin"]
Gradient = Literal["blind", "bpda", "surrogate", "full"]
Member = Literal["apgd-ce", "apgd-margin", "square", "fab"]

DEFAULT_EOT = 8


@dataclass(frozen=True)
class AttackRequest:
    """The settings of an attack that a user asked for; None is not asked for.

    Four are about a defense: how the gradient passes it, the draws that each gradient averages, the sampler steps of a
    surrogate, and whether the attack knows the one draw it will meet.
    """

    loss: LossName | None = None
    steps: int | None = None
    step_size: float | None = None
    queries: int | None = None
    restarts: int | None = None
    gradient: Gradient | None = None
    eot: int | None = None
    attack_sampler_steps: int | None = None
    fixed_draw: bool | None = None
    momentum: float | None = None


DEFAULTS: dict[Method, AttackRequest] = {
    "random": AttackRequest(),
    "pgd": AttackRequest(loss="ce", steps=40, restarts=1),
    "fgsm": AttackRequest(loss="ce", steps=1, restarts=1),
    "apgd": AttackRequest(loss="ce", steps=100, restarts=1),
    "square": AttackRequest(loss="margin", queries=1000, restarts=1),
    "fab": AttackRequest(steps=100),
    "paper": AttackRequest(steps=5),
    "ensemble": AttackRequest(steps=100, queries=1000, restarts=1),
}
"""Method -> its settings and their defaults. The step size of pgd is eps / 4, that of fgsm is eps."""

_FIXED: dict[str, tuple[str, ...]] = {"fgsm": ("steps", "restarts")}
"""Method -> settings that cannot be asked for."""


@dataclass(frozen=True)
class AttackSpec:
    """The settings of an attack; None does not apply to it.

    Args:
        method: Which attack.
        norm: Of the ball.
        eps: Radius of the ball in [0, 1] pixels.
        loss: What is maximized.
        steps: Attack iterations.
        step_size: In [0, 1] pixels.
        queries: Proposals of Square.
        restarts: Random starts.
        attacks: The members of an ensemble.
        gradient: How gradients pass the defense.
        eot: Draws of the defense's noise that each gradient averages.
        attack_sampler_steps: Sampler steps of the surrogate.
        fixed_draw: Whether the attack knows the one draw that it will meet.
        momentum: The weight of earlier gradients in a step of pgd; None for none.
    """

    method: Method
    norm: Norm
    eps: float
    loss: LossName | None = None
    steps: int | None = None
    step_size: float | None = None
    queries: int | None = None
    restarts: int | None = None
    attacks: tuple[Member, ...] | None = None
    gradient: Gradient | None = None
    eot: int | None = None
    attack_sampler_steps: int | None = None
    fixed_draw: bool | None = None
    momentum: float | None = None

    def parameters(self) -> JsonObject:
        """Return the parameters that enter a recipe: the settings that apply."""
        found = {k: v for k, v in asdict(self).items() if v is not None}
        return found | ({} if self.attacks is None else {"attacks": list(self.attacks)})

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, object]) -> "AttackSpec":
        """Return the attack in the parameters of a recipe."""
        names = {f.name for f in fields(cls)}
        found = {k: v for k, v in parameters.items() if k in names}
        if "attacks" in found:
            found["attacks"] = tuple(cast("list[Member]", found["attacks"]))
        return cls(**found)  # type: ignore[arg-type]  # a recipe is JSON, whose values have no types

    @property
    def computes_defense(self) -> bool:
        """Whether the attack, where there is a defense, computes it."""
        return self.method != "random" and self.gradient != "blind"

    @property
    def knows_defense(self) -> bool:
        """Whether the attack was made against a defense that it queries or differentiates."""
        return self.eot is not None or bool(self.fixed_draw)

    @property
    def takes_exact_gradients(self) -> bool:
        """Whether the attack takes gradients of a purifier, where there is one."""
        return self.gradient in ("full", "surrogate")

    def describe(self) -> str:
        """Describe the attack in a few words."""
        eps = f"{self.eps * 255:g}/255" if self.norm == "linf" else f"{self.eps:g}"
        shown = ("steps", "momentum", "queries", "loss", "gradient", "eot", "attack_sampler_steps")
        settings = [f"{k.replace('_', ' ')} {v}" for k in shown if (v := getattr(self, k)) is not None]
        settings += ["one known draw"] if self.fixed_draw else []
        return ", ".join([f"{self.method} {self.norm} {eps}", *settings])


NO_REQUEST = AttackRequest()


def resolve(method: Method, norm: Norm, eps: float, asked: AttackRequest = NO_REQUEST, *, defended: bool) -> AttackSpec:
    """Return the specification of an attack, with defaults filled in.

    Args:
        method: Which attack.
        norm: `linf` or `l2`.
        eps: Radius of the ball in [0, 1] pixels.
        asked: Settings that differ from the defaults.
        defended: Whether a defense stands before the classifier.

    Raises:
        AdvdiffError: A setting does not apply.
    """
    given = {k: v for k, v in asdict(asked).items() if v is not None}
    settings = _applicable(method) | (_about_defense(method, asked) if defended else {})
    gradient = asked.gradient or "full"
    for name in given:
        if name not in settings or name in _FIXED.get(method, ()):
            attack = f"--gradient {gradient}" if "gradient" in settings else "a defense"
            attack += " and --fixed-draw" if asked.fixed_draw and name == "eot" else ""
            against = f"with {attack}" if defended else "without a defense (-m or --defense)"
            raise AdvdiffError(f"--{name.replace('_', '-')} does not apply to --method {method} {against}")
    spec = AttackSpec(method, norm, eps, **(settings | given))  # type: ignore[arg-type]  # by asdict()
    deterministic = not defended or gradient == "blind" or bool(asked.fixed_draw)
    _check_combination(spec, defended=defended, deterministic=deterministic)
    if method == "fgsm":
        return replace(spec, step_size=eps)
    if method == "pgd":
        return replace(spec, step_size=spec.step_size or eps / 4)
    if method == "ensemble":
        return replace(spec, attacks=_members(norm, deterministic))
    return spec


def _applicable(method: Method) -> dict[str, object]:
    """Return the settings of a method, with their defaults; None is set later."""
    found = {k: v for k, v in asdict(DEFAULTS[method]).items() if v is not None}
    return found | ({"step_size": None, "momentum": None} if method == "pgd" else {})


def _about_defense(method: Method, asked: AttackRequest) -> dict[str, object]:
    """Return the settings about a defense that apply, with their defaults."""
    gradient = asked.gradient or "full"
    if method == "random":
        return {}
    found: dict[str, object] = {} if method == "square" else {"gradient": gradient}
    if gradient == "full":
        found["fixed_draw"] = False
    if gradient != "blind" and not asked.fixed_draw:
        found["eot"] = DEFAULT_EOT
    if gradient == "surrogate":
        found["attack_sampler_steps"] = None
    return found


def _check_combination(spec: AttackSpec, *, defended: bool, deterministic: bool) -> None:
    if spec.method in ("square", "paper") and spec.norm != "linf":
        raise AdvdiffError(f"--method {spec.method} is for --norm linf")
    if spec.method == "paper" and defended:
        raise AdvdiffError("--method paper attacks the classifier alone: leave out -m and --defense")
    if spec.method == "fab" and not deterministic:
        raise AdvdiffError(
            "--method fab is for deterministic models: give --fixed-draw or --gradient blind, or no defense"
        )
    if spec.momentum is not None and not 0 < spec.momentum <= 1:
        raise AdvdiffError(f"--momentum {spec.momentum:g} is not in (0, 1]")
    if spec.gradient == "surrogate" and spec.attack_sampler_steps is None:
        raise AdvdiffError("--gradient surrogate needs --attack-sampler-steps")


def fab_is_installed() -> bool:
    """Return whether pyautoattack is installed."""
    return find_spec("pyautoattack") is not None


def _members(norm: Norm, deterministic: bool) -> tuple[Member, ...]:
    square: tuple[Member, ...] = ("square",) if norm == "linf" else ()
    fab: tuple[Member, ...] = ("fab",) if deterministic and fab_is_installed() else ()
    return ("apgd-ce", "apgd-margin", *square, *fab)
