"""Checks of a model's gradients: whether they are zero, whether draws agree, and whether outputs are logits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from advdiff_cli.attacks.eot import Objective, ObjectiveSpec
from advdiff_cli.data.patch_set import LabeledBatch, PatchSet
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.data.selection import row_batches
from advdiff_cli.evaluation.statistics import Estimate, bootstrap, wilson
from advdiff_cli.purification.defended_classifier import logits_of_draws


@dataclass(frozen=True)
class GradientFindings:
    """What the gradients at clean patches look like.

    Args:
        zero: The share of patches whose gradient is zero or not finite.
        cosine: The cosine between the gradients of two halves of the draws; None for a deterministic model.
        probabilities: Whether outputs are probabilities, not logits.
    """

    zero: Estimate
    cosine: Estimate | None
    probabilities: bool

    def as_dict(self) -> JsonObject:
        """Return the fields, with None for NaN."""
        cosine = None if self.cosine is None else self.cosine.as_dict()
        return {"zero": self.zero.as_dict(), "cosine": cosine, "probabilities": self.probabilities}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the findings of `as_dict`."""
        cosine = fields["cosine"]
        zero = Estimate.from_dict(fields["zero"])
        return cls(zero, cosine and Estimate.from_dict(cosine), fields["probabilities"])


def check_gradients(
    model: nn.Module,
    patches: PatchSet,
    spec: ObjectiveSpec,
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda count: None,
) -> GradientFindings:
    """Check the gradients at clean patches.

    Args:
        model: A classifier or a defended classifier.
        patches: With labels, of one size.
        spec: The objective of each half of the draws.
        batch_size: Patches computed together.
        device: Where to compute.
        advance: Called with the number of patches done.
    """
    zeros: list[NDArray[np.bool_]] = []
    cosines, probabilities = [], True
    for rows in row_batches(len(patches), batch_size):
        batch = patches.batch(rows, device)
        objective = Objective(model, batch.labels, batch.keys, spec)
        halves = [objective.gradient(batch.images, k)[1].flatten(1) for k in range(2 if objective.random else 1)]
        entropy = Objective(model, batch.labels, batch.keys, replace(spec, loss="ce", eot=1))
        dead = _is_dead(entropy.gradient(batch.images, 0)[1].flatten(1))
        dead |= torch.stack([_is_dead(h) for h in halves]).all(0)
        zeros.append(dead.cpu().numpy())
        if objective.random:
            one, other = (h.nan_to_num(0) for h in halves)
            cosines.append(cosine_similarity(one, other, dim=1).cpu().double().numpy())
        probabilities &= _returns_probabilities(model, batch, spec.seed)
        advance(len(rows))
    zero = np.concatenate(zeros)
    values = np.concatenate(cosines) if cosines else None
    return GradientFindings(
        wilson(int(zero.sum()), len(zero)),
        None if values is None else bootstrap(lambda rows: float(values[rows].mean()), patches.require_labels()),
        probabilities,
    )


def _is_dead(gradients: Tensor) -> Tensor:
    """Return which gradients (B, D) are zero or not finite."""
    return (gradients == 0).all(1) | ~gradients.isfinite().all(1)


@torch.no_grad()
def _returns_probabilities(model: nn.Module, batch: LabeledBatch, seed: int) -> bool:
    (outputs,) = logits_of_draws(model, batch.images, batch.keys, seed=seed, purpose="attack", draws=range(1))
    ones = outputs.new_ones(len(outputs))
    return bool((outputs >= 0).all() and torch.allclose(outputs.sum(1), ones, atol=1e-4))
