"""Room on the disk, taken before the work begins, and a line for where it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from advdiff_cli.errors import AdvdiffError


def reserve(file: int, size: int) -> None:
    """Make the open file `size` bytes long with every block allocated, so that a full disk is told now.

    Raises:
        OSError: the disk has not that much room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # not on macOS
        os.ftruncate(file, size)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn safetensors' error of a file that cannot be written, which names none, into one that does."""
    try:
        yield
    except SafetensorError as e:
        raise AdvdiffError(f"{path} cannot be written ({e}); the same command goes on from here") from None
