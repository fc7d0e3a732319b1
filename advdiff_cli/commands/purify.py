"""`advdiff purify`."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
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
    from advdiff_cli.data.distributed import ProcessGroup
    from advdiff_cli.data.folder_writer import FolderWriter
    from advdiff_cli.data.image_folder import FoundImages
    from advdiff_cli.data.patches import PatchSet
    from advdiff_cli.data.provenance import JsonObject, Provenance
    from advdiff_cli.jobs.folder_images import Outcome
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
    resume: Mapping[str, object] = {}
    if not output.overwrite:
        resume = resume_params(out) if to_file else folder_resume_params(out)
    patches = rows.open(data) if to_file else None
    plan = _Plan(purifier, compute, patches, resume)
    if patches is not None:
        result = _purify_rows(plan, patches, output)
    else:
        result = _purify_folder(plan, data, folder, rows, output)
    counts = ", ".join(f"{v} {k}" for k, v in result.items() if isinstance(v, int))
    output.emit(result, f"{out}: {result['status']}, {counts}", out)
    if result.get("failed"):
        raise SomeInputsFailed(f"{result['failed']} of {result['files']} files failed; {out}/advdiff.jsonl names each")


@dataclass(frozen=True)
class _Plan:
    """What is to be done: the recipe is known before the model is loaded, where there is earlier work."""

    purifier: PurifierOptions
    compute: ShardedComputeOptions
    patches: "PatchSet | None"
    resume: Mapping[str, object]

    @cached_property
    def job(self) -> "PurifyJob":
        """The job, with the model loaded."""
        from advdiff_cli.cli.batch_size import resolve_batch_size
        from advdiff_cli.jobs.purify_rows import PurifyJob
        from advdiff_cli.purification.equations import MAX_UNTILED

        shape, n = (MAX_UNTILED, MAX_UNTILED), None  # the largest images of a folder that are batched
        if self.patches is not None:
            shape, n = self.patches.require_shape(), len(self.patches)
        device = self.compute.resolve_device()
        precision = self.compute.resolve_precision(device, self.resume)
        defense = self.purifier.build(self.compute)
        module = defense.purifier.to(device)
        asked = self.compute.batch_size
        size = resolve_batch_size(asked, self.resume, module, shape, device, graph=False, n=n)
        return PurifyJob(defense, self.compute.seed, size, precision, device)

    @cached_property
    def known(self) -> "tuple[Provenance, int] | None":
        """The recipe and the batch size, if earlier work tells what would be taken from the machine; else None."""
        from advdiff_cli.cli.batch_size import known_batch_size
        from advdiff_cli.jobs.recipes import purify_recipe

        precision = self.compute.known_precision(self.resume)
        size = known_batch_size(self.compute.batch_size, self.resume, graph=False)
        found = self.purifier.find(self.compute) if self.resume else None
        if found is None or precision is None or size is None:
            return None
        seed = self.compute.seed
        return purify_recipe(*found, self.patches, seed=seed, batch_size=size, precision=precision), size


def _purify_rows(plan: _Plan, patches: "PatchSet", output: PlannedOutputOptions) -> "JsonObject":
    from advdiff_cli.data.output_spec import OutputSpec, shard_rows
    from advdiff_cli.data.resume import is_complete

    out, pair = output.out, plan.compute.shard_pair
    if plan.known is not None and not output.dry_run:
        made_by, size = plan.known
        if is_complete(out, made_by, part := shard_rows(len(patches), size, pair)):
            console.log(f"{out} is up to date")
            return {"out": str(out), "status": "up to date", "patches": len(part)}

    from advdiff_cli.cli.progress import follow_rows
    from advdiff_cli.data.distributed import process_group
    from advdiff_cli.jobs.purify_rows import purify_rows
    from advdiff_cli.jobs.sharding import PatchSetOutput, ShardedOutput

    job = plan.job
    count = len(shard_rows(len(patches), job.batch_size, pair))
    if output.dry_run:
        return {"out": str(out), "status": "would purify", "patches": count}
    made = OutputSpec(out, job.recipe(patches), job.device.type, output.overwrite)
    work = follow_rows(partial(purify_rows, job, patches), "purify", quiet=output.quiet)
    sharded = ShardedOutput(made, len(patches), job.batch_size, PatchSetOutput(patches, work))
    with process_group(job.device) as group:
        status = sharded.make(pair, group)
    if status == "up to date":
        console.log(f"{out} is up to date")
    return {"out": str(out), "status": status, "patches": count}


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
    plan: _Plan, data: str, folder: FolderOptions, rows: RowOptions, output: PlannedOutputOptions
) -> "JsonObject":
    from advdiff_cli.data.distributed import NO_SHARD_UNDER_TORCHRUN, ProcessGroup, process_group, world_size
    from advdiff_cli.data.folder_journal import JOURNAL

    if world_size() > 1:
        if plan.compute.shard is not None:
            raise AdvdiffError(NO_SHARD_UNDER_TORCHRUN)
        with process_group(plan.job.device) as group:
            return _purify_images(plan, data, folder, rows, output, group, made_by=plan.job.recipe())
    known = plan.known if plan.compute.shard is None and (output.out / JOURNAL).is_file() else None
    made_by = plan.job.recipe() if known is None else known[0]
    return _purify_images(plan, data, folder, rows, output, ProcessGroup(), made_by=made_by)


def _purify_images(
    plan: _Plan,
    data: str,
    folder: FolderOptions,
    rows: RowOptions,
    output: PlannedOutputOptions,
    group: "ProcessGroup",
    *,
    made_by: "Provenance",
) -> "JsonObject":
    """Purify this process's share of the images of a folder, by a recipe."""
    from advdiff_cli.data.folder_writer import FolderWriter
    from advdiff_cli.data.output_spec import OutputSpec

    out = output.out
    images = _find_images(data, out, folder, rows, group)
    shard = (group.rank, group.size) if group.size > 1 else plan.compute.shard_pair
    part, parts = shard or (0, 1)
    files = images.files[part::parts]
    unread = images.unread if part == 0 else {}
    if output.dry_run:
        return {"out": str(out), "status": "would purify", "files": group.sum([len(files)])[0]}
    device = plan.job.device.type if "job" in vars(plan) else "cpu"  # which an existing journal tells
    spec = OutputSpec(out, made_by, device, output.overwrite)
    if group.size > 1:
        if group.is_main:
            FolderWriter(spec).close()
        group.wait()
        spec = OutputSpec(out, made_by, device)
    with FolderWriter(spec, shard) as writer:
        if writer.damaged_lines:
            console.warn(f"{out}: {writer.damaged_lines} lines of the journal are damaged; their files are done again")
        for name, reason in unread.items():
            writer.record_failure(name, None, reason)
            console.warn(reason)
        counts = _purify_files(plan, images.root, files, writer, strict=folder.strict, quiet=output.quiet)
    counts["failed"] += len(unread)
    total = len(files) + len(unread)
    ok, kept, failed, total = group.sum([*(counts[k] for k in ("ok", "kept", "failed")), total])
    if group.is_main and group.size > 1:
        FolderWriter(OutputSpec(out, made_by, device)).close()  # merges the journals
    status = "up to date" if kept == total else "done"
    return {"out": str(out), "status": status, "files": total, "purified": ok, "kept": kept, "failed": failed}


