"""Projected gradient descent.

x <- project(x + step_size * steepest(grad loss)), from a random start. Source: Madry et al. 2018,
arXiv:1706.06083; one step of size eps without a random start is FGSM (Goodfellow et al. 2015).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from advdiff_cli.attacks.eot import Objective, best_restart, check_images
from advdiff_cli.attacks.losses import LossName
from advdiff_cli.attacks.projections import Norm, project, random_start, steepest
from advdiff_cli.data.rng import RowKey, RowStreams
from advdiff_cli.purification.defended_classifier import DefendedClassifier


def pgd(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int = 40, step_size: float | None = None,
    norm: Norm = "linf", loss: LossName = "ce", eot: int = 1, follow: DefendedClassifier | None = None,
    restarts: int = 1, start: bool = True, seed: int = 0, rows: Sequence[RowKey] | None = None,
) -> Tensor:  # fmt: skip
    """Maximise a loss inside the ball around each image, keeping each image's best iterate.

    Args:
        model: Images in [0, 1] to logits, in eval mode, parameters frozen. A `DefendedClassifier` is attacked in the
            mean over draws of its noise.
        images: (B, 3, H, W) float in [0, 1].
        labels: (B,) int64, the true classes.
        eps: Radius of the ball in [0, 1] pixels, e.g. 2/255.
        steps: Gradient steps.
        step_size: In [0, 1] pixels; eps / 4 by default.
        norm: `linf` or `l2`.
        loss: `ce` or `margin`.
        eot: Draws of the defence's noise a gradient is the mean of; a deterministic model takes one.
        follow: Whose gradient is taken instead of the model's: `StraightThrough` for BPDA, or a surrogate.
        restarts: Independent random starts; the best of them is kept.
        start: Whether to start at a random point of the ball, or at the image.
        seed: Names, with `rows`, the streams of starts and noise.
        rows: What names each image; 0, 1, ... by default.

    Returns:
        (B, 3, H, W) in [0, 1] and in the ball, misclassified or not.

    Raises:
        ValueError: `images` leave [0, 1] or are not float.
    """
    check_images(images)
    names = list(range(len(images)) if rows is None else rows)
    size = eps / 4 if step_size is None else step_size
    settings: dict[str, Any] = {"loss": loss, "eot": eot, "follow": follow, "seed": seed, "rows": names}

    def run(restart: int) -> tuple[Tensor, Tensor]:
        objective = Objective(model, labels, restart=restart, **settings)
        streams = RowStreams(seed, "attack-start", names, restart=restart)
        x_0 = random_start(images, eps, norm, streams) if start else images
        return objective.choose(iterates(objective, images, x_0, eps, steps, size, norm))

    return best_restart(run, restarts)


def iterates(
    objective: Objective, images: Tensor, x: Tensor, eps: float, steps: int, step_size: float, norm: Norm
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the start and the iterate after each step, each with its loss (B,)."""
    for step in range(steps):
        loss, gradient = objective.gradient(x, step)
        yield x, loss
        x = project(x + step_size * steepest(gradient, norm), images, eps, norm)
    yield x, objective.at(x, steps)
