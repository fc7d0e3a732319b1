"""`advdiff compare`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advdiff_cli import console, options
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.evaluation.comparison import Evaluated

_COLUMNS = ("accuracy", "sensitivity", "specificity")


def compare(
    predictions: Annotated[
        list[Path], typer.Argument(help="Files that evaluate --predictions wrote, one a model or defence.")
    ],
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print each paired difference alone.")] = False,
) -> None:
    """Compare models or defences in pairs, on the patches they share: the first sets of all files, the second ones, ...

    Each comparison has the difference of accuracies with its 95 % interval, McNemar's exact p, and p Holm-adjusted.
    Sets are paired by place, since each defence may have been attacked on its own: name them in one order.

    Example: advdiff compare noise.csv robust.csv ddpm.csv
    """
    from advdiff_cli.evaluation.comparison import compare as paired
    from advdiff_cli.evaluation.predictions_csv import read_predictions

    if len(set(predictions)) < max(len(predictions), 2):
        raise AdvdiffError("compare takes two different files of predictions or more: one a model or defence")
    places = _by_place({str(path): read_predictions(path) for path in predictions})
    comparisons = paired(*places)
    if not comparisons:
        raise AdvdiffError(f"{predictions[0]} and the others share no patches: judge the same rows with each")
    sets = [{"place": k + 1, **_figures(e)} for k, place in enumerate(places) for e in place]
    text = _tables(sets, comparisons)
    brief = "\n".join(str(c["difference"]["value"]) for c in comparisons)
    console.emit({"sets": sets, "comparisons": comparisons}, text, brief, as_json=as_json, quiet=quiet)


def _tables(sets: list[dict[str, Any]], comparisons: list[dict[str, Any]]) -> str:
    """Return the table of sets above that of comparisons."""
    from advdiff_cli.cli.tables import accuracies, pairs

    head = accuracies("% [95 % interval]", ((s["data"], s) for s in sets), _COLUMNS)
    return f"{head}\n\n{pairs(comparisons)}"


def _figures(one: "Evaluated") -> dict[str, Any]:
    told = one.as_dict()
    return {k: told[k] for k in ("data", "n", "draws", *_COLUMNS)}


def _by_place(files: "dict[str, list[Evaluated]]") -> "list[list[Evaluated]]":
    """Return the first sets of all files, the second sets, and so on, each named by its file and itself."""
    (first, sets), *others = files.items()
    for path, mine in others:
        if len(mine) != len(sets):
            raise AdvdiffError(f"{path} holds {len(mine)} sets and {first} {len(sets)}: sets are paired by place")
    stems = [Path(path).stem for path in files]
    shown = stems if len(set(stems)) == len(stems) else list(files)
    return [
        [replace(e, name=f"{name}: {e.name}") for name, e in zip(shown, place, strict=True)]
        for place in zip(*files.values(), strict=True)
    ]
