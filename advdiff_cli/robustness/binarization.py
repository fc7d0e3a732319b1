"""The binarization test of an attack: it must find an adversarial example that provably exists.

For each patch, the head of the classifier is replaced by a linear readout of its features that separates one point on
the ball's surface from points inside. An attack that does not find this point would miss real adversarial examples too.
A random defense is tested on one fixed draw of its noise: the point must exist, and with noise much larger than eps no
readout could separate it.

Source: Zimmermann et al., NeurIPS 2022, arXiv:2206.13991.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from advdiff_cli.attacks.dispatch import AttackBatch, Target, run_attack
from advdiff_cli.attacks.projections import random_point
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.data.rng import RowKey, RowStreams
from advdiff_cli.data.selection import row_batches
from advdiff_cli.evaluation.statistics import Estimate, wilson
from advdiff_cli.jobs.attack import AttackJob
from advdiff_cli.purification.defended_classifier import DefendedClassifier

INNER_POINTS = 63  # inside the ball, the patch among them
RANDOM_POINTS = 64  # that an attack must beat
PROBE_PASSES = INNER_POINTS + RANDOM_POINTS + 4  # forward passes beside those of the attack


@dataclass(frozen=True)
class BinarizationResult:
    """The number n of patches with an example that exists, and the shares of them that the attack and chance find."""

    n: int
    broken: Estimate
    by_chance: Estimate

    def as_dict(self) -> JsonObject:
        """Return the fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the result of `as_dict`."""
        return cls(fields["n"], Estimate(**fields["broken"]), Estimate(**fields["by_chance"]))


@dataclass(frozen=True)
class TestedBatch:
    """For each patch (B,): whether its example exists, whether the attack found one, and whether chance did."""

    exists: Tensor
    broken: Tensor
    by_chance: Tensor


class LinearReadout(nn.Module):
    """A linear readout of features, with its own weights for each patch; logits are (0, score)."""

    def __init__(self, features: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor) -> None:
        """Read features (B, D) with weights (B, D) and biases (B,)."""
        super().__init__()
        self._features = features
        self._weight, self._bias = weight, bias

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 2); class 1 is the side of the surface point."""
        score = (self._features(images) * self._weight).sum(1) + self._bias
        return torch.stack([torch.zeros_like(score), score], 1)


def run_binarization_test(job: AttackJob, advance: Callable[[int], None]) -> BinarizationResult | None:
    """Test the attack of a job on its patches; None if the classifier has no linear head, or no example exists."""
    tested: list[TestedBatch] = []
    for rows in row_batches(len(job.patches), job.batch_size):
        batch = job.patches.batch(rows, job.device)

        def attack(model: nn.Module, x: Tensor, y: Tensor, keys: Sequence[RowKey] = batch.keys) -> Tensor:
            return run_attack(Target(model), job.spec, AttackBatch(x, y, keys, [], job.seed))

        one = binarization_test(
            job.model.module, job.model.classifier, batch.images, batch.keys, job.spec.eps, job.seed, attack
        )
        if one is None:
            return None
        tested.append(one)
        advance(len(rows))
    names = ("exists", "broken", "by_chance")
    exists, broken, chance = (torch.cat([getattr(t, name) for t in tested]).numpy() for name in names)
    n = int(exists.sum())
    if n == 0:
        return None
    return BinarizationResult(n, wilson(int(broken[exists].sum()), n), wilson(int(chance[exists].sum()), n))


def binarization_test(
    model: nn.Module,
    classifier: nn.Module,
    images: Tensor,
    rows: Sequence[RowKey],
    eps: float,
    seed: int,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> TestedBatch | None:
    """Test an attack on the features of a batch; None if the classifier has no linear head.

    Args:
        model: The classifier, or the defended classifier.
        classifier: The classifier itself, whose last linear layer is replaced.
        images: (B, 3, H, W) in [0, 1].
        rows: The name of each patch.
        eps: Radius of the l-inf ball.
        seed: Of points and noise.
        attack: (model, images, labels) -> adversarial images; the labels are all 0.
    """
    capture = capture_head_input(classifier, images)
    if capture is None:
        return None
    fixed = model
    if isinstance(model, DefendedClassifier):
        fixed = model.fixed(model.noise(images, rows=rows, seed=seed, purpose="binarisation"))

    def features(x: Tensor) -> Tensor:
        return capture(lambda: fixed(x))

    def point(k: int, purpose: str) -> Tensor:
        return random_point(images, eps, "linf", RowStreams(seed, purpose, rows, draw=k))

    with torch.no_grad():
        corner = RowStreams(seed, "binarisation-surface", rows).uniform(*images.shape[1:]).sign().to(images)
        surface_point = (images + eps * corner).clamp(0, 1)
        inner_points = [images, *(point(k, "binarisation-inner") for k in range(1, INNER_POINTS))]
        inner = torch.stack([features(x) for x in inner_points], 1)
        readout = LinearReadout(features, *separate(inner, features(surface_point)))
        exists = readout(surface_point).argmax(1) == 1
        exists &= readout(images).argmax(1) == 0
        chance = [readout(point(k, "binarisation-chance")).argmax(1) == 1 for k in range(RANDOM_POINTS)]
    adv = attack(readout, images, torch.zeros(len(images), dtype=torch.int64, device=images.device))
    with torch.no_grad():
        broken = readout(adv).argmax(1) == 1
    return TestedBatch(exists.cpu(), broken.cpu(), torch.stack(chance).any(0).cpu())


def capture_head_input(classifier: nn.Module, images: Tensor) -> Callable[[Callable[[], Tensor]], Tensor] | None:
    """Return a function that runs a forward pass and returns the input (B, D) of the classifier's head.

    The head is the last linear layer that a forward pass of `images` calls, if its input is one vector for each image.
    Return None if there is no such layer.
    """
    calls: list[tuple[nn.Module, Tensor]] = []
    linear = [m for m in classifier.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_pre_hook(lambda m, inputs: calls.append((m, inputs[0]))) for m in linear]
    try:
        with torch.no_grad():
            classifier(images)
    finally:
        for handle in handles:
            handle.remove()
    if not calls or calls[-1][1].shape[:-1] != images.shape[:1]:
        return None
    head = calls[-1][0]

    def capture(forward: Callable[[], Tensor]) -> Tensor:
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            forward()
        finally:
            handle.remove()
        return seen[-1]

    return capture


def separate(inner: Tensor, surface: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights (B, D) and biases (B,) with `surface` (B, D) above 0 and `inner` (B, K, D) below.

    The boundary is halfway between the surface point and the nearest inner point.
    """
    points = torch.cat([inner, surface[:, None]], 1).cpu().double()
    center = points.mean(1, keepdim=True)
    targets = torch.cat([-torch.ones(inner.shape[:2]), torch.ones(len(inner), 1)], 1).to(points)
    weight = torch.linalg.pinv(points - center) @ (targets - targets.mean(1, keepdim=True))[..., None]
    scores = (points @ weight).squeeze(-1)
    bias = -(scores[:, :-1].amax(1) + scores[:, -1]) / 2
    return weight.squeeze(-1).float().to(surface.device), bias.float().to(surface.device)
