"""Output locks: one process at a time writes an output."""

import os
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from advdiff_cli.errors import AdvdiffError


def lock_file(out: Path) -> Path:
    """Return where the lock of an output is."""
    return out.with_name(f".{out.name}.lock")


class OutputLock:
    """A lock in a hidden file next to the output; it is released when the process ends."""

    def __init__(self, out: Path) -> None:
        """Acquire the lock of `out`.

        Raises:
            AdvdiffError: Another process holds the lock.
            OSError: The parent folder of `out` is missing or is not a folder.
        """
        os.scandir(out.parent).close()  # the lock would create a missing folder
        self._file = lock_file(out)
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
        """Release the lock."""
        self.release()

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._lock.is_locked:
            self._file.unlink(missing_ok=True)  # before the release, so that no other process locks a removed file
            self._lock.release()
