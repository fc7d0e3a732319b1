"""Folders and globs of images as patch sets."""

import glob
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from advdiff_cli.data.folder_journal import is_journal, journals
from advdiff_cli.data.image_files import IMAGE_SUFFIXES, image_size, read_image
from advdiff_cli.data.label_table import read_labels
from advdiff_cli.data.patch_source import Images, RowFingerprints, Rows
from advdiff_cli.data.provenance import Provenance
from advdiff_cli.data.rng import RowKey
from advdiff_cli.errors import AdvdiffError

_log = logging.getLogger(__name__)


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
        self.inputs: Sequence[Path] = []
        self.provenance: Provenance | None = None
        self.origins: RowFingerprints | None = None
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
        AdvdiffError: There are no images, a subfolder cannot be read, or `labels` does not name every image.
    """
    found = find_images(path)
    warn_of_purified(found.purified)
    if found.unread:
        raise AdvdiffError(next(iter(found.unread.values())))
    if not found.files:
        raise AdvdiffError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {path}")
    table = None if labels is None else read_labels(labels)
    source = FolderSource(Path(path), found.root, found.files, _labels(found, labels, table))
    source.inputs = [] if labels is None else [labels]
    return source


@dataclass(frozen=True)
class FoundImages:
    """Image files in sorted order, and the folder that their names are relative to.

    Args:
        root: That folder.
        files: The images. Files and folders whose name begins with a dot are left out.
        unread: Relative name -> reason, for subfolders that were not searched.
        purified: Folders below the root that advdiff purify wrote, whose images are left out.
    """

    root: Path
    files: list[Path]
    unread: dict[str, str] = field(default_factory=dict)
    purified: Sequence[Path] = ()

    def name(self, file: Path) -> str:
        """Return the relative name of a file."""
        return file.relative_to(self.root).as_posix()


def find_images(path: str) -> FoundImages:
    """Return the images of a folder (searched recursively), or those that a glob matches, or one image.

    Folders of purified images below that folder, or below the part of a glob without wildcards, are left out: their
    images are results, not more data.

    Raises:
        AdvdiffError: The path is a file of another kind, or a folder that cannot be read.
    """
    place = Path(path)
    if place.is_dir():
        return _search(place)
    if place.is_file():
        if not _has_image_name(place):
            forms = f".safetensors, .h5, or images ({', '.join(sorted(IMAGE_SUFFIXES))})"
            raise AdvdiffError(f"{place} is not a patch set; give {forms}")
        return FoundImages(place.parent, [place])
    matches = [Path(p) for p in glob.glob(path, recursive=True)]
    parts = Path(path).parts
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root, files = Path(*parts[:magic]), sorted(p for p in matches if _has_image_name(p) and not p.is_dir())
    below = {parent for file in files for parent in file.relative_to(root).parents} - {Path()}
    purified = sorted(root / folder for folder in below if journals(root / folder))
    return FoundImages(root, [f for f in files if not set(purified) & set(f.parents)], purified=purified)


def warn_of_purified(folders: Iterable[Path]) -> None:
    """Warn of folders of purified images that are left out."""
    for folder in folders:
        _log.warning(
            "%s holds images that advdiff purify wrote, and is left out; to use them, name that folder", folder
        )


def _search(root: Path) -> FoundImages:
    files: list[Path] = []
    unread: dict[str, str] = {}
    purified: list[Path] = []

    def name_error(e: OSError) -> None:
        if Path(e.filename) == root:
            raise e
        unread[Path(e.filename).relative_to(root).as_posix()] = f"{e.filename} cannot be searched ({e.strerror})"

    for folder, subfolders, names in os.walk(root, onerror=name_error):
        if Path(folder) != root and any(map(is_journal, names)):
            purified.append(Path(folder))
            subfolders.clear()
            continue
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        for link in (Path(folder, s) for s in subfolders if Path(folder, s).is_symlink()):
            why = "is a symbolic link to a folder, which is not followed; name that folder, or move it here"
            unread[link.relative_to(root).as_posix()] = f"{link} {why}"
        files += [file for name in names if _has_image_name(file := Path(folder, name))]
    return FoundImages(root, sorted(files, key=lambda p: p.relative_to(root).as_posix()), unread, sorted(purified))


def named_images(root: Path, names: Sequence[str]) -> list[Path]:
    """Return the files that `names` lists, relative to `root`, each once.

    Raises:
        AdvdiffError: A file is not below `root`, or has no image's name.
    """
    found: dict[Path, None] = {}
    for name in filter(None, names):
        file = Path(os.path.relpath(root / name, root))
        if os.pardir in file.parts:
            raise AdvdiffError(f"{name} is not below {root}; the listed names are relative to it")
        if not _has_image_name(file):
            raise AdvdiffError(f"{name} is not named as an image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        found[root / file] = None
    return list(found)


def _has_image_name(path: Path) -> bool:
    """Return whether a name is that of an image; a file that is not regular fails later, by name."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _labels(found: FoundImages, table: Path | None, known: Mapping[str, int] | None) -> Rows | None:
    """Return the labels in a table, or those that parent folders called 0 and 1 give, or None."""
    if known is None:
        parents = [f.parent.name for f in found.files]
        return np.array([int(p) for p in parents], np.int64) if set(parents) <= {"0", "1"} else None
    names = [found.name(f) for f in found.files]
    for name in names:
        if name not in known:
            raise AdvdiffError(f"{table} gives no label for {name}; it needs a row file,label for every image")
    return np.array([known[name] for name in names], np.int64)
