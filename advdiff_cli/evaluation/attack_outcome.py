"""The outcome of an attack, evaluated on its stored result."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from advdiff_cli.attacks.projections import round_inside, surface_counts
from advdiff_cli.attacks.spec import AttackSpec
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.selection import row_batches
from advdiff_cli.purification.defended_classifier import DefendedClassifier, check_finite, logits_of_draws

DRAWS = 3
"""Draws of a defense's noise on which the outcome is evaluated: the first ones that `evaluate` uses."""


@dataclass
class AttackOutcome:
    """For each patch (N,), the share of draws correct on clean, attacked, and attacked and rounded images.

    A deterministic model has one draw. `on_surface` of `perturbed` values (l-inf) or patches (l2) are on the ball's
    surface.
    """

    clean: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    rounded: list[float] = field(default_factory=list)
    draws: int = 1
    on_surface: float = 0.0
    perturbed: float = 0.0

    @property
    def flipped(self) -> int:
        """The number of patches that are correct in most draws before, and wrong in most draws after the attack."""
        return sum(before > 0.5 > after for before, after in zip(self.clean, self.attacked, strict=True))

    @property
    def surface_share(self) -> float:
        """The share of perturbed values (l-inf) or patches (l2) on the ball's surface."""
        return self.on_surface / self.perturbed if self.perturbed else 0.0


@dataclass(frozen=True)
class AttackedRows:
    """The stored result of an attack: rows of `adv`, made from the rows of `clean` from position `first` on."""

    clean: PatchSet
    adv: PatchSet
    first: int
    spec: AttackSpec
    seed: int


@torch.inference_mode()
def attack_outcome(
    model: nn.Module,
    rows: AttackedRows,
    device: torch.device,
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> AttackOutcome:
    """Evaluate the stored result of an attack.

    Args:
        model: The attacked model. A defended classifier is judged on draws that no gradient saw, unless the attack
            knows its draw.
        rows: The result.
        device: Where to compute.
        batch_size: Patches computed together.
        advance: Called with the number of rows done.
    """
    spec = rows.spec
    draws = range(1 if spec.fixed_draw else DRAWS)
    outcome = AttackOutcome(draws=len(draws) if isinstance(model, DefendedClassifier) else 1)
    for at in row_batches(len(rows.adv), batch_size):
        batch = rows.clean.batch(at + rows.first, device)
        adv = rows.adv.read(at).to(device)
        kinds = {
            "clean": batch.images,
            "attacked": adv,
            "rounded": round_inside(adv, batch.images, spec.eps, spec.norm),
        }
        for kind, images in kinds.items():
            drawn = logits_of_draws(model, images, batch.index, seed=rows.seed, purpose="evaluate", draws=draws)
            logits = [check_finite(z, batch.index, rows.adv.path) for z in drawn]
            correct = torch.stack([(z.argmax(1) == batch.labels).cpu() for z in logits])
            getattr(outcome, kind).extend(correct.double().mean(0).tolist())
        on_surface, perturbed = surface_counts(adv, batch.images, spec.eps, spec.norm)
        outcome.on_surface += on_surface
        outcome.perturbed += perturbed
        advance(len(at))
    return outcome
