"""Patch sets in HDF5 files: advdiff's own (images, labels, index) and PCam's (x, y).

Links, external storage and virtual datasets are not followed. Chunks are whole rows, since HDF5's automatic chunks
would spread each patch over hundreds of them.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.atomic_files import reserve
from advdiff_cli.data.output_spec import FileLayout
from advdiff_cli.data.patch_source import (
    ORIGINS,
    Images,
    RowFingerprints,
    Rows,
    check_index,
    check_labels,
    check_layout,
    check_origins,
)
from advdiff_cli.data.pcam_files import labels_file
from advdiff_cli.data.provenance import KEY, Provenance, canonical_json, parse_provenance
from advdiff_cli.data.rng import RowKey
from advdiff_cli.errors import AdvdiffError, FileInUse

_CHUNK_BYTES = 1 << 20
_MAX_CHUNK_BYTES = 64 << 20  # of a file that is read
_OVERHEAD_BYTES = 1 << 20  # an upper bound of HDF5's own structures
_MAX_DEFLATE_RATIO = 1032  # reached on zeros
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}


class Hdf5Source:
    """Rows of an HDF5 file."""

    def __init__(self, path: Path) -> None:
        """Open `path` and check its datasets."""
        self.path = path
        with _name_read_errors(path):
            self._open(path)

    def _open(self, path: Path) -> None:
        self._file = h5py.File(path, "r")
        self._pcam = "images" not in self._file and "x" in self._file
        self._images = _dataset(self._file, path, "x" if self._pcam else "images")
        stored = tuple(int(s) for s in self._images.shape)
        shape = (stored[0], stored[3], stored[1], stored[2]) if self._pcam and len(stored) == 4 else stored
        labels, index = self._pcam_labels() if self._pcam else self._vector("labels"), self._vector("index")
        self.origins = self._stored_origins()
        vectors = {"labels": labels, "index": index, ORIGINS: self.origins}
        counts = {k: len(v) for k, v in vectors.items() if v is not None}
        check_layout(path, shape, str(self._images.dtype), counts)
        self.shape: tuple[int, int] | None = (shape[2], shape[3])
        self.labels = check_labels(path, labels)
        self.index = check_index(path, index, shape[0])
        self.keys: Sequence[RowKey] = self.index.tolist()
        beside = labels_file(path) if self._pcam else None
        self.inputs: Sequence[Path] = [path] if beside is None else [path, beside]
        self.provenance: Provenance | None = None
        if KEY in self._file:
            record = _dataset(self._file, path, KEY)
            if (
                record.shape != () or h5py.check_string_dtype(record.dtype) is None
            ):  # many strings may be one in the file
                raise AdvdiffError(f"the provenance record in {path} is not a single text; make the file again")
            self.provenance = parse_provenance(record[()], path)

    def _vector(self, name: str) -> NDArray[Any] | None:
        if self._pcam or name not in self._file:
            return None
        vector = _dataset(self._file, self.path, name)
        if vector.ndim != 1 or vector.dtype.kind not in "iu":
            raise AdvdiffError(f"{name} in {self.path} is {vector.dtype} {vector.shape}; int64 (N,) is needed")
        return np.asarray(vector[()])

    def _stored_origins(self) -> RowFingerprints | None:
        if self._pcam or ORIGINS not in self._file:
            return None
        stored = _dataset(self._file, self.path, ORIGINS)
        check_origins(self.path, str(stored.dtype), tuple(stored.shape))
        return np.asarray(stored[()])

    def _pcam_labels(self) -> NDArray[Any] | None:
        """Return the labels (N,) from the _y.h5 file next to PCam's _x.h5 file, or None if there is none."""
        sibling = labels_file(self.path)
        if sibling is None or not sibling.exists():
            return None
        with _name_read_errors(sibling), h5py.File(sibling, "r") as file:
            labels = _dataset(file, sibling, "y")
            if labels.dtype.kind not in "iu":
                raise AdvdiffError(f"y in {sibling} is {labels.dtype}; integers are needed")
            return np.asarray(labels[()]).reshape(-1)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._images)

    @property
    def layout(self) -> tuple[tuple[int, ...], str]:
        """The shape and type of the images as stored."""
        return tuple(self._images.shape), str(self._images.dtype)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, rows: Rows) -> Images:
        """Return the images at `rows`."""
        first, n = int(rows[0]), len(rows)
        with _name_read_errors(self.path):
            if np.array_equal(rows, np.arange(first, first + n)):
                images = self._images[first : first + n]
            else:
                images = np.stack([self._images[int(row)] for row in rows])
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if self._pcam else images


def open_hdf5(path: Path) -> Hdf5Source:
    """Open a patch set in an HDF5 file."""
    return Hdf5Source(path)


@contextmanager
def _name_read_errors(path: Path) -> Iterator[None]:
    """Turn h5py's many errors about a broken file into one that names the file."""
    try:
        yield
    except BlockingIOError:
        raise FileInUse(f"{path} is in use by another process; wait until it ends") from None
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as e:
        why = str(e).strip("'\"").splitlines()[0] if str(e) else type(e).__name__
        raise AdvdiffError(f"{path} is not a complete HDF5 file ({why}); make or download it again") from None


