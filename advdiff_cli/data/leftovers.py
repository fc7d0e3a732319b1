"""What killed processes left beside a finished patch set or table."""

from contextlib import suppress
from pathlib import Path

from advdiff_cli.data.atomic_files import remove_temporaries
from advdiff_cli.data.locks import OutputLock, lock_file
from advdiff_cli.data.provenance import same_recipe
from advdiff_cli.data.recorded_files import record_of
from advdiff_cli.data.resume import identity, recorded
from advdiff_cli.data.row_journal import unfinished, work_files
from advdiff_cli.data.table_writer import recorded_table, unfinished_table
from advdiff_cli.errors import AdvdiffError


def remove_leftovers(out: Path) -> None:
    """Remove locks, temporary files and finished work of killed processes, unless a process is at work there.

    Unfinished work of another recipe stays.

    Args:
        out: A finished patch set or table.
    """
    work, journal = work_files(out)
    with suppress(OSError):  # the folder may be read-only
        for file in (out, record_of(out)):
            remove_temporaries(file)
        if any(file.is_file() for file in (work, journal, lock_file(out))):
            with suppress(AdvdiffError), OutputLock(out):
                for file in (work, journal) if _is_finished(out) else (journal,) if not work.exists() else ():
                    file.unlink(missing_ok=True)


def _is_finished(out: Path) -> bool:
    """Return whether the unfinished work beside an output is of the recipe of the output."""
    if (have := recorded_table(out)) is not None:
        begun = unfinished_table(out)
    else:
        have, begun = recorded(out), unfinished(out)
    return have is not None and begun is not None and same_recipe(identity(have), identity(begun))
