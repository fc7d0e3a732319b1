"""The progress of a fit on the terminal."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from advdiff_cli import console


def follow(records: Iterable[Mapping[str, Any]], total: int, what: str, *, quiet: bool) -> None:
    """Run a fit to its end: a bar over its steps, a line for each epoch or validation."""
    steps = iter(records)
    first = next(steps, None)
    if first is None:  # an earlier run ended after its last checkpoint
        return
    if first["step"] > 1:
        console.log(f"{what}: going on after step {first['step'] - 1} of {total}")
    with console.progress(total, what, done=first["step"] - 1, quiet=quiet) as advance:
        for record in chain([first], steps):
            advance(1, f"loss {record['loss']:.4f}")
            if len(record) > 3 and not quiet:
                console.log("  ".join(f"{k} {_short(v)}" for k, v in record.items() if k != "of"))


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}:{_short(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
