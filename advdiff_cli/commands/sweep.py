"""`advdiff sweep`."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from advdiff_cli import console, options
from advdiff_cli.commands.opening import open_selected
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.purification.defense import attack_precision
from advdiff_cli.robustness.sweep_points import Asked, build_points, refuse_ignored

if TYPE_CHECKING:
    from advdiff_cli.evaluation.metrics import Predictions
    from advdiff_cli.robustness.runner import Climb
    from advdiff_cli.robustness.suite import Rung
    from advdiff_cli.robustness.sweep import Point, Rule

_BATCH = 32
_SHUFFLE_SEED = 0


def sweep(
    data: options.Data,
    classifier: options.ClassifierName,
    out: options.Out,
    over: Annotated[Literal["t-star", "eps", "sampler-steps", "ddpm"], typer.Option(help="What is varied.")] = "t-star",
    values: Annotated[
        str | None,
        typer.Option(
            help="Its values, separated by commas; for ddpm, models of different training.",
            show_default="t-star: 0.001 to 0.3; eps: 0.5/255 to 8/255, for l2 0.125 to 2; sampler-steps: 1,2,4,8",
        ),
    ] = None,
    ddpm: options.DdpmName = None,
    rule: Annotated[
        Literal["mean", "robust"],
        typer.Option(help="Chosen: the best mean of both accuracies, or the least value as robust as the best."),
    ] = "mean",
    method: Annotated[Literal["pgd", "fgsm", "apgd", "square", "paper"], typer.Option(help="Attack.")] = "pgd",
    norm: Annotated[Literal["linf", "l2"], typer.Option(help="Norm of the ball.")] = "linf",
    eps: options.Eps = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Attack iterations.", show_default="the attack's")] = None,
    gradient: Annotated[
        Literal["blind", "bpda", "full"], typer.Option(help="Through the defence; blind as in the paper.")
    ] = "blind",
    eot: Annotated[int | None, typer.Option(min=1, help="Draws a gradient averages.", show_default="8")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the defence's noise that judge a patch.")] = 1,
    seed: options.Seed = 0,
    defense: Annotated[
        Literal["noise", "ddpm"], typer.Option(help="What is swept.", rich_help_panel=options.DEFENCE)
    ] = "ddpm",
    t_star: options.TStar = None,
    sampler: options.Sampler = None,
    sampler_steps: options.SamplerSteps = None,
    split: options.Split = None,
    labels: options.Labels = None,
    limit: options.Limit = None,
    rows: options.Range = None,
    shuffle_seed: options.ShuffleSeed = None,
    allow_pickle: options.AllowPickle = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    batch_size: options.FixedBatch = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Print the chosen value alone, as a flag takes it.")
    ] = False,
) -> None:
    """Sweep a defence's setting: standard and robust accuracy at each value, and the one that a rule chooses.

    Choose on valid, report on test. Each point is kept in the folder --out and made once: the attacked patches, its
    predictions, sweep.json, sweep.csv, sweep.png and sweep.svg. Rows are shuffled unless --range names them.

    Example: advdiff sweep valid.h5 -c pcam-resnet18 -m pcam-ddpm --limit 500 -o sweep/
    """
    from advdiff_cli.models import registry
    from advdiff_cli.models.device import resolve_device
    from advdiff_cli.robustness.runner import Climb, Subject
    from advdiff_cli.robustness.suite import Preset
    from advdiff_cli.robustness.sweep import planned_seconds

    if out.exists() and not out.is_dir():
        raise AdvdiffError(f"--out {out} is a file; a sweep goes to a folder")
    chip = resolve_device(device)
    patches = open_selected(
        data, split, labels, limit, rows, _SHUFFLE_SEED if shuffle_seed is None and rows is None else shuffle_seed
    )
    patches.require_labels()
    patches.require_shape()
    fixed = {"ddpm": ddpm, "t-star": t_star, "sampler-steps": sampler_steps, "eps": eps}
    refuse_ignored(over, gradient, fixed, defense, eot)
    attack = {"steps": steps, "gradient": gradient, "eot": eot}
    size = options.budget("linf" if over == "eps" else norm, eps)
    asked = Asked(defense, ddpm, t_star, sampler, sampler_steps, allow_pickle, method, norm, size, attack)
    model, mark = registry.frozen_classifier(classifier, chip, allow_pickle=allow_pickle)
    spend = Preset(len(patches), 0, eot or 8, 0, draws)
    begun = _begun(out)
    batch = batch_size or begun.get("batch_size", _BATCH)
    bare = Climb(Subject(model, mark), patches, spend, out, seed, batch, chip, overwrite)
    exact = begun.get("precision", "auto") if precision == "auto" else precision
    points = build_points(over, values, asked, bare, attack_precision(exact, {}, chip))
    if dry_run:
        seconds = planned_seconds(points, bare, blind=asked.blind)
        what = {"out": str(out), "status": "would sweep", "points": [p.name for p in points], "seconds": seconds}
        text = f"{out}: would sweep {', '.join(p.name for p in points)}; about {seconds / 60:.0f} min if none is there"
        console.emit(what, text, out, as_json=as_json, quiet=quiet)
        return
    out.mkdir(parents=True, exist_ok=True)
    result = _swept(points, bare, asked, over, rule, quiet)
    _write(result, over, out)
    console.emit(result, _text(result), result["chosen_told"] or "", as_json=as_json, quiet=quiet)


def _begun(out: Path) -> dict[str, Any]:
    """Return the batch size and precision of what is in a sweep's folder, so that it goes on where it was begun."""
    from advdiff_cli.data import patch_writer
    from advdiff_cli.jobs.result_cache import recorded_recipe

    found: dict[str, Any] = {}
    for path in sorted(out.glob("adv*.safetensors*")):
        made = patch_writer.begun(path.with_name(path.name.removesuffix(".rows").removesuffix(".part")))
        found |= {"batch_size": made["batch_size"]} if "batch_size" in made else {}
    for path in sorted(out.glob("*-clean.predictions.safetensors")):
        exact = recorded_recipe(path).get("parameters", {}).get("precision")
        found |= {"precision": exact} if exact else {}
    return found


