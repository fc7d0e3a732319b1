"""Write tables with a line for each patch (CSV): lines into OUT.part as they are computed, and OUT by atomic rename.

OUT.part holds the provenance, then a line [checksum, start, lines] for each batch. The recipe of a finished table is in
its record, OUT.advdiff.
"""

import csv
import json
import logging
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from advdiff_cli.data.atomic_files import sync
from advdiff_cli.data.csv_cells import quote, unquote
from advdiff_cli.data.journal import complete_lines, drop_incomplete_line
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.data.output_spec import Batch, OutputSpec, RowRange, unfinished_batches
from advdiff_cli.data.provenance import Provenance, canonical_json, parse_provenance, provenance, same_recipe
from advdiff_cli.data.recorded_files import check_replaceable, is_recorded, read_record, record_of, recorded_write
from advdiff_cli.data.resume import identity, matches_recipe, part_of
from advdiff_cli.errors import AdvdiffError

_log = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0

Line = Sequence[str]
"""The cells of one patch."""


def work_file(out: Path) -> Path:
    """Return where the unfinished lines of `out` are."""
    return out.with_name(out.name + ".part")


def recorded_table(out: Path) -> Provenance | None:
    """Return the provenance of the table at `out`, or None if there is none, or it was changed since."""
    return read_record(record_of(out))["provenance"] or None if is_recorded(out, record_of(out)) else None


def is_complete_table(out: Path, recipe: Provenance, rows: RowRange) -> bool:
    """Return whether the lines of some rows of `recipe` are at `out`."""
    have = recorded_table(out)
    return have is not None and same_recipe(identity(have), {**recipe, "part": part_of(rows)})


def unfinished_table(out: Path) -> Provenance | None:
    """Return the provenance of the unfinished table at `out`, or None if there is none, or it is damaged."""
    work = work_file(out)
    if not work.is_file():
        return None
    try:
        return parse_provenance(next(iter(complete_lines(work)), ""), work)
    except AdvdiffError:
        return None


def table_resume_params(out: Path) -> Mapping[str, object]:
    """Return the parameters of the table or the unfinished work at `out`; empty if there is neither."""
    record = recorded_table(out) or unfinished_table(out) or {"recipe": {"parameters": {}}}
    parameters: Mapping[str, object] = record["recipe"]["parameters"]
    return parameters


class TableWriter:
    """Writes the lines of one recipe, and resumes where an earlier run stopped."""

    def __init__(
        self,
        output: OutputSpec,
        header: Line,
        rows: RowRange,
        *,
        inputs: Sequence[Provenance] = (),
        read: Sequence[Path] = (),
    ) -> None:
        """Decide whether the table is up to date, and create or reopen OUT.part otherwise.

        Args:
            output: A .csv file.
            header: The names of the columns.
            rows: Which rows of the recipe this table holds.
            inputs: Provenance of the inputs.

            read: Files that the command reads, and which are never replaced.

        Raises:
            AdvdiffError: Something else is at the path, its folder is missing, or another process writes it.
        """
        out = self.out = output.path
        self.rows, self.finished = rows, np.zeros(len(rows), bool)
        self._header, self._work, self._read = header, work_file(out), read
        self._record = provenance(output.recipe, inputs=inputs, device=output.device)
        if (part := part_of(rows)) is not None:
            self._record["part"] = part
        self._output = replace(output, path=record_of(out), recipe=identity(self._record))
        self._lines: list[Line] = [()] * len(rows)
        self._pending: list[str] = []
        self._lock: OutputLock | None = None
        self.up_to_date = self._is_up_to_date()
        if self.up_to_date:
            return
        lock = OutputLock(out)
        try:
            self.up_to_date = self._is_up_to_date()  # another process may just have finished
            if not self.up_to_date:
                self._open(output.overwrite)
                self._lock = lock
        finally:
            if self._lock is None:
                lock.release()

    def _is_up_to_date(self) -> bool:
        check_replaceable(self._output, [self.out], self._read)
        return self.out.exists() and not self._output.overwrite

    def _open(self, overwrite: bool) -> None:
        """Take over the finished lines of OUT.part, as far as they are undamaged, or begin it."""
        if self._work.is_symlink():
            raise AdvdiffError(f"{self._work} is a symbolic link, which advdiff does not write through; remove it")
        begun, wanted = unfinished_table(self.out), identity(self._record)
        if begun is None and self._work.exists():
            _log.warning("the unfinished work in %s is damaged; it is begun again", self._work)
        resumed = begun is not None and matches_recipe(
            self._work, identity(begun), wanted, overwrite=overwrite, unfinished=True
        )
        lines: list[str] = []
        if begun is not None and resumed:
            self._record = begun
            drop_incomplete_line(self._work)
            lines = complete_lines(self._work)[1:]
        good = [line for line in lines if self._take(line)]
        if len(good) < len(lines):
            what = f"{len(lines) - len(good)} of {len(lines)} batches"
            _log.warning("%s in %s are damaged; they are made again", what, self._work)
        if not resumed or len(good) < len(lines):
            self._work.write_text("".join(f"{line}\n" for line in (canonical_json(self._record), *good)))
        self._flushed = time.monotonic()

    def _take(self, line: str) -> bool:
        """Take over the lines of a batch; return whether they are undamaged."""
        try:
            checksum, start, lines = json.loads(line)
            if checksum != _checksum(start, lines) or not 0 <= start <= start + len(lines) <= len(self.finished):
                return False
        except (ValueError, TypeError, RecursionError):
            return False
        self._lines[start : start + len(lines)] = lines
        self.finished[start : start + len(lines)] = True
        return True

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield the unfinished batches, as positions in the source."""
        return unfinished_batches(self.rows, batch_size, self.finished)

    def write(self, batch: Batch, lines: Sequence[Line]) -> None:
        """Write the lines of a batch."""
        start = batch.start - self.rows.start
        kept = [list(line) for line in lines[: batch.count]]
        self._lines[start : start + batch.count] = kept
        self.finished[start : start + batch.count] = True
        self._pending.append(json.dumps([_checksum(start, kept), start, kept], separators=(",", ":")))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        with self._work.open("a") as file:
            file.write("".join(f"{line}\n" for line in self._pending))
        sync(self._work)
        self._pending, self._flushed = [], time.monotonic()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write OUT if every line is finished and there was no exception; keep OUT.part otherwise."""
        if self._lock is None:
            return
        try:
            self._flush()
            if kind is None and self.finished.all():
                with recorded_write(self._output, self.out, self._record) as temporary:
                    write_csv(temporary, self._header, self._lines)
                self._work.unlink()
        finally:
            self._lock.release()
            self._lock = None


def write_csv(path: Path, header: Line, lines: Sequence[Line]) -> None:
    """Write a CSV file; names that are not UTF-8 keep their bytes, and others are quoted by `csv_cells`."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([map(quote, line) for line in (header, *lines)])


def read_csv(path: Path) -> tuple[Line, list[Line]]:
    """Return the header and the lines of a file of `write_csv`."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines: list[Line] = [[unquote(cell) for cell in line] for line in csv.reader(file)]
        header, *rest = lines
    return header, rest


def _checksum(start: int, lines: object) -> int:
    return zlib.crc32(json.dumps([start, lines]).encode())
