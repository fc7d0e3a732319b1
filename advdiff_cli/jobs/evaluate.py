"""Evaluate a model on a patch set, and tell what a table of certificates proves of it."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from advdiff_cli.certification.certificate_file import certificate_provenance, read_certificates
from advdiff_cli.certification.summary import summarize, told_sizes
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.provenance import JsonObject, history
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.comparison import EvaluatedSet
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.jobs.predict import predict
from advdiff_cli.purification.defense import EvaluatedModel
from advdiff_cli.purification.defense_spec import DefenseSpec, ModelSpec

_log = logging.getLogger(__name__)


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


def check_certified_model(table: Path, model: EvaluatedModel) -> None:
    """Check that a table of certificates is of the model that is evaluated; warn if it is at another precision.

    Raises:
        AdvdiffError: It is of another model, or there is no such table.
    """
    if model.defense is None:
        raise AdvdiffError("--certificates are of a classifier behind a defense: give -m, or --defense noise")
    made = certificate_provenance(table)["recipe"]
    own = ModelSpec(made["classifier"], DefenseSpec.from_parameters(made["parameters"]), made["ddpm"], model.precision)
    if own != model.spec:
        raise AdvdiffError(f"{table} is of another model, or another setting of the defense; see advdiff info {table}")
    certified = made["parameters"]["precision"]
    if certified != model.precision:
        _log.warning("%s certifies the purifier in %s, not in %s", table, certified, model.precision)


def certified_of(table: Path, first: EvaluatedSet) -> JsonObject:
    """Return what a table of certificates proves of an evaluated set.

    Raises:
        AdvdiffError: It is of other patches.
    """
    made, found = certificate_provenance(table), read_certificates(table)
    parameters = made["recipe"]["parameters"]
    certified_recipes = [step for one in made["inputs"] for step in history(one)]
    if made["origin"] != first.origin or certified_recipes != first.history:
        raise AdvdiffError(f"{table} certifies other patches than {first.name}, such as those before an attack")
    shared = found.take(first.index)
    if not len(shared):
        raise AdvdiffError(f"{table} holds no patches of {first.name}")
    labels = dict(zip(first.index.tolist(), first.predictions.labels.tolist(), strict=True))
    if shared.labels is not None and [labels[int(i)] for i in shared.index] != shared.labels.tolist():
        raise AdvdiffError(f"{table} and {first.name} label the same patches differently")
    return {"data": first.name, **summarize(shared, told_sizes(parameters)), "alpha": parameters["alpha"]}
