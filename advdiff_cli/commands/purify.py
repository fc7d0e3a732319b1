"""`advdiff purify`."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.compute_options import ShardedComputeOptions
from advdiff_cli.cli.defense_options import PurifierOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import PlannedOutputOptions
from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.errors import AdvdiffError, SomeInputsFailed

if TYPE_CHECKING:
    import torch

    from advdiff_cli.data.distributed import ProcessGroup
    from advdiff_cli.data.folder_writer import FolderWriter
    from advdiff_cli.data.image_folder import FoundImages
    from advdiff_cli.data.patches import PatchSet
    from advdiff_cli.data.provenance import JsonObject
    from advdiff_cli.jobs.purify_rows import PurifyJob

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


@with_option_groups
def purify(
    data: options.Data,
    folder: FolderOptions,
    purifier: PurifierOptions,
    rows: RowOptions,
    compute: ShardedComputeOptions,
    output: PlannedOutputOptions,
) -> None:
    """Purify patches: a file to a .safetensors or .h5 file, a folder or glob of images to a folder of the same names.

    PNG, TIFF and BMP images keep their names; a.jpg becomes a.jpg.png. Run again, the command resumes; in a folder it
    purifies new, changed and failed files only, and exits with 3 if any file fails. Shards of a folder share the
    folder, and shards of a file are joined by merge.

    Example: advdiff purify patches/ -o purified/
    """
    from advdiff_cli.data.distributed import process_group
    from advdiff_cli.data.folder_journal import folder_resume_params
    from advdiff_cli.data.patches import PATCH_FILES
    from advdiff_cli.data.resume import resume_params

    out = output.out
    to_file = out.suffix in PATCH_FILES
    if to_file and folder != FolderOptions():
        raise AdvdiffError(f"--out {out}: --files-from and --strict need a folder of images and a folder as --out")
    if not to_file:
        _check_folder(data, out, rows)
    compute.refuse_auto_for_parts()
    device = compute.resolve_device()
    resume: Mapping[str, object] = {}
    if not output.overwrite:
        resume = resume_params(out) if to_file else folder_resume_params(out)
    patches = rows.open(data) if to_file else None
    job = _job(purifier, compute, patches, resume, device)
    with process_group(device) as group:
        if patches is not None:
            result = _purify_rows(job, patches, compute, output, group)
        else:
            images = _find_images(data, out, folder, rows, group)
            result = _purify_folder(job, images, folder, compute, output, group)
    counts = ", ".join(f"{v} {k}" for k, v in result.items() if isinstance(v, int))
    output.emit(result, f"{out}: {result['status']}, {counts}", out)
    if result.get("failed"):
        raise SomeInputsFailed(f"{result['failed']} of {result['files']} files failed; {out}/advdiff.jsonl names each")


def _job(
    purifier: PurifierOptions,
    compute: ShardedComputeOptions,
    patches: "PatchSet | None",
    resume: Mapping[str, object],
    device: "torch.device",
) -> "PurifyJob":
    from advdiff_cli.cli.batch_size import resolve_batch_size
    from advdiff_cli.jobs.purify_rows import PurifyJob
    from advdiff_cli.purification.tiling import MAX_UNTILED

    shape, n = (MAX_UNTILED, MAX_UNTILED), None  # the largest images of a folder that are batched
    if patches is not None:
        shape, n = patches.require_shape(), len(patches)
    precision = compute.resolve_precision(device, resume)
    defense = purifier.build(compute)
    module = defense.purifier.to(device)
    size = resolve_batch_size(compute.batch_size, resume, module, shape, device, graph=False, n=n)
    return PurifyJob(defense, compute.seed, size, precision, device)


def _purify_rows(
    job: "PurifyJob",
    patches: "PatchSet",
    compute: ShardedComputeOptions,
    output: PlannedOutputOptions,
    group: "ProcessGroup",
) -> "JsonObject":
    from advdiff_cli.cli.progress import follow_rows
    from advdiff_cli.data.output_spec import OutputSpec, shard_rows
    from advdiff_cli.jobs.purify_rows import purify_rows
    from advdiff_cli.jobs.sharding import PatchSetOutput, ShardedOutput

    count = len(shard_rows(len(patches), job.batch_size, compute.shard_pair))
    if output.dry_run:
        return {"out": str(output.out), "status": "would purify", "patches": count}
    made = OutputSpec(output.out, job.recipe(patches), job.device.type, output.overwrite)
    work = follow_rows(partial(purify_rows, job, patches), "purify", quiet=output.quiet)
    sharded = ShardedOutput(made, len(patches), job.batch_size, PatchSetOutput(patches, work))
    status = sharded.make(compute.shard_pair, group)
    if status == "up to date":
        console.log(f"{output.out} is up to date")
    return {"out": str(output.out), "status": status, "patches": count}


def _check_folder(data: str, out: Path, rows: RowOptions) -> None:
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


def _find_images(data: str, out: Path, folder: FolderOptions, rows: RowOptions, group: "ProcessGroup") -> "FoundImages":
    """Return the images to purify, without those in the output folder.

    Raises:
        AdvdiffError: There are none, or an output would replace its input.
    """
    from advdiff_cli.data.folder_journal import output_name
    from advdiff_cli.data.image_folder import find_images, named_images

    found = find_images(data)
    own = os.path.realpath(out) + os.sep
    files = [f for f in found.files if not os.path.realpath(f).startswith(own)]
    if folder.files_from is not None:
        files = named_images(found.root, _listed_names(folder.files_from, group))
    if not files and not found.unread:
        if found.files and folder.files_from is None:
            raise AdvdiffError(f"all images in {data} are below --out {out}; give another --out")
        problem = f"no images in {data}" if folder.files_from is None else f"{folder.files_from} lists no images"
        raise AdvdiffError(problem)
    for file in files:
        if os.path.realpath(file) == own + output_name(found.name(file)):
            raise AdvdiffError(f"--out {out}: the result would replace {file}; give another --out")
    selected = rows.selection.rows(len(files))
    if files and not len(selected):
        raise AdvdiffError(f"no images selected among {len(files)} in {data}; check --limit and --range")
    return replace(found, files=[files[i] for i in selected])


def _listed_names(files_from: str, group: "ProcessGroup") -> list[str]:
    if files_from == "-" and group.size > 1:
        raise AdvdiffError("--files-from -: the processes of torchrun share one stdin; give a file")
    text = sys.stdin.buffer.read() if files_from == "-" else Path(files_from).read_bytes()
    return [os.fsdecode(line.removesuffix(b"\r")) for line in text.split(b"\n")]


def _purify_folder(
    job: "PurifyJob",
    images: "FoundImages",
    folder: FolderOptions,
    compute: ShardedComputeOptions,
    output: PlannedOutputOptions,
    group: "ProcessGroup",
) -> "JsonObject":
    from advdiff_cli.data.folder_writer import FolderWriter
    from advdiff_cli.data.output_spec import OutputSpec
    from advdiff_cli.jobs.sharding import NO_SHARD_UNDER_TORCHRUN

    out, shard = output.out, compute.shard_pair
    if group.size > 1:
        if shard is not None:
            raise AdvdiffError(NO_SHARD_UNDER_TORCHRUN)
        shard = (group.rank, group.size)
    part, parts = shard or (0, 1)
    files = images.files[part::parts]
    unread = images.unread if part == 0 else {}
    if output.dry_run:
        return {"out": str(out), "status": "would purify", "files": group.sum([len(files)])[0]}
    spec = OutputSpec(out, job.recipe(), job.device.type, output.overwrite)
    if group.size > 1:
        if group.is_main:
            FolderWriter(spec).close()
        group.wait()
        spec = OutputSpec(out, job.recipe(), job.device.type)
    with FolderWriter(spec, shard) as writer:
        if writer.damaged_lines:
            console.warn(f"{out}: {writer.damaged_lines} lines of the journal are damaged; their files are done again")
        for name, reason in unread.items():
            writer.record_failure(name, None, reason)
            console.warn(reason)
        counts = _purify_files(job, images.root, files, writer, strict=folder.strict, quiet=output.quiet)
    counts["failed"] += len(unread)
    total = len(files) + len(unread)
    ok, kept, failed, total = group.sum([*(counts[k] for k in ("ok", "kept", "failed")), total])
    if group.is_main and group.size > 1:
        FolderWriter(OutputSpec(out, job.recipe(), job.device.type)).close()  # merges the journals
    status = "up to date" if kept == total else "done"
    return {"out": str(out), "status": status, "files": total, "purified": ok, "kept": kept, "failed": failed}


def _purify_files(
    job: "PurifyJob", root: Path, files: list[Path], writer: "FolderWriter", *, strict: bool, quiet: bool
) -> Counter[str]:
    """Purify files and return how many have which outcome."""
    from advdiff_cli.jobs.purify_folder import FolderPurifier

    counts: Counter[str] = Counter()
    with console.progress(len(files), "purify", quiet=quiet) as advance:
        for outcome in FolderPurifier(job, root, writer).run(files):
            counts[outcome.status] += 1
            if outcome.status == "failed" and strict:
                raise AdvdiffError(f"{outcome.reason} (--strict: files that were not written yet are left out)")
            if outcome.status == "failed":
                console.warn(outcome.reason)
            advance()
    return counts
