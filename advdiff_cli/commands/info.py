"""`advdiff info`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from advdiff_cli import console, options
from advdiff_cli.errors import AdvdiffError


def info(
    file: Annotated[Path, typer.Argument(help="A patch set, a purified folder or a model folder.")],
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the content fingerprint alone.")] = False,
) -> None:
    """Tell what a file is and the whole chain of how it was made.

    Example: advdiff info purified.safetensors
    """
    from advdiff_cli.data.folder_writer import JOURNAL
    from advdiff_cli.data.provenance import parse
    from advdiff_cli.models import registry

    if not file.exists():
        raise AdvdiffError(f"no such file or folder: {file}")
    if file.is_dir() and registry.is_model(file):
        facts: dict[str, Any] = {"kind": "model", "fingerprint": registry.fingerprint(file)}
        made = registry.recorded_provenance(file)
    else:
        facts, made = _patch_set(file)
        if (journal := file / JOURNAL).is_file():
            made = parse(journal.read_text().partition("\n")[0], journal)
    result = {"file": str(file), **facts, "provenance": made}
    lines = [f"{file}: " + ", ".join(f"{k} {v}" for k, v in facts.items())]
    lines += _chain(made, "") if made else ["no provenance recorded"]
    console.emit(result, "\n".join(lines), facts["fingerprint"], as_json=as_json, quiet=quiet)


def _patch_set(file: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    from advdiff_cli.data.patches import open_patches

    patches = open_patches(file)
    facts: dict[str, Any] = {"kind": "patch set", "n": len(patches)}
    facts["size"] = "mixed" if patches.shape is None else f"{patches.shape[0]}x{patches.shape[1]}"
    facts["positive"] = None if patches.labels is None else int(patches.labels.sum())
    return {**facts, "fingerprint": patches.fingerprint()}, patches.provenance


def _chain(made: dict[str, Any], indent: str) -> list[str]:
    """Return the lines that tell how a thing was made, then how its inputs were."""
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
    for below in made.get("inputs", []):
        lines += _chain(below, indent + "    ")
    return lines
