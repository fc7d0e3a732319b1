"""Evaluate a model on a patch set."""

from collections.abc import Callable

import numpy as np
import torch

from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.provenance import history
from advdiff_cli.evaluation.comparison import EvaluatedSet
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.jobs.predict import predict
from advdiff_cli.purification.defense import EvaluatedModel


def evaluate_set(
    name: str,
    patches: PatchSet,
    model: EvaluatedModel,
    device: torch.device,
    *,
    draws: range,
    seed: int,
    advance: Callable[[int], None],
) -> EvaluatedSet:
    """Return the predictions of a model on a set with labels.

    Args:
        name: Of the set.
        patches: What is evaluated.
        model: The classifier, alone or defended.
        device: Where to compute.
        draws: Draws of the defense's noise; one for a classifier alone.
        seed: Of the draws.
        advance: Called with the number of patches done.
    """
    batches = []
    for p1 in predict(model.module, patches, device, draws=draws, seed=seed):
        batches.append(p1)
        advance(len(p1))
    predictions = Predictions(patches.require_labels(), np.concatenate(batches))
    return EvaluatedSet(name, patches.origin(), patches.index, predictions, history(patches.provenance))
