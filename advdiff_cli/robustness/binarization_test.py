"""The attack's unit test: a model changed so that an adversarial example provably exists must be broken.

Source: Zimmermann et al., NeurIPS 2022, arXiv:2206.13991. For each patch the classifier's head is replaced by a linear
readout of its features that tells one point on the ball's surface from the points inside; an attack that cannot find
its way there would miss real adversarial examples too. A randomised defence is tested on one frozen draw of its noise:
the surface point must exist, and under noise much larger than eps no readout could tell it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advdiff_cli.attacks.projections import random_start
from advdiff_cli.data.rng import RowKey, RowStreams
from advdiff_cli.purification.defended_classifier import DefendedClassifier, FixedNoise

INNER = 63  # points inside the ball, the patch among them
_TRIED = 64  # random points an attack must beat
PROBES = INNER + _TRIED + 4  # passes forward beside the attack's: the surface point's, thrice judged


@dataclass(frozen=True)
class Tested:
    """Patches (B,): whether the example exists, whether the attack found one, and whether chance did."""

    exists: Tensor
    broken: Tensor
    by_chance: Tensor


class Readout(nn.Module):
    """Features of a batch, each patch with its own linear readout: logits (0, score)."""

    def __init__(self, features: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor) -> None:
        """Read features (B, D) with weight (B, D) and bias (B,)."""
        super().__init__()
        self._features = features
        self._weight, self._bias = weight, bias

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 2); class 1 is the surface point's side."""
        score = (self._features(images) * self._weight).sum(1) + self._bias
        return torch.stack([torch.zeros_like(score), score], 1)


def head_input(classifier: nn.Module, images: Tensor) -> Callable[[Callable[[], Tensor]], Tensor] | None:
    """Return a function that runs a forward and gives what entered the classifier's head (B, D).

    The head is the last linear layer that a forward of `images` calls, if it takes one vector of each image; None if
    it does not, or there is none.
    """
    called: list[tuple[nn.Module, Tensor]] = []
    linear = [m for m in classifier.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_pre_hook(lambda m, inputs: called.append((m, inputs[0]))) for m in linear]
    try:
        with torch.no_grad():
            classifier(images)
    finally:
        for handle in handles:
            handle.remove()
    if not called or called[-1][1].shape[:-1] != images.shape[:1]:
        return None
    head = called[-1][0]

    def capture(forward: Callable[[], Tensor]) -> Tensor:
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            forward()
        finally:
            handle.remove()
        return seen[-1]

    return capture


def binarisation_test(
    model: nn.Module, classifier: nn.Module, images: Tensor, rows: Sequence[RowKey], *,
    eps: float, seed: int, attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> Tested | None:  # fmt: skip
    """Test an attack on the features of a batch; None where the classifier has no linear head.

    Args:
        model: The classifier, or the defended one.
        classifier: The classifier itself, whose last linear layer is replaced.
        images: (B, 3, H, W) in [0, 1].
        rows: What names each patch.
        eps: Radius of the l-inf ball.
        seed: Of points and noise.
        attack: (model, images, labels) -> adversarial images; told that class 0 is right.
    """
    capture = head_input(classifier, images)
    if capture is None:
        return None
    fixed: nn.Module = model
    if isinstance(model, DefendedClassifier):
        fixed = FixedNoise(model, model.noise(images, rows=rows, seed=seed, purpose="binarisation"))

    def features(x: Tensor) -> Tensor:
        return capture(lambda: fixed(x))

    def point(k: int, purpose: str) -> Tensor:
        return random_start(images, eps, "linf", RowStreams(seed, purpose, rows, draw=k))

    with torch.no_grad():
        corner = RowStreams(seed, "binarisation-surface", rows).uniform(*images.shape[1:]).sign().to(images)
        surface = features((images + eps * corner).clamp(0, 1))
        inner = torch.stack([features(images if k == 0 else point(k, "binarisation-inner")) for k in range(INNER)], 1)
        readout = Readout(features, *_separate(inner, surface))
        exists = readout((images + eps * corner).clamp(0, 1)).argmax(1) == 1
        exists &= readout(images).argmax(1) == 0
        tries = [readout(point(k, "binarisation-chance")).argmax(1) == 1 for k in range(_TRIED)]
    adv = attack(readout, images, torch.zeros(len(images), dtype=torch.int64, device=images.device))
    with torch.no_grad():
        broken = readout(adv).argmax(1) == 1
    return Tested(exists.cpu(), broken.cpu(), torch.stack(tries).any(0).cpu())


def _separate(inner: Tensor, surface: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (B, D) and bias (B,) that put `surface` (B, D) above 0 and `inner` (B, K, D) below.

    The boundary lies halfway between the surface point and the nearest inner one.
    """
    points = torch.cat([inner, surface[:, None]], 1).cpu().double()
    centre = points.mean(1, keepdim=True)
    targets = torch.cat([-torch.ones(inner.shape[:2]), torch.ones(len(inner), 1)], 1).to(points)
    weight = torch.linalg.pinv(points - centre) @ (targets - targets.mean(1, keepdim=True))[..., None]
    scores = (points @ weight).squeeze(-1)
    bias = -(scores[:, :-1].amax(1) + scores[:, -1]) / 2
    return weight.squeeze(-1).float().to(surface.device), bias.float().to(surface.device)
