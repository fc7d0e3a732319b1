"""Folders and globs of images as patch sets, and single images read and written without loss."""

import csv
import glob
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from advdiff_cli.data.patch_source import MAX_PIXELS, Images, Rows
from advdiff_cli.data.provenance import Provenance
from advdiff_cli.data.rng import RowKey
from advdiff_cli.errors import AdvdiffError

_UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)
"""What Pillow raises of images and metadata that are damaged."""

_MOST_DPI = 1e6
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}


class FolderSource:
    """Image files in sorted order, keyed by their path relative to `root`."""

    def __init__(self, path: Path, root: Path, files: list[Path], labels: Rows | None) -> None:
        """Take `files`; each is opened when its row is read."""
        self.path = path
        self.root = root
        self.files = files
        self.keys: Sequence[RowKey] = [f.relative_to(root).as_posix() for f in files]
        self.labels = labels
        self.index: Rows = np.arange(len(files))
        self.provenance: Provenance | None = None
        sizes = {image_size(f) for f in files} - {None}  # a file that cannot be read fails when its row is
        self.shape: tuple[int, int] | None = next(iter(sizes)) if len(sizes) == 1 else None

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.files)

    def read(self, rows: Rows) -> Images:
        """Return the images at `rows`, which must be of one size."""
        return np.stack([read_image(self.files[int(row)]) for row in rows])


def open_folder(path: str, labels: Path | None = None) -> FolderSource:
    """Open a folder (searched through) or a glob of images, or one image.

    Raises:
        AdvdiffError: no image there, or labels that do not cover the files.
    """
    root, files = list_images(path)
    if not files:
        raise AdvdiffError(f"no images ({', '.join(sorted(SUFFIXES))}) in {path}")
    return FolderSource(Path(path), root, files, _labels(root, files, labels))


def list_images(path: str) -> tuple[Path, list[Path]]:
    """Return the folder that names are relative to, and the image files below it in sorted order."""
    place = Path(path)
    if place.is_dir():
        found = [p for p in place.rglob("*") if _is_image_name(p)]
        return place, sorted(found, key=lambda p: p.relative_to(place).as_posix())
    if place.is_file():
        if place.suffix.lower() not in SUFFIXES:
            raise AdvdiffError(f"{place} is no patch set: .safetensors, .h5, or images ({', '.join(sorted(SUFFIXES))})")
        return place.parent, [place]
    found = [Path(p) for p in glob.glob(path, recursive=True)]
    found = sorted(p for p in found if _is_image_name(p))
    parts = Path(path).parts
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:magic]), found


def listed_images(root: Path, names: Sequence[str]) -> list[Path]:
    """Return the files that `names` lists, relative to `root`, each once; AdvdiffError where one is not below it."""
    found: dict[Path, None] = {}
    for name in filter(None, names):
        file = Path(os.path.normpath(root / name))
        if not file.is_relative_to(os.path.normpath(root)):
            raise AdvdiffError(f"{name} is not below {root}, which the listed names are relative to")
        found[root / file.relative_to(os.path.normpath(root))] = None
    return list(found)


def _is_image_name(path: Path) -> bool:
    """Tell whether a path is called like an image; what is no file is then named as one that cannot be read."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


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


def image_size(file: Path) -> tuple[int, int] | None:
    """Return (H, W) from an image's header, or None when it cannot be read."""
    try:
        check_file(file)
        with _opened(file) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except (AdvdiffError, *_UNREADABLE):
        return None


def check_file(file: Path) -> None:
    """Check that `file` can be opened without waiting for ever; AdvdiffError when it is no regular file."""
    if not file.is_file():
        exists = "is no regular file" if file.exists() else "does not exist"
        raise AdvdiffError(f"{file} {'is a link to nothing' if file.is_symlink() else exists}")


class _Unwarned:
    """Python's warnings left out while any thread is inside; `catch_warnings` puts them back right for one alone."""

    def __init__(self) -> None:
        self._turn, self._inside = Lock(), 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._turn:
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


_unwarned = _Unwarned()


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """Open an image without Pillow's warnings of its size, which is checked here, and of its metadata."""
    with _unwarned, Image.open(file) as image:
        yield image


def read_image(file: Path) -> NDArray[np.uint8]:
    """Return an image as (3, H, W) uint8 RGB, EXIF rotation applied.

    Raises:
        AdvdiffError: it cannot be decoded, has more than 8 bits a channel, is transparent, or has several pages or
            more than MAX_PIXELS.
    """
    check_file(file)
    try:
        with _opened(file) as image:
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise AdvdiffError(f"{file} has {pixels / 1e6:.0f} megapixels; cut it into tiles")
            if image.mode.startswith(("I", "F")) or _is_deep(image):
                raise AdvdiffError(f"{file} has more than 8 bits a channel; convert it to 8-bit RGB")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                raise AdvdiffError(f"{file} is transparent; flatten it to RGB")
            if (pages := getattr(image, "n_frames", 1)) > 1:
                raise AdvdiffError(f"{file} has {pages} pages; split it into one file each")
            rgb = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise AdvdiffError(f"{file} is not an image that can be read") from None
    except _UNREADABLE as e:
        if isinstance(e, FileNotFoundError | PermissionError):
            raise
        raise AdvdiffError(f"{file} cannot be decoded ({e})") from None
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _is_deep(image: Image.Image) -> bool:
    """Tell whether an RGB file has 16 bits a channel, which Pillow would cut to 8 without a word."""
    bits = getattr(image, "tag_v2", {}).get(258, (8,)) if image.format == "TIFF" else (8,)
    deep_png = image.format == "PNG" and any(";16B" in str(tile[3]) for tile in getattr(image, "tile", ()))
    return deep_png or max(bits) > 8


def told_of(file: Path) -> dict[str, Any]:
    """Return what an image's file tells about it that stays true: resolution (dpi) and, of RGB, the ICC profile."""
    with _opened(file) as image:
        found: dict[str, Any] = {k: image.info[k] for k in ("dpi", "icc_profile") if image.info.get(k)}
        if image.mode not in ("RGB", "P"):
            found.pop("icc_profile", None)  # of the colours it was converted from
        if not all(isfinite(dpi) and 0 < dpi < _MOST_DPI for dpi in found.get("dpi", ())):
            del found["dpi"]
        if "dpi" in found and image.getexif().get(0x0112, 1) >= 5:
            found["dpi"] = found["dpi"][::-1]
    return found


def write_image(file: Path, image: NDArray[np.uint8], about: Mapping[str, Any] | None = None) -> None:
    """Write a (3, H, W) uint8 image without loss; the format follows the suffix (.png, .tif, .tiff).

    `about` is of `told_of`.
    """
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    lossless = {"compression": "tiff_deflate"} if file.suffix.lower() in (".tif", ".tiff") else {}
    try:
        picture.save(file, format="TIFF" if lossless else "PNG", **lossless, **(about or {}))
    except (ValueError, RuntimeError, OverflowError, struct.error) as e:  # of what another file told
        raise AdvdiffError(f"{file} cannot be written ({e})") from None
