"""The progress of a fit on the terminal."""

from collections.abc import Iterable, Mapping
from typing import Any

from advdiff_cli import console


def follow(records: Iterable[Mapping[str, Any]], total: int, what: str, *, quiet: bool) -> None:
    """Run a fit to its end: a bar over its steps, a line for each epoch or validation."""
    with console.progress(total, what, quiet=quiet) as advance:
        last: int | None = None
        for record in records:
            if last is None:  # a resumed fit does not begin at step 1
                last = record["step"] - 1
                if last:
                    console.log(f"{what}: going on from step {last} of {total}")
            advance(record["step"] - last, f"loss {record['loss']:.4f}")
            last = record["step"]
            if len(record) > 3 and not quiet:
                console.log("  ".join(f"{k} {_short(v)}" for k, v in record.items() if k != "of"))


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}:{_short(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
