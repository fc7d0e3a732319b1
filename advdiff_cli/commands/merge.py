"""`advdiff merge`."""

from pathlib import Path
from typing import Annotated

import typer

from advdiff_cli.cli import up_to_date
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import OutputOptions


@with_option_groups
def merge(
    parts: Annotated[
        list[Path],
        typer.Argument(
            help="Patch sets: the shards of one recipe, or sets of different rows. Or shards of the tables of predict, "
            "certify or evaluate --predictions."
        ),
    ],
    output: OutputOptions,
) -> None:
    """Merge shards into the file that a single run would have made, and other patch sets one after another.

    Example: advdiff merge part0.h5 part1.h5 -o adv.h5
    """
    from advdiff_cli.data.merge import merge_sets, merge_tables

    merge_files = merge_tables if output.out.suffix.lower() == ".csv" else merge_sets
    merged = merge_files(parts, output.out, overwrite=output.overwrite)
    if merged.up_to_date:
        up_to_date.keep(output.out)
    status = "up to date" if merged.up_to_date else "done"
    result = {"out": str(output.out), "status": status, "patches": merged.patches, "parts": len(parts)}
    output.emit(result, f"{output.out}: {merged.patches} patches of {len(parts)} parts", output.out)
