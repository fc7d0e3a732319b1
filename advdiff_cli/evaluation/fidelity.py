"""Fidelity of images to those they were made from: PSNR, SSIM, nuclei, and changed decisions.

SSIM is that of Wang et al. 2004, IEEE TIP 13(4), with a Gaussian window of 1.5 pixels. Nuclei are measured by the
hematoxylin of dark pixels in the center, where PCam's label is decided.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.filters import threshold_otsu
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.data.row_fingerprints import shared_rows
from advdiff_cli.data.stain import separate
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.statistics import bootstrap, wilson

CENTER = 32
"""Side in pixels of the central square of a patch; PCam's label is 1 if a pixel in it is tumor."""
_BATCH = 64


@dataclass(frozen=True)
class PatchFidelity:
    """For each patch (N,): PSNR in dB (infinite if nothing changed), SSIM, and nuclear mass before and after."""

    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]
    nuclei_before: NDArray[np.float64]
    nuclei_after: NDArray[np.float64]


def patch_fidelity(before: Tensor, after: Tensor) -> PatchFidelity:
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
    return PatchFidelity(np.array(psnr), np.array(ssim), columns[0], columns[1])


def nuclear_mass(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the hematoxylin (optical density) of dark nuclei in the center of two images (1, 3, H, W).

    Dark means above Otsu's threshold (1979) of the first image, for both images.
    """
    amounts = [separate(image)[0, 0].clamp(min=0).numpy() for image in (before, after)]
    dark = threshold_otsu(amounts[0])
    top, left = ((side - CENTER) // 2 for side in amounts[0].shape)
    centers = [a[top : top + CENTER, left : left + CENTER] for a in amounts]
    return float(centers[0][centers[0] > dark].sum()), float(centers[1][centers[1] > dark].sum())


def fidelity(reference: PatchSet, judged: Predictions, patches: PatchSet, predictions: Predictions) -> JsonObject:
    """Return the fidelity of `patches` to the rows of `reference` that they were made from, with intervals.

    Returns:
        n; the means over patches of psnr in dB (None if a patch did not change) and ssim; nuclear_mass, the total after
        divided by the total before; and flipped, the share of patches of each label for which the majority of draws
        changes its decision (None without such patches).

    Raises:
        AdvdiffError: The sets have no rows in common.
    """
    a, b = shared_rows((reference.origins(), reference.index), (patches.origins(), patches.index))
    if not len(a):
        raise AdvdiffError(f"{patches.path} was not made from rows of {reference.path}; name the clean set first")
    parts = [
        patch_fidelity(reference.read(a[i : i + _BATCH]), patches.read(b[i : i + _BATCH]))
        for i in range(0, len(a), _BATCH)
    ]
    psnr, ssim, before, after = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("psnr", "ssim", "nuclei_before", "nuclei_after")
    )
    one, other = judged.take(a), predictions.take(b)
    changed = one.decision != other.decision
    return {
        "n": len(a),
        "psnr": bootstrap(lambda rows: float(psnr[rows].mean()), one.labels).as_dict()
        if np.isfinite(psnr).all()
        else None,
        "ssim": bootstrap(lambda rows: float(ssim[rows].mean()), one.labels).as_dict(),
        "nuclear_mass": _ratio(before, after, one.labels),
        "flipped": {str(k): _share(changed[one.labels == k]) for k in (0, 1)},
    }


def _ratio(
    before: NDArray[np.float64], after: NDArray[np.float64], labels: NDArray[np.int64]
) -> dict[str, float | None] | None:
    if not before.sum():
        return None

    def ratio(rows: NDArray[np.int64]) -> float:
        mass = float(before[rows].sum())
        return float(after[rows].sum()) / mass if mass else math.nan  # a resample without nuclei: no interval

    return bootstrap(ratio, labels).as_dict()


def _share(which: NDArray[np.bool_]) -> dict[str, float | None] | None:
    return wilson(int(which.sum()), len(which)).as_dict() if len(which) else None