def _purify_files(
    plan: _Plan, root: Path, files: list[Path], writer: "FolderWriter", *, strict: bool, quiet: bool
) -> Counter[str]:
    """Purify files and return how many have which outcome."""
    counts: Counter[str] = Counter()
    with console.progress(len(files), "purify", quiet=quiet) as advance:
        for outcome in _outcomes(plan, root, files, writer):
            counts[outcome.status] += 1
            if outcome.status == "failed" and strict:
                raise AdvdiffError(f"{outcome.reason} (--strict: files that were not written yet are left out)")
            if outcome.status == "failed":
                console.warn(outcome.reason)
            advance()
    return counts


def _outcomes(plan: _Plan, root: Path, files: list[Path], writer: "FolderWriter") -> "Iterator[Outcome]":
    """Yield the outcome of each file; the model is loaded when the first image is to be computed."""
    from advdiff_cli.jobs.folder_images import FolderImages, Outcome

    size = plan.known[1] if plan.known is not None else plan.job.batch_size
    images = FolderImages(root, writer, size)
    loaded = images.load(files)
    for found in loaded:
        if isinstance(found, Outcome):
            yield images.record(found)
            continue

        from advdiff_cli.jobs.purify_folder import FolderPurifier

        yield from FolderPurifier(plan.job, images).run(chain([found], loaded))
