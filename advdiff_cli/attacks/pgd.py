"""Projected gradient descent.

x <- project(x + step_size * steepest(grad loss)), from a random start. Source: Madry et al. 2018,
arXiv:1706.06083; one step of size eps without a random start is FGSM (Goodfellow et al. 2015).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from advdiff_cli.attacks.balls import Norm, project, random_start, steepest
from advdiff_cli.data.streams import RowKey, RowStreams


def pgd(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int = 40, step_size: float | None = None,
    norm: Norm = "linf", restarts: int = 1, start: bool = True, seed: int = 0, rows: Sequence[RowKey] | None = None,
) -> Tensor:  # fmt: skip
    """Maximise cross-entropy inside the ball around each image, keeping each image's best iterate.

    Args:
        model: Images in [0, 1] to logits, in eval mode, parameters frozen; called steps + 1 times a restart.
        images: (B, 3, H, W) float in [0, 1].
        labels: (B,) int64, the true classes.
        eps: Radius of the ball in [0, 1] pixels, e.g. 2/255.
        steps: Gradient steps.
        step_size: In [0, 1] pixels; eps / 4 by default.
        norm: `linf` or `l2`.
        restarts: Independent random starts; the best of them is kept.
        start: Whether to start at a random point of the ball, or at the image.
        seed: Names, with `rows`, the streams of the random starts.
        rows: What names each image; 0, 1, ... by default.

    Returns:
        (B, 3, H, W) in [0, 1] and in the ball, misclassified or not.

    Raises:
        ValueError: `images` leave [0, 1] or are not float.
    """
    if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
        raise ValueError("images must be float in [0, 1]")
    names = range(len(images)) if rows is None else rows
    best, best_loss = images, torch.full((len(images),), -torch.inf, device=images.device)
    for restart in range(restarts):
        streams = RowStreams(seed, "attack-start", list(names), restart=restart)
        x_0 = random_start(images, eps, norm, streams) if start else images
        size = eps / 4 if step_size is None else step_size
        for x, loss in iterates(model, images, labels, x_0, eps, steps, size, norm):
            better = loss > best_loss
            best_loss = torch.where(better, loss, best_loss)
            best = torch.where(better.view(-1, 1, 1, 1), x, best)
    return best


def iterates(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    x: Tensor,
    eps: float,
    steps: int,
    step_size: float,
    norm: Norm,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the start and the iterate after each step, each with its loss (B,)."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(model(x), labels, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        yield x.detach(), loss.detach()
        x = project(x.detach() + step_size * steepest(gradient, norm), images, eps, norm)
    with torch.no_grad():
        yield x, cross_entropy(model(x), labels, reduction="none")
