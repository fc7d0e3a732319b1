"""Parsers of option values. Those that return more than a number are classes, which Typer takes as types."""

from math import isfinite, nan

import typer

MAX_BATCH = 65_536


def fraction(text: str | float) -> float:
    """Parse a number or a fraction such as 2/255."""
    top, _, bottom = str(text).partition("/")  # Typer also passes defaults, which are numbers
    try:
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        value = nan
    if not isfinite(value):
        raise typer.BadParameter(f"{text!r} is neither a number nor a fraction such as 2/255")
    return value


class RowBounds:
    """Rows A to B - 1, written A:B; either end may be left out."""

    def __init__(self, text: str) -> None:
        """Parse A:B."""
        start, colon, stop = text.partition(":")
        try:
            self.bounds = (int(start or 0), int(stop) if stop else None)
        except ValueError:
            self.bounds = (-1, None)
        if not colon or self.bounds[0] < 0 or (self.bounds[1] is not None and self.bounds[1] < 0):
            raise typer.BadParameter(f"{text!r} is not a range of rows such as 0:1000")


class ShardNumber:
    """Shard I of N, written I/N, with I from 0."""

    def __init__(self, text: str) -> None:
        """Parse I/N."""
        i, _, n = text.partition("/")
        if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise typer.BadParameter(f"{text!r} is not a shard I/N with I from 0 to N-1")
        self.pair = (int(i), int(n))


class BatchSize:
    """A number of patches, or `auto`, for which `size` is None."""

    def __init__(self, text: str) -> None:
        """Parse a number or `auto`."""
        if text != "auto" and not (text.isdecimal() and 1 <= int(text) <= MAX_BATCH):
            raise typer.BadParameter(f"{text!r} is neither a number of patches from 1 to {MAX_BATCH} nor auto")
        self.size = None if text == "auto" else int(text)
