"""Options for a folder of images, and the images that they choose."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.data.distributed import ProcessGroup
    from advdiff_cli.data.image_folder import FoundImages

_FILE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".svs"),
    *(".txt", ".csv", ".json", ".jsonl", ".npy", ".npz", ".pt", ".pth", ".zip", ".tar", ".gz"),
}
"""Suffixes that are those of files, not of a folder for images."""


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Options for a folder of images."""

    files_from: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Only the listed images, one name per line, relative to DATA; - is stdin."),
    ] = None
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that fails.")] = False

    def find(self, data: str, out: Path, rows: RowOptions, group: ProcessGroup) -> FoundImages:
        """Return the images to purify, without those in the output folder.

        Raises:
            AdvdiffError: There are none, or an output would replace its input.
        """
        from advdiff_cli.data.folder_journal import output_name
        from advdiff_cli.data.image_folder import find_images, named_images, warn_of_purified

        found = find_images(data)
        own = os.path.realpath(out) + os.sep
        results = [folder for folder in found.purified if os.path.realpath(folder) + os.sep != own]
        if self.files_from is None:
            warn_of_purified(results)
        files = [f for f in found.files if not os.path.realpath(f).startswith(own)]
        if self.files_from is not None:
            files = named_images(found.root, _listed_names(self.files_from, group))
        if not files and not found.unread:
            if self.files_from is None and (found.files or len(found.purified) > len(results)):
                raise AdvdiffError(f"all images in {data} are below --out {out}; give another --out")
            problem = f"no images in {data}" if self.files_from is None else f"{self.files_from} lists no images"
            raise AdvdiffError(problem)
        for file in files:
            if os.path.realpath(file) == own + output_name(found.name(file)):
                raise AdvdiffError(f"--out {out}: the result would replace {file}; give another --out")
        selected = rows.selection.rows(len(files))
        if files and not len(selected):
            raise AdvdiffError(f"no images selected among {len(files)} in {data}; check --limit and --range")
        return replace(found, files=[files[i] for i in selected])


def check_folder(data: str, out: Path, rows: RowOptions) -> None:
    """Check that images can go from `data` to a folder `out`.

    Raises:
        AdvdiffError: The input is not a folder of images, or the output is not a folder, or the input itself.
    """
    from advdiff_cli.data.patches import PATCH_FILES

    if Path(data).suffix.lower() in PATCH_FILES or rows.split is not None or rows.labels is not None:
        raise AdvdiffError(
            f"--out {out}: for a patch set, or with --split or --labels, give a .safetensors or .h5 file as --out; "
            "a folder of images goes to a folder"
        )
    if not Path(data).exists() and not any(c in data for c in "*?["):
        raise AdvdiffError(f"no such file or folder: {data}")
    if out.suffix.lower() in _FILE_SUFFIXES and not out.is_dir():
        raise AdvdiffError(f"--out {out} is the name of a file; images go to a folder, so give the name of one")
    if Path(data).is_dir() and out.exists() and out.samefile(data):
        raise AdvdiffError(f"--out {out} is the folder of the images themselves; give another folder")


def _listed_names(files_from: str, group: ProcessGroup) -> list[str]:
    if files_from == "-" and group.size > 1:
        raise AdvdiffError("--files-from -: the processes of torchrun share one stdin; give a file")
    text = sys.stdin.buffer.read() if files_from == "-" else Path(files_from).read_bytes()
    return [os.fsdecode(line.removesuffix(b"\r")) for line in text.split(b"\n")]
