"""What is done about an output that is up to date."""

from pathlib import Path

from advdiff_cli import console


def keep(out: Path, *, dry_run: bool = False) -> None:
    """Say that a patch set or table is up to date, and tidy up behind killed processes."""
    from advdiff_cli.data.leftovers import remove_leftovers

    console.log(f"{out} is up to date")
    if not dry_run:
        remove_leftovers(out)
