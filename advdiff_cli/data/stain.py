"""Color deconvolution: hematoxylin, eosin and residual stain in optical density.

Source: Ruifrok & Johnston 2001, Quantification of histochemical staining by color deconvolution.
"""

import torch
from torch import Tensor

HED = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
"""Optical density of one unit of hematoxylin, eosin and residual (DAB) in red, green and blue."""

_UNIT = HED / HED.norm(dim=1, keepdim=True)
_INVERSE = torch.linalg.inv(_UNIT)
_MIN_VALUE = 1 / 255  # the optical density of an 8-bit pixel is at most -ln(1/255)


def separate(images: Tensor) -> Tensor:
    """Return stain amounts (B, 3, H, W) of images (B, 3, H, W) in [0, 1]."""
    density = -images.clamp(min=_MIN_VALUE).log()
    return torch.einsum("bchw,cs->bshw", density, _INVERSE.to(images.device))


def mix(stains: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] of stain amounts (B, 3, H, W)."""
    return torch.einsum("bshw,sc->bchw", stains, _UNIT.to(stains.device)).neg().exp().clamp(0, 1)
