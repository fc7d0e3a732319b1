"""Options for a classifier: its training, and how patches are purified and attacked before."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from advdiff_cli.cli import options
from advdiff_cli.cli.parsers import fraction
from advdiff_cli.cli.training_input import InputRequest, parse_augmentation
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.training.recipes import Adversary

_INPUT = "Purified and attacked patches"
_ATTACK_STEPS = 7
_BETA = 6.0


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """The classifier, and how it is trained."""

    arch: Annotated[
        str | None,
        typer.Option(help="Any torchvision classification architecture.", show_default="that of --init, else resnet18"),
    ] = None
    init: Annotated[str | None, typer.Option(help="Start from the weights of this classifier.")] = None
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 12
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine cycle.")] = 1e-3
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Weight decay of AdamW.")] = 0.05
    stain: Annotated[float, typer.Option(min=0.0, help="Strength of stain variation; 0 for none.")] = 0.2
    ema: Annotated[
        float | None,
        typer.Option(help="Publish a moving average of the weights, with this decay.", show_default="none"),
    ] = None
    batch_size: options.FixedBatch = 64


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """How patches are purified and attacked before the classifier is trained on them."""

    augment: Annotated[
        list[str] | None,
        typer.Option(
            help="none, noise:T or purify:MODEL[:T[:STEPS]]: each patch passes one of these, chosen at random.",
            show_default="none",
            rich_help_panel=_INPUT,
        ),
    ] = None
    adversarial: Annotated[
        bool,
        typer.Option(
            "--adversarial", help="Train on patches attacked by PGD, through --augment.", rich_help_panel=_INPUT
        ),
    ] = False
    norm: Annotated[
        Literal["linf", "l2"] | None,
        typer.Option(help="Norm of its ball.", show_default="linf", rich_help_panel=_INPUT),
    ] = None
    eps: Annotated[
        float | None,
        typer.Option(
            parser=fraction,
            metavar="EPS",
            help="Radius of its ball in [0, 1] pixels; for l2, of the patch after --crop and --pool.",
            show_default="2/255; l2: required",
            rich_help_panel=_INPUT,
        ),
    ] = None
    attack_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Its steps.", show_default=str(_ATTACK_STEPS), rich_help_panel=_INPUT),
    ] = None
    loss: Annotated[
        Literal["madry", "trades"] | None,
        typer.Option(
            help="madry: cross-entropy on attacked patches; trades: on clean ones, plus the divergence of the two.",
            show_default="madry",
            rich_help_panel=_INPUT,
        ),
    ] = None
    beta: Annotated[
        float | None,
        typer.Option(help="Weight of that divergence.", show_default=str(_BETA), rich_help_panel=_INPUT),
    ] = None
    consistency: Annotated[
        float | None,
        typer.Option(
            help="For certificates: weight of the divergence of the outputs under two draws of the noise.",
            show_default="none",
            rich_help_panel=_INPUT,
        ),
    ] = None

    def request(self, *, allow_pickle: bool) -> InputRequest:
        """Return what is asked for.

        Raises:
            AdvdiffError: Options do not fit together, or there is no such model.
        """
        adversary = self._adversary()
        augment = [parse_augmentation(text, allow_pickle=allow_pickle) for text in self.augment or ["none"]]
        options.require_positive(consistency=self.consistency)
        if self.consistency is not None and not any(augment):
            raise AdvdiffError("--consistency requires noise: give --augment purify:MODEL or noise:T")
        if self.consistency is not None and self.loss == "trades":
            raise AdvdiffError("--consistency and --loss trades: choose one")
        return InputRequest(augment, adversary, self.consistency)

    def _adversary(self) -> "Adversary | None":
        from advdiff_cli.training.recipes import Adversary

        if not self.adversarial:
            if (self.norm, self.eps, self.attack_steps, self.loss, self.beta) != (None,) * 5:
                raise AdvdiffError("--norm, --eps, --attack-steps, --loss and --beta require --adversarial")
            return None
        if self.beta is not None and self.loss != "trades":
            raise AdvdiffError("--beta requires --loss trades")
        options.require_positive(eps=self.eps, beta=self.beta)
        norm = self.norm or "linf"
        eps = options.attack_radius(norm, self.eps)
        beta = _BETA if self.beta is None else self.beta
        return Adversary(eps, self.attack_steps or _ATTACK_STEPS, self.loss or "madry", beta, norm)
