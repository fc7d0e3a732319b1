"""What is to be written: an output and its recipe, the rows of it, and the layout of its file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advdiff_cli.data.patch_source import Rows
from advdiff_cli.data.provenance import Provenance
from advdiff_cli.errors import AdvdiffError


@dataclass(frozen=True)
class OutputSpec:
    """An output to be made.

    Args:
        path: Where it goes.
        recipe: What makes it.
        device: The kind of device that computes it; recorded, not compared.
        overwrite: Whether another result, or the unfinished work of another recipe, may be replaced.
    """

    path: Path
    recipe: Provenance
    device: str = "cpu"
    overwrite: bool = False


@dataclass(frozen=True)
class Batch:
    """Rows computed together. The last batch repeats its last row to the full size; its first `count` rows are kept."""

    start: int
    rows: Rows
    count: int


@dataclass(frozen=True)
class RowRange:
    """Rows start to stop - 1 of the `total` rows of a recipe."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start


def shard_rows(n: int, batch_size: int, shard: tuple[int, int] | None) -> RowRange:
    """Return the rows of shard (i, count): whole batches, so that each row is computed as in a single run.

    Raises:
        AdvdiffError: There are fewer batches than shards, and this shard is empty.
    """
    i, count = shard or (0, 1)
    batches = -(-n // batch_size)
    start, stop = (batches * k // count * batch_size for k in (i, i + 1))
    if start >= n or start == stop:
        raise AdvdiffError(
            f"--shard {i}/{count} is empty: a shard has whole batches, and {n} patches in batches of {batch_size} make "
            f"only {batches}; give at most {batches} shards"
        )
    return RowRange(start, min(stop, n), n)


def unfinished_batches(rows: RowRange, batch_size: int, finished: NDArray[np.bool_]) -> Iterator[Batch]:
    """Yield the batches of a range that are not finished, as positions in the source.

    Args:
        rows: The range.
        batch_size: Rows of a batch.
        finished: (len(rows),) which rows are finished; it may change meanwhile.
    """
    for start in range(rows.start, rows.stop, batch_size):
        stop = min(start + batch_size, rows.stop)
        if not finished[start - rows.start : stop - rows.start].all():
            yield Batch(start, np.minimum(np.arange(start, start + batch_size), stop - 1), stop - start)


@dataclass(frozen=True)
class FileLayout:
    """The content of a patch set's file, without the pixels.

    Args:
        shape: (N, 3, H, W) of the images.
        dtype: float32 or uint8.
        vectors: index (N,) and, where there are any, labels (N,) and the fingerprints of origins (N, 32).
        provenance: How the set was made.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    vectors: Mapping[str, NDArray[Any]]
    provenance: Provenance

    @property
    def row_bytes(self) -> int:
        """The bytes of one image."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize
