"""`advdiff evaluate`."""

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advdiff_cli import console, options
from advdiff_cli.commands.opening import open_selected

if TYPE_CHECKING:
    from advdiff_cli.data.patches import PatchSet
    from advdiff_cli.evaluation.comparing import Evaluated

_COLUMNS = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "auroc")


def evaluate(
    data: options.DataSets,
    classifier: options.ClassifierName,
    predictions: Annotated[Path | None, typer.Option(help="Write each patch's prediction to this CSV.")] = None,
    split: options.Split = None,
    labels: options.Labels = None,
    limit: options.Limit = None,
    rows: options.Range = None,
    shuffle_seed: options.ShuffleSeed = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print each set's accuracy alone.")] = False,
) -> None:
    """Evaluate a classifier on patch sets, in fp32: a row a set, every figure with its 95 % interval.

    Sets made from the same rows are compared in pairs: the difference in accuracy and McNemar's exact test,
    Holm-adjusted. Patches of one slide resemble each other, so intervals over patches are too narrow where slides are
    not known.

    Example: advdiff evaluate test.h5 adv.safetensors purified.safetensors -c classifier
    """
    from advdiff_cli.evaluation.comparing import compare
    from advdiff_cli.models import zoo
    from advdiff_cli.models.device import resolve_device

    chip = resolve_device(device)
    sets = [open_selected(path, split, labels, limit, rows, shuffle_seed) for path in data]
    for patches in sets:
        patches.require_labels()
        patches.require_shape()
    model = zoo.frozen_classifier(zoo.find_classifier(classifier), chip)
    evaluated = []
    with console.progress(sum(map(len, sets)), "evaluate", quiet=quiet) as advance:
        for name, patches in zip(data, sets, strict=True):
            evaluated.append(_predict(name, patches, model, chip, advance))
    if predictions is not None:
        _write_predictions(predictions, evaluated, sets)
    result = {"sets": [_plain(e.as_dict()) for e in evaluated], "comparisons": compare(evaluated)}
    brief = "\n".join(str(s["accuracy"]["value"]) for s in result["sets"])
    console.emit(result, _text(result), brief, as_json=as_json, quiet=quiet)


def _predict(name: str, patches: "PatchSet", model: Any, chip: Any, advance: console.Advance) -> "Evaluated":
    import numpy as np

    from advdiff_cli.data.provenance import history
    from advdiff_cli.evaluation.comparing import Evaluated
    from advdiff_cli.evaluation.metrics import Predictions, predict

    p1 = []
    for batch in predict(model, patches, chip):
        p1.append(batch)
        advance(len(batch))
    predictions = Predictions(patches.require_labels(), np.concatenate(p1))
    return Evaluated(name, patches.origin(), patches.index, predictions, history(patches.provenance))


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN, which JSON does not have, by null."""
    return {
        k: {name: None if v != v else v for name, v in value.items()} if isinstance(value, dict) else value
        for k, value in figures.items()
    }


def _write_predictions(path: Path, evaluated: "list[Evaluated]", sets: "list[PatchSet]") -> None:
    """Write set, row (index, or file in a folder), label, draw and p1 of every patch."""
    fresh = path.with_name(path.name + ".part")
    with fresh.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("set", "row", "label", "draw", "p1"))
        for one, patches in zip(evaluated, sets, strict=True):
            p = one.predictions
            table.writerows(
                (one.name, key, label, 0, f"{p1:.9g}")
                for key, label, p1 in zip(patches.keys, p.labels, p.p1, strict=True)
            )
    os.replace(fresh, path)


def _made(history: list[dict[str, Any]]) -> str:
    """Tell in one line the settings that led to a set."""
    shown = ("defense", "method", "norm", "eps", "steps", "restarts", "t_star", "sampler", "sampler_steps", "seed", "n")
    steps = []
    for recipe in history:
        settings = {k: recipe["parameters"][k] for k in shown if recipe["parameters"].get(k) is not None}
        steps.append(f"{recipe['command']} ({', '.join(f'{k} {_short(v)}' for k, v in settings.items())})")
    return ", then ".join(steps)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(result: dict[str, Any]) -> str:
    from advdiff_cli.evaluation.intervals import Estimate

    def cell(value: dict[str, Any]) -> str:
        return "-" if value["value"] is None else str(Estimate(**value))

    rows = [(s["data"], s["n"], *(cell(s[k]) for k in _COLUMNS)) for s in result["sets"]]
    text = console.table(("% [95 % interval]", "n", *(k.replace("_", " ") for k in _COLUMNS)), rows)
    made = [f"{s['data']}: {_made(s['history'])}" for s in result["sets"] if s["history"]]
    text += "".join(f"\n{line}" for line in ["", *made]) if made else ""
    pairs = [
        (
            f"{c['second']} - {c['first']}",
            c["n"],
            cell(c["difference"]),
            f"{c['p']:.2g}",
            f"{c['p_holm']:.2g}",
        )
        for c in result["comparisons"]
    ]
    if pairs:
        text += "\n\n" + console.table(("accuracy, paired", "n", "points [95 %]", "McNemar p", "Holm p"), pairs)
    return text
