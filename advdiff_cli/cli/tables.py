"""Tables of figures with their intervals, as commands print them."""

from collections.abc import Iterable, Mapping
from typing import Any

from advdiff_cli import console


def cell(figure: Mapping[str, Any]) -> str:
    """Return a figure with its interval in percent, or - where it could not be had."""
    from advdiff_cli.evaluation.statistics import Estimate

    return "-" if figure["value"] is None else str(Estimate(**figure))


def accuracies(head: str, sets: Iterable[tuple[str, Mapping[str, Any]]], columns: tuple[str, ...]) -> str:
    """Return a table of named sets, a column a figure, under `head`."""
    rows = [(name, s["n"], *(cell(s[k]) for k in columns)) for name, s in sets]
    return console.table((head, "n", *(k.replace("_", " ") for k in columns)), rows)


def pairs(comparisons: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of paired comparisons."""
    rows = [
        (f"{c['second']} - {c['first']}", c["n"], cell(c["difference"]), f"{c['p']:.2g}", f"{c['p_holm']:.2g}")
        for c in comparisons
    ]
    return console.table(("accuracy, paired", "n", "points [95 %]", "McNemar p", "Holm p"), rows)
