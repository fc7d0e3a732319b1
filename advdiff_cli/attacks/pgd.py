"""Projected gradient descent: x <- project(x + step_size * steepest(gradient of the loss)).

Source: Madry et al. 2018, arXiv:1706.06083. One step of size eps from the image is FGSM (Goodfellow et al. 2015).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advdiff_cli.attacks.eot import Objective, ObjectiveSpec, best_restart, check_images
from advdiff_cli.attacks.projections import project, random_point, steepest
from advdiff_cli.attacks.spec import LossName, Norm
from advdiff_cli.data.rng import RowKey, RowStreams
from advdiff_cli.purification.defended_classifier import DefendedClassifier


@dataclass(frozen=True)
class Ball:
    """The norm ball of radius eps, in [0, 1] pixels, around each of `images` (B, 3, H, W), and the size of a step."""

    images: Tensor
    eps: float
    norm: Norm
    step_size: float

    def step(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the next iterate of projected gradient ascent."""
        return project(x + self.step_size * steepest(gradient, self.norm), self.images, self.eps, self.norm)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 40,
    step_size: float | None = None,
    momentum: float = 0.0,
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
    """Maximize a loss in the ball around each image, and keep the best iterate of each image.

    Args:
        model: Images in [0, 1] to logits, in eval mode, parameters frozen. The loss of a `DefendedClassifier` is a
            mean over draws of its noise.
        images: (B, 3, H, W) float in [0, 1].
        labels: (B,) int64, the true classes.
        eps: Radius of the ball in [0, 1] pixels, such as 2/255.
        steps: Gradient steps.
        step_size: In [0, 1] pixels; eps / 4 by default.
        momentum: The weight of earlier gradients in a step (Dong et al. 2018, arXiv:1710.06081, eq. 6, each divided by
            its mean absolute value). Behind a random defense, they are further draws of nearly the same gradient.
        norm: `linf` or `l2`.
        loss: `ce` or `margin`.
        eot: Draws of the defense's noise that each gradient averages; a deterministic model has one.
        gradient_model: The model whose gradient is used, if not `model`: a `BpdaClassifier`, or a surrogate.
        restarts: Random starts, of which the best result is kept.
        random_start: Whether to start at a random point of the ball, or at the image.
        start: (B, 3, H, W) in the ball, where the first restart starts instead.
        seed: Names, together with `rows`, the streams of starts and noise.
        rows: The name of each image; 0, 1, ... by default.

    Returns:
        (B, 3, H, W) in [0, 1] and in the ball, misclassified or not.

    Raises:
        ValueError: `images` are not float, or not in [0, 1].
    """
    check_images(images)
    names = list(range(len(images)) if rows is None else rows)
    ball = Ball(images, eps, norm, eps / 4 if step_size is None else step_size)
    spec = ObjectiveSpec(loss, eot, gradient_model, seed)

    def run(restart: int) -> tuple[Tensor, Tensor]:
        objective = Objective(model, labels, names, spec, restart)
        streams = RowStreams(seed, "attack-start", names, restart=restart)
        x_0 = random_point(images, eps, norm, streams) if random_start else images
        x_0 = x_0 if start is None or restart else start
        return objective.choose(iterates(objective, ball, x_0, steps, momentum))

    return best_restart(run, restarts)


def iterates(
    objective: Objective, ball: Ball, x: Tensor, steps: int, momentum: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the start x (B, 3, H, W) and the iterate after each step, each with its loss (B,)."""
    direction = torch.zeros_like(x)
    for step in range(steps):
        loss, gradient = objective.gradient(x, step)
        yield x, loss
        if momentum:
            gradient = gradient.nan_to_num(0)
            scale = gradient.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
            direction = gradient = momentum * direction + gradient / (scale + 1e-12)
        x = ball.step(x, gradient)
    yield x, objective.value(x, steps)
