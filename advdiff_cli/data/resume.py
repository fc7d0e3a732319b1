"""The one decision about existing work: up to date or resumable, replaceable, or made by another recipe."""

from collections.abc import Mapping
from pathlib import Path

from advdiff_cli.data.output_spec import RowRange
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.provenance import Provenance, difference, same_recipe
from advdiff_cli.data.row_journal import unfinished
from advdiff_cli.errors import AdvdiffError, FileInUse


def matches_recipe(
    path: Path, recorded: Provenance | None, wanted: Provenance, *, overwrite: bool = False, unfinished: bool = False
) -> bool:
    """Return whether the work at `path` was made by the recipe `wanted`, and so is up to date or can be resumed.

    Args:
        path: Where the work is; named in the error.
        recorded: Its recipe, or None where there is no work.
        wanted: The recipe of this command.
        overwrite: Whether the work of another recipe may be replaced; False is then returned for it.
        unfinished: Whether the work is unfinished, which changes the wording of the error.

    Raises:
        AdvdiffError: The work was made by another recipe and may not be replaced.
    """
    if recorded is None:
        return False
    if same_recipe(recorded, wanted):
        return True
    if overwrite:
        return False
    changes = difference(recorded, wanted)
    state = "holds unfinished work of another recipe" if unfinished else "was made with other settings"
    raise AdvdiffError(f"{path} {state} ({changes}); give --overwrite or another --out")


def resume_params(out: Path) -> Mapping[str, object]:
    """Return the parameters of the result or the unfinished work at `out`; empty if there is neither.

    A command takes its batch size and precision from them, so that it resumes work begun on another machine.
    """
    record = (recorded(out) if out.is_file() else None) or unfinished(out)
    parameters: Mapping[str, object] = (record or {}).get("recipe", {}).get("parameters", {})
    return parameters


def recorded(out: Path) -> Provenance | None:
    """Return the provenance of the patch set at `out`, or None if there is none."""
    try:
        return open_patches(out).provenance
    except FileInUse:
        raise
    except AdvdiffError:
        return None


def is_complete(out: Path, recipe: Provenance, rows: RowRange | None = None) -> bool:
    """Return whether the result of `recipe` is at `out`: some of its rows, or all of them."""
    have = recorded(out) if out.is_file() else None
    return have is not None and same_recipe(identity(have), {**recipe, "part": part_of(rows)})


def part_of(rows: RowRange | None) -> list[int] | None:
    """Return the `part` that is recorded for some rows of a recipe; None for all of them."""
    return None if rows is None or len(rows) == rows.total else [rows.start, rows.stop, rows.total]


def identity(record: Provenance) -> Provenance:
    """Return what is equal for two results of one recipe that hold the same rows."""
    return {**record["recipe"], "part": record.get("part")}
