"""Fingerprints of rows, by which results on the same patches are matched.

The fingerprint of a row is the SHA-256 of its image as stored: the type, the size, and the pixels (3, H, W). What is
made from a row, such as its attacked image, keeps the fingerprint of the patch that it was first made from.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.patch_source import FINGERPRINT_BYTES, Images, RowFingerprints


def fingerprint_rows(images: Images) -> RowFingerprints:
    """Return the fingerprints (B, 32) of images (B, 3, H, W)."""
    head = f"{images.dtype} {images.shape[2]}x{images.shape[3]}\n".encode()
    return np.stack([np.frombuffer(hashlib.sha256(head + row.tobytes()).digest(), np.uint8) for row in images])


def shared_rows(first: RowFingerprints, second: RowFingerprints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the rows that two sets share, in each; equal rows of a set are paired in their order."""
    _, a, b = np.intersect1d(_names(first), _names(second), return_indices=True)
    order = np.argsort(a)
    return a[order], b[order]


def _names(fingerprints: RowFingerprints) -> NDArray[np.bytes_]:
    """Return a name of each row (N,): its fingerprint, and how many rows before it have the same one."""
    values = np.ascontiguousarray(fingerprints).view(f"S{FINGERPRINT_BYTES}").reshape(-1)
    order = np.argsort(values, kind="stable")
    position = np.arange(len(values))
    is_first = np.append(True, values[order][1:] != values[order][:-1])[: len(values)]
    earlier = np.empty(len(values), ">i8")
    earlier[order] = position - np.maximum.accumulate(np.where(is_first, position, 0))
    names = np.concatenate([fingerprints, earlier.view(np.uint8).reshape(-1, 8)], axis=1)
    return np.ascontiguousarray(names).view(f"S{FINGERPRINT_BYTES + 8}").reshape(-1)


def as_text(fingerprint: NDArray[np.uint8]) -> str:
    """Return a fingerprint in hexadecimal, as tables hold it."""
    return fingerprint.tobytes().hex()


def from_texts(texts: Sequence[str]) -> RowFingerprints:
    """Return the fingerprints (N, 32) that `as_text` wrote; ValueError if one is damaged."""
    return np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(len(texts), FINGERPRINT_BYTES)
