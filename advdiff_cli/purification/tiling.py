"""Predictions on images too large to pass whole: overlapping windows, blended so that no seam shows.

Only the prediction of the noise is cut into windows; noise, sampler and clipping act on the whole image, so that what
two windows say of a pixel differs by what their surroundings say alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SIDE = 256
"""Side of a window in pixels; images of up to LARGEST pass whole."""
OVERLAP = 64
LARGEST = 384
BATCH = 16  # windows computed at once, always as many: a result does not depend on their number


def in_windows(predict: Callable[[Tensor], Tensor], images: Tensor, multiple: int) -> Tensor:
    """Return predict(images), computed in windows where the images are large.

    Args:
        predict: (B, 3, H', W') to the same shape.
        images: (B, 3, H, W), sides multiples of `multiple`.
        multiple: What the places of windows are multiples of; it divides SIDE.
    """
    height, width = images.shape[-2:]
    if max(height, width) <= LARGEST:
        return predict(images)
    sides = min(SIDE, height), min(SIDE, width)
    places = [
        (b, top, left)
        for b in range(len(images))
        for top in starts(height, sides[0], multiple)
        for left in starts(width, sides[1], multiple)
    ]
    weight = (_ramp(sides[0]).unsqueeze(1) * _ramp(sides[1])).to(images.device)
    blended, total = torch.zeros_like(images), torch.zeros_like(images[:, :1])
    for k in range(0, len(places), BATCH):
        some = places[k : k + BATCH]
        full = [*some, *[some[-1]] * (BATCH - len(some))]
        cut = torch.stack([images[b, :, t : t + sides[0], c : c + sides[1]] for b, t, c in full])
        for (b, t, c), found in zip(some, predict(cut), strict=False):
            blended[b, :, t : t + sides[0], c : c + sides[1]] += found * weight
            total[b, :, t : t + sides[0], c : c + sides[1]] += weight
    return blended / total


def starts(length: int, side: int, multiple: int) -> list[int]:
    """Return where windows of `side` begin along `length`, overlapping by OVERLAP at least, the last at the end."""
    if length <= side:
        return [0]
    count = -(-(length - side) // (side - OVERLAP)) + 1
    return [round(i * (length - side) / (count - 1) / multiple) * multiple for i in range(count)]


def _ramp(side: int) -> Tensor:
    """Return weights (side,) that rise over the overlap from both ends."""
    distance = torch.minimum(torch.arange(1.0, side + 1), torch.arange(float(side), 0.0, -1))
    return (distance / OVERLAP).clamp(max=1)
