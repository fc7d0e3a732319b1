"""`advdiff merge`."""

from pathlib import Path
from typing import Annotated

import typer

from advdiff_cli import console, options


def merge(
    parts: Annotated[
        list[Path], typer.Argument(help="Patch sets: the shards of one recipe, or sets of different rows.")
    ],
    out: options.Out,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Join patch sets: shards of one recipe into the file that one run would have made, other sets one after another.

    Example: advdiff merge part0.h5 part1.h5 -o adv.h5
    """
    from advdiff_cli.data.merge import merge_sets

    done = merge_sets(parts, out, overwrite=overwrite)
    if done.up_to_date:
        console.log(f"{out} is up to date")
    status = "up to date" if done.up_to_date else "done"
    n = len(done.finished)
    result = {"out": str(out), "status": status, "patches": n, "parts": len(parts)}
    console.emit(result, f"{out}: {n} patches of {len(parts)} parts", out, as_json=as_json, quiet=quiet)
