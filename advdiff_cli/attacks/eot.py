"""What an attack maximises at a point: a loss, for a randomised defence its mean over draws of the noise (EOT).

Expectation over transformation: Athalye et al. 2018, arXiv:1802.00420. Every draw of every step is its own stream, so
none is seen twice, and those that choose among iterates are seen by no gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advdiff_cli.attacks.losses import LOSSES, LossName
from advdiff_cli.data.rng import RowKey
from advdiff_cli.purification.defended_classifier import DefendedClassifier

CHOOSING_DRAWS = 8
CANDIDATES = 3  # iterates that reach the final choice, besides the last


class Objective:
    """The loss of a batch at points of its balls, as a function of the points and the attack's step."""

    def __init__(
        self, model: nn.Module, labels: Tensor, *,
        loss: LossName = "ce", eot: int = 1, follow: DefendedClassifier | None = None,
        seed: int = 0, rows: Sequence[RowKey], restart: int = 0,
    ) -> None:  # fmt: skip
        """Set up the objective.

        Args:
            model: What is attacked, images in [0, 1] to logits. A `DefendedClassifier` is randomised: its loss is a
                mean over draws. Anything else is taken to be deterministic.
            labels: (B,) int64.
            loss: `ce` or `margin`.
            eot: Draws a gradient is the mean of.
            follow: What the gradient is taken of, when it is not `model` (BPDA, a surrogate of fewer steps).
            seed: Names, with `rows` and `restart`, the streams of the noise.
            rows: What names each patch.
            restart: Which restart of the attack this is.
        """
        self._model = model
        self._follow = follow or model
        self._labels = labels
        self._loss = LOSSES[loss]
        self.random = isinstance(model, DefendedClassifier)
        self._eot = eot if self.random else 1
        self._stream: dict[str, Any] = {"rows": rows, "seed": seed}
        self._restart = restart

    def _values(self, model: nn.Module, points: Tensor, purpose: str, draw: int) -> Tensor:
        if not isinstance(model, DefendedClassifier):
            return self._loss(model(points), self._labels)
        restart = self._restart if purpose == "attack" else 0  # restarts are compared on the same draws
        noise = model.noise(points, purpose=purpose, draw=draw, restart=restart, **self._stream)
        return self._loss(model(points, noise), self._labels)

    def gradient(self, points: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the mean loss (B,) over the draws of `step` and its gradient (B, 3, H, W); one graph at a time."""
        total, gradient = torch.zeros(len(points), device=points.device), torch.zeros_like(points)
        for draw in range(step * self._eot, (step + 1) * self._eot):
            x = points.detach().requires_grad_()
            with torch.enable_grad():
                values = self._values(self._follow, x, "attack", draw)
                (one,) = torch.autograd.grad(values.sum(), x)
            total, gradient = total + values.detach(), gradient + one
        return (total, gradient) if self._eot == 1 else (total / self._eot, gradient / self._eot)

    @torch.no_grad()
    def at(self, points: Tensor, step: int, draws: int | None = None, purpose: str = "attack") -> Tensor:
        """Return the mean loss (B,) of the attacked model over the draws of `step`, `eot` of them or `draws`."""
        k = (draws or self._eot) if self.random else 1
        return torch.stack([self._values(self._model, points, purpose, step * k + i) for i in range(k)]).mean(0)

    def choose(self, iterates: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return each patch's best iterate (B, 3, H, W) and its loss (B,).

        A deterministic model's is the iterate of the largest loss. A randomised one's lucky draws must not decide: the
        iterates of the largest losses under the draws of their steps, and the last, are compared on fresh draws.
        """
        kept: list[Tensor] = []
        losses = torch.empty(0)
        x = None
        for x, loss in iterates:
            if not kept:
                kept, losses = [x], loss[None].clone()
                continue
            if len(kept) < (CANDIDATES if self.random else 1):
                kept, losses = [*kept, x], torch.cat([losses, loss[None]])
                continue
            worst, at = losses.min(0)
            better = loss > worst
            for k in range(len(kept)):
                taken = better & (at == k)
                kept[k] = torch.where(taken.view(-1, 1, 1, 1), x, kept[k])
                losses[k] = torch.where(taken, loss, losses[k])
        if x is None:
            raise ValueError("no iterates to choose from")
        if not self.random:
            return kept[0], losses[0]
        return self.best([*kept, x])

    def best(self, candidates: Sequence[Tensor], purpose: str = "attack-choice") -> tuple[Tensor, Tensor]:
        """Return each patch's candidate of the largest loss, on draws that `purpose` names, and that loss (B,)."""
        fresh = torch.stack([self.at(c, 0, CHOOSING_DRAWS, purpose) for c in candidates])
        loss, at = fresh.max(0)
        stacked = torch.stack(list(candidates))
        return stacked[at, torch.arange(len(at), device=at.device)], loss


def best_restart(run: Callable[[int], tuple[Tensor, Tensor]], restarts: int) -> Tensor:
    """Return each patch's adversarial image (B, 3, H, W) of the largest loss over restarts of `run`."""
    adv, best = run(0)
    for restart in range(1, restarts):
        x, loss = run(restart)
        better = loss > best
        adv, best = torch.where(better.view(-1, 1, 1, 1), x, adv), torch.where(better, loss, best)
    return adv


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` are float in [0, 1]."""
    if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
        raise ValueError("images must be float in [0, 1]")
