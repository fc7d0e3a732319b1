"""Write patch sets: rows into OUT.part, finished rows into a journal, and OUT by atomic rename."""

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from advdiff_cli.data.atomic_files import sync
from advdiff_cli.data.hdf5_file import Hdf5Target
from advdiff_cli.data.journal import drop_incomplete_line
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.output_spec import Batch, FileLayout, OutputSpec, RowRange, unfinished_batches
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_source import ORIGINS, Images
from advdiff_cli.data.provenance import Provenance, provenance
from advdiff_cli.data.resume import identity, matches_recipe, part_of, recorded
from advdiff_cli.data.row_journal import (
    FinishedRows,
    append_rows,
    begin_journal,
    checksum,
    finished_rows,
    unfinished,
    work_files,
)
from advdiff_cli.data.safetensors_file import SafetensorsTarget
from advdiff_cli.errors import AdvdiffError, FileInUse

_log = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0
_TARGETS: dict[str, type[SafetensorsTarget] | type[Hdf5Target]] = {
    ".safetensors": SafetensorsTarget,
    ".h5": Hdf5Target,
    ".hdf5": Hdf5Target,
}


class _Target(Protocol):
    def write(self, start: int, images: Images) -> None: ...
    def read(self, start: int, stop: int) -> Images: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


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
        is_origin: bool = False,
    ) -> None:
        """Decide whether the output is up to date, and create or reopen OUT.part otherwise.

        Args:
            output: A .safetensors or .h5 file.
            source: The set it is made from, all of one size; its labels and index are copied.
            rows: Which rows of the recipe this file holds.
            dtype: float32 or uint8.
            inputs: Provenance of the inputs; the source's own by default.
            is_origin: Whether the rows are first themselves, since they are copied or drawn.

        Raises:
            AdvdiffError: Something else is at the path, its folder is missing, or another process writes it.
        """
        out = output.path
        check_suffix(out)
        self.out, self.rows = out, rows
        self._work, self._journal = work_files(out)
        own = [source.provenance] if source.provenance else []
        self._record = provenance(output.recipe, inputs=own if inputs is None else inputs, device=output.device)
        if (part := part_of(rows)) is not None:
            self._record["part"] = part
        self.finished = np.zeros(len(rows), bool)
        self._target: _Target | None = None
        self._resumed = False
        self.up_to_date = self._is_up_to_date(output.overwrite)
        if self.up_to_date:
            if not self._work.exists() and not self._journal.is_symlink():
                self._journal.unlink(missing_ok=True)  # of a process that was killed right after the rename
            return
        self._lock = OutputLock(out)
        try:
            self.up_to_date = self._is_up_to_date(output.overwrite)  # another process may just have finished
            if not self.up_to_date:
                self._open(self._layout(source, dtype, is_origin=is_origin), output.overwrite)
        finally:
            if self._target is None:
                self._lock.release()

    def _layout(self, source: PatchSet, dtype: str, *, is_origin: bool) -> FileLayout:
        rows = slice(self.rows.start, self.rows.stop)
        origins = None if is_origin else source.origins()
        columns = {"index": source.index, "labels": source.labels, ORIGINS: origins}
        vectors = {k: np.ascontiguousarray(v[rows]) for k, v in columns.items() if v is not None}
        return FileLayout((len(self.finished), 3, *source.require_shape()), dtype, vectors, self._record)

    def _is_up_to_date(self, overwrite: bool) -> bool:
        if self.out.is_dir():
            raise AdvdiffError(f"{self.out} is a folder; give another --out")
        if overwrite or not self.out.exists():
            return False
        have = recorded(self.out)
        if have is None:
            raise AdvdiffError(f"{self.out} is not a patch set of advdiff; give --overwrite or another --out")
        return matches_recipe(self.out, identity(have), identity(self._record))

    def _open(self, layout: FileLayout, overwrite: bool) -> None:
        """Reopen OUT.part and its journal, or create them."""
        if link := next((f for f in (self._work, self._journal) if f.is_symlink()), None):
            raise AdvdiffError(f"{link} is a symbolic link, which advdiff does not write through; remove it")
        self._pending, self._recorded, self._flushed = list[FinishedRows](), list[FinishedRows](), time.monotonic()
        begun = unfinished(self.out)
        wanted = identity(self._record)
        if begun is not None and matches_recipe(
            self._work, identity(begun), wanted, overwrite=overwrite, unfinished=True
        ):
            if self._reopen(replace(layout, provenance=begun)):
                return
            _log.warning("the unfinished work in %s is damaged; it is begun again", self._work)
        elif begun is None and self._work.exists() and self._journal.exists() and not overwrite:
            _log.warning("the journal of the unfinished work in %s is damaged; it is begun again", self._work)
        self._create(layout)

    def _reopen(self, layout: FileLayout) -> bool:
        """Take over the finished rows of unfinished work, as far as they are undamaged."""
        try:
            self._target = _TARGETS[self.out.suffix].reopen(self._work, layout)
        except FileInUse:
            raise
        except AdvdiffError:
            return False
        drop_incomplete_line(self._journal)
        lines = list(finished_rows(self._journal, len(self.finished)))
        found = [line for line in lines if line is not None]
        good = self._recorded = [line for line in found if self._is_whole(line)]
        if len(good) < len(found) and self.out.suffix != ".safetensors":  # HDF5's own structures may be damaged too
            self._target.close()
            self._target = None
            return False
        for line in good:
            self.finished[line.start : line.stop] = True
        if len(good) < len(lines):
            what = f"{len(lines) - len(good)} of {len(lines)} batches"
            _log.warning("%s in %s or its journal are damaged; they are made again", what, self._work)
            begin_journal(self._journal, layout.provenance)
            append_rows(self._journal, good)
        self._resumed = True
        return True

    def _is_whole(self, rows: FinishedRows) -> bool:
        """Return whether rows still are as they were recorded."""
        assert self._target is not None
        try:
            return checksum(self._target.read(rows.start, rows.stop)) == rows.checksum
        except AdvdiffError:
            return False

    def _create(self, layout: FileLayout) -> None:
        self._journal.unlink(missing_ok=True)  # before its rows are gone
        try:
            self._target = _TARGETS[self.out.suffix].create(self._work, layout)
            begin_journal(self._journal, layout.provenance)
        except OSError:
            self._target = None
            self._work.unlink(missing_ok=True)
            self._journal.unlink(missing_ok=True)
            raise

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield the unfinished batches, as positions in the source."""
        return unfinished_batches(self.rows, batch_size, self.finished)

    def write(self, batch: Batch, images: Images) -> None:
        """Write the rows of a batch that are kept."""
        assert self._target is not None
        start, kept = batch.start - self.rows.start, images[: batch.count]
        self._target.write(start, kept)
        self.finished[start : start + batch.count] = True
        self._pending.append(FinishedRows(start, start + batch.count, checksum(kept)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Flush rows to the disk, then record them in the journal."""
        assert self._target is not None
        self._target.flush()
        append_rows(self._journal, self._pending)
        self._recorded += self._pending
        self._pending = []
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
                complete = kind is None and bool(self.finished.all())
                if complete and self._resumed and not all(map(self._is_whole, self._recorded)):
                    raise AdvdiffError(f"{self._work} was damaged while it was written; run the same command again")
            finally:
                self._target.close()
            if complete:
                os.replace(self._work, self.out)
                sync(self.out.parent)
                self._journal.unlink()  # last, so that complete work is never without its journal
        finally:
            self._target = None
            self._lock.release()
