"""The one decision about existing work: up to date or resumable, replaceable, or made by another recipe."""

from pathlib import Path

from advdiff_cli.data.provenance import Provenance, difference, same_recipe
from advdiff_cli.errors import AdvdiffError


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
