"""Options for a sweep: what is varied, the rule that chooses, and the attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from advdiff_cli.cli import options
from advdiff_cli.cli.compute_options import SeededComputeOptions
from advdiff_cli.cli.defense_options import PurifierOptions
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.robustness.sweep import Criterion
    from advdiff_cli.robustness.sweep_points import SweepRequest


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is varied, the rule, and the attack."""

    over: Annotated[
        Literal["t-star", "eps", "sampler-steps", "ddpm"], typer.Option(help="The setting that is varied.")
    ] = "t-star"
    values: Annotated[
        str | None,
        typer.Option(
            help="Its values, separated by commas; for ddpm, models with different training.",
            show_default="t-star: 0.001 to 0.3; eps: 0.5/255 to 8/255, for l2 0.125 to 2; sampler-steps: 1,2,4,8",
        ),
    ] = None
    rule: Annotated[
        Literal["mean", "robust", "certified"],
        typer.Option(
            help="Choose the best mean of both accuracies, the least value that is as robust as the best one, or the "
            "best certified accuracy, which is then reported too (l-inf, at most 2000 draws a patch)."
        ),
    ] = "mean"
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            metavar="POINTS",
            help="Choose among the values that lower standard accuracy by at most this many percentage points.",
            show_default="no limit",
        ),
    ] = None
    method: Annotated[Literal["pgd", "fgsm", "apgd", "square", "paper"], typer.Option(help="Attack.")] = "pgd"
    norm: options.Norm = "linf"
    eps: options.Eps = None
    steps: Annotated[
        int | None, typer.Option(min=1, help="Attack iterations.", show_default="the attack's default")
    ] = None
    gradient: Annotated[
        Literal["blind", "bpda", "full"], typer.Option(help="Through the defense; blind as in the paper.")
    ] = "blind"
    eot: Annotated[int | None, typer.Option(min=1, help="Draws that each gradient averages.", show_default="8")] = None
    draws: options.Draws = None
    batch_size: options.FixedBatch = None

    @property
    def criterion(self) -> Criterion:
        """How a value is chosen."""
        from advdiff_cli.robustness.sweep import Criterion

        return Criterion(self.rule, None if self.max_drop is None else self.max_drop / 100)

    def request(
        self, purifier: PurifierOptions, compute: SeededComputeOptions, resume: Mapping[str, object]
    ) -> SweepRequest:
        """Return what is swept.

        Args:
            purifier: The defense.
            compute: Where to compute.
            resume: The parameters of results that exist.

        Raises:
            AdvdiffError: An option would be ignored.
        """
        from advdiff_cli.attacks.spec import AttackRequest
        from advdiff_cli.robustness.sweep_points import SweepRequest

        over = self.over
        if over == "ddpm" and purifier.defense == "noise":
            raise AdvdiffError("--over ddpm sweeps diffusion models; --defense noise has none")
        fixed = {
            "ddpm": purifier.ddpm,
            "t-star": purifier.t_star,
            "sampler-steps": purifier.sampler_steps,
            "eps": self.eps,
        }
        if fixed[over] is not None:
            flag = "-m" if over == "ddpm" else f"--{over}"
            raise AdvdiffError(f"--over {over} takes its values from --values; leave out {flag}")
        if over == "eps" and self.max_drop is not None:
            raise AdvdiffError("--over eps chooses nothing, since eps is the attacker's; leave out --max-drop")
        if self.rule == "certified" and (over in ("eps",) or self.norm == "l2"):
            raise AdvdiffError(
                "--rule certified is about l-inf attacks of one size; leave out --over eps and --norm l2"
            )
        if self.method == "square" and self.gradient == "bpda":
            raise AdvdiffError("--method square takes no gradient; with --gradient full it attacks through the defense")
        if self.gradient == "blind" and self.eot is not None:
            raise AdvdiffError("--eot needs an attack through the defense: give --gradient full or bpda")
        radius = options.attack_radius("linf" if over == "eps" else self.norm, self.eps)
        defense = purifier.request(purifier.defense, compute, resume)
        attack = AttackRequest(steps=self.steps, gradient=self.gradient, eot=self.eot)
        return SweepRequest(over, self.values, defense, self.method, self.norm, radius, attack)
