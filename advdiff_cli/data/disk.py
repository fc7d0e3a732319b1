"""Room on the disk, taken before the work begins."""

import os


def reserve(file: int, size: int) -> None:
    """Make the open file `size` bytes long with every block allocated, so that a full disk is told now.

    Raises:
        OSError: the disk has not that much room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # not on macOS
        os.ftruncate(file, size)
