"""Predict the probability of class 1 for every patch of a set, under each draw of a defense's noise."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advdiff_cli.data.distributed import ProcessGroup
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_source import Rows
from advdiff_cli.data.selection import row_batches
from advdiff_cli.jobs.memory import parallel_batches
from advdiff_cli.jobs.parallel_map import parallel_map
from advdiff_cli.jobs.recipes import judging_batch_size
from advdiff_cli.models.device import to_device
from advdiff_cli.models.external import TwoLogits
from advdiff_cli.purification.defended_classifier import DefendedClassifier, check_finite, logits_of_draws

ONE_DRAW = range(1)
ALONE = ProcessGroup()


def predict(
    model: nn.Module,
    patches: PatchSet,
    device: torch.device,
    *,
    draws: range = ONE_DRAW,
    seed: int = 0,
    group: ProcessGroup = ALONE,
    advance: Callable[[int], None] = lambda count: None,
) -> NDArray[np.float64]:
    """Return p1 (N, R) of all patches, of which each process of a group predicts a part.

    Args:
        model: A classifier (R = 1), or a `DefendedClassifier`.
        patches: What is judged, of one size.
        device: Where to compute.
        draws: The R draws of the defense's noise; see `predict_batches`.
        seed: Of these draws.
        group: The processes.
        advance: Called with the number of patches after each batch of this process.

    Raises:
        AdvdiffError: A logit is not finite.
    """
    defended = isinstance(model, DefendedClassifier)
    size = judging_batch_size(patches.require_shape(), defended=defended, device=device.type)
    batches = list(row_batches(len(patches), size, pad=True))
    start, stop = (len(batches) * k // group.size for k in (group.rank, group.rank + 1))
    found = [np.empty((0, len(draws) if defended else 1))]
    for p1 in predict_batches(model, patches, batches[start:stop], device, draws=draws, seed=seed):
        found.append(p1)
        advance(len(p1))
    return np.concatenate(group.gather(np.concatenate(found)))


def predict_batches(
    model: nn.Module,
    patches: PatchSet,
    batches: Iterable[Rows],
    device: torch.device,
    *,
    draws: range = ONE_DRAW,
    seed: int = 0,
) -> Iterator[NDArray[np.float64]]:
    """Yield p1 (B, R) of one batch after another.

    Args:
        model: A classifier (R = 1), or a `DefendedClassifier`.
        patches: What is judged, of one size.
        batches: The rows of each, of `judging_batch_size`; the last one of the set is padded, so that rows do not
            depend on N.
        device: Where to compute.
        draws: The R draws of the defense's noise, from the evaluation streams of `seed`, which no attack uses. The
            noise of a row is named by its index in the origin set.
        seed: Of those streams.

    Raises:
        AdvdiffError: A logit is not finite.
    """
    defended, n = isinstance(model, DefendedClassifier), len(patches)

    def read(rows: Rows) -> tuple[Rows, Tensor]:
        return rows, to_device(patches.read(rows), device)

    @torch.inference_mode()
    def judge(one: tuple[Rows, Tensor]) -> NDArray[np.float64]:
        rows, images = one
        names = patches.index[rows].tolist()  # which every set made from these rows keeps
        keys = [patches.keys[i] for i in rows]
        logits = logits_of_draws(model, images, names, seed=seed, purpose="evaluate", draws=draws)
        p1 = [check_finite(z, keys, patches.path).cpu().double().softmax(1)[:, 1] for z in logits]
        return torch.stack(p1, 1)[: n - int(rows[0])].numpy()

    external = any(isinstance(m, TwoLogits) for m in model.modules())  # may hold state, so one batch at a time
    shape = patches.require_shape()
    size = judging_batch_size(shape, defended=defended, device=device.type)
    workers = 0 if external else parallel_batches(model, shape, size, device)
    yield from parallel_map(read, judge, batches, workers)
