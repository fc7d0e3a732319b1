"""Check PCam's files where they lie: hashes, shapes, balance of labels, duplicates, and the slides they came from."""

import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from advdiff_cli.datasets.download import hash_of
from advdiff_cli.datasets.pcam import METADATA, PREFIX, REGISTRY, Registry, folder
from advdiff_cli.errors import AdvdiffError

Status = Literal["pass", "warn", "fail"]
_BLOCK = 256
_BALANCE = 0.01  # how far from one half the share of positive labels may lie: the record promises "close to"
_SLIDES = {"train": "camelyon16_train_", "valid": "camelyon16_train_", "test": "camelyon16_test_"}


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it stands, and what was found."""

    file: str
    what: str
    status: Status
    found: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def check(splits: tuple[str, ...], data_dir: Path, registry: Registry = REGISTRY | METADATA) -> Iterator[Finding]:
    """Check the files of some splits, yielding what is found as it is found.

    Args:
        splits: train, valid, test.
        data_dir: Folder of the files, or the one that holds pcam/.
        registry: Known hashes.

    Raises:
        AdvdiffError: there is none of them.
    """
    place, seen = folder(data_dir), dict[bytes, str]()
    have = [s for s in splits if (place / f"{PREFIX}_{s}_x.h5").is_file()]
    if not have:
        raise AdvdiffError(f"{place} holds none of PCam's files of {', '.join(splits)}")
    for split in have:
        x, y, meta = (place / f"{PREFIX}_{split}_{end}" for end in ("x.h5", "y.h5", "meta.csv"))
        for path in (x, y):
            yield _hash(path, registry.get(f"{path.name}.gz"))
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


def _hash(path: Path, known: Any) -> Finding:
    if not path.is_file():
        return Finding(path.name, "hash", "fail", "is missing")
    if known is None or known.unpacked_md5 is None:
        return Finding(path.name, "hash", "warn", "the registry names none")
    right = hash_of(path, "md5") == known.unpacked_md5
    told = "as the registry names it" if right else "not the registry's: another file, or a damaged one"
    return Finding(path.name, "hash", "pass" if right else "fail", told)


def _shapes(path: Path, images: Any, truth: NDArray[Any]) -> Finding:
    right = images.ndim == 4 and images.shape[1:] == (96, 96, 3) and images.dtype == np.uint8
    right = right and len(images) == len(truth)
    told = f"{images.shape} {images.dtype}, {len(truth)} labels, chunks {images.chunks}"
    return Finding(path.name, "shapes", "pass" if right else "fail", told)


def _labels(path: Path, truth: NDArray[Any]) -> Finding:
    if not np.isin(truth, (0, 1)).all():
        return Finding(path.name, "labels", "fail", "not all 0 or 1")
    share = float(truth.mean())
    status: Status = "pass" if abs(share - 0.5) <= _BALANCE else "warn"
    return Finding(path.name, "labels", status, f"{int(truth.sum())} of {len(truth)} positive ({100 * share:.2f} %)")


def _duplicates(path: Path, images: Any, split: str, seen: dict[bytes, str]) -> Finding:
    """Count patches that came before: in this split, and in those checked before it."""
    within, across = 0, 0
    for start in range(0, len(images), _BLOCK):
        for image in images[start : start + _BLOCK]:
            mark = blake2b(image.tobytes(), digest_size=12).digest()
            first = seen.setdefault(mark, split)
            within, across = within + (first == split), across + (first != split)
    mine = sum(of == split for of in seen.values())
    within -= mine
    told = f"{within} of {len(images)} patches stand in it twice or more, {across} in a split checked before"
    return Finding(path.name, "duplicates", "fail" if across else "warn" if within else "pass", told)


def _slides(path: Path, split: str, truth: NDArray[Any]) -> Iterator[Finding]:
    """Check the rows of a meta file against the labels, and its slides against the split."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != len(truth) or not rows or not {"wsi", "center_tumor_patch"} <= set(rows[0]):
        yield Finding(path.name, "rows", "fail", f"{len(rows)} rows for {len(truth)} patches, or columns are missing")
        return
    strangers = sorted({row["wsi"] for row in rows if not row["wsi"].startswith(_SLIDES[split])})
    slides = len({row["wsi"] for row in rows})
    told = f"{slides} slides, all {_SLIDES[split]}*" if not strangers else f"slides of another split: {strangers[:3]}"
    yield Finding(path.name, "slides", "fail" if strangers else "pass", told)
    said = np.array([row["center_tumor_patch"].strip().lower() in ("true", "1") for row in rows])
    other = int((said != (truth == 1)).sum())
    yield Finding(path.name, "labels", "warn" if other else "pass", f"{other} rows say otherwise than y.h5")
