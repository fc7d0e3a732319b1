"""Verify downloaded PCam files: hashes, shapes, balance of labels, duplicates and slides."""

import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.pcam_files import PREFIX, pcam_folder
from advdiff_cli.datasets.download import hash_of
from advdiff_cli.datasets.pcam import METADATA, REGISTRY, Registry
from advdiff_cli.errors import AdvdiffError

Status = Literal["pass", "warn", "fail"]
_BLOCK = 256
_MAX_IMBALANCE = 0.01  # of the share of positive labels from one half, which the record calls "close to" balanced
_SLIDES = {"train": "camelyon16_train_", "valid": "camelyon16_train_", "test": "camelyon16_test_"}


@dataclass(frozen=True)
class Finding:
    """One check of one file, its status and what was found."""

    file: str
    what: str
    status: Status
    found: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def verify(splits: tuple[str, ...], data_dir: Path, registry: Registry = REGISTRY | METADATA) -> Iterator[Finding]:
    """Verify the files of some splits, yielding each finding as it is made.

    Args:
        splits: train, valid, test.
        data_dir: The folder of the files, or the folder that holds pcam/.
        registry: Known hashes.

    Raises:
        AdvdiffError: None of the files is there.
    """
    folder, seen = pcam_folder(data_dir), dict[bytes, str]()
    available = [s for s in splits if (folder / f"{PREFIX}_{s}_x.h5").is_file()]
    if not available:
        raise AdvdiffError(f"{folder} holds no PCam files of {', '.join(splits)}")
    for split in available:
        x, y, meta = (folder / f"{PREFIX}_{split}_{end}" for end in ("x.h5", "y.h5", "meta.csv"))
        for path in (x, y):
            file = registry.get(f"{path.name}.gz")
            yield _hash(path, None if file is None else file.unpacked_md5)
        if meta.is_file():
            file = registry.get(meta.name)
            yield _hash(meta, None if file is None else file.md5)
        try:
            with h5py.File(x, "r") as images, h5py.File(y, "r") as labels:
                truth = labels["y"][:].reshape(-1)
                yield _shapes(x, images["x"], truth)
                yield _labels(y, truth)
                yield _duplicates(x, images["x"], split, seen)
        except (OSError, KeyError) as e:
            yield Finding(x.name, "datasets", "fail", f"cannot be read ({e})")
            continue
        if meta.is_file():
            yield from _slides(meta, split, truth)


def _hash(path: Path, known: str | None) -> Finding:
    if not path.is_file():
        return Finding(path.name, "hash", "fail", "is missing")
    if known is None:
        return Finding(path.name, "hash", "warn", "no hash is known for this file")
    right = hash_of(path, "md5") == known
    found = "as in the registry" if right else "not as in the registry: another file, or a damaged one"
    return Finding(path.name, "hash", "pass" if right else "fail", found)


def _shapes(path: Path, images: Any, truth: NDArray[Any]) -> Finding:
    right = images.ndim == 4 and images.shape[1:] == (96, 96, 3) and images.dtype == np.uint8
    right = right and len(images) == len(truth)
    found = f"{images.shape} {images.dtype}, {len(truth)} labels, chunks {images.chunks}"
    return Finding(path.name, "shapes", "pass" if right else "fail", found)


def _labels(path: Path, truth: NDArray[Any]) -> Finding:
    if not np.isin(truth, (0, 1)).all():
        return Finding(path.name, "labels", "fail", "not all 0 or 1")
    share = float(truth.mean())
    status: Status = "pass" if abs(share - 0.5) <= _MAX_IMBALANCE else "warn"
    return Finding(path.name, "labels", status, f"{int(truth.sum())} of {len(truth)} positive ({100 * share:.2f} %)")


def _duplicates(path: Path, images: Any, split: str, seen: dict[bytes, str]) -> Finding:
    """Count patches that occur earlier, in this split or in a split checked before it."""
    within, across = 0, 0
    for start in range(0, len(images), _BLOCK):
        for image in images[start : start + _BLOCK]:
            mark = blake2b(image.tobytes(), digest_size=12).digest()
            first = seen.setdefault(mark, split)
            within, across = within + (first == split), across + (first != split)
    mine = sum(of == split for of in seen.values())
    within -= mine
    found = f"{within} of {len(images)} patches repeat an earlier one, {across} repeat one of another split"
    return Finding(path.name, "duplicates", "fail" if across else "warn" if within else "pass", found)


def _slides(path: Path, split: str, truth: NDArray[Any]) -> Iterator[Finding]:
    """Compare the rows of a meta file with the labels, and its slides with the split."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != len(truth) or not rows or not {"wsi", "center_tumor_patch"} <= set(rows[0]):
        yield Finding(path.name, "rows", "fail", f"{len(rows)} rows for {len(truth)} patches, or columns are missing")
        return
    misplaced = sorted({row["wsi"] for row in rows if not row["wsi"].startswith(_SLIDES[split])})
    slides = len({row["wsi"] for row in rows})
    found = f"{slides} slides, all {_SLIDES[split]}*" if not misplaced else f"slides of another split: {misplaced[:3]}"
    yield Finding(path.name, "slides", "fail" if misplaced else "pass", found)
    in_meta = np.array([row["center_tumor_patch"].strip().lower() in ("true", "1") for row in rows])
    other = int((in_meta != (truth == 1)).sum())
    yield Finding(path.name, "labels", "warn" if other else "pass", f"{other} rows differ from y.h5")
