"""Recipes, fingerprints and what is recorded beside them.

A recipe decides whether an output is up to date: command, format version, the parameters that change the result, and
the content fingerprints of inputs and models. Paths, argv, time and shard never enter it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from advdiff_cli.errors import AdvdiffError

FORMAT = 1
KEY = "advdiff"  # the metadata key (safetensors) and dataset name (HDF5) of the provenance

Provenance = dict[str, Any]


def canonical(value: object) -> str:
    """Return the one JSON spelling of `value`: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def recipe(command: str, parameters: Mapping[str, Any], **inputs: object) -> Provenance:
    """Build the recipe of `command` from the parameters and input fingerprints that decide its result."""
    return {"command": command, "format": FORMAT, "parameters": dict(parameters), **inputs}


def provenance(
    made_by: Provenance, *, inputs: Sequence[object] = (), origin: str | None = None, device: str = "cpu"
) -> Provenance:
    """Wrap a recipe with what is recorded beside it: the inputs' own provenance, versions, device kind."""
    packages = ("advdiff", "torch", "diffusers", "numpy")
    recorded = {"versions": {p: version(p) for p in packages}, "device": device}
    return {"recipe": made_by, "origin": origin, "inputs": list(inputs), "recorded": recorded}


def same_recipe(one: Provenance, other: Provenance) -> bool:
    """Tell whether two recipes make the same result."""
    return canonical(one) == canonical(other)


def difference(recorded: Provenance, asked: Provenance) -> str:
    """Name the first things in which two recipes differ, for an error message."""
    old, new = _flat(recorded), _flat(asked)
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    shown = [f"{k.removeprefix('parameters.')} {old.get(k, 'unset')} -> {new.get(k, 'unset')}" for k in keys[:3]]
    return ", ".join(shown) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}{name}.").items()}
    text = canonical(value)
    return {prefix.rstrip("."): text if len(text) <= 40 else text[:37] + "..."}


def history(made: Provenance | None) -> list[Provenance]:
    """Return the recipes that led to a file, the first of them first; inputs of inputs are followed along the first.

    Each has its command, its parameters, and the fingerprints of the models it took.
    """
    if not made or "recipe" not in made:
        return []
    inputs = made.get("inputs") or [None]
    told = ("command", "parameters", "classifier", "ddpm")
    return [*history(inputs[0]), {k: made["recipe"][k] for k in told if k in made["recipe"]}]


def whole_lines(journal: Path) -> list[str]:
    """Return the lines of a journal, without half a line at its end that a crash cut off, or that is being written."""
    return journal.read_bytes().decode(errors="ignore").split("\n")[:-1]  # splitlines would split names, too


def mend(journal: Path) -> None:
    """Remove half a line at the end of a journal that no other process writes."""
    text = journal.read_bytes()
    if (whole := text.rfind(b"\n") + 1) < len(text):
        os.truncate(journal, whole)


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of `parts`, in hexadecimal."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse(text: str | bytes, where: Path) -> Provenance:
    """Read a provenance JSON; AdvdiffError when it is none."""
    record = parse_object(text, where)
    if not _is_provenance(record):
        raise AdvdiffError(f"the provenance record in {where} is none of advdiff's; write the file again")
    return record


def parse_object(text: str | bytes, where: Path) -> dict[str, Any]:
    """Read a JSON object; AdvdiffError when it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise AdvdiffError(f"{where} holds no JSON object where one is needed; write the file again")
    return value


def _is_provenance(value: Any) -> bool:
    """Tell whether a record, and those of its inputs, hold what is built on."""
    if not isinstance(value, dict) or not isinstance(recipe := value.get("recipe"), dict):
        return False
    part, inputs = value.get("part", [0, 0, 0]), value.get("inputs", [])
    recorded = value.get("recorded", {"versions": {}, "device": ""})
    return (
        isinstance(recipe.get("command"), str)
        and isinstance(recipe.get("parameters"), dict)
        and isinstance(value.get("origin"), str | None)
        and isinstance(recorded, dict)
        and isinstance(recorded.get("versions"), dict)
        and isinstance(recorded.get("device"), str)
        and isinstance(part, list)
        and [type(p) for p in part] == [int] * 3
        and isinstance(inputs, list)
        and all(isinstance(i, dict) for i in inputs)
        and all("recipe" not in i or _is_provenance(i) for i in inputs)
    )
