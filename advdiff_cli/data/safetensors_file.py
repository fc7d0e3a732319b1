"""Patch sets in safetensors files, read and written row by row, so that memory does not grow with N.

The safetensors library checks the header. Rows are read at their offsets, because every page of the library's memory
map would count as memory of the process, and written at their offsets, because the library writes whole files only.
"""

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from advdiff_cli.data.atomic_files import reserve
from advdiff_cli.data.patch_source import Images, Rows, check_labels, check_layout
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
        tensors, metadata, self._start = _header(path)
        if "images" not in tensors:
            raise AdvdiffError(f"{path} has no tensor named images; a patch set needs images, labels and index")
        stored: _Tensors = {k: tensors[k] for k in ("images", "labels", "index") if k in tensors}
        self._dtype, shape, self._offset = stored["images"]
        check_layout(path, shape, self._dtype, {k: v[1][0] if v[1] else 0 for k, v in stored.items() if k != "images"})
        self._n, self._row_shape = shape[0], shape[1:]
        self.shape: tuple[int, int] | None = (shape[2], shape[3])
        self.provenance: Provenance | None = parse_provenance(metadata[KEY], path) if KEY in metadata else None
        self._file = os.open(path, os.O_RDONLY)
        self.labels = check_labels(path, self._vector(stored, "labels"))
        index = self._vector(stored, "index")
        self.index: Rows = np.arange(self._n) if index is None else index
        self.keys: Sequence[RowKey] = self.index.tolist()

    def _vector(self, stored: _Tensors, name: str) -> Rows | None:
        if name not in stored:
            return None
        dtype, shape, offset = stored[name]
        if dtype != "int64" or len(shape) != 1:
            raise AdvdiffError(f"{name} in {self.path} is {dtype} {shape}; int64 (N,) is needed")
        return np.frombuffer(os.pread(self._file, shape[0] * 8, self._start + offset), np.int64)

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


def _header(path: Path) -> tuple[_Tensors, dict[str, str], int]:
    """Return tensors as {name: (dtype, shape, offset)}, the metadata, and the offset of the data."""
    try:
        with safe_open(path, "np"):  # refuses truncated, overlapping and oversized headers
            pass
    except SafetensorError as e:
        raise AdvdiffError(f"{path} is not a complete safetensors file ({e}); make it again") from None
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: (_DTYPES.get(t["dtype"], t["dtype"]), tuple(t["shape"]), t["data_offsets"][0])
        for name, t in header.items()
    }
    return tensors, metadata, 8 + size


class SafetensorsTarget:
    """A safetensors file whose header and size are written first, and then its rows."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int, int],
        dtype: str,
        vectors: dict[str, NDArray[np.int64]],
        provenance: Provenance,
        *,
        resume: bool,
    ) -> None:
        """Write the header, index and labels to `path`, or reopen the file of an earlier run."""
        header: dict[str, Any] = {"__metadata__": {KEY: canonical_json(provenance)}}
        offset = 0
        for name, vector in vectors.items():  # 8-byte tensors first, so that every tensor is aligned
            header[name] = _entry("int64", vector.shape, offset, vector.nbytes)
            offset += vector.nbytes
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header["images"] = _entry(dtype, shape, offset, size)
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        self._row = size // shape[0]
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_TRUNC), 0o666)
        if resume:  # the existing header may differ in recorded versions or device
            (length,) = struct.unpack("<Q", os.pread(self._file, 8, 0))
            self._images = 8 + length + offset
        else:
            self._images = 8 + len(head) + offset
            os.pwrite(
                self._file,
                struct.pack("<Q", len(head)) + head + b"".join(v.tobytes() for v in vectors.values()),
                0,
            )
            reserve(self._file, self._images + size)

    def write(self, start: int, images: Images) -> None:
        """Write `images` as rows start, start + 1, ..."""
        data = np.ascontiguousarray(images).data.cast("B")
        at = self._images + start * self._row
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written

    def flush(self) -> None:
        """Flush written rows to the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _entry(dtype: str, shape: tuple[int, ...], offset: int, size: int) -> dict[str, Any]:
    return {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
