"""Augmentation of a batch: the eight symmetries of the square (tissue has no orientation), and stain variation."""

import numpy as np
import torch
from torch import Tensor

from advdiff_cli.data.stain import mix, separate
from advdiff_cli.models.device import to_device


def random_symmetry(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply to each image (B, 3, H, W) a random one of four rotations and, half the time, a flip.

    Images that are not square are rotated by 0 or 180 degrees only.
    """
    square = images.shape[-1] == images.shape[-2]
    choice = rng.integers(0, 8, len(images))
    turned = images.clone()
    for k in range(8):
        at = (choice == k).nonzero()[0]
        if len(at):
            chosen = to_device(torch.from_numpy(at), images.device)
            part = torch.rot90(images[chosen], (k % 4) if square else 2 * (k % 2), (-2, -1))
            turned[chosen] = part.flip(-1) if k >= 4 else part
    return turned


def vary_stain(images: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Scale and shift each image's stain amounts by up to `strength` (Tellez et al. 2018, HED augmentation)."""
    factors = torch.from_numpy(rng.uniform(-strength, strength, (2, len(images), 3, 1, 1)).astype(np.float32))
    scale, shift = to_device(factors, images.device)
    return mix(separate(images) * (1 + scale) + shift)
