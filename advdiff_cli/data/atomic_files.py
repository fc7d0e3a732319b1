"""Files that appear under their final name only when they are complete, and disk space reserved in advance."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
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
    """Yield the path of an empty file next to `path`; it replaces `path` when the block ends without an exception."""
    remove_temporaries(path)
    with _temporary_file(path) as temporary:
        try:
            yield temporary
            set_default_mode(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Yield a new file for the content of `path`, locked as long as this process is alive."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.part{path.suffix}")
        with temporary.open("x+b") as file:  # NFS locks for reading what is open for reading
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH)
            if temporary.exists():  # another process may just have taken it for one of a killed process
                yield temporary
                return


def _prefix(path: Path) -> str:
    return f".advdiff.{blake2b(os.fsencode(path.name), digest_size=8).hexdigest()}."


def remove_temporaries(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes left."""
    for file in path.parent.glob(f"{_prefix(path)}*.part*"):
        with suppress(OSError), file.open("r+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


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
