"""The settings of a defense and of a model behind it: what their results depend on, known without loading a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.data.rng import NoiseKind
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models import registry
from advdiff_cli.models.card import DdpmCard, SamplerName, load_card, read_timesteps
from advdiff_cli.models.fingerprint import folder_fingerprint
from advdiff_cli.models.precision import Precision
from advdiff_cli.purification.equations import noise_levels

DEFAULT_DDPM = "pcam-ddpm"

NOISE_T_STAR = 0.085
"""The default t* of NoiseDefense: that of the paper, 0.04 of pixels in [0, 1], on the scale of pixels in [-1, 1]."""

DefenseKind = Literal["noise", "ddpm"]


@dataclass(frozen=True)
class DefenseSpec:
    """The settings of a defense.

    Args:
        defense: `ddpm`, or `noise` for NoiseDefense.
        t_star: Noise level as a fraction of T.
        sampler: Reverse process of a ddpm.
        sampler_steps: U-Net evaluations of a ddpm; None is one for each noise level.
        noise: What draws its noise.
    """

    defense: DefenseKind
    t_star: float
    sampler: SamplerName | None = None
    sampler_steps: int | None = None
    noise: NoiseKind = "numpy"

    def parameters(self) -> JsonObject:
        """Return the parameters that enter a recipe."""
        sampler = {"sampler": self.sampler, "sampler_steps": self.sampler_steps} if self.defense == "ddpm" else {}
        noise = {} if self.noise == "numpy" else {"noise": self.noise}
        return {"defense": self.defense, "t_star": self.t_star, **sampler, **noise}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, object]) -> "DefenseSpec | None":
        """Return the defense in the parameters of a recipe, or None if it had none."""
        names = ("defense", "t_star", "sampler", "sampler_steps", "noise")
        if "t_star" not in parameters:
            return None
        return cls(**{k: parameters[k] for k in names if k in parameters})  # type: ignore[arg-type]  # as AttackSpec

    def describe(self) -> str:
        """Describe the settings in a few words."""
        if self.defense == "noise":
            return f"t* {self.t_star:g}"
        return f"t* {self.t_star:g}, sampler {self.sampler}, steps {self.sampler_steps or 'every noise level'}"

    def differences(self, other: "DefenseSpec") -> list[str]:
        """Return the names of the settings that both kinds of defense have, with different values."""
        mine, theirs = self.parameters(), replace(other, noise=self.noise).parameters()  # any noise is as good
        return [k for k in mine if k in theirs and mine[k] != theirs[k]]


@dataclass(frozen=True)
class DefenseRequest:
    """The defense asked for by name and settings; None takes the recommendation of the diffusion model.

    Args:
        defense: Which.
        ddpm: The name of its diffusion model.
        t_star: Noise level as a fraction of T.
        sampler: Reverse process.
        sampler_steps: U-Net evaluations.
        allow_pickle: Whether pickled weights may be read.
        noise: What draws its noise.
        certify: Whether the recommendation is that for certificates.
    """

    defense: DefenseKind
    ddpm: str | None = None
    t_star: float | None = None
    sampler: SamplerName | None = None
    sampler_steps: int | None = None
    allow_pickle: bool = False
    noise: NoiseKind = "numpy"
    certify: bool = False

    @property
    def model_name(self) -> str:
        """The name of the diffusion model, or of the defense without one."""
        return "NoiseDefense" if self.defense == "noise" else self.ddpm or DEFAULT_DDPM

    @property
    def takes_defaults(self) -> bool:
        """Whether a setting was not asked for, and is recommended by the diffusion model or the paper."""
        settings = (self.t_star, self.sampler, self.sampler_steps)
        return None in (settings if self.defense == "ddpm" else settings[:1])


@dataclass(frozen=True)
class ModelSpec:
    """What the results of a classifier, alone or behind a defense, depend on.

    Args:
        classifier: Its fingerprint.
        defense: The settings of the defense; None for the classifier alone.
        ddpm: The fingerprint of the diffusion model, if there is one.
        precision: Of the purifier.
    """

    classifier: str
    defense: DefenseSpec | None = None
    ddpm: str | None = None
    precision: Precision = "fp32"

    @property
    def parameters(self) -> JsonObject:
        """The parameters of the defense that enter a recipe; empty without one."""
        return {} if self.defense is None else {**self.defense.parameters(), "precision": self.precision}


def resolve_noise_spec(request: DefenseRequest) -> DefenseSpec:
    """Return the settings of NoiseDefense.

    Raises:
        AdvdiffError: Other settings were asked for, or t* is outside (0, 1].
    """
    if request.t_star is not None:
        check_t_star(request.t_star)
    if request.ddpm or request.sampler or request.sampler_steps:
        raise AdvdiffError("--defense noise only adds noise; -m, --sampler and --sampler-steps do not apply")
    t_star = NOISE_T_STAR if request.t_star is None else request.t_star
    return DefenseSpec("noise", t_star, noise=request.noise)


def resolve_ddpm_spec(request: DefenseRequest, card: DdpmCard, timesteps: int) -> DefenseSpec:
    """Return the settings of a defense by a diffusion model; those that were not asked for are its recommendation.

    Args:
        request: What is asked for.
        card: Of the diffusion model.
        timesteps: T, its number of noise levels.

    Raises:
        AdvdiffError: t* is outside (0, 1].
    """
    if request.t_star is not None:
        check_t_star(request.t_star)
    default = card.default_settings(certify=request.certify)
    t_star = default.t_star if request.t_star is None else request.t_star
    steps = default.sampler_steps if request.sampler_steps is None else request.sampler_steps
    if request.sampler_steps is None and request.t_star is not None and steps is not None:
        steps = min(steps, noise_levels(t_star, timesteps))  # a low noise level has fewer levels
    return DefenseSpec("ddpm", t_star, request.sampler or default.sampler, steps, request.noise)


def find_defense(request: DefenseRequest) -> tuple[DefenseSpec, str | None]:
    """Return the settings of a defense and the fingerprint of its diffusion model, without loading the model.

    Raises:
        AdvdiffError: There is no such model, or its configuration is damaged.
    """
    if request.defense == "noise":
        return resolve_noise_spec(request), None
    folder = registry.find_ddpm(request.model_name, allow_pickle=request.allow_pickle)
    return resolve_ddpm_spec(request, load_card(folder), read_timesteps(folder)), folder_fingerprint(folder)


def check_t_star(t_star: float) -> None:
    """Check that a noise level is a fraction of T.

    Raises:
        AdvdiffError: It is outside (0, 1].
    """
    if not 0 < t_star <= 1:
        raise AdvdiffError(f"t* = {t_star:g} is not in (0, 1]")
