"""Defenses: a purifier with the settings and the model that its results depend on, and a classifier behind it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models import registry
from advdiff_cli.models.card import PAPER, SamplerName
from advdiff_cli.models.ddpm import Ddpm, load_ddpm
from advdiff_cli.models.device import Precision
from advdiff_cli.models.fingerprint import folder_fingerprint
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.equations import noise_levels
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, Purifier, check_t_star, linear_alpha_bar

DEFAULT_DDPM = "pcam-ddpm"

DefenseKind = Literal["noise", "ddpm"]


@dataclass(frozen=True)
class DefenseSpec:
    """The settings of a defense.

    Args:
        defense: `ddpm`, or `noise` for NoiseDefense.
        t_star: Noise level as a fraction of T.
        sampler: Reverse process of a ddpm.
        sampler_steps: U-Net evaluations of a ddpm; None is one for each noise level.
    """

    defense: DefenseKind
    t_star: float
    sampler: SamplerName | None = None
    sampler_steps: int | None = None

    def parameters(self) -> JsonObject:
        """Return the parameters that enter a recipe."""
        return asdict(self) if self.defense == "ddpm" else {"defense": self.defense, "t_star": self.t_star}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, object]) -> "DefenseSpec | None":
        """Return the defense in the parameters of a recipe, or None if it had none."""
        names = ("defense", "t_star", "sampler", "sampler_steps")
        if "t_star" not in parameters:
            return None
        return cls(**{k: parameters[k] for k in names if k in parameters})  # type: ignore[arg-type]  # as AttackSpec

    def differences(self, other: "DefenseSpec") -> list[str]:
        """Return the names of the settings that both defenses have, with different values."""
        mine, theirs = asdict(self), asdict(other)
        return [k for k in mine if None not in (mine[k], theirs[k]) and mine[k] != theirs[k]]


@dataclass(frozen=True)
class DefenseRequest:
    """The defense asked for by name and settings; None takes the recommendation of the diffusion model."""

    defense: DefenseKind
    ddpm: str | None = None
    t_star: float | None = None
    sampler: SamplerName | None = None
    sampler_steps: int | None = None
    allow_pickle: bool = False

    @property
    def model_name(self) -> str:
        """The name of the diffusion model."""
        return self.ddpm or DEFAULT_DDPM

    @property
    def takes_defaults(self) -> bool:
        """Whether a setting of the diffusion model's recommendation is used."""
        return self.defense == "ddpm" and None in (self.t_star, self.sampler, self.sampler_steps)


@dataclass(frozen=True)
class Defense:
    """A purifier with its settings, and the fingerprint of its diffusion model (None for NoiseDefense)."""

    purifier: Purifier
    spec: DefenseSpec
    fingerprint: str | None

    def compile_unet(self, device: torch.device) -> None:
        """Compile the U-Net for passes with gradients.

        Raises:
            AdvdiffError: There is no U-Net, or torch cannot compile.
        """
        if not isinstance(self.purifier, DiffusionPurifier):
            raise AdvdiffError("--compile: NoiseDefense has no U-Net to compile")
        self.purifier.ddpm.to(device).compile_unet()

    def protect(self, classifier: nn.Module, device: torch.device, precision: Precision) -> DefendedClassifier:
        """Return the classifier behind this defense, on a device, without parameter gradients."""
        return DefendedClassifier(self.purifier, classifier, precision).to(device).requires_grad_(False).eval()


DdpmLoader = Callable[[str, bool], tuple[Ddpm, str]]


def load_named_ddpm(name: str, allow_pickle: bool) -> tuple[Ddpm, str]:
    """Return the diffusion model called `name` and its fingerprint.

    Raises:
        AdvdiffError: There is no such model, or it is damaged.
    """
    folder = registry.find_ddpm(name, allow_pickle=allow_pickle)
    return load_ddpm(folder, allow_pickle=allow_pickle), folder_fingerprint(folder)


def build_defense(request: DefenseRequest, load: DdpmLoader = load_named_ddpm) -> Defense:
    """Build a defense.

    Args:
        request: What is asked for.
        load: Loads a diffusion model; callers that build many defenses of one model pass a cached function.

    Raises:
        AdvdiffError: There is no such model, or the settings do not fit it.
    """
    r = request
    if r.t_star is not None:
        check_t_star(r.t_star)
    if r.defense == "noise":
        if r.ddpm or r.sampler or r.sampler_steps:
            raise AdvdiffError("--defense noise only adds noise; -m, --sampler and --sampler-steps do not apply")
        spec = DefenseSpec("noise", PAPER.t_star if r.t_star is None else r.t_star)
        return Defense(NoisePurifier(linear_alpha_bar(), spec.t_star), spec, None)
    model, fingerprint = load(r.model_name, r.allow_pickle)
    default = model.card.recommended
    t_star = default.t_star if r.t_star is None else r.t_star
    steps = default.sampler_steps if r.sampler_steps is None else r.sampler_steps
    if r.sampler_steps is None and r.t_star is not None and steps is not None:
        steps = min(steps, noise_levels(t_star, model.timesteps))  # a low noise level has fewer levels
    spec = DefenseSpec("ddpm", t_star, r.sampler or default.sampler, steps)
    purifier = DiffusionPurifier(model, t_star, spec.sampler or default.sampler, steps).eval()
    return Defense(purifier, spec, fingerprint)


@dataclass(frozen=True)
class EvaluatedModel:
    """What is attacked and evaluated: a classifier, alone or behind a defense.

    Args:
        classifier: In eval mode, without parameter gradients.
        fingerprint: Of the classifier.
        defense: None for the classifier alone.
        precision: Of the purifier.
        compiled: Whether the U-Net is compiled for passes with gradients.
    """

    classifier: nn.Module
    fingerprint: str
    defense: Defense | None = None
    precision: Precision = "fp32"
    compiled: bool = False

    def behind(self, defense: Defense | None, device: torch.device, precision: Precision) -> "EvaluatedModel":
        """Return this classifier behind a defense, whose purifier is moved to the device and frozen."""
        if defense is None:
            return replace(self, defense=None)
        defense.purifier.to(device).requires_grad_(False).eval()
        return replace(self, defense=defense, precision=precision)

    def compile_unet(self, device: torch.device) -> "EvaluatedModel":
        """Return the same model with the U-Net compiled for passes with gradients.

        Raises:
            AdvdiffError: There is no U-Net, or torch cannot compile.
        """
        if self.defense is None:
            raise AdvdiffError("--compile: without a defense there is no U-Net to compile")
        self.defense.compile_unet(device)
        return replace(self, compiled=True)

    @cached_property
    def module(self) -> nn.Module:
        """The classifier, or the defended classifier."""
        if self.defense is None:
            return self.classifier
        return DefendedClassifier(self.defense.purifier, self.classifier, self.precision).eval()

    @property
    def parameters(self) -> JsonObject:
        """The parameters of the defense that enter a recipe; empty without one."""
        return {} if self.defense is None else {**self.defense.spec.parameters(), "precision": self.precision}

    @property
    def ddpm_fingerprint(self) -> str | None:
        """The fingerprint of the diffusion model, if there is one."""
        return None if self.defense is None else self.defense.fingerprint

    @property
    def sampler_steps(self) -> int:
        """U-Net evaluations of one purification; 0 without a U-Net."""
        return 0 if self.defense is None else len(getattr(self.defense.purifier, "timesteps", ()))
