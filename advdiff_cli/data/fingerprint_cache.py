"""A cache of the fingerprints of large files, valid as long as the file's size, times and inode do not change."""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from advdiff_cli.data.atomic_files import atomic_write
from advdiff_cli.data.provenance import canonical_json, digest
from advdiff_cli.data.user_cache import cache_folder

_MIN_BYTES = 256 << 20  # smaller files are hashed in less than a second
_SETTLE_SECONDS = 10.0  # a file changed more recently could change again without a trace in its times


def cached_fingerprint(path: Path, selection: bytes, compute: Callable[[], str]) -> str:
    """Return compute(), or its result from an earlier call if the file at `path` has not changed since.

    Args:
        path: The file that is hashed. Only large files are cached.
        selection: What else the fingerprint depends on, such as which rows.
        compute: Reads the file and returns its fingerprint.
    """
    before = path.stat() if path.is_file() else None
    if before is None or before.st_size < _MIN_BYTES:
        return compute()
    key = canonical_json({"path": str(path.resolve()), "stat": _version(before)}).encode()
    entry = cache_folder("fingerprints") / digest([key, selection])
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[0-9a-f]{64}", found := entry.read_text()):
            return found
    fingerprint = compute()
    after = path.stat() if path.is_file() else None
    unchanged = after is not None and _version(after) == _version(before)
    if unchanged and time.time() - before.st_ctime > _SETTLE_SECONDS:
        with suppress(OSError):  # the home folder may be read-only
            entry.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(entry) as temporary:
                temporary.write_text(fingerprint)
    return fingerprint


def _version(s: os.stat_result) -> list[int]:
    """Return what changes when a file changes: size, modification and change times, inode and device."""
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev]
