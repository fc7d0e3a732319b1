"""The objective of an attack: a loss, averaged over draws of the noise of a random defense (EOT).

Source: expectation over transformation, Athalye et al. 2018, arXiv:1802.00420. Every draw of every step has its own
stream, so that no draw is used twice. The draws that choose among iterates were seen by no gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advdiff_cli.attacks.losses import LOSSES
from advdiff_cli.attacks.spec import LossName
from advdiff_cli.data.rng import RowKey
from advdiff_cli.purification.defended_classifier import DefendedClassifier, logits_of_draws

CHOICE_DRAWS = 8
"""Draws on which the final iterate is chosen."""
CANDIDATES = 3
"""Iterates among which it is chosen, besides the last."""


@dataclass(frozen=True)
class ObjectiveSpec:
    """How the objective of an attack is computed.

    Args:
        loss: `ce` or `margin`.
        eot: Number of draws that each gradient averages.
        gradient_model: The model whose gradient is used, if not the attacked one (BPDA, or a surrogate).
        seed: Names, together with the row and the restart, the streams of the noise.
    """

    loss: LossName = "ce"
    eot: int = 1
    gradient_model: DefendedClassifier | None = None
    seed: int = 0


DEFAULT = ObjectiveSpec()


class Objective:
    """The loss of a batch as a function of the adversarial images and the step of the attack."""

    def __init__(
        self,
        model: nn.Module,
        labels: Tensor,
        rows: Sequence[RowKey],
        spec: ObjectiveSpec = DEFAULT,
        restart: int = 0,
    ) -> None:
        """Set up the objective.

        Args:
            model: The attacked model, from images in [0, 1] to logits. The loss of a `DefendedClassifier` is a mean
                over draws; any other model is assumed to be deterministic.
            labels: (B,) int64, or class probabilities (B, classes) with the `ce` loss.
            rows: The name of each row.
            spec: Loss, draws, gradient and seed.
            restart: Which restart of the attack this is.
        """
        self._model = model
        self._gradient_model = spec.gradient_model or model
        self._labels = labels
        self._loss = LOSSES[spec.loss]
        self.random = isinstance(model, DefendedClassifier)
        self._eot = spec.eot if self.random else 1
        self._rows, self._seed, self._restart = rows, spec.seed, restart

    def _losses(self, model: nn.Module, points: Tensor, purpose: str, draws: range) -> Iterator[Tensor]:
        restart = self._restart if purpose == "attack" else 0  # restarts are compared on the same draws
        logits = logits_of_draws(
            model, points, self._rows, seed=self._seed, purpose=purpose, draws=draws, restart=restart
        )
        return (self._loss(z, self._labels) for z in logits)

    def gradient(self, points: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the mean loss (B,) over the draws of `step`, and its gradient (B, 3, H, W)."""
        total, gradient = torch.zeros(len(points), device=points.device), torch.zeros_like(points)
        for draw in range(step * self._eot, (step + 1) * self._eot):  # one graph at a time
            x = points.detach().requires_grad_()
            with torch.enable_grad():
                (values,) = self._losses(self._gradient_model, x, "attack", range(draw, draw + 1))
                (of_draw,) = torch.autograd.grad(values.sum(), x)
            total, gradient = total + values.detach(), gradient + of_draw
        return (total, gradient) if self._eot == 1 else (total / self._eot, gradient / self._eot)

    @torch.no_grad()
    def value(self, points: Tensor, step: int, draws: int | None = None, purpose: str = "attack") -> Tensor:
        """Return the mean loss (B,) of the attacked model over the draws of `step`: `draws` of them, or `eot`."""
        k = (draws or self._eot) if self.random else 1
        return torch.stack([*self._losses(self._model, points, purpose, range(step * k, step * k + k))]).mean(0)

    def choose(self, iterates: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the best iterate (B, 3, H, W) of each patch, and its loss (B,).

        For a deterministic model it is the iterate with the largest loss. For a random one, lucky draws must not
        decide: the iterates with the largest losses, and the last one, are compared on fresh draws.
        """
        kept: list[Tensor] = []
        losses = torch.empty(0)
        x = None
        for x, loss in iterates:
            if not kept:
                kept, losses = [x], loss[None].clone()
            elif len(kept) < (CANDIDATES if self.random else 1):
                kept, losses = [*kept, x], torch.cat([losses, loss[None]])
            else:
                _replace_worst(kept, losses, x, loss)
        if x is None:
            raise ValueError("no iterates to choose from")
        if not self.random:
            return kept[0], losses[0]
        return self.best(kept if kept[-1] is x else [*kept, x])

    def best(self, candidates: Sequence[Tensor], purpose: str = "attack-choice") -> tuple[Tensor, Tensor]:
        """Return the candidate with the largest loss for each patch, on the draws of `purpose`, and that loss (B,)."""
        fresh = torch.stack([self.value(c, 0, CHOICE_DRAWS, purpose) for c in candidates])
        loss, at = fresh.max(0)
        stacked = torch.stack(list(candidates))
        return stacked[at, torch.arange(len(at), device=at.device)], loss


def _replace_worst(kept: list[Tensor], losses: Tensor, x: Tensor, loss: Tensor) -> None:
    """Replace, in place, each patch's kept iterate of the smallest loss by x (B, 3, H, W) where x has a larger loss."""
    smallest, at = losses.min(0)
    better = loss > smallest
    for k in range(len(kept)):
        replaced = better & (at == k)
        kept[k] = torch.where(replaced.view(-1, 1, 1, 1), x, kept[k])
        losses[k] = torch.where(replaced, loss, losses[k])


def best_restart(run: Callable[[int], tuple[Tensor, Tensor]], restarts: int) -> Tensor:
    """Return the adversarial image (B, 3, H, W) with the largest loss over restarts of `run`, for each patch."""
    adv, best = run(0)
    for restart in range(1, restarts):
        x, loss = run(restart)
        better = loss > best
        adv, best = torch.where(better.view(-1, 1, 1, 1), x, adv), torch.where(better, loss, best)
    return adv


def check_images(images: Tensor) -> None:
    """Check that `images` are float in [0, 1].

    Raises:
        ValueError: They are not.
    """
    if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
        raise ValueError("images must be float in [0, 1]")
