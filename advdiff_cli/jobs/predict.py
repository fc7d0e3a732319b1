"""Predict the probability of class 1 for every patch of a set, under each draw of a defense's noise."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advdiff_cli.data.patch_source import Rows
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.selection import row_batches
from advdiff_cli.jobs.memory import parallel_batches
from advdiff_cli.jobs.parallel_map import parallel_map
from advdiff_cli.jobs.recipes import judging_batch_size
from advdiff_cli.models.device import to_device
from advdiff_cli.models.external import TwoLogits
from advdiff_cli.purification.defended_classifier import DefendedClassifier, check_finite, logits_of_draws

ONE_DRAW = range(1)


def predict(
    model: nn.Module,
    patches: PatchSet,
    device: torch.device,
    *,
    draws: range = ONE_DRAW,
    seed: int = 0,
    batches: Iterable[Rows] | None = None,
) -> Iterator[NDArray[np.float64]]:
    """Yield p1 (B, R) of one batch after another.

    Args:
        model: A classifier (R = 1), or a `DefendedClassifier`.
        patches: What is judged, of one size.
        device: Where to compute.
        draws: The R draws of the defense's noise, from the evaluation streams of `seed`, which no attack uses. The
            noise of a row is named by its index in the origin set.
        seed: Of those streams.
        batches: The rows of each batch, of `judging_batch_size`, the last one padded; by default all rows.

    Raises:
        AdvdiffError: A logit is not finite.
    """
    size, n = judging_batch_size(defended=isinstance(model, DefendedClassifier)), len(patches)

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
    workers = 0 if external else parallel_batches(model, patches.require_shape(), size, device)
    chosen = row_batches(n, size, pad=True) if batches is None else batches  # padded: rows do not depend on N
    yield from parallel_map(read, judge, chosen, workers)
