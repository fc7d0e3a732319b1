"""`advdiff robustness`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.compute_options import BatchedComputeOptions
from advdiff_cli.cli.defense_options import DefenseOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import PlannedOutputOptions
from advdiff_cli.cli.progress import duration, follow
from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.cli.suite_tables import plan_text, suite_text
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.data.patches import PatchSet
    from advdiff_cli.data.provenance import JsonObject
    from advdiff_cli.evaluation.metrics import Predictions
    from advdiff_cli.purification.defense import EvaluatedModel
    from advdiff_cli.robustness.certified_rung import BrokenCertificates, CertifiedRung
    from advdiff_cli.robustness.cost_estimate import RowCost
    from advdiff_cli.robustness.runner import SuiteRunner
    from advdiff_cli.robustness.suite import Budget, SuiteRow


_LONG = 3600.0  # seconds of a suite that shorter ones are named for


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """Which attacks of the suite, and what they may spend."""

    preset: Annotated[
        Literal["quick", "standard", "strong"],
        typer.Option(
            help="What attacks may spend: 10, 50 or 100 steps, 2, 8 or 16 draws for each gradient, on 64, 256 or 512 "
            "patches, judged on 5, 11 or 21 draws."
        ),
    ] = "standard"
    eps: options.Eps = None
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
    compute: BatchedComputeOptions,
    output: PlannedOutputOptions,
) -> None:
    """Run the suite of attacks on a classifier or a defense, and check the attacks themselves.

    The suite goes from random noise and attacks that do not know the defense to exact gradients through it. All are
    judged on draws of its noise that no attack used. Sanity checks then look for signs of weak attacks: each passes,
    warns or fails. Every row is a patch set in the folder --out, made once and resumed; robustness.json holds the
    result of the whole suite. Rows are a shuffled sample of the preset's size, or of --limit, unless --range names
    them. With -q, print the worst-case accuracy.

    Example: advdiff robustness test.h5 -c pcam-resnet18 -m pcam-ddpm --preset quick -o suite/
    """
    from advdiff_cli.data.output_spec import OutputSpec
    from advdiff_cli.data.recorded_files import check_summary, record_files
    from advdiff_cli.jobs.result_cache import write_json
    from advdiff_cli.robustness.cost_estimate import estimate_costs
    from advdiff_cli.robustness.suite import PRESETS, build_suite

    eps = options.attack_radius("linf", settings.eps)
    output.require_folder("the results of the suite go to")
    budget = PRESETS[settings.preset]
    protection = defense.build(compute)
    transfer = protection is not None and protection.spec.defense == "ddpm"
    suite = build_suite(budget, eps, defended=protection is not None, transfer=transfer)
    chosen = _chosen(suite, settings.only)
    if settings.only is not None and compute.batch_size is not None and compute.batch_size.size is None:
        raise AdvdiffError("--batch-size auto: all rows of a suite must use the same batch size; with --only give one")
    device = compute.resolve_device()
    patches = rows.sample(budget.patches).open(data)
    patches.require_labels()
    resume = {} if output.overwrite else _resume_params(output.out, suite)
    precision = "fp32" if protection is None else compute.attack_precision(device, resume)
    model = compute.load_classifier(classifier, device).behind(protection, device, precision)
    if settings.compiled:
        model = model.compile_unet(device)
    runner = _runner(model, patches, budget, compute, output, resume)
    tested = next(r.attack for r in chosen if r.name == "pgd") if settings.only is None else None
    plan = estimate_costs(runner, chosen, tested)
    title = f"{len(patches)} patches, eps {eps * 255:g}/255, preset {settings.preset}, {budget.draws} judging draws"
    if output.dry_run:
        status = {"out": str(output.out), "status": "would run", "n": len(patches)}
        output.emit({**status, "rungs": [c.as_dict() for c in plan]}, f"{title}\n{plan_text(plan)}", output.out)
        return
    summary, record = output.out / "robustness.json", output.out / "robustness.advdiff"
    check_summary(record, [summary], overwrite=output.overwrite)
    _log_plan(title, plan, quiet=output.quiet)
    output.out.mkdir(parents=True, exist_ok=True)
    result = _run(runner, chosen, {c.name: c for c in plan}, eps, whole=settings.only is None, quiet=output.quiet)
    if settings.only is None:
        record.unlink(missing_ok=True)  # without it, robustness.json tells whose it is
        write_json(summary, result)
        record_files(OutputSpec(record, result["recipe"], device.type), [summary])
    output.emit(result, f"{title}\n{suite_text(result)}", result["worst"]["accuracy"]["value"])


def _resume_params(out: Path, suite: "Sequence[SuiteRow]") -> Mapping[str, object]:
    """Return the parameters of an existing row of the suite, if possible of one through the defense."""
    from advdiff_cli.attacks.spec import AttackSpec
    from advdiff_cli.data.resume import resume_params

    found = [p for r in suite if r.attack and (p := resume_params(out / f"{r.name}.safetensors"))]
    through = (p for p in found if "t_star" in p and AttackSpec.from_parameters(p).computes_defense)
    return next(through, found[0] if found else {})


def _runner(
    model: "EvaluatedModel",
    patches: "PatchSet",
    budget: "Budget",
    compute: BatchedComputeOptions,
    output: PlannedOutputOptions,
    resume: Mapping[str, object],
) -> "SuiteRunner":
    from advdiff_cli.cli.batch_size import resolve_batch_size
    from advdiff_cli.robustness.runner import SuiteRunner

    device = compute.resolve_device()
    shape, n = patches.require_shape(), len(patches)
    size = resolve_batch_size(compute.batch_size, resume, model.module, shape, device, graph=True, n=n)
    return SuiteRunner(model, patches, budget, output.out, compute.seed, size, device, output.overwrite)


def _run(
    runner: "SuiteRunner",
    suite: "Sequence[SuiteRow]",
    plan: "Mapping[str, RowCost]",
    eps: float,
    *,
    whole: bool,
    quiet: bool,
) -> "JsonObject":
    """Run every row and, for a whole suite, the checks; return the content of robustness.json."""
    from advdiff_cli.data.provenance import recipe
    from advdiff_cli.robustness.summary import summarize

    judged, gradients, tested, certified = {}, None, None, None
    for row in suite:
        console.log(f"{row.name}: {_cost_text(plan[row.name])}")
        judged[row.name] = _run_row(runner, row, quiet=quiet)
    if whole:
        attack = next(r.attack for r in suite if r.name == "pgd")
        assert attack is not None
        console.log(f"gradients: {_cost_text(plan['gradients'])}")
        with console.progress(plan["gradients"].n, "gradients", quiet=quiet) as advance:
            gradients = runner.check_gradients(advance)
        console.log(f"unit-test: {_cost_text(plan['unit-test'])}")
        with console.progress(plan["unit-test"].n, "unit-test", quiet=quiet) as advance:
            tested = runner.binarization_test(attack, advance)
        if "certified" in plan:
            console.log(f"certified: {_cost_text(plan['certified'])}")
            certified = _certify(runner, suite, judged, eps, quiet=quiet)
    model = runner.model
    settings = {"eps": eps, **asdict(runner.budget), "seed": runner.seed, "batch_size": runner.batch_size}
    made_by = recipe(
        "robustness",
        {**settings, **model.parameters},
        data=runner.patches.recipe_input(),
        classifier=model.fingerprint,
        ddpm=model.ddpm_fingerprint,
    )
    defense = None if model.defense is None else model.defense.spec.parameters()
    summary = summarize(suite, judged, eps, gradients, tested, certified)
    for row, printed in zip(suite, summary["rungs"], strict=True):
        cost = plan[row.name]
        printed |= {"unet_forward": cost.unet_forward, "unet_backward": cost.unet_backward}
        printed["seconds"] = runner.seconds(row)
    return {"out": str(runner.out), "recipe": made_by, "eps": eps, "defense": defense, **summary}


def _run_row(runner: "SuiteRunner", row: "SuiteRow", *, quiet: bool) -> "Predictions":
    n = len(runner.patches)
    if row.attack:
        follow(runner.attack(row), n, f"{row.name}: attack", quiet=quiet)
    with console.progress(n, f"{row.name}: judge", quiet=quiet) as advance:
        found = runner.judge(row, advance)
    console.log(f"{row.name}: accuracy {100 * found.share.mean():.1f} %, {duration(runner.seconds(row))}")
    return found


def _certify(
    runner: "SuiteRunner",
    suite: "Sequence[SuiteRow]",
    judged: "Mapping[str, Predictions]",
    eps: float,
    *,
    quiet: bool,
) -> "tuple[CertifiedRung, BrokenCertificates]":
    job = runner.certify_job(eps)
    with console.progress(len(runner.patches), "certified", quiet=quiet) as advance:
        rung = runner.certify(job, eps, advance)
    console.log(f"certified: {100 * rung.summary()['value']:.1f} % proved, {duration(rung.summary()['seconds'])}")
    return rung, runner.check_certificates(job, rung, suite, judged)


def _chosen(suite: "list[SuiteRow]", only: list[str] | None) -> "list[SuiteRow]":
    names = [r.name for r in suite]
    for name in only or []:
        if name not in names:
            raise AdvdiffError(f"--only {name}: there is no such row; choose from {', '.join(names)}")
    return [r for r in suite if r.name == "clean" or only is None or r.name in only]


def _cost_text(cost: "RowCost") -> str:
    unet = f"{cost.unet_forward:,} + {cost.unet_backward:,} U-Net evaluations a patch (forward + backward), "
    return f"{unet if cost.unet_forward else ''}about {duration(cost.seconds)}"


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
