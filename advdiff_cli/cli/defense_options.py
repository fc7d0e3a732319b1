"""Options for the defense before a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.compute_options import NOTHING, ComputeOptions
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.purification.defense import Defense
    from advdiff_cli.purification.defense_spec import DefenseKind, DefenseRequest, DefenseSpec


@dataclass(frozen=True, kw_only=True)
class DefenseOptions:
    """The defense before a classifier: by default a DDPM if one is named, and none otherwise."""

    certify: ClassVar[bool] = False
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
            show_default="the model's own; noise: 0.085",
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

    @property
    def kind(self) -> DefenseKind | None:
        """What stands before the classifier; None for nothing."""
        kind = self.defense or ("ddpm" if self.ddpm else "none")
        return None if kind == "none" else kind

    def check(self) -> None:
        """Check that there is a defense to set, before anything is loaded.

        Raises:
            AdvdiffError: There is none.
        """
        if self.kind is None and (self.ddpm, self.t_star, self.sampler, self.sampler_steps) != (None,) * 4:
            raise AdvdiffError(
                "-m, --t-star, --sampler and --sampler-steps need a defense: give -m, or --defense noise"
            )

    def request(
        self, kind: DefenseKind, compute: ComputeOptions, resume: Mapping[str, object] = NOTHING
    ) -> DefenseRequest:
        """Return the defense asked for, of a given kind; `resume` as for `build`."""
        from advdiff_cli.purification.defense_spec import DefenseRequest

        settings = (self.ddpm, self.t_star, self.sampler, self.sampler_steps)
        return DefenseRequest(kind, *settings, compute.allow_pickle, compute.noise_kind(resume), self.certify)

    def _request(self, compute: ComputeOptions, resume: Mapping[str, object]) -> DefenseRequest | None:
        """Return the defense asked for, or None for no defense.

        Raises:
            AdvdiffError: There is no defense to set.
        """
        self.check()
        return None if self.kind is None else self.request(self.kind, compute, resume)

    def find(self, compute: ComputeOptions, resume: Mapping[str, object]) -> tuple[DefenseSpec, str | None] | None:
        """Return the settings of the defense and the fingerprint of its model, which is not loaded; or None.

        Args:
            compute: Where to compute.
            resume: The parameters of work that exists.

        Raises:
            AdvdiffError: There is no such model, or there is no defense to set.
        """
        from advdiff_cli.purification.defense_spec import find_defense

        request = self._request(compute, resume)
        return None if request is None else find_defense(request)

    def build(self, compute: ComputeOptions, resume: Mapping[str, object] = NOTHING) -> Defense | None:
        """Build the defense; settings that were not given are the model's recommendation, which is logged.

        Args:
            compute: Where to compute.
            resume: The parameters of work that is resumed, if any.

        Raises:
            AdvdiffError: There is no such model, or the settings do not fit it, or there is no defense to set.
        """
        from advdiff_cli.purification.defense import build_defense

        request = self._request(compute, resume)
        if request is None:
            return None
        defense = build_defense(request)
        if request.takes_defaults:
            console.log(f"{request.model_name}: {defense.spec.describe()}")
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

    def build(self, compute: ComputeOptions, resume: Mapping[str, object] = NOTHING) -> Defense:
        """Build the purifier; as DefenseOptions."""
        defense = super().build(compute, resume)
        assert defense is not None
        return defense


@dataclass(frozen=True, kw_only=True)
class CertifiedDefenseOptions(PurifierOptions):
    """A purifier for certificates, whose default settings are those that its model recommends for them."""

    certify: ClassVar[bool] = True
