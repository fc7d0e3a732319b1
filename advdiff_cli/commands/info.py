"""`advdiff info`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advdiff_cli import console
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import ResultOptions
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.data.provenance import JsonObject, Provenance


@with_option_groups
def info(
    file: Annotated[
        Path,
        typer.Argument(help="A patch set or purified folder, a table of predict or certify, a model's folder or name."),
    ],
    output: ResultOptions,
) -> None:
    """Show what a file is and how it was made, with the whole chain of its inputs.

    With -q, print the content fingerprint.

    Example: advdiff info purified.safetensors
    """
    from advdiff_cli.data.folder_journal import journals
    from advdiff_cli.data.provenance import file_digest, parse_provenance
    from advdiff_cli.data.table_writer import read_csv, recorded_table
    from advdiff_cli.models import registry
    from advdiff_cli.models.fingerprint import folder_fingerprint

    if not file.exists() and (bundled := registry.BUNDLED / file.name).is_dir() and str(file) == file.name:
        file = bundled
    if not file.exists():
        raise AdvdiffError(f"no such file or folder: {file}")
    purified = journals(file)
    if file.is_dir() and registry.is_model(file):
        facts: JsonObject = {"kind": "model", "fingerprint": folder_fingerprint(file)}
        made = registry.recorded_provenance(file)
    elif file.is_file() and (known := recorded_table(file)) is not None:
        facts, made = {"kind": "table", "n": len(read_csv(file)[1]), "fingerprint": file_digest(file)}, known
    else:
        facts, made = _patch_set(file)
        if purified:
            made = parse_provenance(purified[0].read_bytes().partition(b"\n")[0], purified[0])
    if purified:
        facts |= _purified(file)
    lines = [f"{file}: " + ", ".join(f"{k} {v}" for k, v in facts.items())]
    lines += _chain(made, "") if made else ["no provenance recorded"]
    text = "\n".join(map(console.printable, lines))
    output.emit({"file": str(file), **facts, "provenance": made}, text, facts["fingerprint"])


def _patch_set(file: Path) -> "tuple[JsonObject, Provenance | None]":
    from advdiff_cli.data.patches import open_patches

    patches = open_patches(file)
    size = "mixed" if patches.shape is None else f"{patches.shape[0]}x{patches.shape[1]}"
    positive = None if patches.labels is None else int(patches.labels.sum())
    facts = {"kind": "patch set", "n": len(patches), "size": size, "positive": positive}
    return {**facts, "fingerprint": patches.fingerprint()}, patches.provenance


def _purified(folder: Path) -> "JsonObject":
    """Return how many outputs are current, or had no input in the last run, and how many inputs failed."""
    from advdiff_cli.data.folder_journal import is_current, journals, parse_lines
    from advdiff_cli.data.journal import complete_lines

    lines = [line for journal in journals(folder) for line in parse_lines(complete_lines(journal)[1:])]
    last = {line.file: line for line in lines if line is not None}
    current = Counter(line.status for line in last.values() if is_current(folder, line))
    failed = sum(line.status == "failed" for line in last.values())
    return {"current": current["ok"], "without_input": current["gone"], "failed": failed}


def _chain(made: "Provenance", indent: str) -> list[str]:
    """Return lines about how something was made, then about how its inputs were made."""
    if "recipe" not in made:
        return []
    recipe = made["recipe"]
    parameters = ", ".join(f"{k} {v}" for k, v in recipe["parameters"].items())
    lines = [f"{indent}{recipe['command']}: {parameters}"]
    if recorded := made.get("recorded"):
        versions = ", ".join(f"{k} {v}" for k, v in recorded["versions"].items())
        lines.append(f"{indent}  with {versions} on {recorded['device']}")
    for name, value in recipe.items():
        if name not in ("command", "format", "parameters") and value is not None:
            lines.append(f"{indent}  {name}: {value}")
    for inner in made.get("inputs", []):
        lines += _chain(inner, indent + "    ")
    return lines
