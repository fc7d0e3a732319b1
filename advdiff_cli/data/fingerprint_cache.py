"""A cache of the fingerprints of rows of large files, each valid while its file (size, times, inode) is unchanged."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from advdiff_cli.data.atomic_files import atomic_write
from advdiff_cli.data.provenance import canonical_json, digest
from advdiff_cli.data.user_cache import cache_folder

_MIN_BYTES = 256 << 20  # smaller files are hashed in less than a second
_SETTLE_SECONDS = 10.0  # a file changed more recently could change again without a trace in its times
_CHECKSUM_BYTES = 64  # of the cached bytes, behind them


def cached_fingerprints(files: Sequence[Path], selection: bytes, compute: Callable[[], bytes]) -> bytes:
    """Return compute(), or its result from an earlier call if no file has changed since.

    Args:
        files: What is read. Only the fingerprints of large files are cached, and none of folders.
        selection: What else the fingerprints depend on: which rows.
        compute: Reads the files and returns the fingerprints of their rows.
    """
    if not files[0].is_file() or max(f.stat().st_size for f in files if f.is_file()) < _MIN_BYTES:
        return compute()
    before = _versions(files)
    entry = cache_folder("fingerprints") / digest([canonical_json(before).encode(), selection])
    with suppress(OSError):
        stored = entry.read_bytes()
        found, checksum = stored[:-_CHECKSUM_BYTES], stored[-_CHECKSUM_BYTES:]
        if found and digest([found]).encode() == checksum:
            return found
    fingerprints = compute()
    settled = all(time.time() - f.stat().st_ctime > _SETTLE_SECONDS for f in files if f.is_file())
    if settled and _versions(files) == before:
        with suppress(OSError):  # the home folder may be read-only
            entry.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(entry) as temporary:
                temporary.write_bytes(fingerprints + digest([fingerprints]).encode())
    return fingerprints


def _versions(files: Sequence[Path]) -> list[list[object]]:
    """Return what changes when a file changes: size, modification and change times, inode and device."""
    found = [(f.resolve(), f.stat()) for f in files if f.is_file()]
    return [[str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for f, s in found]
