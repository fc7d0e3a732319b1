"""Rows of made-up results."""

from advdiff_cli.data.row_fingerprints import from_texts


def origins(rows, of=0):
    """Return the fingerprints (N, 32) of the rows of a set that is called by a number."""
    return from_texts([f"{of:032x}{int(row):032x}" for row in rows])
