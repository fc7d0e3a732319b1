"""Fingerprints of rows, by which results on the same patches are matched.

The fingerprint of a row is the SHA-256 of its image as stored: the type, the size, and the pixels (3, H, W). What is
made from a row, such as its attacked image, keeps the fingerprint of the patch that it was first made from.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.patch_source import FINGERPRINT_BYTES, Images, RowFingerprints

KeyedRows = tuple[RowFingerprints, NDArray[np.int64]]


def fingerprint_rows(images: Images) -> RowFingerprints:
    """Return the fingerprints (B, 32) of images (B, 3, H, W)."""
    head = f"{images.dtype} {images.shape[2]}x{images.shape[3]}\n".encode()
    return np.stack([np.frombuffer(hashlib.sha256(head + row.tobytes()).digest(), np.uint8) for row in images])


def shared_rows(first: KeyedRows, second: KeyedRows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the rows that two sets share, in each.

    Where a set holds a patch several times, rows with the same index are paired, and the others in their order.

    Args:
        first: The fingerprints (N, 32) of the rows of a set, and their indices (N,).
        second: Those of another set.
    """
    (patches, index), (other_patches, other_index) = (
        ([p.tobytes() for p in f], i.tolist()) for f, i in (first, second)
    )
    exact = {key: j for j, key in enumerate(zip(other_patches, other_index, strict=True))}
    paired = {i: exact[key] for i, key in enumerate(zip(patches, index, strict=True)) if key in exact}
    left, taken = defaultdict[bytes, deque[int]](deque), set(paired.values())
    for j, patch in enumerate(other_patches):
        if j not in taken:
            left[patch].append(j)
    for i, patch in enumerate(patches):
        if i not in paired and left.get(patch):
            paired[i] = left[patch].popleft()
    rows = sorted(paired)
    return np.array(rows, np.int64), np.array([paired[i] for i in rows], np.int64)


def as_text(fingerprint: NDArray[np.uint8]) -> str:
    """Return a fingerprint in hexadecimal, as tables hold it."""
    return fingerprint.tobytes().hex()


def from_texts(texts: Sequence[str]) -> RowFingerprints:
    """Return the fingerprints (N, 32) that `as_text` wrote; ValueError if one is damaged."""
    if any(len(text) != 2 * FINGERPRINT_BYTES for text in texts):
        raise ValueError("a fingerprint has 64 digits")
    return np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(len(texts), FINGERPRINT_BYTES)
