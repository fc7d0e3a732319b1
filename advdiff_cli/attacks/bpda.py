"""Backward pass differentiable approximation: the gradient of a purifier is replaced by that of the identity."""

from typing import Any

import torch
from torch import Tensor

from advdiff_cli.purification.defended_classifier import DefendedClassifier


class BpdaClassifier(DefendedClassifier):
    """BPDA: purification in the forward pass, and the identity in the backward pass (Athalye et al. 2018,
    arXiv:1802.00420)."""

    def purify(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the purified images, with the gradient of the images themselves."""
        with torch.no_grad():
            purified = super().purify(images, noise)
        replaced: Tensor = _StraightThrough.apply(images, purified)
        return replaced


class _StraightThrough(torch.autograd.Function):
    """Return the second argument; pass the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, purified: Tensor) -> Tensor:
        return purified

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
