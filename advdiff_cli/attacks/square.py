"""Square attack: random search over squares of maximal perturbation, from losses only.

Source: Andriushchenko et al. 2020, arXiv:1912.00049, algorithms 1 and 2 (l-inf).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from advdiff_cli.attacks.eot import Objective, ObjectiveSpec, best_restart, check_images
from advdiff_cli.attacks.projections import project
from advdiff_cli.attacks.spec import LossName
from advdiff_cli.data.rng import RowKey, stream
from advdiff_cli.models.device import to_device

_FIRST_SHARE = 0.8  # p, the share of the image that the first squares cover
_HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries (section 5)


def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    queries: int = 1000,
    loss: LossName = "margin",
    eot: int = 1,
    restarts: int = 1,
    seed: int = 0,
    rows: Sequence[RowKey] | None = None,
) -> Tensor:
    """Maximize a loss in the l-inf ball around each image without gradients; other arguments and result as for `pgd`.

    For a random defense, a proposal and the point it would replace are compared on the same `eot` fresh draws, so that
    a lucky point does not stay. This doubles the forward passes of a query.

    Args:
        queries: Number of proposals, including the initial stripes.
    """
    check_images(images)
    names = list(range(len(images)) if rows is None else rows)
    spec = ObjectiveSpec(loss, eot, seed=seed)

    def run(restart: int) -> tuple[Tensor, Tensor]:
        objective = Objective(model, labels, names, spec, restart)
        streams = [stream(seed, "attack-square", restart, row) for row in names]
        return _search(objective, images, eps, queries, streams)

    return best_restart(run, restarts)


def _search(
    objective: Objective, images: Tensor, eps: float, queries: int, streams: list[np.random.Generator]
) -> tuple[Tensor, Tensor]:
    _, channels, height, width = images.shape
    stripes = np.stack([s.choice((-eps, eps), (channels, 1, width)) for s in streams])
    x = (images + torch.from_numpy(stripes).to(images)).clamp(0, 1)
    loss = objective.value(x, 0)
    for query in range(1, queries):
        side = max(round(np.sqrt(_covered_share(query, queries) * height * width)), 1)
        proposed = _proposal(x, images, eps, min(side, height - 1, width - 1), streams)
        new = objective.value(proposed, query)
        old = objective.value(x, query) if objective.random else loss
        better = new > old
        x = torch.where(better.view(-1, 1, 1, 1), proposed, x)
        loss = torch.where(better, new, old)
    return objective.best([x]) if objective.random else (x, loss)


def _covered_share(query: int, queries: int) -> float:
    """Return the share of the image that the squares of this query cover."""
    halvings = sum(query * 10_000 / queries > at for at in _HALVED_AT)
    return float(_FIRST_SHARE / 2**halvings)


def _proposal(x: Tensor, images: Tensor, eps: float, side: int, streams: list[np.random.Generator]) -> Tensor:
    """Set the perturbation of one square in each patch to +eps or -eps, by channel."""
    _, channels, height, width = x.shape
    drawn = [([s.integers(0, n - side) for n in (height, width)], s.choice((-eps, eps), channels)) for s in streams]
    corners, signs = (np.array(values) for values in zip(*drawn, strict=True))
    top, left = to_device(torch.from_numpy(corners), x.device).T[..., None]
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    in_rows, in_columns = (rows >= top) & (rows < top + side), (columns >= left) & (columns < left + side)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    perturbed = images + to_device(torch.from_numpy(signs).to(x.dtype), x.device)[:, :, None, None]
    return project(torch.where(inside, perturbed, x), images, eps, "linf")
