"""One process at a time for each output: the others are told so, and touch nothing."""

import os
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from advdiff_cli.errors import AdvdiffError


class OutputLock:
    """Held by the process that writes an output, in a hidden file beside it; it ends with the process."""

    def __init__(self, out: Path) -> None:
        """Take the lock of `out`.

        Raises:
            AdvdiffError: another process holds it.
            OSError: the folder of `out` is missing, or is none.
        """
        os.scandir(out.parent).close()  # the lock would create it
        self._file = out.with_name(f".{out.name}.lock")
        self._lock = FileLock(self._file, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise AdvdiffError(
                f"{out} is being written by another process; wait until it ends, or give another --out"
            ) from None

    def __enter__(self) -> Self:
        """Return the lock."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the output free."""
        self.release()

    def release(self) -> None:
        """Give the output free; doing so again does nothing."""
        if self._lock.is_locked:
            self._file.unlink(missing_ok=True)  # first: whoever opened it takes a name that is gone for no lock
            self._lock.release()
