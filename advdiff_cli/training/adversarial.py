"""What a classifier learns from: patches as they are, behind a defence, or attacked where they would be attacked.

Adversarial training: Madry et al. 2018, arXiv:1706.06083, eq. 2.1; TRADES: Zhang et al. 2019, arXiv:1901.08573, eq. 5.
Perturbations are made in eval mode, so that the running statistics of batch normalisation see none of the iterates
(Pang et al. 2021, arXiv:2010.00467, section 3.6).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from advdiff_cli.attacks.eot import Objective
from advdiff_cli.attacks.projections import project, random_start, steepest
from advdiff_cli.data.rng import RowKey, RowStreams, stream
from advdiff_cli.models.device import autocast
from advdiff_cli.purification.defended_classifier import DefendedClassifier, row_noise
from advdiff_cli.purification.purifier import Purifier


@dataclass(frozen=True)
class Adversary:
    """PGD, l-inf, from a random start: its last iterate is learnt from.

    Steps are of 2.5 eps / steps (Madry et al. 2018), 1.25 eps at most (Wong et al. 2020, arXiv:2001.03994, for one).
    """

    eps: float  # in [0, 1] pixels
    steps: int
    loss: Literal["madry", "trades"]
    beta: float = 6.0  # TRADES: weight of the divergence between clean and attacked outputs

    @property
    def step_size(self) -> float:
        """The size of a step in [0, 1] pixels."""
        return self.eps * min(2.5 / self.steps, 1.25)


@dataclass(frozen=True)
class Regime:
    """How the patches of a batch become what the classifier is shown.

    Args:
        purifiers: Each patch passes one of them, at random; None leaves it as it is.
        adversary: What attacks the patches, through the purifier that each then passes; None for no attack.
        precision: Of the purifiers.
        seed: Of every stream.
    """

    purifiers: Sequence[Purifier | None] = (None,)
    adversary: Adversary | None = None
    precision: str = "fp32"
    seed: int = 0

    def loss(
        self, network: nn.Module, model: nn.Module, images: Tensor, labels: Tensor, rows: Sequence[RowKey]
    ) -> Tensor:  # fmt: skip
        """Return the loss of a batch.

        Args:
            network: What learns, as the forwards that train it go.
            model: The same, as attacks see it: processes that train together share no gradient of theirs.
            images: (B, 3, H, W) in [0, 1].
            labels: (B,) int64.
            rows: What names each patch; no name comes twice.
        """
        adversary = self.adversary
        if adversary is None:
            return cross_entropy(network(self.shown(images, rows)), labels)
        adv = self.shown(self.attacked(model, images, labels, rows), rows)
        network.train()
        if adversary.loss == "madry":
            return cross_entropy(network(adv), labels)
        clean, attacked = network(torch.cat([self.shown(images, rows), adv])).chunk(2)
        divergence = kl_div(log_softmax(attacked, 1), log_softmax(clean, 1), reduction="batchmean", log_target=True)
        return cross_entropy(clean, labels) + adversary.beta * divergence

    @torch.no_grad()
    def shown(self, images: Tensor, rows: Sequence[RowKey]) -> Tensor:
        """Return what the classifier sees of images (B, 3, H, W): each behind its purifier, on a draw of its own."""
        shown = images.clone()
        for purifier, mine in self._groups(rows, images.device):
            if purifier is not None:
                names = [rows[i] for i in mine.tolist()]
                noise = row_noise(purifier, images[mine], names, seed=self.seed, purpose="train")
                with autocast(self.precision, images.device):
                    shown[mine] = purifier(images[mine], noise).to(images.dtype)
        return shown

    def attacked(self, model: nn.Module, images: Tensor, labels: Tensor, rows: Sequence[RowKey]) -> Tensor:
        """Return images (B, 3, H, W) attacked through their purifiers; `model` is left in eval mode."""
        if self.adversary is None:
            return images
        found = images.clone()
        model.eval()
        for purifier, mine in self._groups(rows, images.device):
            names = [rows[i] for i in mine.tolist()]
            defended = model if purifier is None else DefendedClassifier(purifier, model, self.precision).eval()
            found[mine] = self._ascent(self.adversary, defended, images[mine], labels[mine], names)
        return found

    def _ascent(
        self, adversary: Adversary, model: nn.Module, images: Tensor, labels: Tensor, rows: list[RowKey]
    ) -> Tensor:  # fmt: skip
        """Climb the cross-entropy with the labels, or for TRADES with the outputs on the images as they are."""
        if adversary.loss == "trades":
            with torch.no_grad():
                labels = model(images, *self._drawn(model, images, rows)).softmax(1)
        objective = Objective(model, labels, seed=self.seed, rows=rows)
        x = random_start(images, adversary.eps, "linf", RowStreams(self.seed, "attack-start", rows))
        for step in range(adversary.steps):
            _, gradient = objective.gradient(x, step)
            x = project(x + adversary.step_size * steepest(gradient, "linf"), images, adversary.eps, "linf")
        return x

    def _drawn(self, model: nn.Module, images: Tensor, rows: list[RowKey]) -> tuple[Tensor, ...]:
        """Return the noise that a defence takes; nothing for a classifier alone."""
        if not isinstance(model, DefendedClassifier):
            return ()
        return (model.noise(images, rows=rows, seed=self.seed, purpose="train"),)

    def _groups(self, rows: Sequence[RowKey], device: torch.device) -> list[tuple[Purifier | None, Tensor]]:
        """Return each purifier with the positions of the patches that pass it."""
        which = stream(self.seed, "purifier", rows[0]).integers(len(self.purifiers), size=len(rows))
        positions = ((p, torch.from_numpy((which == k).nonzero()[0])) for k, p in enumerate(self.purifiers))
        return [(p, mine.to(device)) for p, mine in positions if len(mine)]
