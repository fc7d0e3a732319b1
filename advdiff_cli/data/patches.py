"""Read patch sets: images in [0, 1] with labels and row keys.

The path decides among four forms: safetensors, HDF5, PCam's own files (or their folder), and images in a folder.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from advdiff_cli.data.fingerprint_cache import cached_fingerprint
from advdiff_cli.data.hdf5_file import open_hdf5
from advdiff_cli.data.image_folder import open_folder
from advdiff_cli.data.patch_source import MIN_SIZE, PatchSource, Rows
from advdiff_cli.data.pcam_files import find_split
from advdiff_cli.data.provenance import JsonObject, canonical_json, digest
from advdiff_cli.data.rng import RowKey
from advdiff_cli.data.safetensors_file import open_safetensors
from advdiff_cli.data.selection import ALL, Selection
from advdiff_cli.data.view import WHOLE, View
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:  # imported where it is used, so that commands that only read recipes answer at once
    import torch

_log = logging.getLogger(__name__)

PATCH_FILES = (".safetensors", ".h5", ".hdf5")
"""The suffixes of files that hold a whole patch set."""

_BLOCK = 64  # rows hashed at a time
_SAMPLED = 64  # rows that identify an origin set


@dataclass(frozen=True)
class LabelledBatch:
    """Images (B, 3, H, W) in [0, 1] and labels (B,) on a device, with the keys and origin indices of their rows."""

    images: "torch.Tensor"
    labels: "torch.Tensor"
    keys: list[RowKey]
    index: list[int]


class PatchSet:
    """The selected rows of a patch set, read and checked batch by batch."""

    def __init__(self, source: PatchSource, selection: Selection = ALL) -> None:
        """Select rows of `source`.

        Raises:
            AdvdiffError: The selection is empty.
        """
        self.source = source
        self.path = source.path
        self.shape = source.shape
        self.selection = selection
        self.provenance = source.provenance
        self._rows = selection.rows(len(source))
        if not len(self._rows):
            raise AdvdiffError(
                f"no patches selected from {self.path}, which holds {len(source)}; check --limit and --range"
            )
        self.labels: Rows | None = None if source.labels is None else source.labels[self._rows]
        self.index: Rows = source.index[self._rows]
        self.keys: list[RowKey] = [source.keys[i] for i in self._rows]
        self._view = WHOLE
        self._fingerprint: str | None = None  # computed once, since the rows of a set do not change

    def first(self, n: int) -> "PatchSet":
        """Return the first n selected rows, or all of them if there are fewer."""
        return self.between(0, n)

    def between(self, start: int, stop: int) -> "PatchSet":
        """Return the selected rows start to stop - 1, as far as there are so many."""
        few, chosen = copy.copy(self), slice(start, stop)
        few._rows, few._fingerprint = self._rows[chosen], None
        few.labels = None if self.labels is None else self.labels[chosen]
        few.index, few.keys = self.index[chosen], self.keys[chosen]
        return few

    def viewed(self, view: View) -> "PatchSet":
        """Return the same rows, of which `read` returns what `view` reads of them.

        Raises:
            AdvdiffError: The patches do not fit it.
        """
        if view.is_whole:
            return self
        shape = view.shape(*self.require_shape())
        partial = PatchSet(self.source, self.selection)
        partial._view, partial.shape = view, shape
        return partial

    def __len__(self) -> int:
        """Return the number of selected rows."""
        return len(self._rows)

    def read(self, rows: Rows | Sequence[int]) -> "torch.Tensor":
        """Return the images at positions `rows` of the selection: float32 (B, 3, H, W) in [0, 1].

        Raises:
            AdvdiffError: A row cannot be read, or holds NaN or values outside [0, 1].
        """
        import torch

        chosen = self._rows[np.asarray(rows, np.int64)]
        raw = self.source.read(chosen)
        if raw.dtype == np.uint8:
            return self._view.apply(torch.from_numpy(raw.astype(np.float32) / np.float32(255)))
        inside = ((raw >= 0) & (raw <= 1)).reshape(len(raw), -1).all(axis=1)  # NaN compares false
        if not inside.all():
            first = int(np.argmin(inside))
            finite = np.isfinite(raw[first]).all()
            problem = "values outside [0, 1]" if finite else "NaN or infinite values"
            raise AdvdiffError(
                f"row {chosen[first]} of {self.path} holds {problem}; images must be float32 in [0, 1] or uint8"
            )
        return self._view.apply(torch.from_numpy(raw))

    def batch(self, rows: Rows, device: "torch.device") -> LabelledBatch:
        """Return images, labels, keys and indices at positions `rows` of the selection.

        Raises:
            AdvdiffError: As `read`, or the set has no labels.
        """
        import torch

        labels = torch.from_numpy(self.require_labels()[rows])
        keys = [self.keys[i] for i in rows]
        return LabelledBatch(self.read(rows).to(device), labels.to(device), keys, self.index[rows].tolist())

    def read_dtype(self) -> str:
        """Return how images are stored: uint8 or float32."""
        return str(self.source.read(self._rows[:1]).dtype)

    def require_labels(self) -> Rows:
        """Return the labels.

        Raises:
            AdvdiffError: The set has no labels.
        """
        if self.labels is None:
            raise AdvdiffError(
                f"{self.path} has no labels; add a labels tensor to the file, sort images into 0/ and 1/, "
                "or give --labels FILE.csv"
            )
        return self.labels

    def require_shape(self) -> tuple[int, int]:
        """Return the (H, W) that all images of the set share.

        Raises:
            AdvdiffError: Sizes differ.
        """
        if self.shape is None:
            self.source.read(self._rows[:1])  # raises a clearer error where no image can be read
            raise AdvdiffError(f"the images of {self.path} differ in size; this command needs one size")
        return self.shape

    def fingerprint(self) -> str:
        """Return the content fingerprint of the selected rows: images, labels and index, in order."""
        if self._fingerprint is None:
            selection = self._rows.tobytes() + self._header()
            self._fingerprint = cached_fingerprint(
                self.path, selection, lambda: digest(self._content(np.arange(len(self))))
            )
        return self._fingerprint

    def origin(self) -> str:
        """Return the identifier of the set that these rows first came from; every derived file keeps it.

        A set without provenance is identified by a hash of its labels, sizes and a fixed sample of its rows.
        """
        known = (self.provenance or {}).get("origin")
        if isinstance(known, str):
            return known
        everything = PatchSet(self.source)
        sample = np.linspace(0, len(everything) - 1, _SAMPLED).round().astype(np.int64)
        return digest(everything._content(np.unique(sample)))

    def recipe_input(self) -> JsonObject:
        """Return what enters a recipe: the fingerprint of the selected rows, and the selection."""
        return {"fingerprint": self.fingerprint(), "n": len(self), **self.selection.parameters()}

    def _header(self) -> bytes:
        labels = None if self.labels is None else self.labels.tolist()
        keys = self.keys if isinstance(self.keys[0], str) else self.index.tolist()
        header = canonical_json({"n": len(self), "shape": self.shape, "labels": labels, "keys": keys})
        return header.encode(errors="surrogateescape")  # file names need not be UTF-8

    def _content(self, rows: Rows) -> Iterator[bytes]:
        yield self._header()
        for start in range(0, len(rows), _BLOCK):
            chosen = self._rows[rows[start : start + _BLOCK]]
            pieces = [chosen] if self.shape is not None else np.split(chosen, len(chosen))
            for piece in pieces:
                raw = self.source.read(piece)
                yield str(raw.dtype).encode() + raw.tobytes()


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
    if split is not None and place.is_file():
        raise AdvdiffError(f"{path} is a file; --split chooses from a folder of PCam's files")
    if labels is not None and place.suffix in PATCH_FILES:
        raise AdvdiffError(f"{path} holds its own labels; --labels is for folders of images")
    source = _open_source(path, split, labels)
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
        split: For the folders among them.
        labels: For those that do not hold their own labels.
        selection: Which rows to use, of each set.

    Raises:
        AdvdiffError: As for `open_patches`, or no set takes `split` or `labels`.
    """
    folders = [path for path in paths if not Path(path).is_file()] or paths
    unlabelled = [path for path in paths if Path(path).suffix not in PATCH_FILES] or paths
    return [
        open_patches(
            path,
            split=split if path in folders else None,
            labels=labels if path in unlabelled else None,
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


def _open_source(path: str | Path, split: str | None, labels: Path | None) -> PatchSource:
    place = Path(path)
    if place.is_dir() and (pcam := find_split(place, split)) is not None:
        place = pcam
    if place.is_dir() or (not place.exists() and any(c in str(path) for c in "*?[")):
        return open_folder(str(path), labels)
    if not place.exists():
        raise AdvdiffError(f"no such file or folder: {path}")
    if place.suffix == ".safetensors":
        return open_safetensors(place)
    if place.suffix in PATCH_FILES:
        return open_hdf5(place)
    return open_folder(str(path), labels)
