"""Patch sets in safetensors files: rows read and written at their offsets, so that memory does not grow with N.

The library checks a file's header; rows are then read at their offsets, since its memory map would count every page
read towards the process, and written at theirs, since it cannot write a file in pieces.
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
from advdiff_cli.data.provenance import KEY, Provenance, canonical, parse
from advdiff_cli.data.rng import RowKey
from advdiff_cli.errors import AdvdiffError

_Tensors = dict[str, tuple[str, tuple[int, ...], int]]  # name -> dtype, shape, offset in the data

_DTYPES = {"F32": "float32", "U8": "uint8", "I64": "int64"}
_CODES = {name: code for code, name in _DTYPES.items()}


class SafetensorsSource:
    """Rows of a safetensors file."""

    def __init__(self, path: Path) -> None:
        """Check the header of `path` and open it."""
        self.path = path
        tensors, metadata, self._start = _header(path)
        if "images" not in tensors:
            raise AdvdiffError(f"{path} has no tensor named images; a patch set holds images, labels and index")
        known: _Tensors = {k: tensors[k] for k in ("images", "labels", "index") if k in tensors}
        self._dtype, shape, self._offset = known["images"]
        check_layout(path, shape, self._dtype, {k: v[1][0] if v[1] else 0 for k, v in known.items() if k != "images"})
        self._n, self._row_shape = shape[0], shape[1:]
        self.shape: tuple[int, int] | None = (shape[2], shape[3])
        self.provenance: Provenance | None = parse(metadata[KEY], path) if KEY in metadata else None
        self._file = os.open(path, os.O_RDONLY)
        self.labels = check_labels(path, self._vector(known, "labels"))
        index = self._vector(known, "index")
        self.index: Rows = np.arange(self._n) if index is None else index
        self.keys: Sequence[RowKey] = self.index.tolist()

    def _vector(self, known: _Tensors, name: str) -> Rows | None:
        if name not in known:
            return None
        dtype, shape, offset = known[name]
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
                raise AdvdiffError(f"{self.path} ends before row {row}; it was changed while being read")
        return images

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            os.close(self._file)


def open_safetensors(path: Path) -> SafetensorsSource:
    """Open a patch set in a safetensors file."""
    return SafetensorsSource(path)


def _header(path: Path) -> tuple[_Tensors, dict[str, str], int]:
    """Return tensors as {name: (dtype, shape, offset)}, the metadata, and where the data starts."""
    try:
        with safe_open(path, "np"):  # refuses truncated, overlapping and oversized headers
            pass
    except SafetensorError as e:
        raise AdvdiffError(f"{path} is not a whole safetensors file ({e}); make it again") from None
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
    """A safetensors file laid down for N rows, then written row by row."""

    def __init__(
        self, path: Path, shape: tuple[int, int, int, int], dtype: str, vectors: dict[str, NDArray[np.int64]],
        provenance: Provenance, *, resume: bool,
    ) -> None:  # fmt: skip
        """Lay down the header, index and labels at `path`, or open what an earlier run laid down."""
        header: dict[str, Any] = {"__metadata__": {KEY: canonical(provenance)}}
        offset = 0
        for name, vector in vectors.items():  # 8-byte tensors first: every tensor is aligned
            header[name] = _entry("int64", vector.shape, offset, vector.nbytes)
            offset += vector.nbytes
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header["images"] = _entry(dtype, shape, offset, size)
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        self._row = size // shape[0]
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_TRUNC), 0o666)
        if resume:  # the header that stands there may differ in what is recorded beside the recipe
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
        """Bring what was written to the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _entry(dtype: str, shape: tuple[int, ...], offset: int, size: int) -> dict[str, Any]:
    return {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
