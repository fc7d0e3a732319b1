"""`advdiff download-pcam`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from advdiff_cli import console, options
from advdiff_cli.errors import AdvdiffError


def download_pcam(
    split: Annotated[Literal["train", "valid", "val", "test", "all"], typer.Option(help="Which split.")],
    data_dir: Annotated[Path, typer.Option(help="The files go to DATA_DIR/pcam, where torchvision looks for them.")],
    mirror: Annotated[
        str | None, typer.Option(help="URL of the folder that holds the files; Zenodo's by default.")
    ] = None,
    keep_gz: Annotated[bool, typer.Option("--keep-gz", help="Keep the packed files too.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Fetch nothing: check hashes, shapes, labels, duplicates and slides.")
    ] = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Download PatchCamelyon from Zenodo (CC0), resumed where it ended, verified by SHA-256, in torchvision's layout.

    What is there already, torchvision's own download too, is not fetched again; a file that another process fetches is
    waited for. All splits are 8.0 GB to fetch, 9.1 GB unpacked. --check exits 1 where a check fails.

    Example: advdiff download-pcam --split test --data-dir data
    """
    from advdiff_cli.datasets import download
    from advdiff_cli.datasets.pcam import MIRROR, folder

    if check:
        _check(split, data_dir, as_json, quiet)
        return
    steps = download.plan(split, data_dir)
    download.check_space(steps, data_dir)
    files = [{"file": str(s.target), "action": s.action, "bytes": s.to_fetch} for s in steps]
    if not dry_run:
        with console.progress(sum(s.to_fetch for s in steps), "download (bytes)", quiet=quiet) as advance:
            for step in steps:
                for got in download.run(step, mirror or MIRROR, keep_gz=keep_gz):
                    advance(got)
    table = console.table(("file", "action", "MB"), [(s.target, s.action, f"{s.to_fetch / 1e6:.1f}") for s in steps])
    result = {"out": str(folder(data_dir)), "status": "would download" if dry_run else "done", "files": files}
    console.emit(result, table, folder(data_dir), as_json=as_json, quiet=quiet)


def _check(split: str, data_dir: Path, as_json: bool, quiet: bool) -> None:
    from advdiff_cli.datasets import verify
    from advdiff_cli.datasets.pcam import SPLITS, folder, split_name

    wanted = SPLITS if split == "all" else (split_name(split),)
    found = []
    for finding in verify.check(wanted, data_dir):
        found.append(finding)
        if not quiet:
            console.log(f"{finding.file}: {finding.what} {finding.status}")
    failed = sum(f.status == "fail" for f in found)
    status = "failed" if failed else "passed"
    table = console.table(("file", "check", "", "found"), [(f.file, f.what, f.status, f.found) for f in found])
    result = {"out": str(folder(data_dir)), "status": status, "checks": [f.as_dict() for f in found]}
    console.emit(result, table, status, as_json=as_json, quiet=quiet)
    if failed:
        raise AdvdiffError(f"{failed} of {len(found)} checks of {folder(data_dir)} failed; fetch what failed again")
