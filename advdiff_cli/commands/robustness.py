"""`advdiff robustness`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from advdiff_cli import console, options
from advdiff_cli.cli.batch_size import batch_size as sized
from advdiff_cli.commands.opening import open_selected
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.purification.defense import Defence, asked_defence, attack_precision

if TYPE_CHECKING:
    from advdiff_cli.evaluation.metrics import Predictions
    from advdiff_cli.robustness.runner import Climb, Subject
    from advdiff_cli.robustness.suite import Rung

_BATCH = 32
_SHUFFLE_SEED = 0


def robustness(
    data: options.Data,
    classifier: options.ClassifierName,
    out: options.Out,
    ddpm: options.DdpmName = None,
    preset: Annotated[
        Literal["quick", "standard", "strong"],
        typer.Option(
            help="What attacks may spend: 10, 50 or 100 steps, each gradient of 2, 8 or 16 draws, on 64, 256 or 512 "
            "patches, judged over 5, 11 or 21 draws."
        ),
    ] = "standard",
    eps: options.Eps = None,
    only: Annotated[
        list[str] | None, typer.Option(help="This rung alone, named as by --dry-run; may be repeated.")
    ] = None,
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
    allow_pickle: options.AllowPickle = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = None,
    compiled: options.Compile = False,
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

    Example: advdiff robustness test.h5 -c pcam-resnet18 -m pcam-ddpm --preset quick -o ladder/
    """
    from advdiff_cli.jobs.result_cache import write_json
    from advdiff_cli.models import registry
    from advdiff_cli.models.device import resolve_device
    from advdiff_cli.robustness.runner import Climb
    from advdiff_cli.robustness.suite import PRESETS, ladder

    size = options.budget("linf", eps)
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
    defence = asked_defence(defense, ddpm, t_star, sampler, sampler_steps, allow_pickle=allow_pickle)
    substitute = defence is not None and defence.parameters["defense"] == "ddpm"
    whole = ladder(spend, size, defended=defence is not None, substitute=substitute)
    rungs, begun = _chosen(whole, only), {} if overwrite else _begun(out, whole)
    exact = "fp32" if defence is None else attack_precision(precision, begun, chip)
    subject = _subject(
        registry.frozen_classifier(classifier, chip, allow_pickle=allow_pickle), defence, exact, chip, compiled=compiled
    )
    if batch_size == "auto" and only is not None:
        raise AdvdiffError("--batch-size auto: the rungs of a ladder must agree on it; with --only give a number")
    batch = sized(
        batch_size, begun, _BATCH, subject.model, patches.require_shape(), len(patches), chip, graph=True
    )  # fmt: skip
    climb = Climb(subject, patches, spend, out, seed, batch, chip, overwrite)
    tested = next(r.settings for r in rungs if r.name == "pgd") if only is None else None
    plan = climb.costs(rungs, tested)
    heading = f"{len(patches)} patches, eps {size * 255:g}/255, preset {preset}, {spend.draws} judging draws"
    if dry_run:
        what = {"out": str(out), "status": "would climb", "n": len(patches), "rungs": plan}
        console.emit(what, f"{heading}\n{_plan_text(plan)}", out, as_json=as_json, quiet=quiet)
        return
    out.mkdir(parents=True, exist_ok=True)
    result = _climbed(climb, rungs, {c["name"]: c for c in plan}, tested, size, quiet)
    if only is None:
        write_json(out / "robustness.json", result)
    brief = result["worst"]["accuracy"]["value"]
    console.emit(result, f"{heading}\n{_text(result)}", brief, as_json=as_json, quiet=quiet)


def _begun(out: Path, rungs: "list[Rung]") -> Mapping[str, Any]:
    """Return the parameters of a rung that is there or begun, one through the defence if there is one."""
    from advdiff_cli.data.patch_writer import begun
    from advdiff_cli.jobs.attack import goes_through

    found = [p for r in rungs if r.settings and (p := begun(out / f"{r.name}.safetensors"))]
    return next((p for p in found if goes_through(p)), found[0] if found else {})


