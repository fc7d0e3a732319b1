"""Open patch sets.

The path decides among four forms: safetensors, HDF5, PCam's own files (or their folder), and images in a folder.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from advdiff_cli.data.hdf5_file import open_hdf5
from advdiff_cli.data.image_folder import open_folder
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_source import MIN_SIZE, PatchSource
from advdiff_cli.data.pcam_files import find_split, holds_pcam
from advdiff_cli.data.safetensors_file import open_safetensors
from advdiff_cli.data.selection import ALL, Selection
from advdiff_cli.errors import AdvdiffError

_log = logging.getLogger(__name__)

PATCH_FILES = (".safetensors", ".h5", ".hdf5")
"""The suffixes of files that hold a whole patch set."""


def open_patches(
    path: str | Path, *, split: str | None = None, labels: Path | None = None, selection: Selection = ALL
) -> PatchSet:
    """Open the patch set at `path`.

    Args:
        path: A .safetensors or .h5 file, a folder of PCam's files (with `split`), or a folder or glob of images.
        split: train, valid (or val) or test, for a folder of PCam's files.
        labels: A CSV of file,label for a folder of images.
        selection: Which rows.

    Raises:
        AdvdiffError: There is no patch set at `path`, or it cannot be read.
    """
    place = Path(path)
    if split is not None and (place.is_file() or _is_glob(path)):
        raise AdvdiffError(
            f"{path} is {'a file' if place.is_file() else 'a glob'}; --split chooses from a folder of PCam's files"
        )
    source = _open_source(path, split, labels)
    if labels is not None and source.path.suffix in PATCH_FILES:
        raise AdvdiffError(f"{source.path} holds its own labels; --labels is for folders of images")
    if source.shape is not None and min(source.shape) < MIN_SIZE:
        raise AdvdiffError(
            f"the patches of {path} are {source.shape[0]}x{source.shape[1]}; at least {MIN_SIZE}x{MIN_SIZE} is needed"
        )
    patches = PatchSet(source, selection)
    _warn_of_one_class(patches)
    return patches


def open_sets(
    paths: Sequence[str], *, split: str | None = None, labels: Path | None = None, selection: Selection = ALL
) -> list[PatchSet]:
    """Open several patch sets, such as one and what was made from it.

    Args:
        paths: As for `open_patches`.
        split: For the folders of PCam's files among them.
        labels: For those that do not hold their own labels.
        selection: Which rows to use, of each set.

    Raises:
        AdvdiffError: As for `open_patches`, or no set takes `split` or `labels`.
    """
    pcam = [path for path in paths if holds_pcam(Path(path))]
    folders = pcam or paths
    unlabeled = [path for path in paths if Path(path).suffix not in PATCH_FILES and path not in pcam] or paths
    return [
        open_patches(
            path,
            split=split if path in folders else None,
            labels=labels if path in unlabeled else None,
            selection=selection,
        )
        for path in paths
    ]


def _warn_of_one_class(patches: PatchSet) -> None:
    """Warn where --limit or --range leaves one class of two, as in sets that are sorted by class or slide."""
    labels, everything = patches.labels, patches.source.labels
    if labels is None or everything is None or patches.selection.shuffle_seed is not None:
        return
    if len(labels) > 1 and len(set(labels.tolist())) < len(set(everything.tolist())):
        text = "all %d patches selected from %s have label %d, and the set has both; --shuffle-seed 0 mixes them"
        _log.warning(text, len(labels), patches.path, labels[0])


def _is_glob(path: str | Path) -> bool:
    return not Path(path).exists() and any(c in str(path) for c in "*?[")


def _open_source(path: str | Path, split: str | None, labels: Path | None) -> PatchSource:
    place = Path(path)
    if place.is_dir() and (pcam := find_split(place, split)) is not None:
        place = pcam
    if place.is_dir() or _is_glob(path):
        return open_folder(str(path), labels)
    if not place.exists():
        raise AdvdiffError(f"no such file or folder: {path}")
    if place.suffix == ".safetensors":
        return open_safetensors(place)
    if place.suffix in PATCH_FILES:
        return open_hdf5(place)
    return open_folder(str(path), labels)
