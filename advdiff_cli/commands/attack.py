"""`advdiff attack`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from advdiff_cli import console
from advdiff_cli.cli import options, up_to_date
from advdiff_cli.cli.attack_options import AttackOptions
from advdiff_cli.cli.compute_options import ShardedComputeOptions
from advdiff_cli.cli.defense_options import DefenseOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import PlannedOutputOptions
from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.attacks.spec import AttackSpec
    from advdiff_cli.data.patch_set import PatchSet
    from advdiff_cli.data.provenance import JsonObject
    from advdiff_cli.jobs.attack import AttackJob


@with_option_groups
def attack(
    data: options.Data,
    classifier: options.ClassifierName,
    settings: AttackOptions,
    defense: DefenseOptions,
    rows: RowOptions,
    compute: ShardedComputeOptions,
    output: PlannedOutputOptions,
) -> None:
    """Attack a classifier, or the defense before it (-m or --defense) with gradients through the defense.

    Prints the outcome of the stored attack: accuracy before and after, accuracy after rounding to 8 bits inside the
    ball, and the share of perturbations on the ball's surface. A stopped attack resumes when the command is run again.

    Example: advdiff attack test.h5 -c pcam-resnet18 --eps 2/255 -o adv.safetensors
    """
    from advdiff_cli.attacks.spec import AttackSpec
    from advdiff_cli.data.patch_writer import check_suffix
    from advdiff_cli.data.resume import resume_params

    out = output.out
    options.attack_radius(settings.norm, settings.eps)
    options.require_positive(step_size=settings.step_size)
    check_suffix(out)
    defense.check()
    _check_settings(settings, defense)
    if compute.precision == "fp16" and defense.kind is not None:
        compute.attack_precision(compute.resolve_device())
    compute.refuse_auto_for_parts()
    patches = rows.open(data)
    patches.require_labels()
    resume = {} if output.overwrite else resume_params(out)
    if resume:
        done = _finished(classifier, settings, defense, compute, patches, resume, output)
        if done is not None:
            up_to_date.keep(out, dry_run=output.dry_run)
            output.emit(done, "" if output.quiet else _text(AttackSpec.from_parameters(done["parameters"]), done), out)
            return
    _attack(classifier, settings, defense, compute, patches, resume, output)


def _attack(
    classifier: str,
    settings: AttackOptions,
    defense: DefenseOptions,
    compute: ShardedComputeOptions,
    patches: "PatchSet",
    resume: "Mapping[str, object]",
    output: PlannedOutputOptions,
) -> None:
    """Make the rows that are missing, and print the outcome."""
    from advdiff_cli.cli.batch_size import resolve_batch_size
    from advdiff_cli.cli.progress import follow_rows
    from advdiff_cli.data.distributed import process_group
    from advdiff_cli.data.output_spec import OutputSpec, shard_rows
    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.data.resume import is_complete
    from advdiff_cli.jobs.attack import AttackJob
    from advdiff_cli.jobs.outcome_cache import cached_outcome, store_outcome
    from advdiff_cli.jobs.sharding import PatchSetOutput, ShardedOutput

    out, device = output.out, compute.resolve_device()
    undefended = compute.load_classifier(classifier, device)
    protection = defense.build(compute, resume)
    spec = settings.resolve(defended=protection is not None)
    precision = "fp32" if protection is None else compute.attack_precision(device, resume)
    model = undefended.behind(protection, device, precision)
    model.warn_of_size(patches)
    if settings.compiled:
        model = model.compile_unet(device)
    shape, n = patches.require_shape(), len(patches)
    size = resolve_batch_size(compute.batch_size, resume, model.module, shape, device, graph=True, n=n)
    job = AttackJob(model, spec, patches, compute.seed, size, device)
    part = shard_rows(n, size, compute.shard_pair)
    parameters = job.recipe["parameters"]
    if output.dry_run:
        is_done = not output.overwrite and is_complete(out, job.recipe, part)
        status = "up to date" if is_done else "would attack"
        plan = {"out": str(out), "status": status, "patches": len(part), "parameters": parameters}
        output.emit(plan, f"{out}: {status}, {len(part)} patches", out)
        return

    made = OutputSpec(out, job.recipe, device.type, output.overwrite)
    work = follow_rows(job.run, "attack", quiet=output.quiet)
    sharded = ShardedOutput(made, len(patches), size, PatchSetOutput(patches, work))
    with process_group(device) as group:
        status = sharded.make(compute.shard_pair, group)
    if status == "up to date":
        up_to_date.keep(out)
    if not group.is_main:
        return
    result = {"out": str(out), "status": status, "parameters": parameters, "precision": precision}
    if output.prints_details:
        fingerprint = open_patches(out).fingerprint()
        outcome = cached_outcome(job.recipe, fingerprint, precision)
        if outcome is None:
            outcome = {"precision": precision, **_outcome(job, part.start, len(part), output)}
            store_outcome(job.recipe, fingerprint, outcome)
        result |= outcome
    output.emit(result, "" if output.quiet else _text(spec, result), out)


def _finished(
    classifier: str,
    settings: AttackOptions,
    defense: DefenseOptions,
    compute: ShardedComputeOptions,
    patches: "PatchSet",
    resume: "Mapping[str, object]",
    output: PlannedOutputOptions,
) -> "JsonObject | None":
    """Return the result if it is up to date and nothing has to be loaded to know that, else None."""
    from advdiff_cli.cli.batch_size import known_batch_size
    from advdiff_cli.data.output_spec import shard_rows
    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.data.resume import is_complete
    from advdiff_cli.jobs.outcome_cache import cached_outcome
    from advdiff_cli.jobs.recipes import attack_recipe

    protection = defense.find(compute, resume)
    model = compute.find_model(classifier, protection, resume)
    size = known_batch_size(compute.batch_size, resume)
    if model is None or size is None:
        return None
    spec = settings.resolve(defended=protection is not None)
    made_by = attack_recipe(model, spec, patches, seed=compute.seed, batch_size=size, compiled=settings.compiled)
    if not is_complete(output.out, made_by, shard_rows(len(patches), size, compute.shard_pair)):
        return None
    found: JsonObject = {"out": str(output.out), "status": "up to date", "parameters": made_by["parameters"]}
    found["precision"] = model.precision
    if not output.prints_details:
        return found
    outcome = cached_outcome(made_by, open_patches(output.out).fingerprint(), compute.precision)
    return None if outcome is None else found | outcome


def _check_settings(settings: AttackOptions, defense: DefenseOptions) -> None:
    """Check the settings of the attack, and that there is a gradient to compile, before a model is loaded."""
    spec = settings.resolve(defended=defense.kind is not None)
    if settings.compiled and not (defense.kind == "ddpm" and spec.takes_exact_gradients):
        raise AdvdiffError("--compile: this attack takes no gradient of a U-Net; leave the option out")


def _outcome(job: "AttackJob", first: int, n: int, output: PlannedOutputOptions) -> "JsonObject":
    """Return the outcome of the stored attack, as JSON."""
    import numpy as np

    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.evaluation.attack_outcome import AttackedRows, attack_outcome
    from advdiff_cli.evaluation.statistics import mean_share
    from advdiff_cli.jobs.recipes import judging_batch_size

    module, rows = job.model.module, AttackedRows(job.patches, open_patches(output.out), first, job.spec, job.seed)
    with console.progress(n, "attack: judge", quiet=output.quiet) as advance:
        shape, defended = job.patches.require_shape(), job.model.defense is not None
        size = judging_batch_size(shape, defended=defended, device=job.device.type)
        found = attack_outcome(module, rows, job.device, batch_size=size, advance=advance)
    kinds = {"clean": found.clean, "attacked": found.attacked, "rounded": found.rounded}
    return {
        "n": n,
        "draws": found.draws,
        "accuracy": {kind: mean_share(np.asarray(shares)).as_dict() for kind, shares in kinds.items()},
        "flipped": found.flipped,
        "on_surface": found.surface_share,
    }


def _text(spec: "AttackSpec", result: "JsonObject") -> str:
    from advdiff_cli.cli.tables import cell

    eps = f"{spec.eps * 255:g}/255" if spec.norm == "linf" else f"{spec.eps:g}"
    title = f"{spec.method} {spec.norm} eps {eps}"
    rows = [(kind, cell(value)) for kind, value in result["accuracy"].items()]
    over = "95 %" if result["draws"] == 1 else f"95 %, mean of {result['draws']} draws"
    table = console.table([f"{title}, n = {result['n']}", f"accuracy % [{over}]"], rows)
    surface = f"{100 * result['on_surface']:.1f} % of perturbations are on the ball's surface"
    members = f"\nensemble of {', '.join(spec.attacks)}" if spec.attacks else ""
    return f"{table}\nflipped {result['flipped']}; {surface}{members}"
