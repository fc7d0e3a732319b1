"""A cache of the outcomes of attacks, in the user's cache folder, by content: they are judged once."""

import json
from contextlib import suppress
from pathlib import Path

from advdiff_cli import __version__
from advdiff_cli.data.atomic_files import atomic_write
from advdiff_cli.data.provenance import JsonObject, Provenance, canonical_json, digest
from advdiff_cli.data.user_cache import cache_folder
from advdiff_cli.models.precision import PrecisionName


def cached_outcome(recipe: Provenance, fingerprint: str, precision: PrecisionName) -> JsonObject | None:
    """Return the stored outcome of attacked patches, or None.

    Args:
        recipe: Of the attack.
        fingerprint: Of the attacked patches.
        precision: At which they are judged; any if `auto`.
    """
    with suppress(OSError, ValueError):
        found = json.loads(_entry(recipe, fingerprint).read_bytes())
        if isinstance(found, dict) and "accuracy" in found and precision in ("auto", found.get("precision")):
            return found
    return None


def store_outcome(recipe: Provenance, fingerprint: str, outcome: JsonObject) -> None:
    """Store an outcome where `cached_outcome` finds it, if the cache folder can be written."""
    entry = _entry(recipe, fingerprint)
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(entry) as temporary:
            temporary.write_text(json.dumps(outcome))


def _entry(recipe: Provenance, fingerprint: str) -> Path:
    key = canonical_json({"recipe": recipe, "fingerprint": fingerprint, "version": __version__})
    return cache_folder("outcomes") / f"{digest([key.encode()])}.json"
