"""Options for the rows of a patch set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advdiff_cli.cli import options
from advdiff_cli.cli.parsers import RowBounds

if TYPE_CHECKING:
    from advdiff_cli.data.patch_set import PatchSet
    from advdiff_cli.data.selection import Selection


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Which rows of a patch set."""

    split: options.Split = None
    labels: Annotated[
        Path | None, typer.Option(help="CSV of file,label for a folder of images.", rich_help_panel=options.ROWS)
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="At most N patches.", rich_help_panel=options.ROWS)] = None
    rows: Annotated[
        RowBounds | None,
        typer.Option(
            "--range",
            parser=RowBounds,
            metavar="A:B",
            help="Rows A to B-1 only; either may be left out.",
            rich_help_panel=options.ROWS,
        ),
    ] = None
    shuffle_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Shuffle the rows before --range and --limit select.", rich_help_panel=options.ROWS),
    ] = None

    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Refuse patches of more pixels, which need much memory.",
            show_default="2048 x 2048",
            rich_help_panel=options.ROWS,
        ),
    ] = None

    def open(self, data: str) -> PatchSet:
        """Open a patch set with these rows selected.

        Raises:
            AdvdiffError: There is no such set, or no such row, or patches are too large.
        """
        from advdiff_cli.data.patches import open_patches

        return self._checked(open_patches(data, split=self.split, labels=self.labels, selection=self.selection))

    def open_sets(self, data: Sequence[str]) -> list[PatchSet]:
        """Open several patch sets with these rows selected, some of which may hold their own labels.

        Raises:
            AdvdiffError: There is no such set, or no such row, or patches are too large.
        """
        from advdiff_cli.data.patches import open_sets

        opened = open_sets(data, split=self.split, labels=self.labels, selection=self.selection)
        return [self._checked(patches) for patches in opened]

    def _checked(self, patches: PatchSet) -> PatchSet:
        from advdiff_cli.data.patch_source import MAX_PATCH_PIXELS

        patches.check_pixels(self.max_pixels or MAX_PATCH_PIXELS, ", or give --max-pixels {pixels}")
        return patches

    @property
    def selection(self) -> Selection:
        """The selected rows."""
        from advdiff_cli.data.selection import Selection

        return Selection(self.limit, None if self.rows is None else self.rows.bounds, self.shuffle_seed)

    def sample(self, limit: int | None = None) -> RowOptions:
        """Return the rows of a shuffled sample, of at most `limit`, unless --range names rows."""
        if self.rows is not None:
            return self
        seed = 0 if self.shuffle_seed is None else self.shuffle_seed
        return replace(self, limit=limit if self.limit is None else self.limit, shuffle_seed=seed)
