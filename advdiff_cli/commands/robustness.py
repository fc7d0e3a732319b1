"""`advdiff robustness`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.compute_options import ShardedComputeOptions
from advdiff_cli.cli.defense_options import DefenseOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import PlannedOutputOptions
from advdiff_cli.cli.parsers import fraction
from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.cli.suite_progress import SuiteProgress
from advdiff_cli.cli.suite_tables import plan_text, suite_text
from advdiff_cli.data.distributed import NO_SHARD_UNDER_TORCHRUN
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.data.distributed import ProcessGroup
    from advdiff_cli.data.patch_set import PatchSet
    from advdiff_cli.jobs.sharding import Shard
    from advdiff_cli.purification.defense import EvaluatedModel
    from advdiff_cli.robustness.cost_estimate import RowCost
    from advdiff_cli.robustness.runner import SuiteRunner
    from advdiff_cli.robustness.suite import Budget, SuiteRow


_RECORD = "robustness.advdiff"
_LONG = 3600.0  # seconds of a suite that shorter ones are named for


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """Which attacks of the suite, and what they may spend."""

    preset: Annotated[
        Literal["quick", "standard", "strong"],
        typer.Option(
            help="What attacks may spend: 10, 40 or 100 steps of PGD, 2, 2 or 8 draws for each gradient, on 64, 256 or "
            "512 patches, judged on 5, 11 or 21 draws."
        ),
    ] = "standard"
    eps: Annotated[
        float | None,
        typer.Option(
            parser=fraction, metavar="EPS", help="Radius of the l-inf ball in [0, 1] pixels.", show_default="2/255"
        ),
    ] = None
    only: Annotated[list[str] | None, typer.Option(help="This row only, named as by --dry-run; may be repeated.")] = (
        None
    )
    compiled: options.Compile = False


@with_option_groups
def robustness(
    data: options.Data,
    classifier: options.ClassifierName,
    settings: SuiteOptions,
    defense: DefenseOptions,
    rows: RowOptions,
    compute: ShardedComputeOptions,
    output: PlannedOutputOptions,
) -> None:
    """Run the suite of attacks on a classifier or a defense, and check the attacks themselves.

    The suite holds controls, l-inf attacks with exact gradients through the defense, and attacks that know less of
    it. All are judged on draws of its noise that no gradient used, except the one that knows its draw. Sanity checks
    then look for signs of weak attacks: each passes, warns or fails. Every row is a patch set in the folder --out,
    made once and resumed; robustness.json holds the result of the whole suite, and predictions.csv what `compare`
    reads: clean patches, and the worst attack on each. Rows are a shuffled sample of the preset's size, or of
    --limit, unless --range names them. With --shard, attack and certify part of the patches; the command without it
    takes the parts over, once all are there. With -q, print the worst-case accuracy.

    Example: advdiff robustness test.h5 -c pcam-resnet18 -m pcam-ddpm --preset quick -o suite/
    """
    from advdiff_cli.data.distributed import process_group
    from advdiff_cli.robustness.suite import PRESETS, build_suite

    eps = options.attack_radius("linf", settings.eps)
    output.require_folder("the results of the suite go to")
    budget = PRESETS[settings.preset]
    resume = {} if output.overwrite else _resume_params(output.out)
    defense.check()
    suite = build_suite(budget, eps, defended=defense.kind is not None, transfer=defense.kind == "ddpm")
    chosen = _chosen(suite, settings.only)
    if settings.only is not None and compute.batch_size is not None and compute.batch_size.size is None:
        raise AdvdiffError("--batch-size auto: all rows of a suite must use the same batch size; with --only give one")
    compute.refuse_auto_for_parts()
    protection = defense.build(compute, resume)
    device = compute.resolve_device()
    patches = rows.sample(budget.patches).open(data)
    patches.require_labels()
    precision = "fp32" if protection is None else compute.attack_precision(device, resume)
    model = compute.load_classifier(classifier, device).behind(protection, device, precision)
    model.warn_of_size(patches)
    if settings.compiled:
        model = model.compile_unet(device)
    title = f"{len(patches)} patches, eps {eps * 255:g}/255, preset {settings.preset}, {budget.draws} judging draws"
    with process_group(device) as group:
        runner = _runner(model, patches, budget, compute, output, resume, group, suite)
        _plan_and_run(runner, chosen, eps, title, whole=settings.only is None, output=output)


def _plan_and_run(
    runner: "SuiteRunner",
    chosen: "list[SuiteRow]",
    eps: float,
    title: str,
    *,
    whole: bool,
    output: PlannedOutputOptions,
) -> None:
    """Plan what is asked for, run it, and print the result; `whole` for all rows and the checks."""
    from advdiff_cli.data.output_spec import OutputSpec
    from advdiff_cli.data.recorded_files import check_summary, record_files
    from advdiff_cli.jobs.result_cache import write_json
    from advdiff_cli.robustness.cost_estimate import estimate_costs

    tested = next(r.attack for r in chosen if r.name == "pgd") if whole else None
    plan = estimate_costs(runner, chosen, tested)
    if output.dry_run:
        status = {"out": str(output.out), "status": "would run", "n": len(runner.patches)}
        output.emit({**status, "rungs": [c.as_dict() for c in plan]}, f"{title}\n{plan_text(plan)}", output.out)
        return
    record, summary, predictions = (output.out / name for name in (_RECORD, "robustness.json", "predictions.csv"))
    check_summary(record, [summary, predictions], overwrite=output.overwrite)
    _log_plan(title, plan, quiet=output.quiet)
    output.out.mkdir(parents=True, exist_ok=True)
    suite = SuiteProgress(runner, chosen, {c.name: c for c in plan}, eps, output.quiet)
    if runner.shard is not None:
        suite.run_shard()
        _emit_shard(runner.shard, output)
        return
    result = suite.run()
    if not runner.group.is_main:
        return
    if whole:
        record.unlink(missing_ok=True)  # without it, robustness.json tells whose it is
        write_json(summary, result)
        suite.write_predictions(predictions)
        record_files(OutputSpec(record, result["recipe"], runner.device.type), [summary, predictions])
    output.emit(result, f"{title}\n{suite_text(result)}", result["worst"]["accuracy"]["value"])


def _emit_shard(shard: "Shard", output: PlannedOutputOptions) -> None:
    i, count = shard
    told = f"{output.out}: part {i} of {count} is attacked; run the command without --shard when all parts are there"
    output.emit({"out": str(output.out), "status": "done", "shard": [i, count]}, told, output.out)


def _resume_params(out: Path) -> Mapping[str, object]:
    """Return the parameters of a row of an existing suite, finished or not, if possible of one through the defense."""
    from advdiff_cli.attacks.spec import AttackSpec
    from advdiff_cli.data.resume import resume_params

    files = {f.with_name(f.name.removesuffix(".rows").removesuffix(".part")) for f in out.glob("*.safetensors*")}
    found = [p for file in sorted(files) if (p := resume_params(file)) and "eps" in p]
    through = (p for p in found if "t_star" in p and AttackSpec.from_parameters(p).computes_defense)
    return next(through, found[0] if found else {})


def _runner(
    model: "EvaluatedModel",
    patches: "PatchSet",
    budget: "Budget",
    compute: ShardedComputeOptions,
    output: PlannedOutputOptions,
    resume: Mapping[str, object],
    group: "ProcessGroup",
    suite: "Sequence[SuiteRow]",
) -> "SuiteRunner":
    from advdiff_cli.cli.batch_size import resolve_batch_size
    from advdiff_cli.robustness.runner import SuiteRunner

    device, part = compute.resolve_device(), compute.shard_pair
    if group.size > 1 and part is not None:
        raise AdvdiffError(NO_SHARD_UNDER_TORCHRUN)
    shape, n = patches.require_shape(), len(patches)
    size = resolve_batch_size(compute.batch_size, resume, model.module, shape, device, graph=True, n=n)
    return SuiteRunner(
        model,
        patches,
        budget,
        output.out,
        compute.seed,
        size,
        device,
        output.overwrite,
        group=group,
        shard=part,
        suite=suite,
    )


def _chosen(suite: "list[SuiteRow]", only: list[str] | None) -> "list[SuiteRow]":
    names = [r.name for r in suite]
    for name in only or []:
        if name not in names:
            raise AdvdiffError(f"--only {name}: there is no such row; choose from {', '.join(names)}")
    if only is None:
        return suite
    wanted = {"clean", *only}
    for row in reversed(suite):  # a row comes after the one that it goes on from
        wanted |= {row.after} if row.name in wanted and row.after is not None else set()
    return [r for r in suite if r.name in wanted]


def _log_plan(title: str, plan: "Sequence[RowCost]", *, quiet: bool) -> None:
    """Say what will be done and how long it takes, before it starts."""
    if quiet:
        return
    for line in (title, *plan_text(plan).split("\n")):
        console.log(line)
    console.log(
        "the times are for nothing done yet, from passes measured just now, on a machine as busy as it was then"
    )
    if sum(c.seconds for c in plan) > _LONG:
        console.log("--preset quick and --limit are shorter; a stopped suite goes on when the command is run again")
