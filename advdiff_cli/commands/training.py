"""What the two commands that train have in common: their data, their precision, and progress on the terminal."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advdiff_cli import console

if TYPE_CHECKING:
    from torch import device as Chip

    from advdiff_cli.data.patches import PatchSet


def open_sets(data: list[str], valid: str | None, split: str | None) -> "tuple[list[PatchSet], PatchSet | None]":
    """Open the sets to train on and the one to validate on; --split names the split of PCam's folders to train on."""
    from advdiff_cli.data.patches import open_patches

    sets = [open_patches(path, split=split) for path in data]
    valid_set = None if valid is None else open_patches(valid, split=None if split is None else "valid")
    if valid_set is not None:
        valid_set.require_shape()
    return sets, valid_set


def fit_precision(asked: str, out: Path, recorded: dict[str, Any] | None, chip: "Chip") -> str:
    """Return the precision asked for; `auto` is that of the work begun at `out`, else what the device has."""
    from advdiff_cli.models.device import resolve_precision
    from advdiff_cli.training.checkpoints import begun

    return resolve_precision(begun(out, recorded).get("precision", "auto") if asked == "auto" else asked, chip)


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
