"""The selected rows of a patch set: images in [0, 1] with labels and row keys, read and checked batch by batch."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from advdiff_cli.data.fingerprint_cache import cached_fingerprints
from advdiff_cli.data.patch_source import MAX_PATCH_PIXELS, Images, PatchSource, RowFingerprints, Rows
from advdiff_cli.data.provenance import JsonObject, canonical_json, digest, history
from advdiff_cli.data.rng import RowKey
from advdiff_cli.data.row_fingerprints import fingerprint_rows
from advdiff_cli.data.selection import ALL, Selection
from advdiff_cli.data.view import WHOLE, View
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:  # imported where it is used, so that commands that only read recipes answer at once
    import torch

_BLOCK = 64  # rows hashed or loaded at a time


@dataclass(frozen=True)
class LabeledBatch:
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
        self.path, self.inputs = source.path, source.inputs
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
        self._fingerprints: RowFingerprints | None = None  # computed once, since the rows of a set do not change
        self._cached: Images | None = None

    def first(self, n: int) -> "PatchSet":
        """Return the first n selected rows, or all of them if there are fewer."""
        return self.between(0, n)

    def between(self, start: int, stop: int) -> "PatchSet":
        """Return the selected rows start to stop - 1, as far as there are so many."""
        few, chosen = copy.copy(self), slice(start, stop)
        few._rows = self._rows[chosen]
        few._fingerprints = None if self._fingerprints is None else self._fingerprints[chosen]
        few.labels = None if self.labels is None else self.labels[chosen]
        few.index, few.keys = self.index[chosen], self.keys[chosen]
        few._cached = None if self._cached is None else self._cached[chosen]
        return few

    def in_memory(self) -> "PatchSet":
        """Return the same rows, read once and kept in memory as they are stored.

        Raises:
            AdvdiffError: Sizes differ, or a row cannot be read.
        """
        loaded = copy.copy(self)
        self.require_shape()
        one = self.source.read(self._rows[:1])
        loaded._cached = np.empty((len(self), *one.shape[1:]), one.dtype)
        for start in range(0, len(self), _BLOCK):
            loaded._cached[start : start + _BLOCK] = self.source.read(self._rows[start : start + _BLOCK])
        return loaded

    def viewed(self, view: View) -> "PatchSet":
        """Return the same rows, of which `read` returns what `view` reads of them.

        Raises:
            AdvdiffError: The patches do not fit it.
        """
        if view.is_whole:
            return self
        partial = copy.copy(self)
        partial._view, partial.shape = view, view.shape(*self.require_shape())
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
        raw = self.source.read(chosen) if self._cached is None else self._cached[np.asarray(rows, np.int64)]
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

    def batch(self, rows: Rows, device: "torch.device") -> LabeledBatch:
        """Return images, labels, keys and indices at positions `rows` of the selection.

        Raises:
            AdvdiffError: As `read`, or the set has no labels.
        """
        import torch

        labels = torch.from_numpy(self.require_labels()[rows])
        keys = [self.keys[i] for i in rows]
        return LabeledBatch(self.read(rows).to(device), labels.to(device), keys, self.index[rows].tolist())

    def read_dtype(self) -> str:
        """Return how images are stored: uint8 or float32."""
        return str(self.source.read(self._rows[:1]).dtype)

    def require_labels(self, hint: str = "") -> Rows:
        """Return the labels.

        Args:
            hint: The end of the message, where there are none.

        Raises:
            AdvdiffError: The set has no labels.
        """
        if self.labels is None:
            raise AdvdiffError(f"{self.path} has no labels; {self._remedy()}{hint}")
        return self.labels

    def _remedy(self) -> str:
        """Return how a set without labels gets them."""
        if self.path not in self.inputs:
            return "sort images into 0/ and 1/, or give --labels FILE.csv"
        beside = [str(file) for file in self.inputs if file != self.path]
        return f"PCam's are in {beside[0]}, which is missing" if beside else "add a labels tensor to the file"

    def require_shape(self) -> tuple[int, int]:
        """Return the (H, W) that all images of the set share.

        Raises:
            AdvdiffError: Sizes differ.
        """
        if self.shape is None:
            self.source.read(self._rows[:1])  # raises a clearer error where no image can be read
            raise AdvdiffError(f"the images of {self.path} differ in size; this command needs one size")
        return self.shape

    def check_pixels(self, most: int = MAX_PATCH_PIXELS, advice: str = "") -> None:
        """Check that patches are small enough to be computed whole, before one is read.

        Args:
            most: Pixels of a patch.
            advice: What else to do about larger ones.

        Raises:
            AdvdiffError: They are larger.
        """
        if self.source.shape is not None and (pixels := math.prod(self.source.shape)) > most:
            height, width = self.source.shape
            advice = advice.format(pixels=pixels)
            raise AdvdiffError(
                f"the patches of {self.path} are {height}x{width} and would need much memory: cut them into tiles "
                f"of at most {most} pixels{advice}"
            )

    def fingerprint(self) -> str:
        """Return the content fingerprint of the selected rows: images, labels, index and stored origins, in order."""
        stored = b"" if self.source.origins is None else self.origins().tobytes()
        return digest([self._header(), self.row_fingerprints().tobytes(), stored])

    def row_fingerprints(self) -> RowFingerprints:
        """Return the fingerprint of each selected row (N, 32): of its whole image as stored."""
        if self._fingerprints is None:
            files = [self.path, *self.inputs]
            found = cached_fingerprints(files, self._rows.tobytes(), lambda: b"".join(self._hash_rows()))
            self._fingerprints = np.frombuffer(found, np.uint8).reshape(len(self), -1)
        return self._fingerprints

    def origins(self) -> RowFingerprints:
        """Return the fingerprint of the patch that each row was first made from (N, 32), by which sets are matched.

        Every derived file keeps them. The rows of other sets are first themselves.

        Raises:
            AdvdiffError: The set was attacked or purified, and does not hold them.
        """
        if self.source.origins is not None:
            return self.source.origins[self._rows]
        if any(made["command"] in ("attack", "purify") for made in history(self.provenance)):
            raise AdvdiffError(
                f"{self.path} does not tell from which patches it was made: make it again, or add their fingerprints "
                "(origin_sha256; docs/guide.md, Attacks that know the defense)"
            )
        return self.row_fingerprints()

    def recipe_input(self) -> JsonObject:
        """Return what enters a recipe: the fingerprint of the selected rows, and the selection."""
        return {"fingerprint": self.fingerprint(), "n": len(self), **self.selection.parameters()}

    def _header(self) -> bytes:
        labels = None if self.labels is None else self.labels.tolist()
        keys = self.keys if isinstance(self.keys[0], str) else self.index.tolist()
        header = canonical_json({"n": len(self), "shape": self.shape, "labels": labels, "keys": keys})
        return header.encode(errors="surrogateescape")  # file names need not be UTF-8

    def _hash_rows(self) -> Iterator[bytes]:
        for start in range(0, len(self), _BLOCK):
            chosen = self._rows[start : start + _BLOCK]
            pieces = [chosen] if self.source.shape is not None else np.split(chosen, len(chosen))
            for piece in pieces:
                yield fingerprint_rows(self.source.read(piece)).tobytes()
