"""The journal of unfinished work, OUT.part.rows: the provenance, then a line [start, stop, checksum] for each batch.

A checksum is the CRC-32 of the rows of the batch, so that rows which were damaged after they were recorded are computed
again.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from advdiff_cli.data.journal import complete_lines
from advdiff_cli.data.patch_source import Images
from advdiff_cli.data.provenance import Provenance, canonical_json, parse_provenance
from advdiff_cli.errors import AdvdiffError


@dataclass(frozen=True)
class FinishedRows:
    """Rows start to stop - 1, and their checksum."""

    start: int
    stop: int
    checksum: int


def work_files(out: Path) -> tuple[Path, Path]:
    """Return where the unfinished rows of `out` are, and their journal."""
    return out.with_name(out.name + ".part"), out.with_name(out.name + ".part.rows")


def checksum(images: Images) -> int:
    """Return the checksum of rows."""
    return zlib.crc32(np.ascontiguousarray(images).data)


def begin_journal(journal: Path, provenance: Provenance) -> None:
    """Write the journal of work that has no rows yet."""
    journal.write_text(canonical_json(provenance) + "\n")


def append_rows(journal: Path, finished: Sequence[FinishedRows]) -> None:
    """Record finished rows."""
    with journal.open("a") as file:
        file.write("".join(f"[{f.start},{f.stop},{f.checksum}]\n" for f in finished))


def unfinished(out: Path) -> Provenance | None:
    """Return the provenance of the unfinished work at `out`; None if there is none, or its journal is damaged."""
    work, journal = work_files(out)
    if not (work.is_file() and journal.is_file()):
        return None
    try:
        return parse_provenance(next(iter(complete_lines(journal)), ""), journal)
    except AdvdiffError:
        return None


def finished_rows(journal: Path, n: int) -> Iterator[FinishedRows | None]:
    """Yield the finished rows of a set of n, and None for each damaged line."""
    for text in complete_lines(journal)[1:]:
        try:
            numbers = json.loads(text)
            good = isinstance(numbers, list) and len(numbers) == 3 and all(type(k) is int for k in numbers)
        except (ValueError, RecursionError):
            good = False
        yield FinishedRows(*numbers) if good and 0 <= numbers[0] < numbers[1] <= n else None
