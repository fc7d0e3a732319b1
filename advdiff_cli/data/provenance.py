"""Recipes, fingerprints and the provenance recorded with every output.

A recipe decides whether an output is up to date. It holds the command, the format version, the parameters that change
the result, and the content fingerprints of inputs and models. It never holds paths, arguments, times or shards.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from advdiff_cli.errors import AdvdiffError

FORMAT = 1
_MAX_DEPTH = 200  # of records within records
KEY = "advdiff"  # the metadata key (safetensors) or dataset name (HDF5) of the provenance

JsonObject = dict[str, Any]
Provenance = JsonObject


def canonical_json(value: object) -> str:
    """Return `value` as JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def recipe(command: str, parameters: Mapping[str, object], **inputs: object) -> Provenance:
    """Build the recipe of `command` from its parameters and the fingerprints of its inputs."""
    return {"command": command, "format": FORMAT, "parameters": dict(parameters), **inputs}


def provenance(made_by: Provenance, *, inputs: Sequence[object] = (), device: str = "cpu") -> Provenance:
    """Return a recipe together with what is recorded beside it: the inputs' provenance, versions, kind of device."""
    packages = ("advdiff", "torch", "diffusers", "numpy")
    recorded = {"versions": {p: version(p) for p in packages}, "device": device}
    return {"recipe": made_by, "inputs": list(inputs), "recorded": recorded}


def same_recipe(one: Provenance, other: Provenance) -> bool:
    """Return whether two recipes give the same result."""
    return canonical_json(one) == canonical_json(other)


def difference(recorded: Provenance, wanted: Provenance) -> str:
    """Name the first three differences between two recipes, for an error message."""
    old, new = _flat(recorded), _flat(wanted)
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    shown = [f"{k.removeprefix('parameters.')} {_short(old.get(k))} -> {_short(new.get(k))}" for k in keys[:3]]
    return ", ".join(shown) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): canonical_json(value)}


def _short(text: str | None) -> str:
    if text is None:
        return "unset"
    return text if len(text) <= 40 else text[:37] + "..."


def history(made: Provenance | None) -> list[Provenance]:
    """Return the recipes that led to a file, oldest first, following the first input of each.

    Each holds the command, its parameters and the fingerprints of the models it used.
    """
    if not made or "recipe" not in made:
        return []
    inputs = made.get("inputs") or [None]
    kept = ("command", "parameters", "classifier", "ddpm")
    return [*history(inputs[0]), {k: made["recipe"][k] for k in kept if k in made["recipe"]}]


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of `parts`, in hexadecimal."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_provenance(text: str | bytes, where: Path) -> Provenance:
    """Parse a provenance record.

    Raises:
        AdvdiffError: The text is not a provenance record.
    """
    record = parse_json_object(text, where)
    if not is_provenance(record):
        raise AdvdiffError(f"the provenance record in {where} was not written by advdiff; write the file again")
    return record


def is_provenance(value: object) -> bool:
    """Return whether a JSON value is a provenance record."""
    return _is_plain(value) and _has_structure(value)


def read_json_object(path: Path) -> JsonObject:
    """Read a file that holds a JSON object.

    Raises:
        AdvdiffError: It holds something else.
    """
    return parse_json_object(path.read_bytes(), path)


def parse_json_object(text: str | bytes, where: Path) -> JsonObject:
    """Parse a JSON object.

    Raises:
        AdvdiffError: The text is not a JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        value = None
    if not isinstance(value, dict):
        raise AdvdiffError(f"{where} does not hold a JSON object; write the file again")
    return value


def _is_plain(value: object, depth: int = 0) -> bool:
    """Return whether a JSON value is not nested too deeply and its texts are valid Unicode."""
    if isinstance(value, str):
        return value.isprintable() or value.encode(errors="replace").decode() == value
    if depth > _MAX_DEPTH:
        return False
    if isinstance(value, dict):
        return all(_is_plain(one, depth + 1) for pair in value.items() for one in pair)
    return not isinstance(value, list) or all(_is_plain(one, depth + 1) for one in value)


def _has_structure(value: object) -> bool:
    """Return whether a record and those of its inputs have the expected structure."""
    if not isinstance(value, dict) or not isinstance(recipe := value.get("recipe"), dict):
        return False
    part, inputs = value.get("part", [0, 0, 0]), value.get("inputs", [])
    recorded = value.get("recorded", {"versions": {}, "device": ""})
    return (
        isinstance(recipe.get("command"), str)
        and isinstance(recipe.get("parameters"), dict)
        and isinstance(recorded, dict)
        and isinstance(recorded.get("versions"), dict)
        and isinstance(recorded.get("device"), str)
        and isinstance(part, list)
        and [type(p) for p in part] == [int] * 3
        and isinstance(inputs, list)
        and all(isinstance(i, dict) for i in inputs)
        and all("recipe" not in i or _has_structure(i) for i in inputs)
    )
