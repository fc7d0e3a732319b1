"""Write patch sets: rows into OUT.part, finished rows into a journal, and OUT by atomic rename."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from advdiff_cli.data.hdf5_file import Hdf5Target
from advdiff_cli.data.journal import complete_lines, drop_incomplete_line
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.patch_source import Images, Rows
from advdiff_cli.data.patches import PatchSet, open_patches
from advdiff_cli.data.provenance import Provenance, canonical_json, provenance, same_recipe
from advdiff_cli.data.resume import matches_recipe
from advdiff_cli.data.safetensors_file import SafetensorsTarget
from advdiff_cli.errors import AdvdiffError

_FLUSH_SECONDS = 1.0
_TARGETS: dict[str, type[SafetensorsTarget] | type[Hdf5Target]] = {
    ".safetensors": SafetensorsTarget,
    ".h5": Hdf5Target,
    ".hdf5": Hdf5Target,
}


class _Target(Protocol):
    def write(self, start: int, images: Images) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


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
        raise AdvdiffError(f"--shard {i}/{count} is empty: {n} patches make only {batches} batches of {batch_size}")
    return RowRange(start, min(stop, n), n)


def resume_params(out: Path) -> Mapping[str, object]:
    """Return the parameters of the result or the unfinished work at `out`; empty if there is neither.

    A command takes its batch size and precision from them, so that it resumes work begun on another machine.
    """
    record = _unfinished(out) or (recorded(out) if out.is_file() else None)
    parameters: Mapping[str, object] = (record or {}).get("recipe", {}).get("parameters", {})
    return parameters


def recorded(out: Path) -> Provenance | None:
    """Return the provenance of the patch set at `out`, or None if there is none."""
    try:
        return open_patches(out).provenance
    except AdvdiffError:
        return None


def is_complete(out: Path, recipe: Provenance) -> bool:
    """Return whether the whole result of `recipe` is at `out`."""
    have = recorded(out) if out.is_file() else None
    return have is not None and same_recipe(_identity(have), {**recipe, "part": None})


def check_suffix(out: Path) -> None:
    """Check that patch sets can be written under the name `out`.

    Raises:
        AdvdiffError: They cannot.
    """
    if out.suffix not in _TARGETS:
        raise AdvdiffError(f"--out {out}: patch sets are written as .safetensors or .h5")


class PatchWriter:
    """Writes the rows of one recipe, and resumes where an earlier run stopped."""

    def __init__(
        self,
        output: OutputSpec,
        source: PatchSet,
        rows: RowRange,
        *,
        dtype: str = "float32",
        inputs: list[Provenance] | None = None,
    ) -> None:
        """Decide whether the output is up to date, and create or reopen OUT.part otherwise.

        Args:
            output: A .safetensors or .h5 file.
            source: The set it is made from, all of one size; its labels, index and origin are copied.
            rows: Which rows of the recipe this file holds.
            dtype: float32 or uint8.
            inputs: Provenance of the inputs; the source's own by default.

        Raises:
            AdvdiffError: Something else is at the path, its folder is missing, or another process writes it.
        """
        out = output.path
        check_suffix(out)
        self.out, self.rows = out, rows
        self._work, self._journal = _work_files(out)
        own = [source.provenance] if source.provenance else []
        self._record = provenance(
            output.recipe,
            inputs=own if inputs is None else inputs,
            origin=source.origin(),
            device=output.device,
        )
        if len(rows) < rows.total:
            self._record["part"] = [rows.start, rows.stop, rows.total]
        self.finished = np.zeros(len(rows), bool)
        self._target: _Target | None = None
        self.up_to_date = self._is_up_to_date(output.overwrite)
        if self.up_to_date:
            return
        self._lock = OutputLock(out)
        try:
            self.up_to_date = self._is_up_to_date(output.overwrite)  # another process may just have finished
            if not self.up_to_date:
                self._open(source, dtype, output.overwrite)
        finally:
            if self._target is None:
                self._lock.release()

    def _open(self, source: PatchSet, dtype: str, overwrite: bool) -> None:
        """Open OUT.part and its journal, new or left by an earlier run."""
        if link := next((f for f in (self._work, self._journal) if f.is_symlink()), None):
            raise AdvdiffError(f"{link} is a symbolic link, which advdiff does not write through; remove it")
        rows, columns = slice(self.rows.start, self.rows.stop), {"index": source.index, "labels": source.labels}
        vectors = {k: np.ascontiguousarray(v[rows]) for k, v in columns.items() if v is not None}
        resume = self._resume(overwrite)
        if not resume:  # before its rows are gone
            self._journal.unlink(missing_ok=True)
        shape = (len(self.finished), 3, *source.require_shape())
        try:
            target = _TARGETS[self.out.suffix]
            self._target = target(self._work, shape, dtype, vectors, self._record, resume=resume)
            if not resume:
                self._journal.write_text(canonical_json(self._record) + "\n")
        except OSError:
            self._target = None
            if not resume:
                self._work.unlink(missing_ok=True)
                self._journal.unlink(missing_ok=True)
            raise
        self._pending, self._flushed = list[tuple[int, int]](), time.monotonic()

    def _is_up_to_date(self, overwrite: bool) -> bool:
        if self.out.is_dir():
            raise AdvdiffError(f"{self.out} is a folder; give another --out")
        if overwrite or not self.out.exists():
            return False
        have = recorded(self.out)
        if have is None:
            raise AdvdiffError(f"{self.out} is not a patch set of advdiff; give --overwrite or another --out")
        return matches_recipe(self.out, _identity(have), _identity(self._record))

    def _resume(self, overwrite: bool) -> bool:
        """Take over the finished rows of unfinished work of the same recipe."""
        have = _unfinished(self.out)
        if have is None or not matches_recipe(
            self._work, _identity(have), _identity(self._record), overwrite=overwrite, unfinished=True
        ):
            return False
        drop_incomplete_line(self._journal)
        for line in complete_lines(self._journal)[1:]:
            start, stop = json.loads(line)
            self.finished[start:stop] = True
        return True

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield the unfinished batches, as positions in the source."""
        for start in range(self.rows.start, self.rows.stop, batch_size):
            stop = min(start + batch_size, self.rows.stop)
            if not self.finished[start - self.rows.start : stop - self.rows.start].all():
                yield Batch(start, np.minimum(np.arange(start, start + batch_size), stop - 1), stop - start)

    def write(self, batch: Batch, images: Images) -> None:
        """Write the rows of a batch that are kept."""
        assert self._target is not None
        start = batch.start - self.rows.start
        self._target.write(start, images[: batch.count])
        self.finished[start : start + batch.count] = True
        self._pending.append((start, start + batch.count))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Flush rows to the disk, then record them in the journal."""
        assert self._target is not None
        self._target.flush()
        with self._journal.open("a") as file:
            file.write("".join(f"[{start},{stop}]\n" for start, stop in self._pending))
        self._pending.clear()
        self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close OUT.part; rename it to OUT if every row is finished and there was no exception."""
        if self._target is None:
            return
        try:
            try:
                self._flush()
            finally:
                self._target.close()
            if kind is None and self.finished.all():
                self._journal.unlink()
                os.replace(self._work, self.out)
        finally:
            self._target = None
            self._lock.release()


def _work_files(out: Path) -> tuple[Path, Path]:
    return out.with_name(out.name + ".part"), out.with_name(out.name + ".part.rows")


def _unfinished(out: Path) -> Provenance | None:
    """Return the provenance of the unfinished work at `out`, or None if nothing can be resumed."""
    work, journal = _work_files(out)
    if not (work.is_file() and journal.is_file()):
        return None
    head, newline, _ = journal.read_text().partition("\n")
    record: Provenance | None = json.loads(head) if newline else None
    return record


def _identity(record: Provenance) -> Provenance:
    """Return what is equal for two results of one recipe that hold the same rows."""
    return {**record["recipe"], "part": record.get("part")}
