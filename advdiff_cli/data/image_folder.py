"""Folders and globs of images as patch sets."""

import csv
import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from advdiff_cli.data.image_files import IMAGE_SUFFIXES, image_size, read_image
from advdiff_cli.data.patch_source import Images, Rows
from advdiff_cli.data.provenance import Provenance
from advdiff_cli.data.rng import RowKey
from advdiff_cli.errors import AdvdiffError


class FolderSource:
    """Image files in sorted order; the key of each is its path relative to `root`."""

    def __init__(self, path: Path, root: Path, files: list[Path], labels: Rows | None) -> None:
        """Take `files`; each is opened when its row is read."""
        self.path = path
        self.root = root
        self.files = files
        self.keys: Sequence[RowKey] = [f.relative_to(root).as_posix() for f in files]
        self.labels = labels
        self.index: Rows = np.arange(len(files))
        self.provenance: Provenance | None = None
        sizes = {image_size(f) for f in files} - {None}  # an unreadable file fails when its row is read
        self.shape: tuple[int, int] | None = next(iter(sizes)) if len(sizes) == 1 else None

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.files)

    def read(self, rows: Rows) -> Images:
        """Return the images at `rows`, which must be of one size."""
        return np.stack([read_image(self.files[int(row)]) for row in rows])


def open_folder(path: str, labels: Path | None = None) -> FolderSource:
    """Open a folder (searched recursively) or a glob of images, or one image.

    Raises:
        AdvdiffError: There are no images, or `labels` does not name every image.
    """
    root, files = list_images(path)
    if not files:
        raise AdvdiffError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {path}")
    return FolderSource(Path(path), root, files, _labels(root, files, labels))


def list_images(path: str) -> tuple[Path, list[Path]]:
    """Return the folder that names are relative to, and its image files in sorted order."""
    place = Path(path)
    if place.is_dir():
        found = [p for p in place.rglob("*") if _has_image_name(p)]
        return place, sorted(found, key=lambda p: p.relative_to(place).as_posix())
    if place.is_file():
        if place.suffix.lower() not in IMAGE_SUFFIXES:
            forms = f".safetensors, .h5, or images ({', '.join(sorted(IMAGE_SUFFIXES))})"
            raise AdvdiffError(f"{place} is not a patch set; give {forms}")
        return place.parent, [place]
    found = [Path(p) for p in glob.glob(path, recursive=True)]
    found = sorted(p for p in found if _has_image_name(p))
    parts = Path(path).parts
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:magic]), found


def named_images(root: Path, names: Sequence[str]) -> list[Path]:
    """Return the files that `names` lists, relative to `root`, each once.

    Raises:
        AdvdiffError: A file is not below `root`.
    """
    found: dict[Path, None] = {}
    for name in filter(None, names):
        file = Path(os.path.normpath(root / name))
        if not file.is_relative_to(os.path.normpath(root)):
            raise AdvdiffError(f"{name} is not below {root}; the listed names are relative to it")
        found[root / file.relative_to(os.path.normpath(root))] = None
    return list(found)


def _has_image_name(path: Path) -> bool:
    """Return whether a path has an image's suffix; one that is not a regular file fails later, by name."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()


def _labels(root: Path, files: list[Path], table: Path | None) -> Rows | None:
    if table is None:
        parents = [f.parent.name for f in files]
        return np.array([int(p) for p in parents], np.int64) if set(parents) <= {"0", "1"} else None
    with table.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    known = {row[0]: row[-1].strip() for row in rows}
    names = [f.relative_to(root).as_posix() for f in files]
    for name in names:
        if known.get(name) not in ("0", "1"):
            raise AdvdiffError(f"{table} gives no label 0 or 1 for {name}; it needs a row file,label for every image")
    return np.array([int(known[name]) for name in names], np.int64)
