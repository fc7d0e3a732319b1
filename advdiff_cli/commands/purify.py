"""`advdiff purify`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from advdiff_cli import console, options
from advdiff_cli.commands.defending import Defence, build_defence
from advdiff_cli.commands.opening import open_selected
from advdiff_cli.errors import AdvdiffError, SomeInputsFailed

if TYPE_CHECKING:
    from torch import device as Chip

    from advdiff_cli.data.patches import PatchSet

_BATCH = 16


def purify(
    data: options.Data,
    out: options.Out,
    ddpm: options.DdpmName = None,
    defense: options.Defense = "ddpm",
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
    fails).

    Example: advdiff purify patches/ -o purified/
    """
    from advdiff_cli.data import folder_writer, writer
    from advdiff_cli.data.provenance import recipe
    from advdiff_cli.models.device import resolve_device, resolve_precision

    chip = resolve_device(device)
    to_file = out.suffix in (".safetensors", ".h5", ".hdf5")
    earlier = writer.begun(out) if to_file else folder_writer.begun(out)
    machine: dict[str, Any] = {
        "batch_size": batch_size or earlier.get("batch_size", _BATCH),
        "precision": earlier.get("precision", "auto") if precision == "auto" else precision,
    }
    machine["precision"] = resolve_precision(machine["precision"], chip)
    if to_file:
        patches = open_selected(data, split, labels, limit, rows, shuffle_seed)
        patches.require_shape()
    elif (split, limit, rows, shuffle_seed, shard) != (None,) * 5 or not _holds_images(data):
        raise AdvdiffError(
            f"--out {out}: rows of a patch set go to a .safetensors or .h5 file, whole folders of images to a folder"
        )
    defence = build_defence(defense or "ddpm", ddpm, t_star, sampler, sampler_steps, allow_pickle=allow_pickle)
    defence.purifier.to(chip)
    parameters = defence.parameters | {"seed": seed} | machine
    if to_file:
        made_by = recipe("purify", parameters, data=patches.recipe_input(), ddpm=defence.model)
        result = _to_file(patches, out, made_by, defence, cast("Any", shard), chip, overwrite, dry_run, quiet)
    else:
        made_by = recipe("purify", parameters, ddpm=defence.model)
        result = _to_folder(data, out, made_by, defence, chip, overwrite, dry_run, quiet)
    counts = ", ".join(f"{v} {k}" for k, v in result.items() if isinstance(v, int))
    console.emit(result, f"{out}: {result['status']}, {counts}", out, as_json=as_json, quiet=quiet)
    if result.get("failed"):
        raise SomeInputsFailed(f"{result['failed']} of {result['files']} files failed; {out}/advdiff.jsonl names each")


def _holds_images(data: str) -> bool:
    return Path(data).suffix.lower() not in (".safetensors", ".h5", ".hdf5")


def _to_file(
    patches: "PatchSet", out: Path, made_by: dict[str, Any], defence: Defence, shard: tuple[int, int] | None,
    chip: "Chip", overwrite: bool, dry_run: bool, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    from advdiff_cli.data import writer
    from advdiff_cli.purification.bulk import purify_batch

    machine = made_by["parameters"]
    part = writer.shard_rows(len(patches), machine["batch_size"], shard)
    count = part.stop - part.start
    if dry_run:
        return {"out": str(out), "status": "would purify", "patches": count}
    sink = writer.PatchWriter(
        out, made_by, patches, part, shape=patches.require_shape(), device=chip.type, overwrite=overwrite
    )
    if sink.up_to_date:
        console.log(f"{out} is up to date")
        return {"out": str(out), "status": "up to date", "patches": count}
    with sink, console.progress(count, "purify", done=int(sink.finished.sum()), quiet=quiet) as advance:
        for batch in sink.batches(machine["batch_size"]):
            keys = [patches.keys[i] for i in batch.rows]
            clean = purify_batch(
                defence.purifier, patches.read(batch.rows), keys, machine["seed"], machine["precision"], chip
            )
            sink.write(batch, clean.numpy())
            advance(batch.count)
    return {"out": str(out), "status": "done", "patches": count}


def _to_folder(
    data: str,
    out: Path,
    made_by: dict[str, Any],
    defence: Defence,
    chip: "Chip",
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
) -> dict[str, Any]:
    from advdiff_cli.data.folder_writer import FolderWriter
    from advdiff_cli.data.image_folder import list_images
    from advdiff_cli.purification.bulk import purify_files

    if not Path(data).exists() and not any(c in data for c in "*?["):
        raise AdvdiffError(f"no such file or folder: {data}")
    root, files = list_images(data)
    files = [f for f in files if not f.resolve().is_relative_to(out.resolve())]
    if not files:
        raise AdvdiffError(f"no images in {data}")
    if dry_run:
        return {"out": str(out), "status": "would purify", "files": len(files)}
    sink = FolderWriter(out, made_by, device=chip.type, overwrite=overwrite)
    counts = {"ok": 0, "kept": 0, "failed": 0}
    p = made_by["parameters"]
    settings = {"batch_size": p["batch_size"], "seed": p["seed"], "precision": p["precision"]}
    with console.progress(len(files), "purify", quiet=quiet) as advance:
        for outcome in purify_files(defence.purifier, root, files, sink, device=chip, **settings):
            counts[outcome.status] += 1
            if outcome.status == "failed":
                console.warn(outcome.reason)
            advance()
    status = "up to date" if counts["kept"] == len(files) else "done"
    return {
        "out": str(out),
        "status": status,
        "files": len(files),
        "purified": counts["ok"],
        "kept": counts["kept"],
        "failed": counts["failed"],
    }
