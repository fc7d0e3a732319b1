"""What the two commands that train have in common: their data, their precision, and progress on the terminal."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advdiff_cli import console
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.purification.defense import Defence, build_defence

if TYPE_CHECKING:
    from torch import device as Chip

    from advdiff_cli.data.patches import PatchSet
    from advdiff_cli.training.adversarial import Adversary, Regime


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


def shared(batch_size: int) -> dict[str, int]:
    """Return the number of processes that share each batch, as a recipe's parameter; nothing where there is one.

    Each draws from streams of its own and normalises batches over its share, so another number trains another model.

    Raises:
        AdvdiffError: they cannot share a batch evenly.
    """
    from advdiff_cli.data.distributed import process_count

    count = process_count()
    if batch_size % count:
        raise AdvdiffError(f"--batch-size {batch_size} cannot be shared evenly by {count} processes; give a multiple")
    return {"processes": count} if count > 1 else {}


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


@dataclass(frozen=True)
class AskedRegime:
    """What --augment and --adversarial ask for: the regime, and what of it enters the recipe."""

    augment: list[Defence | None]
    adversary: "Adversary | None"

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that are not a plain training's."""
        plain = self.augment == [None]
        found = {} if plain else {"augment": [d and {**d.parameters, "ddpm": d.model} for d in self.augment]}
        return found | ({} if self.adversary is None else {"adversary": asdict(self.adversary)})

    def build(self, precision: str, seed: int, chip: "Chip") -> "Regime":
        """Return the regime, its purifiers frozen on the device."""
        from advdiff_cli.training.adversarial import Regime

        purifiers = [None if d is None else d.purifier.to(chip).requires_grad_(False).eval() for d in self.augment]
        return Regime(purifiers, self.adversary, precision, seed)


def asked_regime(augment: list[str] | None, adversary: "Adversary | None", *, allow_pickle: bool) -> AskedRegime:
    """Read the specifications of --augment: none, noise:T, or purify:MODEL, its t* and sampler steps after it."""
    return AskedRegime([_augmentation(text, allow_pickle) for text in augment or ["none"]], adversary)


def _augmentation(text: str, allow_pickle: bool) -> Defence | None:
    kind, _, rest = text.partition(":")
    if text == "none":
        return None
    if kind == "noise" and _is_number(rest):
        return build_defence("noise", None, float(rest), None, None)
    model = rest
    numbers: list[str] = []
    while model and len(numbers) < 2 and _is_number(model.rpartition(":")[2]):
        model, _, last = model.rpartition(":")
        numbers.insert(0, last)
    if kind != "purify" or not model or not all(n.isdigit() for n in numbers[1:]):
        raise AdvdiffError(
            f"--augment {text}: give none, noise:T, purify:MODEL, purify:MODEL:T or purify:MODEL:T:STEPS, "
            "T a noise level in (0, 1]"
        )
    steps = int(numbers[1]) if len(numbers) == 2 else None
    return build_defence("ddpm", model, float(numbers[0]) if numbers else None, None, steps, allow_pickle=allow_pickle)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
