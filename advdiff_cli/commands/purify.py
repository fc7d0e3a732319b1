"""`advdiff purify`."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from advdiff_cli import console
from advdiff_cli.cli import options, up_to_date
from advdiff_cli.cli.compute_options import ShardedComputeOptions
from advdiff_cli.cli.defense_options import PurifierOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.image_options import FolderOptions, check_folder
from advdiff_cli.cli.output_options import PlannedOutputOptions
from advdiff_cli.cli.purify_plan import PurifyPlan
from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.errors import AdvdiffError, SomeInputsFailed

if TYPE_CHECKING:
    from advdiff_cli.data.distributed import ProcessGroup
    from advdiff_cli.data.folder_writer import FolderWriter
    from advdiff_cli.data.output_spec import OutputSpec
    from advdiff_cli.data.patch_set import PatchSet
    from advdiff_cli.data.provenance import JsonObject
    from advdiff_cli.jobs.folder_images import Outcome


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
        check_folder(data, out, rows)
    compute.refuse_auto_for_parts()
    resume: Mapping[str, object] = {}
    if not output.overwrite:
        resume = resume_params(out) if to_file else folder_resume_params(out)
    patches = rows.open(data) if to_file else None
    plan = PurifyPlan(purifier, compute, patches, resume)
    if patches is not None:
        result = _purify_rows(plan, patches, output)
    else:
        result = _purify_folder(plan, data, folder, rows, output)
    counts = ", ".join(f"{v} {k}" for k, v in result.items() if isinstance(v, int))
    output.emit(result, f"{out}: {result['status']}, {counts}", out)
    if result.get("failed") and not output.dry_run:
        raise SomeInputsFailed(f"{result['failed']} of {result['files']} files failed; {out}/advdiff*.jsonl name each")


def _purify_rows(plan: PurifyPlan, patches: "PatchSet", output: PlannedOutputOptions) -> "JsonObject":
    from advdiff_cli.data.output_spec import OutputSpec, shard_rows
    from advdiff_cli.data.resume import is_complete

    out, pair = output.out, plan.compute.shard_pair
    if plan.known is not None:
        made_by, size = plan.known
        if is_complete(out, made_by, part := shard_rows(len(patches), size, pair)):
            up_to_date.keep(out, dry_run=output.dry_run)
            return {"out": str(out), "status": "up to date", "patches": len(part)}

    from advdiff_cli.cli.progress import follow_rows
    from advdiff_cli.data.distributed import process_group
    from advdiff_cli.jobs.purify_rows import purify_rows
    from advdiff_cli.jobs.sharding import PatchSetOutput, ShardedOutput

    job = plan.job
    part = shard_rows(len(patches), job.batch_size, pair)
    count = len(part)
    if output.dry_run:
        is_done = not output.overwrite and is_complete(out, job.recipe(patches), part)
        return {"out": str(out), "status": "up to date" if is_done else "would purify", "patches": count}
    made = OutputSpec(out, job.recipe(patches), job.device.type, output.overwrite)
    work = follow_rows(partial(purify_rows, job, patches), "purify", quiet=output.quiet)
    sharded = ShardedOutput(made, len(patches), job.batch_size, PatchSetOutput(patches, work))
    with process_group(job.device) as group:
        status = sharded.make(pair, group)
    if status == "up to date":
        up_to_date.keep(out)
    return {"out": str(out), "status": status, "patches": count}


def _purify_folder(
    plan: PurifyPlan, data: str, folder: FolderOptions, rows: RowOptions, output: PlannedOutputOptions
) -> "JsonObject":
    from advdiff_cli.data.distributed import NO_SHARD_UNDER_TORCHRUN, ProcessGroup, process_group, world_size
    from advdiff_cli.data.folder_journal import JOURNAL
    from advdiff_cli.data.output_spec import OutputSpec

    if world_size() > 1:
        if plan.compute.shard is not None:
            raise AdvdiffError(NO_SHARD_UNDER_TORCHRUN)
        with process_group(plan.job.device) as group:
            return _purify_images(plan, data, folder, rows, output, group, plan.spec(output))
    known = plan.known if plan.compute.shard is None and (output.out / JOURNAL).is_file() else None
    spec = plan.spec(output) if known is None else OutputSpec(output.out, known[0])  # the journal tells the device
    return _purify_images(plan, data, folder, rows, output, ProcessGroup(), spec)


def _purify_images(
    plan: PurifyPlan,
    data: str,
    folder: FolderOptions,
    rows: RowOptions,
    output: PlannedOutputOptions,
    group: "ProcessGroup",
    spec: "OutputSpec",
) -> "JsonObject":
    """Purify this process's share of the images of a folder, by the recipe of `spec`."""
    from advdiff_cli.data.folder_writer import FolderWriter
    from advdiff_cli.data.selection import ALL

    out = output.out
    images = folder.find(data, out, rows, group)
    names = {images.name(file) for file in images.files}
    whole = Path(data).is_dir() and folder.files_from is None and rows.selection == ALL and not images.unread
    shard = (group.rank, group.size) if group.size > 1 else plan.compute.shard_pair
    part, parts = shard or (0, 1)
    files = images.files[part::parts]
    unread = images.unread if part == 0 else {}
    if output.dry_run:
        return _plan(spec, images.root, files, len(unread), group)
    if group.size > 1:
        if group.is_main:
            FolderWriter(spec).close()
        group.wait()
        spec = replace(spec, overwrite=False)
    with FolderWriter(spec, shard) as writer:
        if writer.damaged_lines:
            console.warn(f"{out}: {writer.damaged_lines} lines of the journal are damaged; their files are done again")
        for name, reason in unread.items():
            writer.record_failure(name, None, reason)
            console.warn(reason)
        counts = _purify_files(plan, images.root, files, writer, strict=folder.strict, quiet=output.quiet)
        if whole and shard is None:
            writer.record_inputs(names)
    counts["failed"] += len(unread)
    total = len(files) + len(unread)
    ok, kept, failed, total = group.sum([*(counts[k] for k in ("ok", "kept", "failed")), total])
    if group.is_main and group.size > 1:
        with FolderWriter(spec) as writer:  # merges the journals
            if whole:
                writer.record_inputs(names)
    status = "up to date" if kept == total else "done"
    return {"out": str(out), "status": status, "files": total, "purified": ok, "kept": kept, "failed": failed}


def _plan(spec: "OutputSpec", root: Path, files: list[Path], unread: int, group: "ProcessGroup") -> "JsonObject":
    """Return what would be done with the images of a folder."""
    from advdiff_cli.data.folder_state import folder_plan

    found = folder_plan(spec, root, files)
    new, changed, failed, kept = group.sum([found["new"], found["changed"], found["failed"] + unread, found["kept"]])
    total = new + changed + failed + kept
    status = "up to date" if kept == total else "would purify"
    counts = {"files": total, "new": new, "changed": changed, "failed": failed, "kept": kept}
    return {"out": str(spec.path), "status": status, **counts}


def _purify_files(
    plan: PurifyPlan, root: Path, files: list[Path], writer: "FolderWriter", *, strict: bool, quiet: bool
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


def _outcomes(plan: PurifyPlan, root: Path, files: list[Path], writer: "FolderWriter") -> "Iterator[Outcome]":
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
