"""`advdiff evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.compute_options import ShardedSeededOptions
from advdiff_cli.cli.defense_options import DefenseOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import ResultOptions
from advdiff_cli.cli.row_options import RowOptions
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.data.patch_set import PatchSet
    from advdiff_cli.data.provenance import JsonObject, Provenance
    from advdiff_cli.evaluation.comparison import EvaluatedSet

_COLUMNS = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "auroc")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is evaluated, and what is written beside the table."""

    draws: options.Draws = None
    fidelity: Annotated[
        bool,
        typer.Option("--fidelity", help="Also measure the fidelity of the other sets to the first one."),
    ] = False
    predictions: Annotated[
        Path | None, typer.Option(help="Write the prediction for every patch and draw to this CSV file.")
    ] = None
    certificates: Annotated[
        Path | None,
        typer.Option(help="Table of certify: also tell the certified accuracy of the first set, on the shared rows."),
    ] = None
    overwrite: options.Overwrite = False


@with_option_groups
def evaluate(
    data: Annotated[list[str], typer.Argument(help="Patch sets, one row of the table for each.")],
    classifier: options.ClassifierName,
    settings: EvaluateOptions,
    defense: DefenseOptions,
    rows: RowOptions,
    compute: ShardedSeededOptions,
    output: ResultOptions,
) -> None:
    """Evaluate a classifier, or a defended one (-m, --defense): one row for each set, with 95 % intervals.

    A defense is judged on draws of its noise that no attack used: the mean over draws, majority votes, and all draws
    correct. Name the clean set beside an attacked one, as its control. Paired tests compare sets with the same rows.
    The row options select rows of each set. Patches of one slide resemble each other, so intervals are too narrow.
    Predictions that --predictions wrote before are read, not made again. With -q, print the accuracy of each set.

    Example: advdiff evaluate test.h5 adv.safetensors purified.safetensors -c pcam-resnet18
    """
    _check_predictions_path(settings.predictions, data, sharded=compute.shard is not None)
    defense.check()
    draws = range(options.resolve_draws(settings.draws, defended=defense.kind is not None))
    if settings.fidelity and len(data) < 2:
        raise AdvdiffError("--fidelity compares sets with the first one: name the clean set, then what was made of it")
    sets = rows.open_sets(data)
    for patches in sets:
        patches.require_labels("; advdiff predict needs no labels")
        patches.require_shape()

    from advdiff_cli.data.distributed import process_group, world_size
    from advdiff_cli.data.recorded_files import check_not_input
    from advdiff_cli.data.table_writer import table_resume_params
    from advdiff_cli.evaluation.comparison import compare
    from advdiff_cli.evaluation.provenance_checks import Judge, provenance_warnings
    from advdiff_cli.jobs.evaluate import EvaluateJob, certified_of, check_certified_model

    device = compute.resolve_device()
    undefended = compute.load_classifier(classifier, device)
    table = settings.predictions
    resume = {} if table is None or settings.overwrite else table_resume_params(table)
    protection = defense.build(compute, resume)
    precision = "fp32" if protection is None else compute.resolve_precision(device, resume)
    model = undefended.behind(protection, device, precision)
    for patches in sets:
        model.warn_of_size(patches)
    certificates = settings.certificates
    if certificates is not None:
        if table is not None:
            check_not_input(table, [certificates])
        check_certified_model(certificates, model)
    job = EvaluateJob(model, list(zip(data, sets, strict=True)), draws, compute.seed, device, compute.shard_pair)
    share = -(-job.n // world_size())
    with process_group(device) as group, console.progress(share, "evaluate", quiet=output.quiet) as advance:
        evaluated = job.run(group, advance, table, overwrite=settings.overwrite)
    if not group.is_main:
        return
    sets = [job.part(patches) for patches in sets]
    result: JsonObject = {
        "classifier": {"name": Path(classifier).name, "fingerprint": model.fingerprint},
        "defense": protection and {**protection.spec.parameters(), "ddpm": model.ddpm_fingerprint, **job.judging},
        "sets": [e.as_dict() for e in evaluated],
        "comparisons": compare(evaluated),
        **({"fidelity": _fidelity(sets, evaluated)} if settings.fidelity else {}),
        **({} if certificates is None else {"certified": certified_of(certificates, data[0], sets[0])}),
    }
    spec = None if protection is None else protection.spec
    judge = Judge(model.fingerprint, spec, model.ddpm_fingerprint, precision, compute.seed)
    for line in provenance_warnings(evaluated, judge):
        console.warn(line)
    brief = "\n".join(str(s["accuracy"]["value"]) for s in result["sets"])
    output.emit(result, _text(result), brief)


def _check_predictions_path(path: Path | None, data: list[str], *, sharded: bool) -> None:
    if path is None:
        if sharded:
            raise AdvdiffError("--shard: give --predictions FILE.csv; merge joins the files of all shards")
        return
    from advdiff_cli.data.recorded_files import check_own_name

    check_own_name(path)
    if not path.parent.is_dir():
        raise AdvdiffError(f"--predictions {path}: there is no folder {path.parent}")
    if len(set(data)) < len(data):
        raise AdvdiffError("--predictions: the file tells sets apart by their names; name each set once")


def _fidelity(sets: "Sequence[PatchSet]", evaluated: "Sequence[EvaluatedSet]") -> "list[JsonObject]":
    """Return the fidelity of each other set to the first one."""
    from advdiff_cli.evaluation.fidelity import fidelity

    first, judged = sets[0], evaluated[0].predictions
    return [
        {"data": e.name, "reference": evaluated[0].name, **fidelity(first, judged, patches, e.predictions)}
        for patches, e in zip(sets[1:], evaluated[1:], strict=True)
    ]


def _how_made(history: "list[Provenance]") -> str:
    """Describe in one line how a set was made."""
    from advdiff_cli.attacks.spec import AttackSpec
    from advdiff_cli.evaluation.provenance_checks import is_own_attack
    from advdiff_cli.purification.defense_spec import DefenseSpec

    steps = []
    for recipe in history:
        p, step = recipe["parameters"], recipe["command"]
        shown: tuple[str, ...] = ("defense", "t_star", "sampler", "sampler_steps", "seed", "n")
        if is_own_attack(recipe):
            attack = AttackSpec.from_parameters(p)
            through = attack.computes_defense and DefenseSpec.from_parameters(p) is not None
            step += f" ({attack.describe()}) {'through' if through else 'on the classifier alone'}"
            shown = ("defense", "t_star", "sampler", "sampler_steps") if through else ()
        settings = ", ".join(f"{k} {_short(p[k])}" for k in shown if p.get(k) is not None)
        steps.append(f"{step} ({settings})" if settings else step)
    return ", then ".join(steps)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _fidelity_text(found: "list[JsonObject]") -> str:
    from advdiff_cli.cli.tables import cell

    def plain(value: dict[str, Any] | None, digits: int) -> str:
        if value is None:
            return "-"
        if value["low"] is None:
            return f"{value['value']:.{digits}f} [no interval]"
        return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"

    rows = []
    for f in found:
        values = (plain(f["psnr"], 1), plain(f["ssim"], 3), plain(f["nuclear_mass"], 2))
        rows.append((f["data"], f["n"], *values, *(cell(f["flipped"][k]) for k in ("0", "1"))))
    measures = ("PSNR dB", "SSIM", "nuclear mass, ratio", "decisions changed, label 0 %", "label 1 %")
    return console.table((f"fidelity to {found[0]['reference']} [95 %]", "n", *measures), rows)


def _certified_text(found: "JsonObject") -> str:
    from advdiff_cli.cli.tables import cell, certified_rows

    title = (f"proved of {found['data']}", "size", "l2 radius", "certified accuracy % [95 %]", "n", "vote accuracy %")
    rows = [(*row, found["n"], cell(found["vote_accuracy"])) for row in certified_rows(found["certified"])]
    return console.table(title, rows)


def _text(result: "JsonObject") -> str:
    from advdiff_cli.cli.tables import accuracy_table, cell, comparison_table

    blocks = [accuracy_table("% [95 % interval]", ((s["data"], s) for s in result["sets"]), _COLUMNS)]
    votes = [k for k in result["sets"][0] if k.startswith("vote_") or k == "all_correct"]
    if votes:
        rows = [(s["data"], s["draws"], *(cell(s[k]) for k in votes)) for s in result["sets"]]
        names = [k.replace("vote_", "vote of ").replace("all_correct", "all draws correct") for k in votes]
        blocks.append(console.table(("accuracy, by draws", "draws", *names), rows))
    if "fidelity" in result:
        blocks.append(_fidelity_text(result["fidelity"]))
    if "certified" in result:
        blocks.append(_certified_text(result["certified"]))
    made = [f"{s['data']}: {_how_made(s['history'])}" for s in result["sets"] if s["history"]]
    if made:
        blocks.append("\n".join(map(console.printable, made)))
    if result["comparisons"]:
        blocks.append(comparison_table(result["comparisons"]))
    return "\n\n".join(blocks)
