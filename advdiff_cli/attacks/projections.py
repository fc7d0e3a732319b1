"""Norm balls: random points, steepest-ascent steps, projections, and rounding to 8 bits inside the ball."""

import torch
from torch import Tensor

from advdiff_cli.attacks.spec import Norm
from advdiff_cli.data.philox import DeviceStreams
from advdiff_cli.data.rng import RowStreams

_TINY = 1e-6  # values below it are scaled up, so that their squares are not 0
_ROUNDING_SLACK = 1e-4  # of 1/255: float error of an 8-bit value


def _norms(delta: Tensor) -> Tensor:
    norms: Tensor = delta.square().flatten(1).sum(1).sqrt()
    return norms.view(-1, 1, 1, 1)


def _unit(delta: Tensor) -> Tensor:
    return delta / (_norms(delta) + 1e-12)


def random_point(images: Tensor, eps: float, norm: Norm, streams: RowStreams | DeviceStreams) -> Tensor:
    """Draw a uniform point of the ball around each image (B, 3, H, W), clipped to [0, 1]."""
    shape = images.shape[1:]
    if norm == "linf":
        delta = streams.uniform(*shape) * eps
    else:
        direction = streams.normal(*shape)
        radius = (streams.uniform(1, 1, 1) / 2 + 0.5) ** (1 / direction[0].numel())
        delta = direction / _norms(direction) * radius * eps
    return (images + delta.to(images.device)).clamp(0, 1)


def random_surface_point(images: Tensor, eps: float, norm: Norm, streams: RowStreams) -> Tensor:
    """Draw a point on the ball's surface around each image, a corner for l-inf, clipped to [0, 1]: a control."""
    direction = streams.normal(*images.shape[1:]).to(images.device)
    return (images + eps * steepest(direction, norm)).clamp(0, 1)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the unit step of steepest ascent: the sign for l-inf, the direction for l2; NaN counts as 0."""
    gradient = gradient.nan_to_num(0)
    if norm == "linf":
        return gradient.sign()
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    tiny = (largest > 0) & (largest < _TINY)
    return _unit(gradient / torch.where(tiny, largest, 1))


def project(points: Tensor, images: Tensor, eps: float, norm: Norm) -> Tensor:
    """Project points (B, 3, H, W) onto the eps-ball around `images`, and then onto [0, 1]."""
    delta = points - images
    delta = delta.clamp(-eps, eps) if norm == "linf" else _unit(delta) * _norms(delta).clamp(max=eps)
    return (images + delta).clamp(0, 1)


def round_inside(points: Tensor, images: Tensor, eps: float, norm: Norm) -> Tensor:
    """Round to multiples of 1/255 without leaving the ball, as in an 8-bit file of the attack.

    For l2, round towards the image; this never lengthens the perturbation of an 8-bit image.
    """
    slack = _ROUNDING_SLACK
    if norm == "linf":
        low, high = ((images - eps) * 255 - slack).ceil(), ((images + eps) * 255 + slack).floor()
        return torch.minimum(torch.maximum((points * 255).round(), low), high).clamp(0, 255) / 255
    toward = torch.where(points > images, (points * 255 + slack).floor(), (points * 255 - slack).ceil())
    return toward.clamp(0, 255) / 255


def surface_counts(points: Tensor, images: Tensor, eps: float, norm: Norm) -> tuple[float, float]:
    """Return how many values (l-inf) or patches (l2) are on the ball's surface, and how many are perturbed."""
    delta = (points - images).abs() if norm == "linf" else _norms(points - images)
    moved = delta > 1e-7
    return float((delta >= eps * (1 - 1e-3)).logical_and(moved).sum()), float(moved.sum())
