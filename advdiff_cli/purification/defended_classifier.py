"""The defended classifier, as a module that any attack library runs on, and what its gradient can be replaced by."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advdiff_cli.data.rng import RowKey, RowStreams
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.device import autocast
from advdiff_cli.purification.purifier import Purifier


def row_noise(
    purifier: Purifier, images: Tensor, rows: Sequence[RowKey], *,
    seed: int, purpose: str, draw: int = 0, restart: int = 0,
) -> Tensor:  # fmt: skip
    """Return what `purifier` takes as noise for images (B, 3, H, W), each row's from the stream that names it."""
    streams = RowStreams(seed, purpose, rows, draw=draw, restart=restart)
    return streams.normal(*purifier.noise_shape(*images.shape[-2:])).to(images.device)


class DefendedClassifier(nn.Module):
    """A purifier, then a classifier: images (B, 3, H, W) in [0, 1] to logits, differentiable through every step.

    Called with images alone it draws its noise from torch's global stream, as any randomised model does; `fixed`
    freezes the noise, for tools that take a model to be a function.
    """

    def __init__(self, purifier: Purifier, classifier: nn.Module, precision: str = "fp32") -> None:
        """Put `purifier`, which computes at `precision` (fp32, bf16 or fp16), before `classifier`."""
        super().__init__()
        self.precision = precision
        self.purifier = purifier
        self.classifier = classifier

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return logits (B, classes); noise as for the purifier."""
        logits: Tensor = self.classifier(self.purified(images, noise))
        return logits

    def purified(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return what the classifier sees (B, 3, H, W)."""
        with autocast(self.precision, images.device):
            purified: Tensor = self.purifier(images, noise)
        return purified.to(images.dtype)

    def noise(
        self, images: Tensor, *, rows: Sequence[RowKey], seed: int, purpose: str, draw: int = 0, restart: int = 0
    ) -> Tensor:
        """Return a draw of the noise for images (B, 3, H, W), each row's from its own stream."""
        return row_noise(self.purifier, images, rows, seed=seed, purpose=purpose, draw=draw, restart=restart)

    def fixed(self, noise: Tensor) -> "FixedNoise":
        """Return the deterministic model that always draws `noise`: (B, ...) for a batch, (1, ...) shared by any."""
        return FixedNoise(self, noise)


def judged_at_once(model: nn.Module) -> int:
    """Return how many patches of a batch are judged: fewer where a U-Net stands before the classifier."""
    return 16 if isinstance(model, DefendedClassifier) else 64


def finite(logits: Tensor, rows: Sequence[RowKey], path: Path) -> Tensor:
    """Return logits (B, classes) of the rows of `path`; AdvdiffError where one is not finite, and so no decision."""
    whole = logits.isfinite().all(1)
    if not whole.all():
        row = rows[int(whole.int().argmin())]
        raise AdvdiffError(f"the logits of row {row} of {path} are not finite; compute at --precision fp32")
    return logits


class FixedNoise(nn.Module):
    """A defended classifier whose noise never changes: a function of the images ("Deterministic White-Box",
    arXiv:2404.14309), on which attacks for deterministic models are valid."""

    frozen: Tensor

    def __init__(self, defended: DefendedClassifier, noise: Tensor) -> None:
        """Freeze `noise`: one draw for each image of the batches to come, or one (1, ...) that all share."""
        super().__init__()
        self.defended = defended
        self.register_buffer("frozen", noise)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        logits: Tensor = self.defended(images, self.frozen.expand(len(images), *self.frozen.shape[1:]))
        return logits


class StraightThrough(DefendedClassifier):
    """BPDA: the defence forward, and backward as if it were the identity (Athalye et al. 2018, arXiv:1802.00420)."""

    def purified(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return what the classifier sees, with the gradient of the images themselves."""
        with torch.no_grad():
            purified = super().purified(images, noise)
        passed: Tensor = _Identity.apply(images, purified)
        return passed


class _Identity(torch.autograd.Function):
    """The second argument forward; the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, purified: Tensor) -> Tensor:
        return purified

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
