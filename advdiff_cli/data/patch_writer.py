"""The writer of patch sets: rows in place in OUT.part, a sidecar of finished rows, OUT by atomic rename."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from advdiff_cli.data.hdf5_file import Hdf5Target
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.patch_source import Images, Rows
from advdiff_cli.data.patches import PatchSet, open_patches
from advdiff_cli.data.provenance import Provenance, canonical, difference, mend, provenance, same_recipe, whole_lines
from advdiff_cli.data.safetensors_file import SafetensorsTarget
from advdiff_cli.errors import AdvdiffError

_FLUSH_SECONDS = 1.0
_TARGETS: dict[str, Any] = {".safetensors": SafetensorsTarget, ".h5": Hdf5Target, ".hdf5": Hdf5Target}


class _Target(Protocol):
    def write(self, start: int, images: Images) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Batch:
    """Rows computed at once; the last batch repeats its last row to the full size, and only `count` rows are kept."""

    start: int
    rows: Rows
    count: int


@dataclass(frozen=True)
class Part:
    """Rows start..stop-1 of the `of` rows that a recipe makes."""

    start: int
    stop: int
    of: int


def shard_rows(n: int, batch_size: int, shard: tuple[int, int] | None) -> Part:
    """Return the rows of shard (i, count): whole batches, so that every row is computed as in one run.

    Raises:
        AdvdiffError: there are fewer batches than shards, and none is left for this one.
    """
    i, count = shard or (0, 1)
    total = -(-n // batch_size)
    start, stop = (total * k // count * batch_size for k in (i, i + 1))
    if start >= n or start == stop:
        raise AdvdiffError(f"--shard {i}/{count} is empty: {n} patches are only {total} batches of {batch_size}")
    return Part(start, min(stop, n), n)


def begun(out: Path) -> Mapping[str, Any]:
    """Return the parameters of the result, or of the unfinished work, at `out`; empty where there is none.

    The same command takes batch size and precision from it, so that it goes on where another machine began.
    """
    record = _unfinished(out) or (recorded(out) if out.is_file() else None)
    parameters: Mapping[str, Any] = (record or {}).get("recipe", {}).get("parameters", {})
    return parameters


def recorded(out: Path) -> Provenance | None:
    """Return the provenance of the patch set at `out`, or None where the file has none."""
    try:
        return open_patches(out).provenance
    except AdvdiffError:
        return None


def is_made(out: Path, recipe: Provenance) -> bool:
    """Tell whether the whole result of `recipe` stands at `out`."""
    have = recorded(out) if out.is_file() else None
    return have is not None and same_recipe(_identity(have), {**recipe, "part": None})


def check_suffix(out: Path) -> None:
    """Check that `out` names a form that can be written; AdvdiffError when not."""
    if out.suffix not in _TARGETS:
        raise AdvdiffError(f"--out {out}: patch sets are written as .safetensors or .h5")


class PatchWriter:
    """Writes the rows of one recipe to `out`, going on where an earlier run of it ended."""

    def __init__(
        self, out: Path, recipe: Provenance, source: PatchSet, part: Part, *,
        shape: tuple[int, int], dtype: str = "float32", device: str = "cpu", overwrite: bool = False,
        inputs: list[Provenance] | None = None,
    ) -> None:  # fmt: skip
        """Decide whether `out` is up to date, and lay down or open OUT.part.

        Args:
            out: A .safetensors or .h5 file to be made.
            recipe: What is to be made.
            source: The rows it is made from: labels, index and origin are carried over.
            part: Which rows of the recipe this file holds.
            shape: (H, W) of the images.
            dtype: float32 or uint8.
            device: Kind of device, for the record.
            overwrite: Whether another result, or another recipe's unfinished work, may be replaced.
            inputs: Provenance of the inputs; the source's own by default.

        Raises:
            AdvdiffError: something else stands at `out`, its folder is missing, or another process writes it.
        """
        check_suffix(out)
        self.out, self.part = out, part
        self._work, self._sidecar = _work_files(out)
        own = [source.provenance] if source.provenance else []
        record = provenance(recipe, inputs=own if inputs is None else inputs, origin=source.origin(), device=device)
        if part.stop - part.start < part.of:
            record["part"] = [part.start, part.stop, part.of]
        self._record = record
        self.finished = np.zeros(part.stop - part.start, bool)
        self._target: _Target | None = None
        self.up_to_date = self._stands(overwrite)
        if self.up_to_date:
            return
        self._lock = OutputLock(out)
        try:
            self.up_to_date = self._stands(overwrite)  # another process may have ended meanwhile
            if not self.up_to_date:
                self._lay_down(source, shape, dtype, overwrite)
        finally:
            if self._target is None:
                self._lock.release()

    def _lay_down(self, source: PatchSet, shape: tuple[int, int], dtype: str, overwrite: bool) -> None:
        """Open OUT.part, taken over from an earlier run or new, and its sidecar."""
        if link := next((f for f in (self._work, self._sidecar) if f.is_symlink()), None):
            raise AdvdiffError(f"{link} is a symbolic link, which is not written through; remove it")
        rows, vectors = slice(self.part.start, self.part.stop), {"index": source.index, "labels": source.labels}
        vectors = {k: np.ascontiguousarray(v[rows]) for k, v in vectors.items() if v is not None}
        resume = self._resume(overwrite)
        if not resume:  # before the rows it speaks of are gone
            self._sidecar.unlink(missing_ok=True)
        full = (len(self.finished), 3, *shape)
        try:
            kind: Callable[..., _Target] = _TARGETS[self.out.suffix]
            self._target = kind(self._work, full, dtype, vectors, self._record, resume=resume)
            if not resume:
                self._sidecar.write_text(canonical(self._record) + "\n")
        except OSError:
            self._target = None
            if not resume:
                self._work.unlink(missing_ok=True)
                self._sidecar.unlink(missing_ok=True)
            raise
        self._pending, self._flushed = list[tuple[int, int]](), time.monotonic()

    def _stands(self, overwrite: bool) -> bool:
        """Tell whether the result is made; AdvdiffError when something else stands there that may not be replaced."""
        if self.out.is_dir():
            raise AdvdiffError(f"{self.out} is a folder; give another --out")
        if overwrite or not self.out.exists():
            return False
        if (have := recorded(self.out)) is not None and self._same(have):
            return True
        what = f"was made otherwise ({difference(_identity(have), _identity(self._record))})" if have else ""
        raise AdvdiffError(f"{self.out} {what or 'is no patch set of advdiff'}; give --overwrite or another --out")

    def _same(self, other: Provenance) -> bool:
        return same_recipe(_identity(other), _identity(self._record))

    def _resume(self, overwrite: bool) -> bool:
        """Take over the finished rows of unfinished work of the same recipe; AdvdiffError when it is of another."""
        have = _unfinished(self.out)
        if have is None:
            return False
        if not self._same(have):
            if overwrite:
                return False
            what = difference(_identity(have), _identity(self._record))
            raise AdvdiffError(
                f"{self._work} holds unfinished work of another recipe ({what}); give --overwrite or another --out"
            )
        mend(self._sidecar)
        for line in whole_lines(self._sidecar)[1:]:
            start, stop = json.loads(line)
            self.finished[start:stop] = True
        return True

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield the batches that are not finished, as positions in the source."""
        for start in range(self.part.start, self.part.stop, batch_size):
            stop = min(start + batch_size, self.part.stop)
            if not self.finished[start - self.part.start : stop - self.part.start].all():
                yield Batch(start, np.minimum(np.arange(start, start + batch_size), stop - 1), stop - start)

    def write(self, batch: Batch, images: Images) -> None:
        """Write the kept rows of a batch."""
        assert self._target is not None
        start = batch.start - self.part.start
        self._target.write(start, images[: batch.count])
        self.finished[start : start + batch.count] = True
        self._pending.append((start, start + batch.count))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Bring rows to the disk, then say in the sidecar that they are there."""
        assert self._target is not None
        self._target.flush()
        with self._sidecar.open("a") as file:
            file.write("".join(f"[{start},{stop}]\n" for start, stop in self._pending))
        self._pending.clear()
        self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close OUT.part; rename it to OUT when every row is finished and nothing went wrong."""
        if self._target is None:
            return
        try:
            try:
                self._flush()
            finally:
                self._target.close()
            if kind is None and self.finished.all():
                self._sidecar.unlink()
                os.replace(self._work, self.out)
        finally:
            self._target = None
            self._lock.release()


def _work_files(out: Path) -> tuple[Path, Path]:
    return out.with_name(out.name + ".part"), out.with_name(out.name + ".part.rows")


def _unfinished(out: Path) -> Provenance | None:
    """Return the provenance of the unfinished work at `out`, or None where there is none that can be resumed."""
    work, sidecar = _work_files(out)
    if not (work.is_file() and sidecar.is_file()):
        return None
    head, newline, _ = sidecar.read_text().partition("\n")
    record: Provenance | None = json.loads(head) if newline else None
    return record


def _identity(record: Provenance) -> Provenance:
    """Return what two results of one recipe and the same rows have in common."""
    return {**record["recipe"], "part": record.get("part")}