def _subject(
    found: tuple[Any, str], defence: Defence | None, precision: str, chip: Any, *, compiled: bool
) -> "Subject":
    from advdiff_cli.robustness.runner import Subject

    model, fingerprint = found
    if defence is None:
        if compiled:
            raise AdvdiffError("--compile: there is no U-Net to compile without a defence")
        return Subject(model, fingerprint)
    if compiled:
        defence.compile_unet(chip)
    purifier = defence.before(model, chip, precision).purifier
    return Subject(model, fingerprint, purifier, defence.parameters, defence.model, precision, compiled)


def _climbed(
    climb: "Climb", rungs: "list[Rung]", plan: Mapping[str, dict[str, Any]], tested: Mapping[str, Any] | None,
    eps: float, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """Climb every rung, make the checks of a whole ladder, and return what robustness.json holds."""
    from advdiff_cli.data.provenance import recipe
    from advdiff_cli.robustness.summary import conclusions

    judged, gradients, found = {}, None, None
    for rung in rungs:
        console.log(f"{rung.name}: {_cost_text(plan[rung.name])}")
        judged[rung.name] = _climb_one(climb, rung, quiet)
    if tested is not None:
        for name in ("gradients", "unit-test"):
            console.log(f"{name}: {_cost_text(plan[name])}")
            with console.progress(plan[name]["n"], name, quiet=quiet) as advance:
                if name == "gradients":
                    gradients = climb.gradients(advance)
                else:
                    found = climb.unit_test(tested, advance)
    subject = climb.subject
    settings = {"eps": eps, **asdict(climb.spend), "seed": climb.seed, "batch_size": climb.batch_size}
    result = {
        "out": str(climb.out),
        "recipe": recipe(
            "robustness", {**settings, **subject.settings},
            data=climb.patches.recipe_input(), classifier=subject.fingerprint, ddpm=subject.ddpm,
        ),
        "eps": eps,
        "defence": subject.defence and dict(subject.defence),
        **conclusions(rungs, judged, eps, gradients, found),
    }  # fmt: skip
    for rung, row in zip(rungs, result["rungs"], strict=True):
        row |= {k: plan[rung.name][k] for k in ("unet_forward", "unet_backward")}
        row["seconds"] = climb.seconds(rung)
    return result


def _climb_one(climb: "Climb", rung: "Rung", quiet: bool) -> "Predictions":
    n = len(climb.patches)
    if rung.settings:
        with console.progress(n, f"{rung.name}: attack", quiet=quiet) as advance:
            for count in climb.attack(rung):
                advance(count)
    with console.progress(n, f"{rung.name}: judge", quiet=quiet) as advance:
        found = climb.judge(rung, advance)
    console.log(f"{rung.name}: accuracy {100 * found.share.mean():.1f} %, {_duration(climb.seconds(rung))}")
    return found


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
    from advdiff_cli.attacks.spec import describe
    from advdiff_cli.evaluation.statistics import Estimate

    def cell(value: dict[str, Any] | None) -> str:
        return "-" if value is None else str(Estimate(**value))

    odd = [k for k in result["rungs"][0] if k.startswith("vote_")][-1:] if result["draws"] > 1 else []
    many = [*odd, "all_correct"] if odd else []
    rows = [
        (
            r["name"], describe(r["attack"]), cell(r["accuracy"]), *(cell(r.get(k)) for k in many),
            cell(r["difference"]), _duration(r["seconds"]) if "seconds" in r else "",
        )
        for r in [*result["rungs"], result["worst"]]
    ]  # fmt: skip
    names = [k.replace("vote_", "vote of ").replace("all_correct", "all draws right") for k in many]
    head = (
        "% [95 %]",
        "attack",
        "accuracy" + (", mean of draws" if many else ""),
        *names,
        "less clean, points",
        "time",
    )
    text = console.table(head, rows)
    signs = [(a["status"], f"{a['name']}: {a['reason']}") for a in result["alarms"]]
    return text + "\n\n" + "\n".join(f"{status:4}  {line}" for status, line in signs)
