"""Tables of labels for images: CSV files with a name and a label of 0 or 1 on each line."""

import csv
import io
from pathlib import Path

from advdiff_cli.errors import AdvdiffError

_FILE = ("file", "filename", "name", "image", "path")
_LABEL = ("label", "class", "target", "tumor")
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def read_labels(table: Path) -> dict[str, int]:
    """Return the label of each file that a CSV lists.

    The header, if there is one, names the columns (file and label, or the like). Without a header, there must be two
    columns: file and label. UTF-8, with or without a byte order mark, and UTF-16 with one are read.

    Raises:
        AdvdiffError: The columns are ambiguous, a label is neither 0 nor 1, or a file has two labels.
    """
    header, *lines = _rows(table)
    names = [cell.strip().lower() for cell in header]
    file_columns = [i for i, name in enumerate(names) if name in _FILE]
    label_columns = [i for i, name in enumerate(names) if name in _LABEL]
    if not file_columns and not label_columns:
        lines, file_columns, label_columns = [header, *lines], [0], [1]
        if len(header) != 2:
            raise AdvdiffError(f"{table} has {len(header)} columns and no header; begin it with the line file,label")
    if len(file_columns) != 1 or len(label_columns) != 1:
        raise AdvdiffError(
            f"the header of {table} ({','.join(header)}) does not name one column of files and one of labels; "
            "call them file and label"
        )
    labels: dict[str, int] = {}
    for number, line in enumerate(lines, 1 + (lines[:1] != [header])):
        if len(line) <= max(file_columns[0], label_columns[0]):
            raise AdvdiffError(f"line {number} of {table} has {len(line)} columns; a file and a label are needed")
        name, text = line[file_columns[0]], line[label_columns[0]].strip()
        if text not in ("0", "1"):
            raise AdvdiffError(f"line {number} of {table} labels {name} {text or 'with nothing'}; 0 or 1 is needed")
        if labels.setdefault(name, int(text)) != int(text):
            raise AdvdiffError(f"{table} labels {name} twice, 0 and 1; keep one of the lines")
    return labels


def _rows(table: Path) -> list[list[str]]:
    raw = table.read_bytes()
    encoding = next((name for bom, name in _BOMS.items() if raw.startswith(bom)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        raise AdvdiffError(f"{table} is neither UTF-8 nor UTF-16 with a byte order mark; save it as UTF-8") from None
    if "\0" in text:
        raise AdvdiffError(f"{table} is not a CSV file in UTF-8; save it as UTF-8")
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as e:
        raise AdvdiffError(f"{table} is not a CSV file ({e}); it needs a row file,label for every image") from None
    if not rows:
        raise AdvdiffError(f"{table} is empty; it needs a row file,label for every image")
    return rows
