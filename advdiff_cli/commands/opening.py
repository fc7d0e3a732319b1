"""The patch set that the positional DATA and the row options ask for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from advdiff_cli.data.patches import PatchSet


def open_selected(
    data: str,
    split: str | None,
    labels: Path | None,
    limit: int | None,
    rows: object | None,
    shuffle_seed: int | None,
) -> "PatchSet":
    """Open DATA with --split, --labels, --limit, --range and --shuffle-seed."""
    from advdiff_cli.data.patches import Selection, open_patches

    selection = Selection(limit, cast("Any", rows), shuffle_seed)
    return open_patches(data, split=split, labels=labels, selection=selection)
