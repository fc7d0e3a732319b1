"""A look at a defence's gradients, and the attack's unit test, over a patch set."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from advdiff_cli.attacks.eot import Objective
from advdiff_cli.attacks.spec import Target, run
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.rng import RowKey
from advdiff_cli.evaluation.statistics import bootstrap, wilson
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.robustness.binarization_test import Tested, binarisation_test
from advdiff_cli.robustness.sanity_checks import Gradients, UnitTest


def look_at_gradients(
    model: nn.Module, patches: PatchSet, device: torch.device, *,
    eot: int, seed: int, batch_size: int = 32, advance: Callable[[int], None] = lambda count: None,
) -> Gradients:  # fmt: skip
    """Return what the gradients at the clean patches look like, as means of `eot` draws, split in two halves.

    Patches are computed `batch_size` at once.
    """
    zeros: list[NDArray[np.bool_]] = []
    cosines, probabilities = [], True
    for images, labels, keys in batches(patches, device, batch_size):
        objective = Objective(model, labels, loss="margin", eot=max(eot // 2, 1), seed=seed, rows=keys)
        halves = [objective.gradient(images, step)[1].flatten(1) for step in range(2 if objective.random else 1)]
        entropy = Objective(model, labels, loss="ce", seed=seed, rows=keys).gradient(images, 0)[1].flatten(1)
        dead = _dead(entropy) | torch.stack([_dead(h) for h in halves]).all(0)
        zeros.append(dead.cpu().numpy())
        if objective.random:
            one, other = (h.nan_to_num(0) for h in halves)
            cosines.append(cosine_similarity(one, other, dim=1).cpu().double().numpy())
        probabilities &= _probabilities(model, images, keys, seed)
        advance(len(keys))
    zero = np.concatenate(zeros)
    values = np.concatenate(cosines) if cosines else None
    return Gradients(
        wilson(int(zero.sum()), len(zero)),
        None if values is None else bootstrap(lambda rows: float(values[rows].mean()), patches.require_labels()),
        probabilities,
    )


def _dead(gradients: Tensor) -> Tensor:
    """Tell which of gradients (B, D) lead nowhere: all zero, or not finite."""
    return (gradients == 0).all(1) | ~gradients.isfinite().all(1)


@torch.no_grad()
def _probabilities(model: nn.Module, images: Tensor, keys: list[RowKey], seed: int) -> bool:
    if isinstance(model, DefendedClassifier):
        outputs = model(images, model.noise(images, rows=keys, seed=seed, purpose="attack"))
    else:
        outputs = model(images)
    ones = outputs.new_ones(len(outputs))
    return bool((outputs >= 0).all() and torch.allclose(outputs.sum(1), ones, atol=1e-4))


def unit_test(
    model: nn.Module, classifier: nn.Module, patches: PatchSet, device: torch.device,
    settings: Mapping[str, Any], seed: int, batch_size: int = 32, advance: Callable[[int], None] = lambda count: None,
) -> UnitTest | None:  # fmt: skip
    """Run the binarisation test with an attack of `settings`, `batch_size` patches at once; None where none can be."""
    tested: list[Tested] = []
    for images, _, keys in batches(patches, device, batch_size):

        def attack(readout: nn.Module, x: Tensor, y: Tensor, rows: list[RowKey] = keys) -> Tensor:
            return run(Target(readout), settings, x, y, rows, seed)

        one = binarisation_test(model, classifier, images, keys, eps=settings["eps"], seed=seed, attack=attack)
        if one is None:
            return None
        tested.append(one)
        advance(len(keys))
    exists, broken, chance = (
        torch.cat([getattr(t, name) for t in tested]).numpy() for name in ("exists", "broken", "by_chance")
    )
    n = int(exists.sum())
    if n == 0:
        return None
    return UnitTest(n, wilson(int(broken[exists].sum()), n), wilson(int(chance[exists].sum()), n))


def batches(patches: PatchSet, device: torch.device, size: int) -> Iterator[tuple[Tensor, Tensor, list[RowKey]]]:
    """Yield images, labels and keys of one batch of `size` after another, none padded."""
    labels = patches.require_labels()
    for start in range(0, len(patches), size):
        rows: NDArray[np.int64] = np.arange(start, min(start + size, len(patches)))
        yield patches.read(rows).to(device), torch.from_numpy(labels[rows]).to(device), [patches.keys[i] for i in rows]
