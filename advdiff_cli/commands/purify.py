"""`advdiff purify`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from advdiff_cli import console, options
from advdiff_cli.cli.batch_size import batch_size as sized
from advdiff_cli.commands.opening import open_selected
from advdiff_cli.errors import AdvdiffError, SomeInputsFailed
from advdiff_cli.jobs.sharding import fill
from advdiff_cli.purification.defense import Defence, build_defence

if TYPE_CHECKING:
    from torch import device as Chip

    from advdiff_cli.data.distributed import Processes
    from advdiff_cli.data.patches import PatchSet

_BATCH = 16


def purify(
    data: options.Data,
    out: options.Out,
    files_from: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Only the images listed, a name a line, relative to DATA; - is stdin."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image of a folder that fails.")] = False,
    ddpm: options.PurifierName = None,
    defense: Annotated[
        Literal["noise", "ddpm"], typer.Option(help="What purifies.", rich_help_panel=options.DEFENCE)
    ] = "ddpm",
    t_star: options.TStar = None,
    sampler: options.Sampler = None,
    sampler_steps: options.SamplerSteps = None,
    seed: options.Seed = 0,
    split: options.Split = None,
    labels: options.Labels = None,
    limit: options.Limit = None,
    rows: options.Range = None,
    shuffle_seed: options.ShuffleSeed = None,
    shard: options.Shard = None,
    allow_pickle: options.AllowPickle = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Purify patches: a file to a .safetensors or .h5 file, a folder or glob of images to a folder of the same names.

    Run again, it goes on where it was stopped; a folder gets new, changed and failed files only (exit 3 while any
    fails). Shards of a folder share it; those of a file are joined by merge.

    Example: advdiff purify patches/ -o purified/
    """
    from advdiff_cli.data import folder_writer, patch_writer
    from advdiff_cli.data.distributed import together
    from advdiff_cli.data.provenance import recipe
    from advdiff_cli.models.device import resolve_device, resolve_precision
    from advdiff_cli.purification.tiling import LARGEST

    chip = resolve_device(device)
    to_file = out.suffix in (".safetensors", ".h5", ".hdf5")
    earlier = {} if overwrite else patch_writer.begun(out) if to_file else folder_writer.begun(out)
    exact = resolve_precision(earlier.get("precision", "auto") if precision == "auto" else precision, chip)
    shape, n = (LARGEST, LARGEST), None  # of the largest images of a folder that are batched
    if to_file and (files_from is not None or strict):
        raise AdvdiffError(f"--out {out}: --files-from and --strict are for folders of images that go to a folder")
    if to_file:
        patches = open_selected(data, split, labels, limit, rows, shuffle_seed)
        shape, n = patches.require_shape(), len(patches)
    elif (split, labels, limit, rows, shuffle_seed) != (None,) * 5 or not _holds_images(data):
        raise AdvdiffError(
            f"--out {out}: rows and labels of a patch set go to a .safetensors or .h5 file, whole folders to a folder"
        )
    defence = build_defence(defense or "ddpm", ddpm, t_star, sampler, sampler_steps, allow_pickle=allow_pickle)
    defence.purifier.to(chip)
    batch = sized(batch_size, earlier, _BATCH, defence.purifier, shape, n, chip, shard=shard)
    parameters = defence.parameters | {"seed": seed, "batch_size": batch, "precision": exact}
    part = cast("tuple[int, int] | None", shard)
    with together() as processes:
        if to_file:
            made_by = recipe("purify", parameters, data=patches.recipe_input(), ddpm=defence.model)
            result = _to_file(patches, out, made_by, defence, part, processes, chip, overwrite, dry_run, quiet)
        else:
            made_by = recipe("purify", parameters, ddpm=defence.model)
            files = _listed(data, out, files_from, processes)
            result = _to_folder(files, out, made_by, defence, part, processes, chip, overwrite, dry_run, strict, quiet)
    counts = ", ".join(f"{v} {k}" for k, v in result.items() if isinstance(v, int))
    console.emit(result, f"{out}: {result['status']}, {counts}", out, as_json=as_json, quiet=quiet)
    if result.get("failed"):
        raise SomeInputsFailed(f"{result['failed']} of {result['files']} files failed; {out}/advdiff.jsonl names each")


def _holds_images(data: str) -> bool:
    return Path(data).suffix.lower() not in (".safetensors", ".h5", ".hdf5")


