"""What the two training commands share: their options, data, precision and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.compute_options import SeededComputeOptions
from advdiff_cli.cli.output_options import OutputOptions
from advdiff_cli.data.distributed import world_size
from advdiff_cli.data.pcam_files import holds_pcam
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    import torch

    from advdiff_cli.data.patch_set import PatchSet
    from advdiff_cli.data.provenance import JsonObject, Provenance
    from advdiff_cli.data.rng import NoiseKind
    from advdiff_cli.data.view import View
    from advdiff_cli.models.precision import Precision
    from advdiff_cli.training.checkpoints import WorkFolder


@dataclass(frozen=True, kw_only=True)
class TrainingDataOptions:
    """Which patches are trained on."""

    valid: Annotated[str | None, typer.Option(help="Patch set for validation.")] = None
    split: options.Split = None
    crop: Annotated[
        int | None,
        typer.Option(min=1, help="Read only the central N x N pixels of each patch.", rich_help_panel=options.ROWS),
    ] = None
    pool: Annotated[
        int,
        typer.Option(min=1, help="Average pixels in squares of this side, after --crop.", rich_help_panel=options.ROWS),
    ] = 1

    @property
    def view(self) -> View:
        """What is read of each patch.

        Raises:
            AdvdiffError: --crop and --pool do not fit together.
        """
        from advdiff_cli.data.view import View

        try:
            return View(self.crop, self.pool)
        except ValueError as e:
            raise AdvdiffError(f"--crop, --pool: {e}") from None

    def open(self, data: Sequence[str]) -> TrainingSets:
        """Open the sets to train on and the one to validate on; --split names the split of PCam's folders to train on.

        Raises:
            AdvdiffError: A set is missing, or has patches too large, of several sizes or that do not fit the view.
        """
        from advdiff_cli.data.patches import open_patches, open_sets

        view = self.view
        valid_split = "valid" if self.split and self.valid and holds_pcam(Path(self.valid)) else None
        sets = [patches.viewed(view) for patches in open_sets(data, split=self.split)]
        valid = None if self.valid is None else open_patches(self.valid, split=valid_split).viewed(view)
        for patches in sets if valid is None else [*sets, valid]:
            patches.check_pixels()
        if valid is not None:
            valid.require_shape()
        return TrainingSets(sets, valid)


@dataclass(frozen=True)
class TrainingSets:
    """The sets to train on, and the one to validate on."""

    train: list[PatchSet]
    valid: PatchSet | None

    def recipe_inputs(self) -> JsonObject:
        """Return the fingerprints that enter the recipe."""
        return {
            "data": [s.recipe_input() for s in self.train],
            "valid": self.valid and self.valid.recipe_input(),
        }

    @property
    def provenances(self) -> list[Provenance]:
        """The provenance of the sets to train on."""
        return [s.provenance for s in self.train if s.provenance]


def training_compute(
    compute: SeededComputeOptions, output: OutputOptions, recorded: Provenance | None, device: torch.device
) -> tuple[Precision, NoiseKind]:
    """Return the precision, and what draws random numbers.

    Both are those of the work that is resumed, or of the model that may be up to date, if any. Otherwise they are the
    device's best; so they are if the model is to be replaced.
    """
    from advdiff_cli.training.checkpoints import training_resume_params

    earlier = training_resume_params(output.out, None if output.overwrite else recorded)
    return compute.resolve_precision(device, earlier), compute.noise_kind(earlier)


def finished_precision(compute: SeededComputeOptions, output: OutputOptions, recorded: Provenance | None) -> Any:
    """Return the precision of a finished model that may be up to date, if nothing has to be loaded to know that."""
    from advdiff_cli.training.checkpoints import is_begun

    if recorded is None or output.overwrite or is_begun(output.out):
        return None
    return compute.known_precision(recorded.get("parameters", {}))


def process_parameters(batch_size: int) -> dict[str, int]:
    """Return the number of processes, as a parameter of the recipe; empty if there is only one.

    Each process has its own streams and its own batch statistics, so that another number trains another model.

    Raises:
        AdvdiffError: The processes cannot share a batch evenly.
    """
    count = world_size()
    if batch_size % count:
        raise AdvdiffError(f"--batch-size {batch_size} cannot be shared evenly by {count} processes; give a multiple")
    return {"processes": count} if count > 1 else {}


def train(
    output: OutputOptions,
    made_by: Provenance,
    recorded: Provenance | None,
    device: torch.device,
    fit: Callable[[WorkFolder, bool], None],
) -> bool:
    """Train unless the output is up to date; return whether this is the main process.

    Args:
        output: The model folder to be made.
        made_by: Its recipe.
        recorded: The recipe of the existing model folder, or None.
        device: Where to compute.
        fit: Trains in the work folder; in the main process, it also publishes the model.

    Raises:
        AdvdiffError: Processes would share a GPU, or the output cannot be made, as in `WorkFolder`.
    """
    from advdiff_cli.data.distributed import check_gpus, process_group
    from advdiff_cli.data.output_spec import OutputSpec
    from advdiff_cli.training.checkpoints import WorkFolder

    check_gpus(device)
    spec = OutputSpec(output.out, made_by, device.type, output.overwrite)
    with process_group(device) as group, WorkFolder(spec, recorded, is_main=group.is_main) as work:
        group.wait()  # until the main process has opened the work folder
        if work.up_to_date:
            console.log(f"{output.out} is up to date")
        else:
            fit(work, group.is_main)
    return group.is_main


def follow_training(records: Iterable[Mapping[str, Any]], total: int, label: str, *, quiet: bool) -> None:
    """Run a fit, with a progress bar over its steps and a line for each epoch or validation."""
    steps = iter(records)
    first = next(steps, None)
    if first is None:  # an earlier run ended after its last checkpoint
        return
    if first["step"] > 1:
        console.log(f"{label}: resuming after step {first['step'] - 1} of {total}")
    with console.progress(total, label, done=first["step"] - 1, quiet=quiet) as advance:
        for record in chain([first], steps):
            advance(1, f"loss {record['loss']:.4f}")
            if len(record) > 3 and not quiet:
                console.log("  ".join(f"{k} {_short(v)}" for k, v in record.items() if k != "of"))


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}:{_short(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
