"""The reader of patch sets: rows of images in [0, 1], with labels and the row keys of their origin.

Four forms, chosen by what the path is: safetensors, HDF5, PCam's own files (or their folder), images in a folder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advdiff_cli.data.fingerprint_cache import remembered
from advdiff_cli.data.hdf5_file import open_hdf5
from advdiff_cli.data.image_folder import open_folder
from advdiff_cli.data.patch_source import MIN_SIZE, Rows, Source
from advdiff_cli.data.provenance import canonical, digest
from advdiff_cli.data.rng import RowKey
from advdiff_cli.data.safetensors_file import open_safetensors
from advdiff_cli.datasets.pcam import find_split
from advdiff_cli.errors import AdvdiffError

_FILES = (".safetensors", ".h5", ".hdf5")
_BLOCK = 64  # rows hashed at a time
_SAMPLED = 64  # rows that identify an origin set


@dataclass(frozen=True)
class Selection:
    """Which rows of a set, in which order: shuffled, then a range of that order, then at most `limit`."""

    limit: int | None = None
    range: tuple[int, int | None] | None = None
    shuffle_seed: int | None = None

    def rows(self, n: int) -> Rows:
        """Return the selected positions among n."""
        order = np.arange(n)
        if self.shuffle_seed is not None:
            order = np.random.Generator(np.random.Philox(self.shuffle_seed)).permutation(n)
        if self.range is not None:
            order = order[slice(*self.range)]
        return order[: self.limit].astype(np.int64)

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that enter a recipe."""
        return {
            "limit": self.limit,
            "range": self.range and list(self.range),
            "shuffle_seed": self.shuffle_seed,
        }


ALL = Selection()


class PatchSet:
    """Selected rows of a source, read and checked batch by batch."""

    def __init__(self, source: Source, selection: Selection = ALL) -> None:
        """Select rows of `source`; AdvdiffError when none are left."""
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
        self._fingerprint: str | None = None  # made once: the rows of a set do not change

    def first(self, n: int) -> "PatchSet":
        """Return the first n of the selected rows, or all where there are fewer."""
        few = PatchSet(self.source, self.selection)
        few._rows = few._rows[:n]
        few.labels = None if few.labels is None else few.labels[:n]
        few.index, few.keys = few.index[:n], few.keys[:n]
        return few

    def __len__(self) -> int:
        """Return the number of selected rows."""
        return len(self._rows)

    def read(self, rows: Rows | Sequence[int]) -> torch.Tensor:
        """Return float32 (B, 3, H, W) in [0, 1]: the images at positions `rows` of the selection.

        Raises:
            AdvdiffError: a row cannot be read, or holds NaN or values outside [0, 1].
        """
        chosen = self._rows[np.asarray(rows, np.int64)]
        raw = self.source.read(chosen)
        if raw.dtype == np.uint8:
            return torch.from_numpy(raw.astype(np.float32) / np.float32(255))
        inside = ((raw >= 0) & (raw <= 1)).reshape(len(raw), -1).all(axis=1)  # NaN compares false
        if not inside.all():
            row = int(chosen[np.argmin(inside)])
            value = (
                "NaN or infinite values" if not np.isfinite(raw[np.argmin(inside)]).all() else "values outside [0, 1]"
            )
            raise AdvdiffError(f"row {row} of {self.path} holds {value}; images must be float32 in [0, 1] or uint8")
        return torch.from_numpy(raw)

    def read_dtype(self) -> str:
        """Return how images are stored: uint8 or float32."""
        return str(self.source.read(self._rows[:1]).dtype)

    def require_labels(self) -> Rows:
        """Return the labels; AdvdiffError when the set has none."""
        if self.labels is None:
            raise AdvdiffError(
                f"{self.path} has no labels, which are needed here: a labels tensor in a file, images under 0/ and 1/"
            )
        return self.labels

    def require_shape(self) -> tuple[int, int]:
        """Return the one (H, W) of the set; AdvdiffError when sizes differ."""
        if self.shape is None:
            self.source.read(self._rows[:1])  # where no image can be read, this says so
            raise AdvdiffError(f"the images of {self.path} differ in size; this command needs one size")
        return self.shape

    def fingerprint(self) -> str:
        """Return the content fingerprint of the selected rows: images, labels and index, in order."""
        if self._fingerprint is None:
            what = self._rows.tobytes() + self._header()
            self._fingerprint = remembered(self.path, what, lambda: digest(self._content(np.arange(len(self)))))
        return self._fingerprint

    def origin(self) -> str:
        """Return what names the set these rows first came from, carried along by every file made from it.

        Where no provenance tells, it is a hash of the whole set's labels, sizes and a fixed sample of its rows.
        """
        known = (self.provenance or {}).get("origin")
        if isinstance(known, str):
            return known
        whole = PatchSet(self.source)
        return digest(whole._content(np.unique(np.linspace(0, len(whole) - 1, _SAMPLED).round().astype(np.int64))))

    def recipe_input(self) -> dict[str, Any]:
        """Return what enters a recipe: the fingerprint of the selected rows, and the selection."""
        return {"fingerprint": self.fingerprint(), "n": len(self), **self.selection.parameters()}

    def _header(self) -> bytes:
        labels = None if self.labels is None else self.labels.tolist()
        keys = self.keys if isinstance(self.keys[0], str) else self.index.tolist()
        header = canonical({"n": len(self), "shape": self.shape, "labels": labels, "keys": keys})
        return header.encode(errors="surrogateescape")  # names of files need not be UTF-8

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
    """Open the patch set at `path`, whatever its form.

    Args:
        path: a .safetensors or .h5 file, a folder of PCam's files (then `split`), a folder or glob of images.
        split: train, valid (or val) or test, for a folder of PCam's files.
        labels: a CSV of file,label for a folder of images.
        selection: which rows.

    Raises:
        AdvdiffError: nothing there, or nothing that can be read.
    """
    place = Path(path)
    if split is not None and place.is_file():
        raise AdvdiffError(f"{path} is a file; --split chooses from a folder of PCam's files")
    if labels is not None and place.suffix in _FILES:
        raise AdvdiffError(f"{path} holds its own labels; --labels is for folders of images")
    source: Source
    if place.is_dir() and (pcam := find_split(place, split)) is not None:
        place = pcam
    if place.is_dir() or (not place.exists() and any(c in str(path) for c in "*?[")):
        source = open_folder(str(path), labels)
    elif not place.exists():
        raise AdvdiffError(f"no such file or folder: {path}")
    elif place.suffix == ".safetensors":
        source = open_safetensors(place)
    elif place.suffix in (".h5", ".hdf5"):
        source = open_hdf5(place)
    else:
        source = open_folder(str(path), labels)
    if source.shape is not None and min(source.shape) < MIN_SIZE:
        raise AdvdiffError(
            f"the patches of {path} are {source.shape[0]}x{source.shape[1]}; at least {MIN_SIZE}x{MIN_SIZE} is needed"
        )
    return PatchSet(source, selection)