def _to_file(
    patches: "PatchSet", out: Path, made_by: dict[str, Any], defence: Defence, shard: tuple[int, int] | None,
    processes: "Processes", chip: "Chip", overwrite: bool, dry_run: bool, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    from advdiff_cli.data.patch_writer import PatchWriter, shard_rows
    from advdiff_cli.jobs.purify_rows import purify_rows

    machine = made_by["parameters"]
    part = shard_rows(len(patches), machine["batch_size"], shard)
    count = part.stop - part.start
    if dry_run:
        return {"out": str(out), "status": "would purify", "patches": count}

    settings = {k: machine[k] for k in ("batch_size", "seed", "precision")}

    def work(sink: PatchWriter) -> None:
        done, of = int(sink.finished.sum()), len(sink.finished)
        with console.progress(of, "purify", done=done, quiet=quiet) as advance:
            for count in purify_rows(defence.purifier, patches, sink, device=chip, **settings):
                advance(count)

    status = fill(out, made_by, patches, shard, processes, work, device=chip.type, overwrite=overwrite)
    return {"out": str(out), "status": status, "patches": count}


def _listed(
    data: str, out: Path, files_from: str | None, processes: "Processes"
) -> "tuple[Path, list[Path], dict[str, str]]":
    """Return the folder that names are relative to, the images to purify, and the output's name for each image below.

    What was made from them is left out; a list does not change what a file's output is called.
    """
    from advdiff_cli.data.folder_writer import output_names
    from advdiff_cli.data.image_folder import list_images, listed_images

    if not Path(data).exists() and not any(c in data for c in "*?["):
        raise AdvdiffError(f"no such file or folder: {data}")
    root, below = list_images(data)
    made = os.path.realpath(out) + os.sep
    files = below = [f for f in below if not os.path.realpath(f).startswith(made)]
    if files_from is not None:
        if files_from == "-" and processes.count > 1:
            raise AdvdiffError("--files-from -: the processes of torchrun share one stdin; give a file")
        text = sys.stdin.buffer.read() if files_from == "-" else Path(files_from).read_bytes()
        files = listed_images(root, [os.fsdecode(line.removesuffix(b"\r")) for line in text.split(b"\n")])
    if not files:
        raise AdvdiffError(f"no images in {data}" if files_from is None else f"{files_from} lists no images")
    names = output_names(sorted({f.relative_to(root).as_posix() for f in [*below, *files]}))
    return root, files, names


def _to_folder(
    listed: "tuple[Path, list[Path], dict[str, str]]", out: Path, made_by: dict[str, Any], defence: Defence,
    shard: tuple[int, int] | None, processes: "Processes", chip: "Chip", overwrite: bool, dry_run: bool, strict: bool,
    quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    from advdiff_cli.data.folder_writer import FolderWriter
    from advdiff_cli.jobs.purify_folder import FilesPurifier

    root, files, names = listed
    if processes.count > 1:
        if shard is not None:
            raise AdvdiffError("--shard: under torchrun each process takes the shard of its rank; leave it out")
        shard = (processes.rank, processes.count)
    mine = files if shard is None else files[shard[0] :: shard[1]]
    if dry_run:
        return {"out": str(out), "status": "would purify", "files": processes.sums([len(mine)])[0]}
    if processes.count > 1:
        if processes.first:
            FolderWriter(out, made_by, device=chip.type, overwrite=overwrite).close()
        processes.wait()
        overwrite = False
    counts = {"ok": 0, "kept": 0, "failed": 0}
    settings = {k: made_by["parameters"][k] for k in ("batch_size", "seed", "precision")}
    with (
        FolderWriter(out, made_by, shard, device=chip.type, overwrite=overwrite) as sink,
        console.progress(len(mine), "purify", quiet=quiet) as advance,
    ):
        for outcome in FilesPurifier(defence.purifier, root, names, sink, device=chip, **settings).run(mine):
            counts[outcome.status] += 1
            if outcome.status == "failed" and strict:
                raise AdvdiffError(f"{outcome.reason} (--strict: what was not written yet is left)")
            if outcome.status == "failed":
                console.warn(outcome.reason)
            advance()
    ok, kept, failed, of = processes.sums([*counts.values(), len(mine)])
    if processes.first and processes.count > 1:
        FolderWriter(out, made_by, device=chip.type).close()  # which joins the journals
    return {
        "out": str(out),
        "status": "up to date" if kept == of else "done",
        "files": of,
        "purified": ok,
        "kept": kept,
        "failed": failed,
    }
