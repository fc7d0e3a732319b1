"""Option groups: dataclasses whose fields are options, and which commands take as single parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.parsers import BatchSize, RowBounds, ShardNumber
from advdiff_cli.data.distributed import world_size
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    import torch

    from advdiff_cli.data.patches import PatchSet, Selection
    from advdiff_cli.models.device import Precision
    from advdiff_cli.purification.defense import Defense, DefenseKind, DefenseRequest, EvaluatedModel


NOTHING: Mapping[str, object] = MappingProxyType({})
"""The parameters of work that does not exist."""


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command in which every parameter with a dataclass type is replaced by the options of its fields."""
    flat: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        types = get_type_hints(group, include_extras=True)
        flat += [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if f.default is MISSING else f.default,
                annotation=types[f.name],
            )
            for f in fields(group)
        ]

    @wraps(command)
    def run(**given: object) -> None:
        built = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **built)

    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]  # which inspect and Typer read
    run.__annotations__ = {p.name: p.annotation for p in flat}
    return run


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Which rows of a patch set."""

    split: options.Split = None
    labels: Annotated[
        Path | None, typer.Option(help="CSV of file,label for a folder of images.", rich_help_panel=options.ROWS)
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="At most N patches.", rich_help_panel=options.ROWS)] = None
    rows: Annotated[
        RowBounds | None,
        typer.Option(
            "--range",
            parser=RowBounds,
            metavar="A:B",
            help="Rows A to B-1 only; either may be left out.",
            rich_help_panel=options.ROWS,
        ),
    ] = None
    shuffle_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Shuffle the rows before --range and --limit select.", rich_help_panel=options.ROWS),
    ] = None

    def open(self, data: str) -> PatchSet:
        """Open a patch set with these rows selected.

        Raises:
            AdvdiffError: There is no such set, or no such row.
        """
        from advdiff_cli.data.patches import open_patches

        return open_patches(data, split=self.split, labels=self.labels, selection=self.selection)

    @property
    def selection(self) -> Selection:
        """The selected rows."""
        from advdiff_cli.data.patches import Selection

        return Selection(self.limit, None if self.rows is None else self.rows.bounds, self.shuffle_seed)

    def sample(self, limit: int | None = None) -> RowOptions:
        """Return the rows of a shuffled sample, of at most `limit`, unless --range names rows."""
        if self.rows is not None:
            return self
        seed = 0 if self.shuffle_seed is None else self.shuffle_seed
        return replace(self, limit=limit if self.limit is None else self.limit, shuffle_seed=seed)


@dataclass(frozen=True, kw_only=True)
class DefenseOptions:
    """The defense before a classifier: by default a DDPM if one is named, and none otherwise."""

    ddpm: options.DdpmName = None
    defense: Annotated[
        Literal["none", "noise", "ddpm"] | None,
        typer.Option(
            help="What stands before the classifier.",
            show_default="ddpm with -m, else none",
            rich_help_panel=options.DEFENSE,
        ),
    ] = None
    t_star: Annotated[
        float | None,
        typer.Option(
            help="Noise level as a fraction of T, in (0, 1].",
            show_default="the model's own; noise: 0.04",
            rich_help_panel=options.DEFENSE,
        ),
    ] = None
    sampler: Annotated[
        Literal["ddpm", "ddim"] | None,
        typer.Option(help="Reverse process.", show_default="the model's own", rich_help_panel=options.DEFENSE),
    ] = None
    sampler_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="U-Net evaluations for each patch.",
            show_default="the model's own",
            rich_help_panel=options.DEFENSE,
        ),
    ] = None

    def request(self, kind: DefenseKind, compute: ComputeOptions) -> DefenseRequest:
        """Return the defense asked for, of a given kind."""
        from advdiff_cli.purification.defense import DefenseRequest

        settings = (self.ddpm, self.t_star, self.sampler, self.sampler_steps)
        return DefenseRequest(kind, *settings, compute.allow_pickle)

    def build(self, compute: ComputeOptions) -> Defense | None:
        """Build the defense; settings that were not given are the model's recommendation, which is logged.

        Raises:
            AdvdiffError: There is no such model, or the settings do not fit it, or there is no defense to set.
        """
        from advdiff_cli.purification.defense import build_defense

        kind = self.defense or ("ddpm" if self.ddpm else "none")
        if kind == "none":
            if (self.ddpm, self.t_star, self.sampler, self.sampler_steps) != (None,) * 4:
                raise AdvdiffError(
                    "-m, --t-star, --sampler and --sampler-steps need a defense: give -m, or --defense noise"
                )
            return None
        request = self.request(kind, compute)
        defense = build_defense(request)
        if request.takes_defaults:
            s = defense.spec
            steps = s.sampler_steps or "every noise level"
            console.log(f"{request.model_name}: t* {s.t_star:g}, sampler {s.sampler}, steps {steps}")
        return defense


@dataclass(frozen=True, kw_only=True)
class PurifierOptions(DefenseOptions):
    """A purifier: a DDPM by default."""

    ddpm: Annotated[
        str | None,
        typer.Option("-m", "--ddpm", help="Diffusion model: folder, bundled name or Hub id.", show_default="pcam-ddpm"),
    ] = None
    defense: Annotated[
        Literal["noise", "ddpm"],
        typer.Option(help="ddpm, or noise without denoising (NoiseDefense).", rich_help_panel=options.DEFENSE),
    ] = "ddpm"

    def build(self, compute: ComputeOptions) -> Defense:
        """Build the purifier; as DefenseOptions."""
        defense = super().build(compute)
        assert defense is not None
        return defense


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and how to compute."""

    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Read pickled weights; only for a source you trust.", rich_help_panel=options.COMPUTE
        ),
    ] = False
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], typer.Option(rich_help_panel=options.COMPUTE, help="Where to compute.")
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(
            rich_help_panel=options.COMPUTE, help="Of U-Nets and of training; auto: bf16 where the device has it."
        ),
    ] = "auto"

    def resolve_device(self) -> torch.device:
        """Return the device.

        Raises:
            AdvdiffError: The device is not available.
        """
        from advdiff_cli.models.device import resolve_device

        return resolve_device(self.device)

    def resolve_precision(self, device: torch.device, resume: Mapping[str, object] = NOTHING) -> Precision:
        """Return the precision; `auto` is that of the work that is resumed, if any, else the device's best."""
        from advdiff_cli.models.device import resolve_precision

        asked: Any = resume.get("precision", "auto") if self.precision == "auto" else self.precision
        return resolve_precision(asked, device)

    def attack_precision(self, device: torch.device, resume: Mapping[str, object] = NOTHING) -> Precision:
        """Return the precision of an attacked purifier; `auto` is that of a resumed attack that computes it, if any.

        Raises:
            AdvdiffError: Gradients underflow at this precision.
        """
        from advdiff_cli.attacks.spec import AttackSpec

        if self.precision == "fp16":
            raise AdvdiffError("--precision fp16: gradients underflow; attack in bf16 or fp32")
        through = "t_star" in resume and AttackSpec.from_parameters(resume).computes_defense
        return self.resolve_precision(device, resume if through else NOTHING)

    def load_classifier(self, name: str, device: torch.device) -> EvaluatedModel:
        """Return a classifier without a defense.

        Raises:
            AdvdiffError: There is no such classifier.
        """
        from advdiff_cli.models.registry import load_frozen_classifier
        from advdiff_cli.purification.defense import EvaluatedModel

        return EvaluatedModel(*load_frozen_classifier(name, device, allow_pickle=self.allow_pickle))


