"""`advdiff download-pcam`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from advdiff_cli import console, options


def download_pcam(
    split: Annotated[Literal["train", "valid", "val", "test", "all"], typer.Option(help="Which split.")],
    data_dir: Annotated[Path, typer.Option(help="The files go to DATA_DIR/pcam, where torchvision looks for them.")],
    mirror: Annotated[
        str | None, typer.Option(help="URL of the folder that holds the files; Zenodo's by default.")
    ] = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Download PatchCamelyon from Zenodo (CC0), resumed where it ended, verified by SHA-256, in torchvision's layout.

    What is there already, torchvision's own download too, is not fetched again. All splits are 8.0 GB to fetch, 9.1 GB
    unpacked.

    Example: advdiff download-pcam --split test --data-dir data
    """
    from advdiff_cli.data import download
    from advdiff_cli.data.pcam import MIRROR, folder

    steps = download.plan(split, data_dir)
    download.check_space(steps, data_dir)
    files = [{"file": str(s.target), "action": s.action, "bytes": s.to_fetch} for s in steps]
    if not dry_run:
        with console.progress(sum(s.to_fetch for s in steps), "download (bytes)", quiet=quiet) as advance:
            for step in steps:
                for got in download.run(step, mirror or MIRROR):
                    advance(got)
    table = console.table(("file", "action", "MB"), [(s.target, s.action, f"{s.to_fetch / 1e6:.1f}") for s in steps])
    result = {"out": str(folder(data_dir)), "status": "would download" if dry_run else "done", "files": files}
    console.emit(result, table, folder(data_dir), as_json=as_json, quiet=quiet)
