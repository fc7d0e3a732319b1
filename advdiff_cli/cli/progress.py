"""Progress of jobs that yield the number of rows they have done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from advdiff_cli import console

if TYPE_CHECKING:
    from advdiff_cli.data.patch_writer import PatchWriter
    from advdiff_cli.data.table_writer import TableWriter

Writer = TypeVar("Writer", "PatchWriter", "TableWriter")


def follow(counts: Iterable[int], total: int, label: str, *, done: int = 0, quiet: bool = False) -> None:
    """Run a job that yields numbers of finished rows, and show its progress."""
    with console.progress(total, label, done=done, quiet=quiet) as advance:
        for count in counts:
            advance(count)


def follow_rows(rows: Callable[[Writer], Iterator[int]], label: str, *, quiet: bool) -> Callable[[Writer], None]:
    """Return a function that writes the missing rows of a writer and shows its progress."""

    def work(writer: Writer) -> None:
        follow(rows(writer), len(writer.finished), label, done=int(writer.finished.sum()), quiet=quiet)

    return work


def duration(seconds: float) -> str:
    """Return a number of seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
