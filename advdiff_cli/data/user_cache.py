"""The folder of the user's caches."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of cache, by the XDG Base Directory Specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "advdiff" / kind
