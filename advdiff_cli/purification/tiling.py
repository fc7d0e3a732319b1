"""Noise prediction on large images in overlapping windows, blended without seams.

Only the prediction of the noise is computed in windows. The noise, the sampler and the clipping act on the whole image,
so that the predictions of two windows for a pixel differ only because of the context they see.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from advdiff_cli.purification.equations import MAX_UNTILED

WINDOW = 256  # side of a window in pixels
OVERLAP = 64  # pixels
BATCH = 16  # windows computed together; always a full batch, so that results do not depend on their number


def predict_in_windows(predict: Callable[[Tensor], Tensor], images: Tensor, multiple: int) -> Tensor:
    """Return predict(images), computed in windows where the images are large.

    Args:
        predict: From (B, 3, H', W') to the same shape.
        images: (B, 3, H, W), with sides that are multiples of `multiple`.
        multiple: The positions of windows are multiples of it; it divides WINDOW.
    """
    if max(images.shape[-2:]) <= MAX_UNTILED:
        return predict(images)
    blended, total = torch.zeros_like(images), torch.zeros_like(images[:, :1])
    add_windows(predict, images, multiple, blended, total)
    return blended / total


def add_windows(
    predict: Callable[[Tensor], Tensor], images: Tensor, multiple: int, blended: Tensor, total: Tensor
) -> None:
    """Add weighted predictions of all windows to `blended` (B, 3, H, W), and their weights to `total` (B, 1, H, W).

    The other arguments are those of `predict_in_windows`, for large images.
    """
    height, width = images.shape[-2:]
    sides = min(WINDOW, height), min(WINDOW, width)
    windows = [
        (b, top, left)
        for b in range(len(images))
        for top in window_starts(height, sides[0], multiple)
        for left in window_starts(width, sides[1], multiple)
    ]
    weight = (_ramp(sides[0]).unsqueeze(1) * _ramp(sides[1])).to(images.device)
    for k in range(0, len(windows), BATCH):
        chunk = windows[k : k + BATCH]
        full = [*chunk, *[chunk[-1]] * (BATCH - len(chunk))]
        crops = torch.stack([images[b, :, t : t + sides[0], c : c + sides[1]] for b, t, c in full])
        for (b, t, c), predicted in zip(chunk, predict(crops), strict=False):
            blended[b, :, t : t + sides[0], c : c + sides[1]] += predicted * weight
            total[b, :, t : t + sides[0], c : c + sides[1]] += weight


def window_starts(length: int, side: int, multiple: int) -> list[int]:
    """Return where windows of `side` start along `length`, overlapping by at least OVERLAP and covering all of it."""
    if length <= side:
        return [0]
    count = -(-(length - side) // (side - OVERLAP)) + 1
    return [round(i * (length - side) / (count - 1) / multiple) * multiple for i in range(count)]


def _ramp(side: int) -> Tensor:
    """Return weights (side,) that rise linearly over the overlap from both ends."""
    distance = torch.minimum(torch.arange(1.0, side + 1), torch.arange(float(side), 0.0, -1))
    return (distance / OVERLAP).clamp(max=1)
