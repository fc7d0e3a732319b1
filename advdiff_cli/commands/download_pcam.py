"""`advdiff download-pcam`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import ResultOptions
from advdiff_cli.errors import AdvdiffError


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """What is downloaded, and from where."""

    split: Annotated[Literal["train", "valid", "val", "test", "all"], typer.Option(help="Which split.")]
    data_dir: Annotated[Path, typer.Option(help="The files go to DATA_DIR/pcam, where torchvision looks for them.")]
    mirror: Annotated[str | None, typer.Option(help="URL of the folder that holds the files; Zenodo by default.")] = (
        None
    )
    keep_gz: Annotated[bool, typer.Option("--keep-gz", help="Also keep the gzipped files.")] = False
    check: Annotated[
        bool,
        typer.Option("--check", help="Download nothing; verify hashes, shapes, labels, duplicates and slides."),
    ] = False
    dry_run: options.DryRun = False


@with_option_groups
def download_pcam(settings: DownloadOptions, output: ResultOptions) -> None:
    """Download PatchCamelyon from Zenodo (CC0), verified by SHA-256, in torchvision's layout.

    A stopped download resumes when the command is run again. Existing files, such as torchvision's own download, are
    not fetched again, and a file that another process fetches is waited for. All splits take 8.0 GB to download and 9.1
    GB unpacked. --check exits with 1 if a check fails. With -q, print the folder.

    Example: advdiff download-pcam --split test --data-dir data
    """
    from advdiff_cli.data.pcam_files import pcam_folder
    from advdiff_cli.datasets import download
    from advdiff_cli.datasets.pcam import MIRROR

    if settings.check:
        _verify(settings, output)
        return
    steps = download.plan(settings.split, settings.data_dir)
    download.check_space(steps, settings.data_dir)
    files = [{"file": str(s.target), "action": s.action, "bytes": s.to_fetch} for s in steps]
    if not settings.dry_run:
        total = sum(s.to_fetch for s in steps)
        with console.progress(total, "download (bytes)", quiet=output.quiet) as advance:
            for step in steps:
                for count in download.run(step, settings.mirror or MIRROR, keep_gz=settings.keep_gz):
                    advance(count)
    table = console.table(("file", "action", "MB"), [(s.target, s.action, f"{s.to_fetch / 1e6:.1f}") for s in steps])
    folder = pcam_folder(settings.data_dir)
    status = "would download" if settings.dry_run else "done"
    output.emit({"out": str(folder), "status": status, "files": files}, table, folder)


def _verify(settings: DownloadOptions, output: ResultOptions) -> None:
    from advdiff_cli.data.pcam_files import SPLITS, pcam_folder, split_name
    from advdiff_cli.datasets.verify import verify

    splits = SPLITS if settings.split == "all" else (split_name(settings.split),)
    found = []
    for finding in verify(splits, settings.data_dir):
        found.append(finding)
        if not output.quiet:
            console.log(f"{finding.file}: {finding.what} {finding.status}")
    failed = sum(f.status == "fail" for f in found)
    status = "failed" if failed else "passed"
    table = console.table(("file", "check", "", "found"), [(f.file, f.what, f.status, f.found) for f in found])
    folder = pcam_folder(settings.data_dir)
    output.emit({"out": str(folder), "status": status, "checks": [f.as_dict() for f in found]}, table, status)
    if failed:
        raise AdvdiffError(f"{failed} of {len(found)} checks of {folder} failed; download the failed files again")
