"""Options for certificates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advdiff_cli.cli import options
from advdiff_cli.cli.parsers import fraction
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.jobs.recipes import CertifySettings

_CERTIFICATE = "Certificate"
_FIXED = (100, 1000)  # draws that choose and that bound, where no size is given
_SEQUENTIAL = (20, 10_000)
_LEAST_ALPHA = 1e-12  # far above the rounding of probabilities


@dataclass(frozen=True, kw_only=True)
class CertificateOptions:
    """What is proved, and by how many draws."""

    eps: Annotated[
        list[float] | None,
        typer.Option(
            parser=fraction,
            metavar="EPS",
            help="Decide whether each patch withstands every l-inf attack of this size in [0, 1] pixels; may be "
            "repeated.",
            rich_help_panel=_CERTIFICATE,
        ),
    ] = None
    radius: Annotated[
        list[float] | None,
        typer.Option(
            parser=fraction,
            metavar="R",
            help="The same for an l2 size, of the whole patch; 0 decides the vote itself.",
            rich_help_panel=_CERTIFICATE,
        ),
    ] = None
    fixed: Annotated[
        bool,
        typer.Option(
            "--fixed", help="Take exactly --n draws, also where a size is given.", rich_help_panel=_CERTIFICATE
        ),
    ] = False
    n0: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draws that choose the class.",
            show_default="100; with a size: 20",
            rich_help_panel=_CERTIFICATE,
        ),
    ] = None
    n: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draws that bound its probability; with a size: at most.",
            show_default="1000; with a size: 10000",
            rich_help_panel=_CERTIFICATE,
        ),
    ] = None
    alpha: Annotated[
        float,
        typer.Option(
            help="Probability that the certificate of a patch is wrong, at most.", rich_help_panel=_CERTIFICATE
        ),
    ] = 0.001
    sound: Annotated[
        bool,
        typer.Option(
            "--sound",
            help="Draw the noise on the grid of 8-bit pixels, so that rounding cannot break the proof.",
            rich_help_panel=_CERTIFICATE,
        ),
    ] = False
    tsv: Annotated[
        Path | None,
        typer.Option(help="Also write the table of Cohen et al.'s certify.py.", rich_help_panel=options.OUTPUT),
    ] = None

    def settings(self) -> CertifySettings:
        """Return the settings.

        Raises:
            AdvdiffError: A value is outside its range.
        """
        from advdiff_cli.jobs.recipes import CertifySettings

        if not _LEAST_ALPHA <= self.alpha < 0.5:
            raise AdvdiffError(f"--alpha must be at least {_LEAST_ALPHA:g} and below 0.5, not {self.alpha:g}")
        asked, radii = tuple(self.eps or ()), tuple(self.radius or ())
        for eps in asked:
            options.attack_radius("linf", eps)
        for radius in filter(None, radii):
            options.attack_radius("l2", radius, "radius")
        n0, n = _SEQUENTIAL if (asked or radii) and not self.fixed else _FIXED
        decided = ((), ()) if self.fixed else (asked, radii)
        return CertifySettings(self.n0 or n0, self.n or n, self.alpha, *decided, self.sound)

    def asked_sizes(self) -> dict[str, list[float]]:
        """Return the l-inf and l2 sizes that are asked for, named as in a recipe; empty if there are none."""
        if not (self.eps or self.radius):
            return {}
        return {"eps": self.eps or [], "radii": self.radius or []}
