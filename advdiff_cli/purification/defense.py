"""Defenses: a purifier with the settings and the model that its results depend on, and a classifier behind it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models import registry
from advdiff_cli.models.classifiers import Classifier
from advdiff_cli.models.ddpm import Ddpm, read_ddpm
from advdiff_cli.models.fingerprint import folder_fingerprint
from advdiff_cli.models.precision import Precision
from advdiff_cli.purification.defended_classifier import DefendedClassifier, check_view, classifier_view
from advdiff_cli.purification.defense_spec import (
    DefenseRequest,
    DefenseSpec,
    ModelSpec,
    check_t_star,
    resolve_ddpm_spec,
    resolve_noise_spec,
)
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, Purifier, linear_alpha_bar

_log = logging.getLogger(__name__)


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
        """Return the classifier behind this defense, on a device, without parameter gradients.

        Raises:
            AdvdiffError: The purifier was not trained on what the classifier reads.
        """
        check_view(self.purifier, classifier_view(classifier))
        return DefendedClassifier(self.purifier, classifier, precision).to(device).requires_grad_(False)


def _sides(size: tuple[int, int] | None) -> str:
    return "x".join(map(str, size or ()))


DdpmLoader = Callable[[str, bool], tuple[Ddpm, str]]


def load_named_ddpm(name: str, allow_pickle: bool) -> tuple[Ddpm, str]:
    """Return the diffusion model called `name` and its fingerprint.

    Raises:
        AdvdiffError: There is no such model, or it is damaged.
    """
    folder = registry.find_ddpm(name, allow_pickle=allow_pickle)
    return read_ddpm(folder, allow_pickle=allow_pickle), folder_fingerprint(folder)


def build_defense(request: DefenseRequest, load: DdpmLoader = load_named_ddpm) -> Defense:
    """Build a defense.

    Args:
        request: What is asked for.
        load: Loads a diffusion model; callers that build many defenses of one model pass a cached function.

    Raises:
        AdvdiffError: There is no such model, or the settings do not fit it.
    """
    if request.defense == "noise":
        spec = resolve_noise_spec(request)
        return Defense(NoisePurifier(linear_alpha_bar(), spec.t_star, spec.noise), spec, None)
    if request.t_star is not None:
        check_t_star(request.t_star)  # before a large model is loaded
    model, fingerprint = load(request.model_name, request.allow_pickle)
    spec = resolve_ddpm_spec(request, model.card, model.timesteps)
    purifier = DiffusionPurifier(model, spec.t_star, spec.sampler or "ddpm", spec.sampler_steps, spec.noise)
    return Defense(purifier.eval(), spec, fingerprint)


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
        """Return this classifier behind a defense, whose purifier is moved to the device and frozen.

        Raises:
            AdvdiffError: The purifier was not trained on what the classifier reads.
        """
        if defense is None:
            return replace(self, defense=None)
        check_view(defense.purifier, classifier_view(self.classifier))
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

    def warn_of_size(self, patches: PatchSet) -> None:
        """Warn where patches have another size than those that the models were trained on, as their files tell.

        Raises:
            AdvdiffError: Sizes of the patches differ, or the classifier cannot read them.
        """
        height, width = patches.require_shape()
        known = {}
        if isinstance(self.classifier, Classifier):
            known["classifier"] = self.classifier.config.size, (height, width)
        if self.defense is not None and isinstance(self.defense.purifier, DiffusionPurifier):
            read = classifier_view(self.classifier).shape(height, width)
            known["diffusion model"] = self.defense.purifier.ddpm.trained_size, read
        others = [
            f"the {k} was trained on {_sides(own)}" for k, (own, read) in known.items() if own not in (None, read)
        ]
        if others:
            text = "the patches of %s are %s, but %s: resample or cut them to the size and magnification that it knows"
            _log.warning(text, patches.path, _sides((height, width)), ", and ".join(others))

    @cached_property
    def module(self) -> nn.Module:
        """The classifier, or the defended classifier."""
        if self.defense is None:
            return self.classifier
        return DefendedClassifier(self.defense.purifier, self.classifier, self.precision)

    @property
    def protected(self) -> DefendedClassifier:
        """The defended classifier; ValueError without a defense."""
        if not isinstance(self.module, DefendedClassifier):
            raise ValueError("there is no defense")
        return self.module

    @property
    def spec(self) -> ModelSpec:
        """What the results of this model depend on."""
        defense = self.defense
        if defense is None:
            return ModelSpec(self.fingerprint)
        return ModelSpec(self.fingerprint, defense.spec, defense.fingerprint, self.precision)

    @property
    def parameters(self) -> JsonObject:
        """The parameters of the defense that enter a recipe; empty without one."""
        return self.spec.parameters

    @property
    def ddpm_fingerprint(self) -> str | None:
        """The fingerprint of the diffusion model, if there is one."""
        return self.spec.ddpm

    @property
    def sampler_steps(self) -> int:
        """U-Net evaluations of one purification; 0 without a U-Net."""
        return 0 if self.defense is None else len(getattr(self.defense.purifier, "timesteps", ()))
