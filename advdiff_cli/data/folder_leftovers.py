"""What a purified folder no longer needs: temporary files of killed processes, and outputs of inputs that changed."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from advdiff_cli.data.folder_journal import JournalLine, journals
from advdiff_cli.data.locks import OutputLock
from advdiff_cli.errors import AdvdiffError

_TEMPORARY = re.compile(r"\.advdiff\.(\d+of\d+\.)?[0-9a-f]{16}\.part\.\w+")


def remove_leftovers(out: Path, lines: Mapping[str, JournalLine], written: Mapping[str, set[str]]) -> None:
    """Remove temporary files of killed processes, and outputs that no longer belong to their input.

    Such an input was purified to another name since, or has other content, which could not be purified. Nothing
    is removed while a shard is at work.

    Args:
        out: The folder.
        lines: The last line about each input.
        written: The outputs that the folder ever had, by input.
    """
    with ExitStack() as stack:
        try:
            for journal in journals(out)[1:]:
                stack.enter_context(OutputLock(journal))
        except AdvdiffError:
            return
        read = ("ok", "failed")  # an input that could not even be read has no sha256, and may come back
        done = [file for file, line in lines.items() if line.status in read and line.sha256]
        current = {line.out for line in lines.values()}
        for name in {name for file in done for name in written.get(file, ())} - current:
            _remove_output(out, PurePosixPath(name))
        for file in out.rglob(".*.part.*"):
            if _TEMPORARY.fullmatch(file.name):
                file.unlink(missing_ok=True)


def _remove_output(out: Path, name: PurePosixPath) -> None:
    """Remove an output, unless its name leads out of the folder."""
    if name.is_absolute() or ".." in name.parts or (out / name.parent).resolve() != (out.resolve() / name.parent):
        return
    (out / name).unlink(missing_ok=True)
