"""Fingerprints of large files, remembered from one command to the next: each is read once, then known by its stat."""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from advdiff_cli.data.atomic_files import replacing
from advdiff_cli.data.provenance import canonical, digest

_LARGE = 256 << 20  # bytes; reading less costs less than a second
_SETTLED = 10.0  # seconds since a file was changed, within which another change might leave no trace in its times


def remembered(path: Path, content: bytes, make: Callable[[], str]) -> str:
    """Return the fingerprint that `make` would, from an earlier call where the file has not changed since.

    Args:
        path: What the fingerprint is of. Only large files are remembered.
        content: What else it depends on, such as which rows.
        make: Reads the file.
    """
    before = _stat(path)
    if before is None or before.st_size < _LARGE:
        return make()
    kept = _folder() / digest([canonical({"path": str(path.resolve()), "stat": _told(before)}).encode(), content])
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[0-9a-f]{64}", found := kept.read_text()):
            return found
    made = make()
    after = _stat(path)
    if after is not None and _told(after) == _told(before) and time.time() - before.st_ctime > _SETTLED:
        with suppress(OSError):  # a home that cannot be written to
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as fresh:
                fresh.write_text(made)
    return made


def _stat(path: Path) -> os.stat_result | None:
    return path.stat() if path.is_file() else None


def _told(s: os.stat_result) -> list[int]:
    """Return what changes with a file: its size, times of writing and of any change, and which file it is."""
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev]


def _folder() -> Path:
    """Return the folder that the XDG Base Directory Specification names for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "advdiff" / "fingerprints"
