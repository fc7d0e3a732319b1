"""Options for the defense before a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.cli.compute_options import ComputeOptions
    from advdiff_cli.purification.defense import Defense, DefenseKind, DefenseRequest


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
