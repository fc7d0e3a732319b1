"""Files that cannot hold their own recipe (CSV, HTML, pictures), recorded in a JSON file next to them (NAME.advdiff).

The record holds the provenance and the SHA-256 of each file. A file that is not recorded, or was changed since, is
someone else's: it is not replaced without --overwrite.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from advdiff_cli.data.atomic_files import atomic_write
from advdiff_cli.data.output_spec import OutputSpec
from advdiff_cli.data.provenance import (
    JsonObject,
    difference,
    file_digest,
    parse_json_object,
    provenance,
    same_recipe,
)
from advdiff_cli.errors import AdvdiffError


def record_of(path: Path) -> Path:
    """Return where the record of a single file is."""
    return path.with_name(f"{path.name}.advdiff")


def check_replaceable(output: OutputSpec, files: Sequence[Path], inputs: Sequence[Path] = ()) -> None:
    """Check that files may be written: each is new, or was made by the same recipe, or may be overwritten.

    Args:
        output: The record, and the recipe.
        files: What is to be written.
        inputs: Files that are read, and are never replaced.

    Raises:
        AdvdiffError: A file may not be written.
    """
    for file in files:
        if any(file.exists() and i.exists() and file.samefile(i) for i in inputs):
            raise AdvdiffError(f"{file} is an input of this command, which is never replaced; give another name")
        if file.is_dir():
            raise AdvdiffError(f"{file} is a folder; give another name")
    existing = [file for file in files if file.exists()]
    if output.overwrite or not existing:
        return
    recorded = _read(output.path)
    for file in existing:
        if recorded["files"].get(file.name) != file_digest(file):
            raise AdvdiffError(f"{file} exists and was not made by this command; give --overwrite or another name")
    made = recorded["provenance"].get("recipe", {})
    if not same_recipe(made, output.recipe):
        changes = difference(made, output.recipe)
        raise AdvdiffError(f"{existing[0]} was made with other settings ({changes}); give --overwrite or another name")


def record_files(output: OutputSpec, files: Sequence[Path]) -> None:
    """Record files that were just written."""
    made = provenance(output.recipe, device=output.device)
    with atomic_write(output.path) as temporary:
        content = {"provenance": made, "files": {file.name: file_digest(file) for file in files}}
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _read(record: Path) -> JsonObject:
    try:
        found = parse_json_object(record.read_bytes(), record)
    except (OSError, AdvdiffError):
        found = {}
    files, made = found.get("files"), found.get("provenance")
    return {"files": files if isinstance(files, dict) else {}, "provenance": made if isinstance(made, dict) else {}}