@dataclass(frozen=True, kw_only=True)
class SeededComputeOptions(ComputeOptions):
    """Where and how to compute, with random streams."""

    seed: options.Seed = 0


@dataclass(frozen=True, kw_only=True)
class BatchedComputeOptions(SeededComputeOptions):
    """Where and how to compute, in batches."""

    batch_size: Annotated[
        BatchSize | None,
        typer.Option(
            parser=BatchSize,
            metavar="N|auto",
            rich_help_panel=options.COMPUTE,
            help="Patches computed together; auto: by cores and free memory.",
            show_default="32; purify: 16",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ShardedComputeOptions(BatchedComputeOptions):
    """Where and how to compute, in batches, and which shard."""

    shard: Annotated[
        ShardNumber | None,
        typer.Option(
            parser=ShardNumber,
            metavar="I/N",
            help="Only part I of N, with I from 0; see merge.",
            rich_help_panel=options.ROWS,
        ),
    ] = None

    @property
    def shard_pair(self) -> tuple[int, int] | None:
        """The shard as (I, N), or None for everything."""
        return None if self.shard is None else self.shard.pair

    def refuse_auto_for_parts(self) -> None:
        """Refuse --batch-size auto for one part of many, since all parts must use the same batch size.

        Raises:
            AdvdiffError: It was given.
        """
        auto = self.batch_size is not None and self.batch_size.size is None
        if auto and (self.shard is not None or world_size() > 1):
            raise AdvdiffError("--batch-size auto: all parts of a result must use the same batch size; give a number")


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """How a result is printed."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=options.OUTPUT)] = (
        False
    )
    quiet: Annotated[
        bool,
        typer.Option(
            "-q",
            "--quiet",
            help="Print one value only, for scripts: OUT unless said above.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False

    def emit(self, result: Mapping[str, object], text: str, brief: object) -> None:
        """Print a result: as JSON, as the `brief` value, or as text."""
        console.emit(result, text, brief, as_json=self.as_json, quiet=self.quiet)

    @property
    def prints_details(self) -> bool:
        """Whether more than one value is printed."""
        return self.as_json or not self.quiet


@dataclass(frozen=True, kw_only=True)
class OutputOptions(ResultOptions):
    """How a result is written and printed."""

    out: Annotated[Path, typer.Option("-o", "--out", help="Where the result goes.")]
    overwrite: options.Overwrite = False

    def require_folder(self, content: str) -> None:
        """Check that the output can be a folder.

        Raises:
            AdvdiffError: It is a file.
        """
        if self.out.exists() and not self.out.is_dir():
            raise AdvdiffError(f"--out {self.out} is a file; {content} a folder")


@dataclass(frozen=True, kw_only=True)
class PlannedOutputOptions(OutputOptions):
    """How a result is written and printed, or only planned."""

    dry_run: options.DryRun = False
