"""Patch sets in safetensors files, read and written row by row, so that memory does not grow with N.

The safetensors library checks the header. Rows are read at their offsets, because every page of the library's memory
map would count as memory of the process, and written at their offsets, because the library writes whole files only.
"""

import json
import os
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open

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
from advdiff_cli.data.provenance import KEY, Provenance, canonical_json, parse_provenance
from advdiff_cli.data.rng import RowKey
from advdiff_cli.errors import AdvdiffError

_Tensors = dict[str, tuple[str, tuple[int, ...], int]]  # name -> dtype, shape, offset in the data

_DTYPES = {"F32": "float32", "U8": "uint8", "I64": "int64"}
_CODES = {name: code for code, name in _DTYPES.items()}


class SafetensorsSource:
    """Rows of a safetensors file."""

    def __init__(self, path: Path) -> None:
        """Open `path` and check its header."""
        self.path = path
        tensors, metadata, self._start = read_header(path)
        if "images" not in tensors:
            raise AdvdiffError(f"{path} has no tensor named images; a patch set needs images, labels and index")
        stored: _Tensors = {
            k: (_DTYPES.get(t["dtype"], t["dtype"]), tuple(t["shape"]), t["data_offsets"][0])
            for k in ("images", "labels", "index", ORIGINS)
            if (t := tensors.get(k)) is not None
        }
        self._dtype, shape, self._offset = stored["images"]
        check_layout(path, shape, self._dtype, {k: v[1][0] if v[1] else 0 for k, v in stored.items() if k != "images"})
        self._n, self._row_shape = shape[0], shape[1:]
        self.shape: tuple[int, int] | None = (shape[2], shape[3])
        self.provenance: Provenance | None = parse_provenance(metadata[KEY], path) if KEY in metadata else None
        self._file = os.open(path, os.O_RDONLY)
        self.labels = check_labels(path, self._vector(stored, "labels"))
        self.index = check_index(path, self._vector(stored, "index"), self._n)
        self.origins = self._origins(stored)
        self.inputs: Sequence[Path] = [path]
        self.keys: Sequence[RowKey] = self.index.tolist()

    def _vector(self, stored: _Tensors, name: str) -> Rows | None:
        if name not in stored:
            return None
        dtype, shape, offset = stored[name]
        if dtype != "int64" or len(shape) != 1:
            raise AdvdiffError(f"{name} in {self.path} is {dtype} {shape}; int64 (N,) is needed")
        return np.frombuffer(os.pread(self._file, shape[0] * 8, self._start + offset), np.int64)

    def _origins(self, stored: _Tensors) -> RowFingerprints | None:
        if ORIGINS not in stored:
            return None
        dtype, shape, offset = stored[ORIGINS]
        check_origins(self.path, dtype, shape)
        return np.frombuffer(os.pread(self._file, prod(shape), self._start + offset), np.uint8).reshape(shape)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._n

    def read(self, rows: Rows) -> Images:
        """Return the images at `rows`."""
        images = np.empty((len(rows), *self._row_shape), self._dtype)
        for out, row in zip(images, rows, strict=True):
            at = self._start + self._offset + int(row) * out.nbytes
            if os.preadv(self._file, [memoryview(out).cast("B")], at) != out.nbytes:
                raise AdvdiffError(f"{self.path} ends before row {row}; it changed while it was read")
        return images

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            os.close(self._file)


def open_safetensors(path: Path) -> SafetensorsSource:
    """Open a patch set in a safetensors file."""
    return SafetensorsSource(path)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Return the entries of the tensors, the metadata, and the offset of the data.

    Raises:
        AdvdiffError: The file is not a complete safetensors file.
    """
    try:
        with safe_open(path, "np"):  # refuses truncated, overlapping and oversized headers
            pass
    except SafetensorError as e:
        raise AdvdiffError(f"{path} is not a complete safetensors file ({e}); make or download it again") from None
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    return header, header.pop("__metadata__", {}), 8 + size


class SafetensorsTarget:
    """A safetensors file whose header and size are written first, and then its rows."""

    def __init__(self, path: Path, layout: FileLayout, mode: int) -> None:
        """Open the file with the flags `mode`, and write its header, index and labels."""
        self._path, self._layout = path, layout
        head = _encode_header(layout)
        self._images = len(head)
        self._file = os.open(path, os.O_RDWR | mode, 0o666)
        os.pwrite(self._file, head, 0)
        size = self._images + layout.shape[0] * layout.row_bytes
        reserve(self._file, size)
        os.ftruncate(self._file, size)  # a damaged file may be too long

    @classmethod
    def create(cls, path: Path, layout: FileLayout) -> Self:
        """Create the file."""
        return cls(path, layout, os.O_CREAT | os.O_TRUNC)

    @classmethod
    def reopen(cls, path: Path, layout: FileLayout) -> Self:
        """Reopen the file of an earlier run; it gets the size that it should have."""
        return cls(path, layout, 0)

    def write(self, start: int, images: Images) -> None:
        """Write `images` as rows start, start + 1, ..."""
        data = np.ascontiguousarray(images).data.cast("B")
        at = self._images + start * self._layout.row_bytes
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written

    def read(self, start: int, stop: int) -> Images:
        """Return rows start to stop - 1."""
        size, row = self._layout.row_bytes * (stop - start), self._layout.row_bytes
        data = os.pread(self._file, size, self._images + start * row)
        return np.frombuffer(data, self._layout.dtype).reshape(-1, *self._layout.shape[1:])

    def flush(self) -> None:
        """Flush written rows to the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _encode_header(layout: FileLayout) -> bytes:
    """Return all that comes before the images: the header, and the vectors."""
    header: dict[str, Any] = {"__metadata__": {KEY: canonical_json(layout.provenance)}}
    offset = 0
    for name, vector in layout.vectors.items():  # 8-byte tensors first, so that every tensor is aligned
        header[name] = _entry(str(vector.dtype), vector.shape, offset, vector.nbytes)
        offset += vector.nbytes
    header["images"] = _entry(layout.dtype, layout.shape, offset, layout.shape[0] * layout.row_bytes)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + b"".join(v.tobytes() for v in layout.vectors.values())


def _entry(dtype: str, shape: tuple[int, ...], offset: int, size: int) -> dict[str, Any]:
    return {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
