"""Room on the disk, taken before the work begins; a line for where it ends; and files that are there whole or not."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from advdiff_cli.errors import AdvdiffError

_UMASK = os.umask(0o77)
os.umask(_UMASK)


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
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` for one writer alone, whose file takes the name when the block ends well."""
    fresh = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield fresh
        share(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def share(path: Path) -> None:
    """Give a file, or all files of a folder, the mode of a new file; safetensors leaves them to their owner alone."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~_UMASK)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn safetensors' error of a file that cannot be written, which names none, into one that does."""
    try:
        yield
    except SafetensorError as e:
        raise AdvdiffError(f"{path} cannot be written ({e}); the same command goes on from here") from None
