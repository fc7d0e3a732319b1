"""Options for an attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from advdiff_cli.cli import options
from advdiff_cli.cli.parsers import fraction

if TYPE_CHECKING:
    from advdiff_cli.attacks.spec import AttackSpec


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """The settings of an attack."""

    method: Annotated[
        Literal["pgd", "fgsm", "apgd", "square", "fab", "ensemble", "random", "paper"],
        typer.Option(
            help="ensemble: the worst of APGD, Square and, where possible, FAB for each patch; random: a control; "
            "paper: the weak attack of the paper's code."
        ),
    ] = "pgd"
    norm: options.Norm = "linf"
    eps: options.Eps = None
    loss: Annotated[
        Literal["ce", "margin"] | None,
        typer.Option(help="Cross-entropy, or the margin between the classes.", show_default="ce; square: margin"),
    ] = None
    steps: Annotated[
        int | None, typer.Option(min=1, help="Attack iterations.", show_default="pgd: 40, paper: 5, else 100")
    ] = None
    step_size: Annotated[
        float | None, typer.Option(parser=fraction, metavar="SIZE", help="Step size of pgd.", show_default="eps/4")
    ] = None
    momentum: Annotated[
        float | None, typer.Option(help="Weight of earlier gradients in a step of pgd, in (0, 1].", show_default="none")
    ] = None
    queries: Annotated[int | None, typer.Option(min=1, help="Proposals of square.", show_default="1000")] = None
    restarts: Annotated[int | None, typer.Option(min=1, help="Random starts.", show_default="1")] = None
    gradient: Annotated[
        Literal["blind", "bpda", "surrogate", "full"] | None,
        typer.Option(
            help="full: exact, through the defense; bpda: the defense forward, the identity backward; surrogate: "
            "through a defense of --attack-sampler-steps; blind: of the classifier alone.",
            show_default="full",
            rich_help_panel=options.DEFENSE,
        ),
    ] = None
    eot: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draws of the defense's noise that each gradient averages.",
            show_default="8",
            rich_help_panel=options.DEFENSE,
        ),
    ] = None
    attack_sampler_steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps of the surrogate.", rich_help_panel=options.DEFENSE)
    ] = None
    fixed_draw: Annotated[
        bool | None,
        typer.Option(
            "--fixed-draw",
            help="Attack one known draw of the noise: the first one that evaluate uses.",
            rich_help_panel=options.DEFENSE,
        ),
    ] = None

    compiled: options.Compile = False

    def resolve(self, *, defended: bool) -> AttackSpec:
        """Return the specification of the attack.

        Raises:
            AdvdiffError: A setting does not apply.
        """
        from advdiff_cli.attacks.spec import AttackRequest, resolve

        radius = options.attack_radius(self.norm, self.eps)
        asked = AttackRequest(
            self.loss,
            self.steps,
            self.step_size,
            self.queries,
            self.restarts,
            self.gradient,
            self.eot,
            self.attack_sampler_steps,
            self.fixed_draw,
            self.momentum,
        )
        return resolve(self.method, self.norm, radius, asked, defended=defended)