def _swept(
    points: "Sequence[Point]", bare: "Climb", asked: Asked, over: str, rule: "Rule", quiet: bool
) -> dict[str, Any]:  # fmt: skip
    """Make and judge every point, and return what sweep.json holds."""
    from advdiff_cli.data.provenance import recipe
    from advdiff_cli.evaluation.statistics import mean_share
    from advdiff_cli.robustness.sweep import CLEAN, RULES, Judged, choose, row

    plain = replace(bare, label="undefended-")
    undefended, judged, rows = _judge(plain, CLEAN, quiet), [], []
    for point in points:
        _attack(point, quiet)
        one = Judged(_judge(point.climb, CLEAN, quiet), _judge(point.climb, point.attack, quiet))
        attacked = _judge(plain, point.attack, quiet) if asked.blind else None
        judged.append(one)
        rows.append(row(point, one, undefended, attacked))
        shares = [100 * p.share.mean() for p in (one.clean, one.attacked)]
        console.log(f"{point.name}: standard {shares[0]:.1f} %, robust {shares[1]:.1f} %")
    chosen = None if over == "eps" else points[choose(judged, rule)]  # a budget is not for the defence to choose
    typical = chosen or points[-1]
    subject = typical.climb.subject
    settings = {"over": over, "rule": rule, "seed": bare.seed, "batch_size": bare.batch_size, "draws": bare.spend.draws}
    attack = {**typical.attack.settings, "gradient": asked.attack["gradient"]}
    return {
        "out": str(bare.out),
        "over": over,
        "n": len(undefended.labels),
        "draws": judged[0].clean.draws,
        "recipe": recipe(
            "sweep", {**settings, "values": [p.value for p in points], "attack": attack, **subject.settings},
            data=bare.patches.recipe_input(), classifier=bare.subject.fingerprint, ddpm=subject.ddpm,
        ),
        "attack": attack,
        "attack_told": _told(attack, over),
        "defence": subject.settings,
        "undefended": mean_share(undefended.share).as_dict(),
        "rows": rows,
        "rule": f"{rule}: {RULES[rule]}",
        "chosen": chosen and chosen.name,
        "chosen_value": chosen and chosen.value,
        "chosen_told": chosen and chosen.told,
    }  # fmt: skip


def _told(attack: dict[str, Any], over: str) -> str:
    from advdiff_cli.attacks.spec import describe

    told = describe(attack)
    if over != "eps":
        return told
    head, _, rest = told.partition(",")
    return f"{head.rpartition(' ')[0]}{',' if rest else ''}{rest}"


def _attack(point: "Point", quiet: bool) -> None:
    with console.progress(len(point.climb.patches), f"{point.name}: attack", quiet=quiet) as advance:
        for count in point.climb.attack(point.attack):
            advance(count)


def _judge(climb: "Climb", rung: "Rung", quiet: bool) -> "Predictions":
    with console.progress(len(climb.patches), f"{climb.label}{rung.name}: judge", quiet=quiet) as advance:
        return climb.judge(rung, advance)


def _write(result: dict[str, Any], over: str, out: Path) -> None:
    """Write sweep.json, sweep.csv and the pictures."""
    from advdiff_cli.data.atomic_files import replacing
    from advdiff_cli.jobs.result_cache import write_json
    from advdiff_cli.report.plots import sweep_curves
    from advdiff_cli.robustness.sweep import axis

    write_json(out / "sweep.json", result)
    with replacing(out / "sweep.csv") as fresh, fresh.open("w", newline="") as file:
        table = csv.writer(file)
        figures = ("standard", "robust")
        table.writerow(("value", "unet_evaluations", *(f"{f}{end}" for f in figures for end in ("", "_low", "_high"))))
        for r in result["rows"]:
            told = (r[f][k] for f in figures for k in ("value", "low", "high"))
            table.writerow((f"{r['value']:g}", r["unet_evaluations"], *(f"{v:.6g}" for v in told)))
    sweep_curves(result, axis(result), [out / "sweep.png", out / "sweep.svg"])


def _text(result: dict[str, Any]) -> str:
    from advdiff_cli.evaluation.statistics import Estimate

    rows = [
        (
            f"{r['value']:g}{'  <- chosen' if r['name'] == result['chosen'] else ''}", r["unet_evaluations"],
            *(str(Estimate(**r[k])) for k in ("standard", "robust", "less_undefended")),
        )
        for r in result["rows"]
    ]  # fmt: skip
    head = (result["over"], "U-Net evaluations", "standard % [95 %]", "robust % [95 %]", "standard less undefended")
    chosen = f"chosen {result['chosen_told']} ({result['rule']})\n" if result["chosen"] else ""
    undefended = Estimate(**result["undefended"])
    return (
        f"n = {result['n']}, {result['draws']} draws, attack {result['attack_told']}\n"
        f"undefended standard {undefended} %\n"
        f"{console.table(head, rows)}\n{chosen}"
        f"{result['out']}: sweep.json, sweep.csv, sweep.png, sweep.svg"
    )
