"""`advdiff sweep`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.compute_options import SeededComputeOptions
from advdiff_cli.cli.defense_options import PurifierOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import PlannedOutputOptions
from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.cli.sweep_options import SweepOptions

if TYPE_CHECKING:
    from advdiff_cli.data.provenance import JsonObject
    from advdiff_cli.evaluation.metrics import Predictions
    from advdiff_cli.robustness.certified_accuracy import CertifiedAccuracy
    from advdiff_cli.robustness.runner import SuiteRunner
    from advdiff_cli.robustness.suite import SuiteRow
    from advdiff_cli.robustness.sweep import Criterion, SweepPoint
    from advdiff_cli.robustness.sweep_points import SweepRequest


_FILES = ("sweep.json", "sweep.csv", "sweep.png", "sweep.svg")
_RECORD = "sweep.advdiff"
_CERTIFY_DRAWS = 2000


@with_option_groups
def sweep(
    data: options.Data,
    classifier: options.ClassifierName,
    settings: SweepOptions,
    purifier: PurifierOptions,
    rows: RowOptions,
    compute: SeededComputeOptions,
    output: PlannedOutputOptions,
) -> None:
    """Sweep a setting of a defense: standard and robust accuracy at each value, and the value that a rule chooses.

    Choose on valid, and report on test. The folder --out keeps the attacked patches and the predictions of each point,
    which are made once, and sweep.json, sweep.csv, sweep.png and sweep.svg. Rows are shuffled unless --range names
    them. With -q, print the chosen value as its flag takes it.

    Example: advdiff sweep valid.h5 -c pcam-resnet18 -m pcam-ddpm --limit 500 -o sweep/
    """
    from advdiff_cli.data.recorded_files import check_summary
    from advdiff_cli.jobs.recipes import default_batch_size
    from advdiff_cli.robustness.certified_accuracy import CHOOSING_DRAWS
    from advdiff_cli.robustness.runner import SuiteRunner
    from advdiff_cli.robustness.suite import Budget
    from advdiff_cli.robustness.sweep import unet_evaluations
    from advdiff_cli.robustness.sweep_points import build_points

    out = output.out
    output.require_folder("a sweep goes to")
    resume = {} if output.overwrite else _resume_params(out)
    of_defense = resume if "t_star" in resume else {}
    request = settings.request(purifier, compute, of_defense)
    device = compute.resolve_device()
    patches = rows.sample().open(data)
    patches.require_labels()
    patches.require_shape()
    draws = settings.draws or resume.get("draws", options.DRAWS)
    budget = Budget(len(patches), 0, settings.eot or 8, 0, draws, _CERTIFY_DRAWS)
    undefended = SuiteRunner(
        compute.load_classifier(classifier, device),
        patches,
        budget,
        out,
        compute.seed,
        settings.batch_size
        or resume.get("batch_size", default_batch_size(device.type, patches.require_shape(), graph=True)),
        device,
        output.overwrite,
    )
    if compute.precision == "fp16":
        compute.attack_precision(device)
    undefended.model.warn_of_size(patches)
    points = build_points(request, undefended, compute.resolve_precision(device, of_defense))
    if output.dry_run:
        forward, backward = unet_evaluations(points, undefended)
        if settings.rule == "certified":  # at most
            forward += sum(p.runner.model.sampler_steps for p in points) * (CHOOSING_DRAWS + _CERTIFY_DRAWS)
        names = [p.name for p in points]
        text = f"{out}: would sweep {', '.join(names)} on {len(patches)} patches; "
        text += f"{forward:,} + {backward:,} U-Net evaluations a patch (forward + backward)"
        plan = {"out": str(out), "status": "would sweep", "points": names, "patches": len(patches)}
        output.emit({**plan, "unet_forward": forward, "unet_backward": backward}, text, out)
        return
    check_summary(out / _RECORD, [out / name for name in _FILES], overwrite=output.overwrite)
    out.mkdir(parents=True, exist_ok=True)
    result = _run(points, undefended, request, settings.criterion, quiet=output.quiet)
    _write(result, out)
    output.emit(result, _text(result), result["chosen_told"] or "")


def _resume_params(out: Path) -> dict[str, Any]:
    """Return the parameters of the results in a sweep's folder that the sweep goes on with.

    Without `t_star`, none of them is of a defense.
    """
    from advdiff_cli.data.resume import resume_params
    from advdiff_cli.jobs.result_cache import recorded_recipe

    attacks = [p for p in sorted(out.glob("adv*.safetensors*")) if not p.name.endswith(".rows")]
    made = [resume_params(path.with_name(path.name.removesuffix(".part"))) for path in attacks]
    judged = sorted(out.glob("*-clean.predictions.safetensors"))
    made += [recorded_recipe(path).get("parameters", {}) for path in judged]
    wanted = ("batch_size", "precision", "draws", "noise", "t_star")
    return {key: value for one in made for key in wanted if (value := one.get(key)) is not None}


def _run(
    points: "Sequence[SweepPoint]",
    undefended: "SuiteRunner",
    request: "SweepRequest",
    criterion: "Criterion",
    *,
    quiet: bool,
) -> "JsonObject":
    """Make and judge every point, and return the content of sweep.json."""
    from advdiff_cli.evaluation.statistics import mean_share
    from advdiff_cli.robustness.suite import CLEAN
    from advdiff_cli.robustness.sweep import JudgedPoint, summarize_point
    from advdiff_cli.robustness.sweep_result import sweep_settings

    plain = replace(undefended, label="undefended-")
    clean, judged, rows = _judge(plain, CLEAN, quiet=quiet), [], []
    for point in points:
        label = f"{point.name}: attack"
        with console.progress(len(point.runner.patches), label, quiet=quiet) as advance:
            point.runner.attack(point.attack, advance)
        proved = _certify(point, request.eps, quiet=quiet) if criterion.rule == "certified" else None
        on_clean, on_attacked = (_judge(point.runner, row, quiet=quiet) for row in (CLEAN, point.attack))
        one = JudgedPoint(on_clean, on_attacked, proved)
        attacked = _judge(plain, point.attack, quiet=quiet) if request.blind else None
        judged.append(one)
        rows.append(summarize_point(point, one, clean, attacked))
        standard, robust = (100 * p.share.mean() for p in (one.clean, one.attacked))
        told = "" if proved is None else f", certified {100 * proved.summary()['value']:.1f} %"
        console.log(f"{point.name}: standard {standard:.1f} %, robust {robust:.1f} %{told}")
    best = None if request.over == "eps" else criterion.choose(judged, clean)  # the defender does not choose eps
    chosen = None if best is None else points[best]
    return sweep_settings(points, undefended, request, criterion, chosen) | {
        "n": len(clean.labels),
        "draws": judged[0].clean.draws,
        "undefended": mean_share(clean.share).as_dict(),
        "rows": rows,
    }


def _certify(point: "SweepPoint", eps: float, *, quiet: bool) -> "CertifiedAccuracy":
    job = point.runner.certify_job(eps)
    with console.progress(len(point.runner.patches), f"{point.name}: certify", quiet=quiet) as advance:
        return point.runner.certify(job, advance)


def _judge(runner: "SuiteRunner", row: "SuiteRow", *, quiet: bool) -> "Predictions":
    with console.progress(len(runner.patches), f"{runner.label}{row.name}: judge", quiet=quiet) as advance:
        return runner.judge(row, advance)


def _write(result: "JsonObject", out: Path) -> None:
    """Write sweep.json, sweep.csv and the plots, and record them."""
    from advdiff_cli.data.output_spec import OutputSpec
    from advdiff_cli.data.recorded_files import record_files
    from advdiff_cli.jobs.result_cache import write_json
    from advdiff_cli.report.plots import sweep_curves
    from advdiff_cli.robustness.sweep import axis_label
    from advdiff_cli.robustness.sweep_result import write_table

    (out / _RECORD).unlink(missing_ok=True)  # without it, sweep.json tells whose the files are
    write_json(out / "sweep.json", result)
    write_table(result, out / "sweep.csv")
    sweep_curves(result, axis_label(result), [out / "sweep.png", out / "sweep.svg"])
    record_files(OutputSpec(out / _RECORD, result["recipe"]), [out / name for name in _FILES])


def _text(result: "JsonObject") -> str:
    from advdiff_cli.cli.tables import cell

    rows, certified = [], ("certified",) if "certified" in result["rows"][0] else ()
    for r in result["rows"]:
        mark = "  <- chosen" if r["name"] == result["chosen"] else ""
        figures = (cell(r[k]) for k in ("standard", "robust", "less_undefended", *certified))
        rows.append((f"{r['value']:g}{mark}", r["unet_evaluations"], *figures))
    columns = ("U-Net evaluations", "standard % [95 %]", "robust % [95 %]", "standard minus undefended")
    extra = ["certified % [95 %]"] if certified else []
    told = result["chosen_told"] or "none"
    chosen = "" if result["over"] == "eps" else f"chosen {told} ({result['rule']})\n"
    return (
        f"n = {result['n']}, {result['draws']} draws, attack {result['attack_told']}\n"
        f"undefended standard {cell(result['undefended'])} %\n"
        f"{console.table((result['over'], *columns, *extra), rows)}\n{chosen}"
        f"{result['out']}: sweep.json, sweep.csv, sweep.png, sweep.svg"
    )
