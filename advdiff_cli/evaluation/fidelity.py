"""How faithful images are to those they were made from: pixels, structure, nuclei, and what the classifier says.

PSNR; SSIM (Wang et al. 2004, IEEE TIP 13(4): Gaussian window of 1.5 pixels); the haematoxylin of dark nuclei in the
centre, where PCam's label is decided; and the share of patches on which the classifier changes its mind.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.filters import threshold_otsu
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.stain import separate
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.statistics import bootstrap, wilson

CENTRE = 32
"""Side in pixels of the square in the centre of a patch, a tumour pixel in which makes PCam's label 1."""
_BATCH = 64


@dataclass(frozen=True)
class Likeness:
    """Of each patch (N,): PSNR in dB, infinite where nothing changed; SSIM; nuclear mass before and after."""

    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]
    nuclei_before: NDArray[np.float64]
    nuclei_after: NDArray[np.float64]


def likeness(before: Tensor, after: Tensor) -> Likeness:
    """Compare images (B, 3, H, W) in [0, 1] with those they were made from."""
    pairs = [
        (a.permute(1, 2, 0).double().numpy(), b.permute(1, 2, 0).double().numpy())
        for a, b in zip(before, after, strict=True)
    ]
    window: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    with np.errstate(divide="ignore"):
        psnr = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    ssim = [structural_similarity(a, b, data_range=1, channel_axis=2, **window) for a, b in pairs]
    nuclei = [nuclear_mass(a[None], b[None]) for a, b in zip(before, after, strict=True)]
    columns = np.array(nuclei).T
    return Likeness(np.array(psnr), np.array(ssim), columns[0], columns[1])


def nuclear_mass(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the haematoxylin (optical density) of dark nuclei in the centre of an image (1, 3, H, W), and of another.

    Dark is above the threshold of Otsu (1979) between nuclei and the rest of the first image, for both.
    """
    amounts = [separate(image)[0, 0].clamp(min=0).numpy() for image in (before, after)]
    dark = threshold_otsu(amounts[0])
    top, left = ((side - CENTRE) // 2 for side in amounts[0].shape)
    centres = [a[top : top + CENTRE, left : left + CENTRE] for a in amounts]
    return float(centres[0][centres[0] > dark].sum()), float(centres[1][centres[1] > dark].sum())


def fidelity(
    reference: PatchSet, judged: Predictions, patches: PatchSet, predictions: Predictions
) -> dict[str, Any]:  # fmt: skip
    """Return how faithful `patches` are to the rows of `reference` they were made from, every figure with its interval.

    Returns:
        n; psnr in dB (None where a patch did not change at all) and ssim, means over patches; nuclear_mass, its sum
        after over its sum before; flipped, the share of patches of each label on which the majority of draws decides
        otherwise, None where there are none.

    Raises:
        AdvdiffError: the sets have no rows in common.
    """
    _, a, b = np.intersect1d(reference.index, patches.index, return_indices=True)
    if reference.origin() != patches.origin() or not len(a):
        raise AdvdiffError(f"{patches.path} was not made from rows of {reference.path}: nothing to be faithful to")
    parts = [
        likeness(reference.read(a[i : i + _BATCH]), patches.read(b[i : i + _BATCH])) for i in range(0, len(a), _BATCH)
    ]
    psnr, ssim, before, after = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("psnr", "ssim", "nuclei_before", "nuclei_after")
    )
    one, other = judged.take(a), predictions.take(b)
    turned = one.decision != other.decision
    return {
        "n": len(a),
        "psnr": bootstrap(lambda rows: float(psnr[rows].mean()), one.labels).as_dict()
        if np.isfinite(psnr).all()
        else None,
        "ssim": bootstrap(lambda rows: float(ssim[rows].mean()), one.labels).as_dict(),
        "nuclear_mass": _ratio(before, after, one.labels),
        "flipped": {str(k): _share(turned[one.labels == k]) for k in (0, 1)},
    }


def _ratio(before: NDArray[np.float64], after: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, Any] | None:
    if not before.sum():
        return None
    return bootstrap(lambda rows: float(after[rows].sum() / max(before[rows].sum(), 1e-12)), labels).as_dict()


def _share(which: NDArray[np.bool_]) -> dict[str, Any] | None:
    return wilson(int(which.sum()), len(which)).as_dict() if len(which) else None
