"""Predictions as CSV, one line for each set, patch and draw, for later comparison and for other tools."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from advdiff_cli.data.patch_source import ORIGINS
from advdiff_cli.data.rng import RowKey
from advdiff_cli.data.row_fingerprints import as_text, from_texts
from advdiff_cli.data.table_writer import Line, read_csv, write_csv
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.comparison import EvaluatedSet
from advdiff_cli.evaluation.metrics import Predictions

_COLUMNS = ("set", ORIGINS, "index", "row", "label", "draw", "p1")


def write_predictions(path: Path, sets: Sequence[tuple[EvaluatedSet, Sequence[RowKey]]]) -> None:
    """Write the predictions of sets, each with the names of its rows.

    The columns are: the name of the set, the fingerprint of the patch that the row was first made from, its index, the
    row's name (a file in a folder, else the index), its label, the draw of the defense's noise, and the probability of
    class 1.
    """
    lines = [
        [one.name, as_text(origin), str(index), str(key), str(label), str(draw), repr(float(p1))]
        for one, keys in sets
        for origin, index, key, label, row in zip(
            one.origins, one.index, keys, one.predictions.labels, one.predictions.p1, strict=True
        )
        for draw, p1 in enumerate(row)
    ]
    write_csv(path, _COLUMNS, lines)


def read_predictions(path: Path) -> list[EvaluatedSet]:
    """Return the sets in a file of `write_predictions`, in its order.

    Raises:
        AdvdiffError: The file is of another kind, or incomplete.
    """
    lines: dict[str, list[Line]] = {}
    try:
        header, table = read_csv(path)
        if tuple(header) != _COLUMNS:
            raise AdvdiffError(
                f"{path} is not a file of predictions: make one with advdiff evaluate --predictions {path}"
            )
        for line in table:
            lines.setdefault(line[0], []).append(line)
        return [_parse_set(name, mine) for name, mine in lines.items()]
    except (ValueError, IndexError, csv.Error):
        raise AdvdiffError(f"{path} is damaged: make it again with advdiff evaluate --predictions {path}") from None


def _parse_set(name: str, lines: Sequence[Line]) -> EvaluatedSet:
    """Return a set; ValueError unless its lines are draws 0 to R - 1 of one patch after another, with valid figures."""
    _, origins, index, _, labels, draw, p1 = zip(*lines, strict=True)
    draws = max(map(int, draw)) + 1
    if len(lines) % draws:
        raise ValueError(name)
    if list(map(int, draw)) != list(range(draws)) * (len(lines) // draws):
        raise ValueError(name)
    patches = list(zip(origins, index, labels, strict=True))
    if patches != [patch for patch in patches[::draws] for _ in range(draws)]:
        raise ValueError(name)
    first = slice(None, None, draws)
    predictions = Predictions(np.array(labels[first], np.int64), np.array(p1, np.float64).reshape(-1, draws))
    if not ((predictions.p1 >= 0) & (predictions.p1 <= 1)).all() or not np.isin(predictions.labels, (0, 1)).all():
        raise ValueError(name)
    return EvaluatedSet(name, from_texts(origins[first]), np.array(index[first], np.int64), predictions)
