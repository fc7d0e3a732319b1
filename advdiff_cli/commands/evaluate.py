"""`advdiff evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advdiff_cli import console, options
from advdiff_cli.commands.opening import open_selected
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.purification.defense import asked_defence

if TYPE_CHECKING:
    from advdiff_cli.data.patches import PatchSet
    from advdiff_cli.evaluation.comparison import Evaluated

_COLUMNS = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "auroc")
_DRAWS = 11


def evaluate(
    data: Annotated[
        list[str], typer.Argument(help="Patch sets, a row of the table each; what selects rows does so in each.")
    ],
    classifier: options.ClassifierName,
    ddpm: options.DdpmName = None,
    defense: options.Defense = None,
    t_star: options.TStar = None,
    sampler: options.Sampler = None,
    sampler_steps: options.SamplerSteps = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="Draws of the defence's noise a patch.", show_default=str(_DRAWS))
    ] = None,
    seed: options.Seed = 0,
    fidelity: Annotated[
        bool,
        typer.Option(
            "--fidelity", help="Also tell how faithful the other sets are to the first, which they are made of."
        ),
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(help="Write every patch's and draw's prediction here (CSV).")
    ] = None,
    split: options.Split = None,
    labels: options.Labels = None,
    limit: options.Limit = None,
    rows: options.Range = None,
    shuffle_seed: options.ShuffleSeed = None,
    allow_pickle: options.AllowPickle = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print each set's accuracy alone.")] = False,
) -> None:
    """Evaluate a classifier, or a defended one (-m, --defense): a row a set, every figure with its 95 % interval.

    A defence is judged over draws of its noise that no attack has seen: the mean over draws, majority votes, all
    draws right. Name the clean set beside an attacked one, as its control. Sets of the same rows are compared in pairs.
    Patches of one slide resemble each other, so intervals over patches are too narrow where slides are not known.

    Example: advdiff evaluate test.h5 adv.safetensors purified.safetensors -c pcam-resnet18
    """
    from advdiff_cli.evaluation.comparison import compare
    from advdiff_cli.evaluation.predictions_csv import write_predictions
    from advdiff_cli.evaluation.provenance_checks import cautions
    from advdiff_cli.models import registry
    from advdiff_cli.models.device import resolve_device, resolve_precision

    if predictions is not None and not predictions.parent.is_dir():
        raise AdvdiffError(f"--predictions {predictions}: there is no folder {predictions.parent}")
    if predictions is not None and len(set(data)) < len(data):
        raise AdvdiffError("--predictions tells sets apart by their names: name each set once")
    chip = resolve_device(device)
    sets = [open_selected(path, split, labels, limit, rows, shuffle_seed) for path in data]
    for patches in sets:
        patches.require_labels()
        patches.require_shape()
    alone, mark = registry.frozen_classifier(classifier, chip, allow_pickle=allow_pickle)
    model: Any = alone
    defence = asked_defence(defense, ddpm, t_star, sampler, sampler_steps, allow_pickle=allow_pickle)
    if defence is None and draws is not None:
        raise AdvdiffError("--draws is of a defence's noise: give -m, or --defense noise")
    judging: dict[str, Any] = {}
    if defence is not None:
        judging = {"draws": draws or _DRAWS, "seed": seed}
        exact = resolve_precision(precision, chip)
        model = defence.before(alone, chip, exact)
    evaluated = []
    with console.progress(sum(map(len, sets)), "evaluate", quiet=quiet) as advance:
        for name, patches in zip(data, sets, strict=True):
            evaluated.append(_predict(name, patches, model, chip, judging, advance))
    if predictions is not None:
        write_predictions(predictions, [(e, patches.keys) for e, patches in zip(evaluated, sets, strict=True)])
    result: dict[str, Any] = {
        "classifier": {"name": Path(classifier).name, "fingerprint": mark},
        "defence": None if defence is None else {**defence.parameters, **judging, "precision": exact},
        "sets": [e.as_dict() for e in evaluated],
        "comparisons": compare(evaluated),
        **({"fidelity": _fidelity(sets, evaluated)} if fidelity else {}),
    }
    for line in cautions(evaluated, mark, result["defence"], None if defence is None else defence.model):
        console.warn(line)
    brief = "\n".join(str(s["accuracy"]["value"]) for s in result["sets"])
    console.emit(result, _text(result), brief, as_json=as_json, quiet=quiet)


def _fidelity(sets: "list[PatchSet]", evaluated: "list[Evaluated]") -> list[dict[str, Any]]:
    """Return how faithful each set but the first is to the first."""
    from advdiff_cli.evaluation.fidelity import fidelity

    if len(sets) < 2:
        raise AdvdiffError("--fidelity compares sets with the first: name the clean set, then what was made of it")
    first, judged = sets[0], evaluated[0].predictions
    return [
        {"data": e.name, "reference": evaluated[0].name, **fidelity(first, judged, patches, e.predictions)}
        for patches, e in zip(sets[1:], evaluated[1:], strict=True)
    ]


def _predict(
    name: str, patches: "PatchSet", model: Any, chip: Any, judging: dict[str, Any], advance: console.Advance
) -> "Evaluated":
    import numpy as np

    from advdiff_cli.data.provenance import history
    from advdiff_cli.evaluation.comparison import Evaluated
    from advdiff_cli.evaluation.metrics import Predictions, predict

    p1 = []
    for batch in predict(model, patches, chip, **judging):
        p1.append(batch)
        advance(len(batch))
    predictions = Predictions(patches.require_labels(), np.concatenate(p1))
    return Evaluated(name, patches.origin(), patches.index, predictions, history(patches.provenance))


def _made(history: list[dict[str, Any]]) -> str:
    """Tell in one line the settings that led to a set."""
    from advdiff_cli.attacks.spec import describe
    from advdiff_cli.jobs.attack import goes_through

    steps = []
    for recipe in history:
        p, what = recipe["parameters"], recipe["command"]
        shown: tuple[str, ...] = ("defense", "t_star", "sampler", "sampler_steps", "seed", "n")
        if what == "attack":
            what += f" ({describe(p)}) {'through' if goes_through(p) else 'on the classifier alone'}"
            shown = ("defense", "t_star", "sampler", "sampler_steps") if goes_through(p) else ()
        settings = ", ".join(f"{k} {_short(p[k])}" for k in shown if p.get(k) is not None)
        steps.append(f"{what} ({settings})" if settings else what)
    return ", then ".join(steps)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _fidelity_text(found: list[dict[str, Any]]) -> str:
    from advdiff_cli.evaluation.statistics import Estimate

    def plain(value: dict[str, float] | None, places: int) -> str:
        if value is None:
            return "-"
        return f"{value['value']:.{places}f} [{value['low']:.{places}f}, {value['high']:.{places}f}]"

    rows = [
        (
            f["data"], f["n"], plain(f["psnr"], 1), plain(f["ssim"], 3), plain(f["nuclear_mass"], 2),
            *(str(Estimate(**e)) if (e := f["flipped"][k]) else "-" for k in ("0", "1")),
        )
        for f in found
    ]  # fmt: skip
    head = (
        f"faithful to {found[0]['reference']} [95 %]", "n", "PSNR dB", "SSIM", "nuclear mass, ratio",
        "decisions changed, label 0 %", "label 1 %",
    )  # fmt: skip
    return console.table(head, rows)


def _text(result: dict[str, Any]) -> str:
    from advdiff_cli.cli.tables import accuracies, cell, pairs

    text = accuracies("% [95 % interval]", ((s["data"], s) for s in result["sets"]), _COLUMNS)
    voted = [k for k in result["sets"][0] if k.startswith("vote_") or k == "all_correct"]
    if voted:
        rows = [(s["data"], s["draws"], *(cell(s[k]) for k in voted)) for s in result["sets"]]
        names = [k.replace("vote_", "vote of ").replace("all_correct", "all draws right") for k in voted]
        text += "\n\n" + console.table(("accuracy, by draws", "draws", *names), rows)
    if "fidelity" in result:
        text += "\n\n" + _fidelity_text(result["fidelity"])
    made = [f"{s['data']}: {_made(s['history'])}" for s in result["sets"] if s["history"]]
    text += "".join(f"\n{line}" for line in ["", *made]) if made else ""
    return f"{text}\n\n{pairs(result['comparisons'])}" if result["comparisons"] else text
