"""Files that cannot hold their own recipe (CSV, HTML, pictures), recorded in a JSON file next to them (NAME.advdiff).

The record holds the provenance and the SHA-256 of each file. A file that is not recorded, or was changed since, is
someone else's: it is not replaced without --overwrite.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from advdiff_cli.data.atomic_files import atomic_write
from advdiff_cli.data.output_spec import OutputSpec
from advdiff_cli.data.provenance import (
    JsonObject,
    Provenance,
    difference,
    file_digest,
    is_provenance,
    provenance,
    read_json_object,
    same_recipe,
)
from advdiff_cli.errors import AdvdiffError


def record_of(path: Path) -> Path:
    """Return where the record of a single file is."""
    return path.with_name(f"{path.name}.advdiff")


def check_not_input(file: Path, inputs: Sequence[Path]) -> None:
    """Check that a file is none of those that a command reads, which are never replaced.

    Raises:
        AdvdiffError: It is one.
    """
    if any(file.exists() and i.exists() and file.samefile(i) for i in inputs):
        raise AdvdiffError(f"{file} is an input of this command, which is never replaced; give another name")


def check_own_name(file: Path) -> None:
    """Check that a file is not named as what advdiff keeps beside its outputs: work, records and locks.

    Raises:
        AdvdiffError: It is.
    """
    is_lock = file.name.startswith(".") and file.name.endswith(".lock")
    if file.name.endswith((".part", ".part.rows", ".advdiff")) or is_lock or file.name.startswith(".advdiff."):
        raise AdvdiffError(f"{file} is named as a file that advdiff keeps beside its outputs; give another name")


def check_replaceable(output: OutputSpec, files: Sequence[Path], inputs: Sequence[Path] = ()) -> None:
    """Check that files may be written: each is new, or was made by the same recipe, or may be overwritten.

    Args:
        output: The record, and the recipe, with the part of it that the files hold, if it is one.
        files: What is to be written.
        inputs: Files that are read, and are never replaced.

    Raises:
        AdvdiffError: A file may not be written.
    """
    for file in files:
        check_not_input(file, inputs)
        check_own_name(file)
        if file.is_dir():
            raise AdvdiffError(f"{file} is a folder; give another name")
    existing = [file for file in files if file.exists()]
    if output.overwrite or not existing:
        return
    for file in existing:
        if not is_recorded(file, output.path):
            raise AdvdiffError(f"{file} exists and was not made by this command; give --overwrite or another name")
    known = read_record(output.path)["provenance"]
    made = {**known.get("recipe", {}), "part": known.get("part")}
    wanted = {"part": None, **output.recipe}
    if not same_recipe(made, wanted):
        changes = difference(made, wanted)
        raise AdvdiffError(f"{existing[0]} was made with other settings ({changes}); give --overwrite or another name")


def check_summary(record: Path, files: Sequence[Path], *, overwrite: bool) -> None:
    """Check that the summary of a folder may be written again, from results that have recipes of their own.

    Args:
        record: Of the files. Where there is none, as while they are written, the first file, in
            JSON, tells by its recipe whose they are.
        files: What is to be written.
        overwrite: Whether files of others may be replaced.

    Raises:
        AdvdiffError: A file is someone else's.
    """
    if overwrite:
        return
    for file in (f for f in files if f.exists()):
        if not (is_recorded(file, record) if record.exists() else _has_recipe(files[0])):
            raise AdvdiffError(f"{file} exists and was not made by this command; give --overwrite or another --out")


def _has_recipe(file: Path) -> bool:
    try:
        return isinstance(read_json_object(file).get("recipe"), dict)
    except (OSError, AdvdiffError):
        return False


def is_recorded(file: Path, record: Path) -> bool:
    """Return whether a file is as it was recorded."""
    return file.is_file() and read_record(record)["files"].get(file.name) == file_digest(file)


def record_files(output: OutputSpec, files: Sequence[Path]) -> None:
    """Record files that were just written."""
    made = provenance(output.recipe, device=output.device)
    _write(output.path, made, {file.name: file_digest(file) for file in files})


@contextmanager
def recorded_write(output: OutputSpec, file: Path, made: Provenance | None = None) -> Iterator[Path]:
    """Yield a temporary path; it replaces `file` when the block ends without an exception, and is recorded before.

    Args:
        output: The record, and the recipe.
        file: What is written.
        made: Its provenance; by default that of the recipe alone.
    """
    with atomic_write(file) as temporary:
        yield temporary
        known = made or provenance(output.recipe, device=output.device)
        _write(output.path, known, {file.name: file_digest(temporary)})


def read_record(record: Path) -> JsonObject:
    """Return the `files` and the `provenance` of a record; both are empty where it is missing or damaged."""
    try:
        found = read_json_object(record)
    except (OSError, AdvdiffError):
        found = {}
    files, made = found.get("files"), found.get("provenance")
    return {"files": files if isinstance(files, dict) else {}, "provenance": made if is_provenance(made) else {}}


def _write(record: Path, made: Provenance, files: Mapping[str, str]) -> None:
    with atomic_write(record) as temporary:
        temporary.write_text(json.dumps({"provenance": made, "files": files}, indent=2) + "\n")
