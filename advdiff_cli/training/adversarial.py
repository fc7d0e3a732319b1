"""What a classifier is trained on: patches as they are, purified by a defense, or attacked.

Adversarial training: Madry et al. 2018, arXiv:1706.06083, eq. 2.1. TRADES: Zhang et al. 2019, arXiv:1901.08573, eq. 5.
Through noise, with l2 attacks, it is SmoothAdv: Salman et al. 2019, arXiv:1906.04584. Consistency: Jeong and Shin 2020,
arXiv:2006.04062.
Perturbations are made in eval mode, so that the running statistics of batch normalization see no iterate of the attack
(Pang et al. 2021, arXiv:2010.00467, section 3.6).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from advdiff_cli.attacks.eot import Objective, ObjectiveSpec
from advdiff_cli.attacks.pgd import Ball
from advdiff_cli.attacks.projections import random_point
from advdiff_cli.data.philox import DeviceStreams
from advdiff_cli.data.rng import NoiseKind, RowKey, RowStreams, stream
from advdiff_cli.models.device import autocast, to_device
from advdiff_cli.models.precision import Precision
from advdiff_cli.purification.defended_classifier import DefendedClassifier, logits_of_draws, row_noise
from advdiff_cli.purification.purifier import Purifier
from advdiff_cli.training.recipes import Adversary

CONSISTENCY_DRAWS = 2
"""Draws of the noise whose outputs are made consistent (m of Jeong and Shin)."""
ENTROPY_WEIGHT = 0.5
"""Weight of the entropy of their mean (eta of Jeong and Shin)."""


@dataclass(frozen=True)
class TrainingInput:
    """How the patches of a batch are purified and attacked before the classifier is trained on them.

    Args:
        purifiers: Each patch passes one of them, chosen at random; None leaves it unchanged.
        adversary: Attacks each patch through its purifier; None for no attack.
        precision: Of the purifiers; on CUDA also of the classifier in an attack.
        seed: Of every stream.
        consistency: Weight of consistency regularization, which trains each patch on two draws; 0 for none. Not with
            TRADES.
        noise: What draws the random starts of attacks.
    """

    purifiers: Sequence[Purifier | None] = (None,)
    adversary: Adversary | None = None
    precision: Precision = "fp32"
    seed: int = 0
    consistency: float = 0.0
    noise: NoiseKind = "numpy"

    def loss(
        self, network: nn.Module, model: nn.Module, images: Tensor, labels: Tensor, rows: Sequence[RowKey]
    ) -> Tensor:
        """Return the training loss of a batch.

        Args:
            network: The classifier as wrapped for training.
            model: The same classifier without the wrapper, for attacks, whose gradients processes do not share.
            images: (B, 3, H, W) in [0, 1].
            labels: (B,) int64.
            rows: The name of each patch; names are unique.
        """
        adv = self.perturb(model, images, labels, rows)
        network.train()
        if self.consistency:
            draws = [self.purify(adv, rows, draw) for draw in range(CONSISTENCY_DRAWS)]
            return consistency_loss(network(torch.cat(draws)).chunk(CONSISTENCY_DRAWS), labels, self.consistency)
        if self.adversary is None or self.adversary.loss == "madry":
            return cross_entropy(network(self.purify(adv, rows)), labels)
        clean, attacked = network(torch.cat([self.purify(images, rows), self.purify(adv, rows)])).chunk(2)
        divergence = kl_div(log_softmax(attacked, 1), log_softmax(clean, 1), reduction="batchmean", log_target=True)
        return cross_entropy(clean, labels) + self.adversary.beta * divergence

    @torch.no_grad()
    def purify(self, images: Tensor, rows: Sequence[RowKey], draw: int = 0) -> Tensor:
        """Return images (B, 3, H, W), each purified by its purifier with its own `draw` of the noise."""
        purified = images.clone()
        for purifier, names, chosen in self._groups(rows, images.device):
            if purifier is not None:
                noise = row_noise(purifier, images[chosen], names, seed=self.seed, purpose="train", draw=draw)
                with autocast(self.precision, images.device):
                    purified[chosen] = purifier(images[chosen], noise).to(images.dtype)
        return purified

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, rows: Sequence[RowKey]) -> Tensor:
        """Return images (B, 3, H, W), each attacked through its purifier; leaves `model` in eval mode."""
        if self.adversary is None:
            return images
        adv = images.clone()
        model.eval()
        for purifier, names, chosen in self._groups(rows, images.device):
            defended = model if purifier is None else DefendedClassifier(purifier, model, self.precision)
            with autocast(self.precision if images.device.type == "cuda" else "fp32", images.device):
                adv[chosen] = self._attack(self.adversary, defended, images[chosen], labels[chosen], names)
        return adv

    def _attack(
        self, adversary: Adversary, model: nn.Module, images: Tensor, labels: Tensor, rows: list[RowKey]
    ) -> Tensor:
        """Maximize the cross-entropy with the labels or, in TRADES, with the outputs on the clean images."""
        if adversary.loss == "trades":
            with torch.no_grad():
                (logits,) = logits_of_draws(model, images, rows, seed=self.seed, purpose="train", draws=range(1))
                labels = logits.float().softmax(1)
        objective = Objective(model, labels, rows, ObjectiveSpec(seed=self.seed))
        ball = Ball(images, adversary.eps, adversary.norm, adversary.step_size)
        name = (self.seed, "attack-start", rows)
        streams = DeviceStreams(*name, images.device) if self.noise == "philox" else RowStreams(*name)
        x = random_point(images, adversary.eps, adversary.norm, streams)
        for step in range(adversary.steps):
            x = ball.step(x, objective.gradient(x, step)[1])
        return x

    def _groups(
        self, rows: Sequence[RowKey], device: torch.device
    ) -> Iterator[tuple[Purifier | None, list[RowKey], Tensor]]:
        """Yield each purifier with the names and the positions of its patches."""
        which = stream(self.seed, "purifier", rows[0]).integers(len(self.purifiers), size=len(rows))
        for k, purifier in enumerate(self.purifiers):
            chosen = (which == k).nonzero()[0]
            if len(chosen):
                yield purifier, [rows[i] for i in chosen], to_device(torch.from_numpy(chosen), device)


def consistency_loss(logits: Sequence[Tensor], labels: Tensor, weight: float) -> Tensor:
    """Return the cross-entropy, regularized so that the noise changes outputs little.

    To it are added the mean divergence of a draw's outputs from the mean outputs, times `weight`, and the entropy of
    the mean outputs, times 0.5.

    Args:
        logits: (B, classes) of each draw of the noise.
        labels: (B,) int64.
        weight: Of the divergence (lambda of Jeong and Shin).
    """
    log_p = log_softmax(torch.stack(list(logits)), -1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))
    divergence = (log_mean.exp() * (log_mean - log_p)).sum(-1).mean()
    entropy = -(log_mean.exp() * log_mean).sum(-1).mean()
    of_labels = cross_entropy(log_p.flatten(0, 1), labels.repeat(len(log_p)))
    return of_labels + weight * divergence + ENTROPY_WEIGHT * entropy
