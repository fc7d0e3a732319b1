"""Files that appear under their final name only when they are complete, and disk space reserved in advance."""

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
    """Allocate `size` bytes for the open file `file`, so that a full disk is reported before the work starts.

    Raises:
        OSError: The disk does not have that much space.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS
        os.ftruncate(file, size)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; it replaces `path` when the block ends without an exception."""
    temporary = path.with_name(f".advdiff.{secrets.token_hex(8)}.part{path.suffix}")
    try:
        yield temporary
        set_default_mode(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def set_default_mode(path: Path) -> None:
    """Give a file, or every file in a folder, the mode of a new file; safetensors writes files private to the owner."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~_UMASK)


@contextmanager
def name_write_errors(path: Path) -> Iterator[None]:
    """Turn a safetensors write error, which does not name the file, into an AdvdiffError that does."""
    try:
        yield
    except SafetensorError as e:
        raise AdvdiffError(f"cannot write {path} ({e}); run the same command again to resume") from None
