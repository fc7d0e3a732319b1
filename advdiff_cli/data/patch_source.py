"""The interface of every kind of patch set, and the checks they share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.provenance import Provenance
from advdiff_cli.data.rng import RowKey
from advdiff_cli.errors import AdvdiffError

Images = NDArray[Any]  # (B, 3, H, W) uint8 or float32
Rows = NDArray[np.int64]
RowFingerprints = NDArray[np.uint8]  # (N, 32)

ORIGINS = "origin_sha256"
"""The name of the tensor of fingerprints (N, 32) of the patches that rows were first made from."""
FINGERPRINT_BYTES = 32

MIN_SIZE = 32  # pixels
MAX_PIXELS = 89_478_485  # of an image that is read at once: Pillow's own limit
MAX_PATCH_PIXELS = 2048 * 2048  # of a patch that is computed whole, unless more is asked for


class PatchSource(Protocol):
    """A patch set as stored: images by row, and what is known about the rows."""

    path: Path
    inputs: Sequence[Path]  # files that a command reads and never replaces
    shape: tuple[int, int] | None  # (H, W), or None where images differ in size
    labels: Rows | None
    index: Rows
    keys: Sequence[RowKey]
    provenance: Provenance | None
    origins: RowFingerprints | None  # of the patches that the rows were first made from; None where these are they

    def __len__(self) -> int: ...

    def read(self, rows: Rows) -> Images:
        """Return the images at positions `rows`, all of one size."""
        ...


def check_layout(path: Path, images: tuple[int, ...], dtype: str, counts: dict[str, int]) -> None:
    """Check that images are (N, 3, H, W) uint8 or float32 and that every other tensor has N rows.

    Raises:
        AdvdiffError: They are not.
    """
    if len(images) != 4 or images[1] != 3:
        raise AdvdiffError(f"the images of {path} have shape {images}; (N, 3, H, W) is needed")
    if dtype not in ("uint8", "float32"):
        raise AdvdiffError(f"the images of {path} are {dtype}; float32 in [0, 1] or uint8 is needed")
    if images[2] * images[3] > MAX_PIXELS:
        raise AdvdiffError(f"the images of {path} are {images[2]}x{images[3]} pixels; cut them into tiles")
    if images[0] == 0:
        raise AdvdiffError(f"{path} holds no patches")
    for name, count in counts.items():
        if count != images[0]:
            raise AdvdiffError(f"{path} holds {images[0]} images and {count} {name}; the counts must match")


def check_index(path: Path, index: NDArray[Any] | None, n: int) -> Rows:
    """Return the index as int64 (N,): without one, the positions of the n rows.

    Raises:
        AdvdiffError: Two rows have the same index.
    """
    if index is None:
        return np.arange(n)
    values, counts = np.unique(index, return_counts=True)
    if len(values) < len(index):
        twice = values[counts > 1][0]
        raise AdvdiffError(f"the index of {path} names row {twice} more than once; each row needs its own")
    return index.astype(np.int64)


def check_origins(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Check that the fingerprints of the origins are uint8 (N, 32).

    Raises:
        AdvdiffError: They are not.
    """
    if dtype != "uint8" or len(shape) != 2 or shape[1] != FINGERPRINT_BYTES:
        raise AdvdiffError(f"{ORIGINS} in {path} is {dtype} {shape}; uint8 (N, {FINGERPRINT_BYTES}) is needed")


def check_labels(path: Path, labels: NDArray[Any] | None) -> Rows | None:
    """Return labels as int64 (N,).

    Raises:
        AdvdiffError: A label is neither 0 nor 1.
    """
    if labels is None:
        return None
    if not np.isin(labels, (0, 1)).all():
        raise AdvdiffError(f"the labels of {path} are not all 0 or 1")
    return labels.astype(np.int64).reshape(-1)
