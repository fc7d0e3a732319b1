"""`advdiff robustness`."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from advdiff_cli import console, options
from advdiff_cli.commands.defending import Defence, asked_defence
from advdiff_cli.commands.opening import open_selected
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.evaluation.climbing import Climb, Subject
    from advdiff_cli.evaluation.ladder import Rung
    from advdiff_cli.evaluation.metrics import Predictions

_BATCH = 32
_SHUFFLE_SEED = 0
_LOOKED_AT = 64  # patches whose gradients are looked at, and that the attack's unit test is made of


def robustness(
    data: options.Data,
    classifier: options.ClassifierName,
    out: options.Out,
    ddpm: options.DdpmName = None,
    preset: Annotated[
        Literal["quick", "standard", "strong"], typer.Option(help="How much every attack may spend; see --dry-run.")
    ] = "standard",
    eps: options.Eps = 2 / 255,
    only: Annotated[list[str] | None, typer.Option(help="This rung alone; may be repeated.")] = None,
    seed: options.Seed = 0,
    defense: options.Defense = None,
    t_star: options.TStar = None,
    sampler: options.Sampler = None,
    sampler_steps: options.SamplerSteps = None,
    split: options.Split = None,
    labels: options.Labels = None,
    limit: options.Limit = None,
    rows: options.Range = None,
    shuffle_seed: options.ShuffleSeed = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the worst-case accuracy alone.")] = False,
) -> None:
    """Climb the whole ladder of attacks on a classifier or a defence, and sound the alarms of a weak evaluation.

    From chance over attacks that do not know the defence to exact gradients through it, judged on draws of its noise
    that no attack has seen; then the signs of masked gradients, each pass, warn or fail. Every rung is a patch set in
    the folder --out, made once and resumed; robustness.json holds the result of the whole ladder. Unless --range names
    rows, a shuffled selection is judged, as large as the preset or --limit says.

    Example: advdiff robustness test.h5 -c classifier -m ddpm --preset quick -o ladder/
    """
    from advdiff_cli.evaluation.climbing import Climb
    from advdiff_cli.evaluation.ladder import PRESETS, ladder
    from advdiff_cli.models.device import resolve_device, resolve_precision

    options.need_positive(eps=eps)
    if out.exists() and not out.is_dir():
        raise AdvdiffError(f"--out {out} is a file; the rungs go to a folder")
    chip = resolve_device(device)
    spend = PRESETS[preset]
    if limit is None and rows is None:
        limit = spend.patches
    if shuffle_seed is None and rows is None:
        shuffle_seed = _SHUFFLE_SEED
    patches = open_selected(data, split, labels, limit, rows, shuffle_seed)
    patches.require_labels()
    patches.require_shape()
    subject = _subject(classifier, asked_defence(defense, ddpm, t_star, sampler, sampler_steps), chip)
    rungs = _chosen(
        ladder(spend, eps, defended=subject.purifier is not None, substitute=bool(subject.sampler_steps)), only
    )
    exact = resolve_precision(precision, chip)
    climb = Climb(subject, patches, spend, out, seed, exact, batch_size or _BATCH, chip, overwrite)
    plan = climb.costs(rungs)
    heading = f"{len(patches)} patches, eps {eps * 255:g}/255, preset {preset}, {spend.draws} judging draws"
    if dry_run:
        what = {"out": str(out), "status": "would climb", "n": len(patches), "rungs": plan}
        console.emit(what, f"{heading}\n{_plan_text(plan)}", out, as_json=as_json, quiet=quiet)
        return
    out.mkdir(parents=True, exist_ok=True)
    judged = {}
    for rung, cost in zip(rungs, plan, strict=True):
        console.log(f"{rung.name}: {_cost_text(cost)}")
        judged[rung.name] = _climb_one(climb, rung, quiet)
    result: dict[str, Any] = {"out": str(out), **_summary(climb, rungs, plan, judged, eps, preset)}
    if only is None:
        _write_json(out / "robustness.json", result)
    brief = result["worst"]["accuracy"]["value"]
    console.emit(result, f"{heading}\n{_text(result)}", brief, as_json=as_json, quiet=quiet)


def _subject(classifier: str, defence: Defence | None, chip: Any) -> "Subject":
    from advdiff_cli.evaluation.climbing import Subject
    from advdiff_cli.models import zoo

    folder = zoo.find_classifier(classifier)
    model, fingerprint = zoo.frozen_classifier(folder, chip), zoo.fingerprint(folder)
    if defence is None:
        return Subject(model, fingerprint)
    return Subject(model, fingerprint, defence.before(model, chip).purifier, defence.parameters, defence.model)


def _climb_one(climb: "Climb", rung: "Rung", quiet: bool) -> "Predictions":
    n, started = len(climb.patches), time.monotonic()
    if rung.settings:
        with console.progress(n, f"{rung.name}: attack", quiet=quiet) as advance:
            for count in climb.attack(rung):
                advance(count)
    with console.progress(n, f"{rung.name}: judge", quiet=quiet) as advance:
        found = climb.judge(rung, advance)
    console.log(f"{rung.name}: accuracy {100 * found.share.mean():.1f} %, {time.monotonic() - started:.0f} s")
    return found


def _summary(
    climb: "Climb", rungs: "list[Rung]", plan: list[dict[str, Any]], judged: "dict[str, Predictions]", eps: float,
    preset: str,
) -> dict[str, Any]:  # fmt: skip
    from advdiff_cli.evaluation.alarms import NOT_TESTED, alarms
    from advdiff_cli.evaluation.climbing import row, worst
    from advdiff_cli.evaluation.looking import look_at_gradients, unit_test

    few = climb.patches.first(_LOOKED_AT)
    gradients = look_at_gradients(climb.subject.model, few, climb.device, eot=climb.spend.eot, seed=climb.seed)
    settings = next((r.settings for r in rungs if r.name == "pgd"), None)
    tested = None
    if settings is not None:
        tested = unit_test(climb.subject.model, climb.subject.classifier, few, climb.device, settings, climb.seed)
    missing = [] if tested or settings is None else [NOT_TESTED.as_dict()]
    names, hardest = worst(rungs, judged, eps)
    costs = {c["name"]: {k: c[k] for k in ("unet_forward", "unet_backward")} for c in plan}
    clean = judged["clean"]
    return {
        "n": len(climb.patches),
        "positive": int(clean.labels.sum()),
        "eps": eps,
        "preset": preset,
        "draws": clean.draws,
        "defence": None if climb.subject.defence is None else dict(climb.subject.defence),
        "rungs": [row(r, judged[r.name], clean) | costs[r.name] for r in rungs],
        "worst": {"of": names, **row(replace(rungs[0], name="worst"), hardest, clean)},
        "gradients": gradients.as_dict(),
        "unit_test": None if tested is None else tested.as_dict(),
        "alarms": [a.as_dict() for a in alarms(rungs, judged, gradients, tested)] + missing,
    }


def _chosen(rungs: "list[Rung]", only: list[str] | None) -> "list[Rung]":
    names = [r.name for r in rungs]
    for name in only or []:
        if name not in names:
            raise AdvdiffError(f"--only {name}: there is no such rung; there are {', '.join(names)}")
    return [r for r in rungs if r.name == "clean" or only is None or r.name in only]


def _cost_text(cost: dict[str, Any]) -> str:
    unet = f"{cost['unet_forward']:,} + {cost['unet_backward']:,} U-Net evaluations a patch (forward + backward), "
    return f"{unet if cost['unet_forward'] else ''}about {_duration(cost['seconds'])}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _plan_text(plan: list[dict[str, Any]]) -> str:
    rows = [(c["name"], f"{c['unet_forward']:,}", f"{c['unet_backward']:,}", _duration(c["seconds"])) for c in plan]
    rows.append(("all", "", "", _duration(sum(c["seconds"] for c in plan))))
    return console.table(("rung", "U-Net forward a patch", "backward", "about, if none is there yet"), rows)


def _text(result: dict[str, Any]) -> str:
    from advdiff_cli.evaluation.intervals import Estimate

    def cell(value: dict[str, Any] | None) -> str:
        return "-" if value is None else str(Estimate(**value))

    odd = [k for k in result["rungs"][0] if k.startswith("vote_")][-1:] if result["draws"] > 1 else []
    many = [*odd, "all_correct"] if odd else []
    rows = [
        (r["name"], _made(r["attack"]), cell(r["accuracy"]), *(cell(r.get(k)) for k in many), cell(r["difference"]))
        for r in [*result["rungs"], result["worst"]]
    ]
    names = [k.replace("vote_", "vote of ").replace("all_correct", "all draws right") for k in many]
    head = ("% [95 %]", "attack", "accuracy" + (", mean of draws" if many else ""), *names, "less clean, points")
    text = console.table(head, rows)
    signs = [(a["status"], f"{a['name']}: {a['reason']}") for a in result["alarms"]]
    return text + "\n\n" + "\n".join(f"{status:4}  {line}" for status, line in signs)


def _made(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    shown = ("steps", "queries", "gradient", "eot", "loss")
    text = ", ".join(f"{k} {settings[k]}" for k in shown if settings.get(k) is not None)
    return f"{settings['method']} {settings['eps'] * 255:g}/255{', ' if text else ''}{text}"


def _write_json(path: Path, result: dict[str, Any]) -> None:
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    os.replace(fresh, path)
