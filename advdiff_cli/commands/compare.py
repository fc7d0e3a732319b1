"""`advdiff compare`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advdiff_cli.cli import options
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import ResultOptions
from advdiff_cli.cli.parsers import fraction
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.data.provenance import JsonObject
    from advdiff_cli.evaluation.comparison import EvaluatedSet

_COLUMNS = ("accuracy", "sensitivity", "specificity")


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """The size of attacks against which certificates are compared."""

    eps: Annotated[
        float | None,
        typer.Option(parser=fraction, metavar="EPS", help="Of l-inf attacks, in [0, 1] pixels, for tables of certify."),
    ] = None
    radius: Annotated[
        float | None,
        typer.Option(parser=fraction, metavar="R", help="Of l2 attacks on the whole patch, for tables of certify."),
    ] = None

    def attack(self, *, needed: bool) -> tuple[str, float] | None:
        """Return the norm and the size; None for predictions.

        Raises:
            AdvdiffError: There is no size, or there are two, or there is nothing that it is about.
        """
        given = [(norm, v) for norm, v in (("linf", self.eps), ("l2", self.radius)) if v is not None]
        if len(given) != needed:
            raise AdvdiffError(
                "certified accuracy is that at one size of attacks: give --eps or --radius"
                if needed
                else "--eps and --radius are about tables of certify"
            )
        for norm, size in given:
            if norm == "linf" or size != 0:
                options.attack_radius(norm, size, "eps" if norm == "linf" else "radius")
        return given[0] if given else None


@with_option_groups
def compare(
    predictions: Annotated[
        list[Path],
        typer.Argument(help="Files of evaluate --predictions, or tables of certify, one for each model or defense."),
    ],
    size: SizeOptions,
    output: ResultOptions,
) -> None:
    """Compare models or defenses on the patches that they share, with paired tests.

    Tables of certify are compared by certified accuracy at --eps or --radius.

    Each comparison has the difference of accuracies with its 95 % interval, the p-value of McNemar's exact test, and
    the p-value adjusted by Holm's method. Sets are paired by position: the first sets of all files, the second ones,
    and so on. With -q, print the difference of each pair.

    Example: advdiff compare noise.csv robust.csv ddpm.csv
    """
    from advdiff_cli.certification.certificate_file import is_certificate_table
    from advdiff_cli.certification.summary import certified_set
    from advdiff_cli.cli.tables import accuracy_table, comparison_table
    from advdiff_cli.evaluation.comparison import compare as compare_sets
    from advdiff_cli.evaluation.predictions_csv import read_predictions

    if len(set(predictions)) < max(len(predictions), 2):
        raise AdvdiffError("compare needs at least two different files of predictions, one for each model or defense")
    tables = [is_certificate_table(path) for path in predictions]
    if any(tables) and not all(tables):
        raise AdvdiffError("compare files of predictions, or tables of certify, but not one with the other")
    attack = size.attack(needed=any(tables))
    read = read_predictions if attack is None else lambda path: [certified_set(path, *attack)]
    groups = _by_position({str(path): read(path) for path in predictions})
    comparisons = compare_sets(*groups)
    if not comparisons:
        raise AdvdiffError(
            f"{predictions[0]} shares no patches with the others: evaluate the same rows with each model"
        )
    sets = [{"place": k + 1, **_summary(e)} for k, group in enumerate(groups) for e in group]
    accuracies = accuracy_table("% [95 % interval]", ((s["data"], s) for s in sets), _COLUMNS)
    brief = "\n".join(str(c["difference"]["value"]) for c in comparisons)
    text = f"{accuracies}\n\n{comparison_table(comparisons)}"
    output.emit({"sets": sets, "comparisons": comparisons}, text, brief)


def _summary(evaluated: "EvaluatedSet") -> "JsonObject":
    everything = evaluated.as_dict()
    return {k: everything[k] for k in ("data", "n", "draws", *_COLUMNS)}


def _by_position(files: "dict[str, list[EvaluatedSet]]") -> "list[list[EvaluatedSet]]":
    """Return the first sets of all files, the second sets, and so on, with the file in each name."""
    (first, sets), *others = files.items()
    for path, own in others:
        if len(own) != len(sets):
            raise AdvdiffError(f"{path} holds {len(own)} sets and {first} {len(sets)}: sets are paired by position")
    stems = [Path(path).stem for path in files]
    names = stems if len(set(stems)) == len(stems) else list(files)
    return [
        [replace(e, name=f"{name}: {e.name}") for name, e in zip(names, group, strict=True)]
        for group in zip(*files.values(), strict=True)
    ]
