"""Norm balls: random points, steps along a gradient, projections, and rounding to 8 bits inside the ball."""

from typing import Literal

import torch
from torch import Tensor

from advdiff_cli.data.rng import RowStreams

Norm = Literal["linf", "l2"]


def _norms(delta: Tensor) -> Tensor:
    norms: Tensor = delta.square().flatten(1).sum(1).sqrt()
    return norms.view(-1, 1, 1, 1)


def _unit(delta: Tensor) -> Tensor:
    return delta / (_norms(delta) + 1e-12)


def random_start(images: Tensor, eps: float, norm: Norm, streams: RowStreams) -> Tensor:
    """Draw a point of each image's ball (B, 3, H, W), uniformly, clipped to [0, 1]."""
    shape = images.shape[1:]
    if norm == "linf":
        delta = streams.uniform(*shape) * eps
    else:
        direction = streams.normal(*shape)
        radius = (streams.uniform(1, 1, 1) / 2 + 0.5) ** (1 / direction[0].numel())
        delta = direction / _norms(direction) * radius * eps
    return (images + delta.to(images.device)).clamp(0, 1)


def random_surface(images: Tensor, eps: float, norm: Norm, streams: RowStreams) -> Tensor:
    """Draw a point of the ball's surface (B, 3, H, W), for l-inf a corner, clipped to [0, 1]: a control, no attack."""
    direction = streams.normal(*images.shape[1:]).to(images.device)
    return (images + eps * steepest(direction, norm)).clamp(0, 1)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the unit step of steepest ascent: the sign for l-inf, the direction for l2; NaN leads nowhere."""
    gradient = gradient.nan_to_num(0)
    return gradient.sign() if norm == "linf" else _unit(gradient)


def project(points: Tensor, images: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return the points (B, 3, H, W) projected to the eps-ball around `images`, then to [0, 1]."""
    delta = points - images
    delta = delta.clamp(-eps, eps) if norm == "linf" else _unit(delta) * _norms(delta).clamp(max=eps)
    return (images + delta).clamp(0, 1)


def round_inside(points: Tensor, images: Tensor, eps: float, norm: Norm) -> Tensor:
    """Round to multiples of 1/255 without leaving the ball: what an 8-bit file of the attack would hold.

    l2 rounds towards the image, which never lengthens delta where the image itself is 8-bit.
    """
    slack = 1e-4
    if norm == "linf":
        low, high = ((images - eps) * 255 - slack).ceil(), ((images + eps) * 255 + slack).floor()
        return torch.minimum(torch.maximum((points * 255).round(), low), high).clamp(0, 255) / 255
    toward = torch.where(points > images, (points * 255 + slack).floor(), (points * 255 - slack).ceil())
    return toward.clamp(0, 255) / 255


def surface_share(points: Tensor, images: Tensor, eps: float, norm: Norm) -> tuple[float, float]:
    """Return how many perturbed values (l-inf) or patches (l2) lie on the ball's surface, and of how many."""
    delta = (points - images).abs() if norm == "linf" else _norms(points - images)
    moved = delta > 1e-7
    return float((delta >= eps * (1 - 1e-3)).logical_and(moved).sum()), float(moved.sum())
