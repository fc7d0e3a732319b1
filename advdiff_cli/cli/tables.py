"""Tables of estimates with their intervals."""

from collections.abc import Iterable, Mapping
from typing import Any

from advdiff_cli import console


def cell(estimate: Mapping[str, Any] | None) -> str:
    """Return an estimate and its interval in percent, or - where there is none."""
    from advdiff_cli.evaluation.statistics import Estimate

    if estimate is None or estimate["value"] is None:
        return "-"
    return str(Estimate(*(estimate[k] for k in ("value", "low", "high"))))


def accuracy_table(title: str, sets: Iterable[tuple[str, Mapping[str, Any]]], columns: tuple[str, ...]) -> str:
    """Return a table with one row for each named set, under `title`."""
    rows = [(name, s["n"], *(cell(s[k]) for k in columns)) for name, s in sets]
    return console.table((title, "n", *(k.replace("_", " ") for k in columns)), rows)


def certified_rows(certified: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return rows of a table of what is certified: the norm, the size, the l2 radius and the accuracy."""
    rows = []
    for c in certified:
        linf = c["norm"] == "linf"
        size = f"{c['eps'] * 255:g}/255" if linf else f"{c['eps']:g}"
        rows.append(("l-inf" if linf else "l2", size, f"{c['l2']:.3f}", cell(c)))
    return rows


def comparison_table(comparisons: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of paired comparisons."""
    rows = [
        (f"{c['second']} - {c['first']}", c["n"], cell(c["difference"]), f"{c['p']:.2g}", f"{c['p_holm']:.2g}")
        for c in comparisons
    ]
    return console.table(("accuracy, paired", "n", "points [95 %]", "McNemar p", "Holm p"), rows)
