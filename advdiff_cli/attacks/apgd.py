"""Auto-PGD: projected gradient ascent with momentum and a step size that halves where progress stalls.

Source: Croce & Hein 2020, arXiv:2003.01690, algorithm 1 and section 4. Its DLR loss needs three classes; here the loss
is cross-entropy or the margin.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advdiff_cli.attacks.eot import Objective, best_restart, check_images
from advdiff_cli.attacks.losses import LossName
from advdiff_cli.attacks.projections import Norm, project, random_start, steepest
from advdiff_cli.data.rng import RowKey, RowStreams
from advdiff_cli.purification.defended_classifier import DefendedClassifier

_MOMENTUM = 0.75  # alpha, the weight of the new step
_RISING = 0.75  # rho, the share of steps that must raise the loss


def apgd(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int = 100, norm: Norm = "linf",
    loss: LossName = "ce", eot: int = 1, follow: DefendedClassifier | None = None,
    restarts: int = 1, start: bool = True, seed: int = 0, rows: Sequence[RowKey] | None = None,
) -> Tensor:  # fmt: skip
    """Maximise a loss inside the ball around each image with Auto-PGD; arguments and result as for `pgd`.

    Under a randomised defence the schedule acts on mean losses over `eot` draws, and the iterate that is returned is
    chosen on fresh draws.
    """
    check_images(images)
    names = list(range(len(images)) if rows is None else rows)
    settings: dict[str, Any] = {"loss": loss, "eot": eot, "follow": follow, "seed": seed, "rows": names}

    def run(restart: int) -> tuple[Tensor, Tensor]:
        objective = Objective(model, labels, restart=restart, **settings)
        streams = RowStreams(seed, "attack-start", names, restart=restart)
        x_0 = random_start(images, eps, norm, streams) if start else images
        return objective.choose(iterates(objective, images, x_0, eps, steps, norm))

    return best_restart(run, restarts)


def checkpoints(steps: int) -> list[int]:
    """Return the steps w_j after which the step size is reconsidered (section 4.1): 22 % of them, then ever fewer."""
    period, found = max(int(0.22 * steps), 1), [0]
    while found[-1] + period <= steps:
        found.append(found[-1] + period)
        period = max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found


def iterates(
    objective: Objective, images: Tensor, x: Tensor, eps: float, steps: int, norm: Norm
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the start and the iterate after each step, each with its loss (B,)."""
    loss, gradient = objective.gradient(x, 0)
    yield x, loss
    before = x
    best, best_loss, best_gradient = x, loss, gradient
    size = torch.full((len(x), 1, 1, 1), 2 * eps, device=x.device)
    halve = _Halving(steps, loss)
    for step in range(1, steps + 1):
        moved = _project(x + size * steepest(gradient, norm), images, eps, norm)
        share = _MOMENTUM if step > 1 else 1.0
        moved = _project(x + (moved - x) * share + (x - before) * (1 - share), images, eps, norm)
        before, x = x, moved
        loss, gradient = objective.gradient(x, step)
        yield x, loss
        better = loss > best_loss
        best, best_gradient = _pick(better, x, best), _pick(better, gradient, best_gradient)
        best_loss = torch.where(better, loss, best_loss)
        stalled = halve.after(step, loss, best_loss)
        if stalled is not None:
            size = torch.where(stalled.view(-1, 1, 1, 1), size / 2, size)
            x, gradient = _pick(stalled, best, x), _pick(stalled, best_gradient, gradient)


class _Halving:
    """When the step size of a patch halves (section 4.1, conditions 1 and 2)."""

    def __init__(self, steps: int, loss: Tensor) -> None:
        self._checkpoints = set(checkpoints(steps)[1:])
        self._loss = loss
        self._best_at_check = loss
        self._halved = torch.ones_like(loss, dtype=torch.bool)
        self._rises = torch.zeros_like(loss)
        self._since = 0

    def after(self, step: int, loss: Tensor, best: Tensor) -> Tensor | None:
        """Take note of a step; at a checkpoint, return which patches (B,) go back to their best, at half the step."""
        self._rises, self._loss, self._since = self._rises + (loss > self._loss), loss, self._since + 1
        if step not in self._checkpoints:
            return None
        few = self._rises <= _RISING * self._since
        stuck = ~self._halved & (self._best_at_check >= best)
        self._halved = few | stuck
        self._best_at_check, self._rises, self._since = best, torch.zeros_like(loss), 0
        return self._halved


def _pick(which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(which.view(-1, 1, 1, 1), yes, no)


def _project(points: Tensor, images: Tensor, eps: float, norm: Norm) -> Tensor:
    """Project as AutoAttack does, to the bit: l-inf by the faces of the ball, which leaves points inside untouched."""
    if norm == "linf":
        return torch.minimum(torch.maximum(points, images - eps), images + eps).clamp(0, 1)
    return project(points, images, eps, norm)
