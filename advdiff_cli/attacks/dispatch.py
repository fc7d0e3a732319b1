"""Run the attack that a specification describes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from advdiff_cli.attacks.ankile2022 import ankile2022
from advdiff_cli.attacks.apgd import apgd
from advdiff_cli.attacks.bpda import BpdaClassifier
from advdiff_cli.attacks.eot import Objective, ObjectiveSpec
from advdiff_cli.attacks.fab import fab
from advdiff_cli.attacks.pgd import pgd
from advdiff_cli.attacks.projections import random_surface_point
from advdiff_cli.attacks.spec import AttackSpec, LossName, Member
from advdiff_cli.attacks.square import square
from advdiff_cli.data.rng import RowKey, RowStreams
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.precision import Precision
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.purifier import DiffusionPurifier, Purifier

_MEMBERS: dict[Member, tuple[str, LossName | None]] = {
    "apgd-ce": ("apgd", "ce"),
    "apgd-margin": ("apgd", "margin"),
    "square": ("square", "margin"),
    "fab": ("fab", None),
}
"""Member of an ensemble -> its method and loss."""


@dataclass(frozen=True)
class Target:
    """The attacked model, and the model whose gradient is used, if that is another one."""

    model: nn.Module
    gradient_model: DefendedClassifier | None = None


@dataclass(frozen=True)
class AttackBatch:
    """Patches to attack.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        labels: (B,) int64.
        rows: The name of each row; with `seed`, it names the streams of starts and noise.
        index: The index of each row in the origin set, which names the draws that judge it.
        seed: Of every stream.
        start: (B, 3, H, W) in the ball, where gradient attacks start; None for a random point.
    """

    images: Tensor
    labels: Tensor
    rows: Sequence[RowKey]
    index: Sequence[int]
    seed: int
    start: Tensor | None = None


def build_target(
    classifier: nn.Module, purifier: Purifier | None, spec: AttackSpec, precision: Precision = "fp32"
) -> Target:
    """Return the target of an attack on a classifier, alone or behind a purifier.

    Raises:
        AdvdiffError: A surrogate is asked for of a defense without a sampler.
    """
    gradient = spec.gradient or "full"
    if purifier is None or gradient == "blind":
        return Target(classifier)
    defended = DefendedClassifier(purifier, classifier, precision)
    if gradient == "bpda":
        return Target(defended, BpdaClassifier(purifier, classifier, precision))
    if gradient == "surrogate":
        if not isinstance(purifier, DiffusionPurifier):
            raise AdvdiffError("--gradient surrogate needs a diffusion model's sampler, which NoiseDefense has not")
        surrogate = purifier.with_steps(spec.attack_sampler_steps or 1)
        return Target(defended, DefendedClassifier(surrogate, classifier, precision))
    return Target(defended)


def run_attack(target: Target, spec: AttackSpec, batch: AttackBatch) -> Tensor:
    """Return adversarial images (B, 3, H, W), in the ball and in [0, 1]."""
    if spec.fixed_draw and isinstance(target.model, DefendedClassifier):
        defended = target.model
        noise = defended.noise(batch.images, rows=batch.index, seed=batch.seed, purpose="evaluate")
        target = Target(defended.fixed(noise))
    if spec.attacks is None:
        return _run(target, spec, spec.method, spec.loss, batch)
    found = [_run(target, spec, *_MEMBERS[name], batch) for name in spec.attacks]
    judge = Objective(target.model, batch.labels, batch.rows, ObjectiveSpec("margin", seed=batch.seed))
    return judge.best(found, "attack-ensemble")[0]


def _run(target: Target, spec: AttackSpec, method: str, loss: LossName | None, batch: AttackBatch) -> Tensor:
    """Run one method with the settings of `spec`, which has those that the method needs."""
    model, images, labels, eps = target.model, batch.images, batch.labels, spec.eps
    steps = cast("int", spec.steps)
    if method == "random":
        return random_surface_point(images, eps, spec.norm, RowStreams(batch.seed, "attack-random", batch.rows))
    if method == "paper":
        return ankile2022(model, images, labels, eps=eps, steps=steps)
    if method == "fab":
        return fab(model, images, labels, eps=eps, steps=steps, norm=spec.norm)
    shared: dict[str, Any] = {"eps": eps, "loss": loss, "eot": spec.eot or 1, "restarts": spec.restarts}
    shared |= {"seed": batch.seed, "rows": batch.rows}
    if method == "square":
        return square(model, images, labels, queries=cast("int", spec.queries), **shared)
    shared |= {"steps": steps, "norm": spec.norm, "gradient_model": target.gradient_model, "start": batch.start}
    if method == "apgd":
        return apgd(model, images, labels, **shared)
    shared |= {"step_size": spec.step_size, "momentum": spec.momentum or 0.0, "random_start": method == "pgd"}
    return pgd(model, images, labels, **shared)
