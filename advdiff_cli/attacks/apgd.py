"""Auto-PGD: projected gradient ascent with momentum, and a step size that is halved when progress stalls.

Source: Croce & Hein 2020, arXiv:2003.01690, algorithm 1 and section 4. Its DLR loss needs three classes; the loss here
is the cross-entropy or the margin.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from advdiff_cli.attacks.eot import Objective, ObjectiveSpec, best_restart, check_images
from advdiff_cli.attacks.projections import project, random_point, steepest
from advdiff_cli.attacks.spec import LossName, Norm
from advdiff_cli.data.rng import RowKey, RowStreams
from advdiff_cli.purification.defended_classifier import DefendedClassifier

_MOMENTUM = 0.75  # alpha, the weight of the new step
_MIN_RISING = 0.75  # rho, the share of steps that must raise the loss


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 100,
    norm: Norm = "linf",
    loss: LossName = "ce",
    eot: int = 1,
    gradient_model: DefendedClassifier | None = None,
    restarts: int = 1,
    random_start: bool = True,
    start: Tensor | None = None,
    seed: int = 0,
    rows: Sequence[RowKey] | None = None,
) -> Tensor:
    """Maximize a loss in the ball around each image with Auto-PGD; arguments and result as for `pgd`.

    For a random defense, the step size depends on mean losses over `eot` draws; the result is chosen on fresh draws.
    From a given `start`, the first step is eps / 2 long, where it is 2 eps otherwise.
    """
    check_images(images)
    names = list(range(len(images)) if rows is None else rows)
    spec = ObjectiveSpec(loss, eot, gradient_model, seed)

    def run(restart: int) -> tuple[Tensor, Tensor]:
        objective = Objective(model, labels, names, spec, restart)
        streams = RowStreams(seed, "attack-start", names, restart=restart)
        if start is not None and not restart:
            return objective.choose(iterates(objective, images, start, eps, steps, norm, eps / 2))
        x_0 = random_point(images, eps, norm, streams) if random_start else images
        return objective.choose(iterates(objective, images, x_0, eps, steps, norm))

    return best_restart(run, restarts)


def checkpoints(steps: int) -> list[int]:
    """Return the steps w_j at which the step size is reconsidered, after ever shorter intervals (section 4.1)."""
    period, found = max(int(0.22 * steps), 1), [0]
    while found[-1] + period <= steps:
        found.append(found[-1] + period)
        period = max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found


def iterates(
    objective: Objective,
    images: Tensor,
    x: Tensor,
    eps: float,
    steps: int,
    norm: Norm,
    first_step: float | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the start x and the iterate after each step, each with its loss (B,)."""
    loss, gradient = objective.gradient(x, 0)
    yield x, loss
    previous = x
    best, best_loss, best_gradient = x, loss, gradient
    size = torch.full((len(x), 1, 1, 1), 2 * eps if first_step is None else first_step, device=x.device)
    schedule = _StepSizeSchedule(steps, loss)
    for step in range(1, steps + 1):
        moved = _project(x + size * steepest(gradient, norm), images, eps, norm)
        weight = _MOMENTUM if step > 1 else 1.0
        moved = _project(x + (moved - x) * weight + (x - previous) * (1 - weight), images, eps, norm)
        previous, x = x, moved
        loss, gradient = objective.gradient(x, step)
        yield x, loss
        better = loss > best_loss
        best, best_gradient = _where(better, x, best), _where(better, gradient, best_gradient)
        best_loss = torch.where(better, loss, best_loss)
        stalled = schedule.update(step, loss, best_loss)
        if stalled is not None:
            size = torch.where(stalled.view(-1, 1, 1, 1), size / 2, size)
            x, gradient = _where(stalled, best, x), _where(stalled, best_gradient, gradient)


class _StepSizeSchedule:
    """Decides when the step size of a patch is halved (section 4.1, conditions 1 and 2)."""

    def __init__(self, steps: int, loss: Tensor) -> None:
        self._checkpoints = set(checkpoints(steps)[1:])
        self._loss = loss
        self._best_at_checkpoint = loss
        self._halved = torch.ones_like(loss, dtype=torch.bool)
        self._rises = torch.zeros_like(loss)
        self._steps_since = 0

    def update(self, step: int, loss: Tensor, best: Tensor) -> Tensor | None:
        """Record a step; at a checkpoint, return which patches (B,) restart from their best with half the step."""
        self._rises = self._rises + (loss > self._loss)
        self._loss, self._steps_since = loss, self._steps_since + 1
        if step not in self._checkpoints:
            return None
        few_rises = self._rises <= _MIN_RISING * self._steps_since
        no_progress = ~self._halved & (self._best_at_checkpoint >= best)
        self._halved = few_rises | no_progress
        self._best_at_checkpoint, self._rises, self._steps_since = best, torch.zeros_like(loss), 0
        return self._halved


def _where(which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(which.view(-1, 1, 1, 1), yes, no)


def _project(points: Tensor, images: Tensor, eps: float, norm: Norm) -> Tensor:
    """Project as AutoAttack does, to the bit: for l-inf, points inside the ball are left untouched."""
    if norm == "linf":
        return torch.minimum(torch.maximum(points, images - eps), images + eps).clamp(0, 1)
    return project(points, images, eps, norm)