def _dataset(file: Any, path: Path, name: str) -> Any:
    """Return a dataset that is stored in the file itself and is no larger than the file can hold.

    Raises:
        AdvdiffError: It is a link, external or virtual, claims more data than the file holds, or has very large chunks.
    """
    if file.get(name, getlink=True).__class__ is not h5py.HardLink:
        raise AdvdiffError(f"{path} has no dataset {name} of its own; a patch set needs images, labels and index")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.external is not None or dataset.is_virtual:
        raise AdvdiffError(f"{name} in {path} is not a plain dataset; external and virtual datasets are not read")
    plan = dataset.id.get_create_plist()
    stored, filters = dataset.id.get_storage_size(), plan.get_nfilters()
    kinds = [plan.get_filter(k)[0] for k in range(filters)]
    if len(set(kinds)) < filters or not set(kinds) <= _FILTERS:
        raise AdvdiffError(
            f"{name} in {path} is compressed in an unusual way; gzip, lzf, shuffle and fletcher32 are read"
        )
    row = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    if dataset.chunks is not None and (chunk := math.prod(dataset.chunks) * dataset.dtype.itemsize) > max(
        _MAX_CHUNK_BYTES, row
    ):
        layout = "x".join(map(str, (16, *dataset.shape[1:])))
        raise AdvdiffError(
            f"{name} in {path} has chunks of {chunk >> 20} MiB, which are read whole for each row; store it in smaller "
            f"ones, such as with h5repack -l {name}:CHUNK={layout}"
        )
    limit = stored * (_MAX_DEFLATE_RATIO if filters else 1)
    if dataset.nbytes > limit or stored > path.stat().st_size:
        raise AdvdiffError(
            f"{name} in {path} claims {dataset.nbytes} bytes, but the file holds {stored}; make it again"
        )
    return dataset


class Hdf5Target:
    """An HDF5 file whose datasets are created and allocated first, and then written row by row."""

    def __init__(self, path: Path, file: Any, images: Any) -> None:
        """Take the open file and its dataset of images."""
        self._path, self._file, self._images = path, file, images

    @classmethod
    def create(cls, path: Path, layout: FileLayout) -> Self:
        """Create the file."""
        record, rows = canonical_json(layout.provenance), layout.shape[0]
        with path.open("wb") as file:  # HDF5 itself would crash on a full disk
            vectors = sum(v.nbytes for v in layout.vectors.values())
            reserve(file.fileno(), rows * layout.row_bytes + vectors + len(record) + _OVERHEAD_BYTES)
        made = h5py.File(path, "w")
        for name, vector in layout.vectors.items():
            made[name] = vector
        made[KEY] = record
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_obj_track_times(False)  # so that equal results are equal files
        plan.set_chunk((max(1, min(rows, _CHUNK_BYTES // layout.row_bytes)), *layout.shape[1:]))
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # a killed writer then leaves a valid file
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        kind = h5py.h5t.py_create(np.dtype(layout.dtype), logical=True)
        space = h5py.h5s.create_simple(layout.shape)
        images = h5py.Dataset(h5py.h5d.create(made.id, b"images", kind, space, plan))
        made.flush()
        reserve(made.id.get_vfd_handle(), made.id.get_filesize())
        return cls(path, made, images)

    @classmethod
    def reopen(cls, path: Path, layout: FileLayout) -> Self:
        """Reopen the file of an earlier run.

        Raises:
            AdvdiffError: It is damaged, or has another layout.
        """
        source = Hdf5Source(path)
        same = source.provenance == layout.provenance and source.layout == (layout.shape, layout.dtype)
        stored = {"index": source.index, "labels": source.labels, ORIGINS: source.origins}
        vectors = {k: v for k, v in stored.items() if v is not None}
        same &= vectors.keys() == layout.vectors.keys()
        same &= all(np.array_equal(v, layout.vectors.get(k, ())) for k, v in vectors.items())
        source.close()
        if not same:
            raise AdvdiffError(f"{path} is not the unfinished work that its journal tells of")
        with _name_read_errors(path):
            file = h5py.File(path, "r+")
            return cls(path, file, file["images"])

    def read(self, start: int, stop: int) -> Images:
        """Return rows start to stop - 1."""
        with _name_read_errors(self._path):
            rows: Images = self._images[start:stop]
            return rows

    def write(self, start: int, images: Images) -> None:
        """Write `images` as rows start, start + 1, ..."""
        with _name_write_errors(self._path):
            self._images[start : start + len(images)] = images

    def flush(self) -> None:
        """Flush written rows to the disk."""
        with _name_write_errors(self._path):
            self._file.flush()
            os.fsync(self._file.id.get_vfd_handle())

    def close(self) -> None:
        """Close the file."""
        with _name_write_errors(self._path):
            self._file.close()


@contextmanager
def _name_write_errors(path: Path) -> Iterator[None]:
    """Turn h5py's write errors, which do not name the file, into one that does."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        raise AdvdiffError(
            f"cannot write {path} ({str(e).splitlines()[0]}); run the same command again to resume"
        ) from None
