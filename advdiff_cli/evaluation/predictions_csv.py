"""Predictions as CSV: a line for every set, patch and draw, to be compared later or read by other tools."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from advdiff_cli.data.atomic_files import replacing
from advdiff_cli.data.rng import RowKey
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.comparison import Evaluated
from advdiff_cli.evaluation.metrics import Predictions

_HEAD = ("set", "origin", "index", "row", "label", "draw", "p1")


def write_predictions(path: Path, sets: Sequence[tuple[Evaluated, Sequence[RowKey]]]) -> None:
    """Write the predictions of sets, each with the names of its rows.

    The columns are the set's name, what names the set that its rows came from, the row's index there, its name (a file
    in a folder, else the index), its label, the draw of the defence's noise, and the probability of class 1.
    """
    with replacing(path) as fresh, fresh.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(_HEAD)
        for one, keys in sets:
            p = one.predictions
            table.writerows(
                (one.name, one.origin, index, key, label, draw, f"{p1:.9g}")
                for index, key, label, row in zip(one.index, keys, p.labels, p.p1, strict=True)
                for draw, p1 in enumerate(row)
            )


def read_predictions(path: Path) -> list[Evaluated]:
    """Return the sets of a file that `write_predictions` wrote, in its order.

    Raises:
        AdvdiffError: it is no such file, or not whole.
    """
    wanted = f"{path} is no file of predictions: make one with advdiff evaluate --predictions {path}"
    lines: dict[str, list[list[str]]] = {}
    try:
        with path.open(newline="") as file:
            table = csv.reader(file)
            if tuple(next(table, ())) != _HEAD:
                raise AdvdiffError(wanted)
            for line in table:
                lines.setdefault(line[0], []).append(line)
        return [_read(name, mine) for name, mine in lines.items()]
    except (ValueError, IndexError, csv.Error):
        raise AdvdiffError(f"{path} is not whole: make it again with advdiff evaluate --predictions {path}") from None


def _read(name: str, lines: list[list[str]]) -> Evaluated:
    """Return a set of its lines; ValueError where they are not draws 0 to R - 1 of one patch after another."""
    _, origins, index, _, labels, draw, p1 = zip(*lines, strict=True)
    draws = max(map(int, draw)) + 1
    if list(map(int, draw)) != list(range(draws)) * (len(lines) // draws) or len(set(origins)) != 1:
        raise ValueError(name)
    firsts = slice(None, None, draws)
    predictions = Predictions(np.array(labels[firsts], np.int64), np.array(p1, np.float64).reshape(-1, draws))
    return Evaluated(name, origins[0], np.array(index[firsts], np.int64), predictions)
