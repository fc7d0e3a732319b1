"""The defence that the flags --defense, -m, --t-star, --sampler and --sampler-steps ask for."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from advdiff_cli import console
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from torch import device as Chip
    from torch import nn

    from advdiff_cli.models.ddpm import Ddpm
    from advdiff_cli.purification.defended_classifier import DefendedClassifier
    from advdiff_cli.purification.purifier import Purifier

DEFAULT_DDPM = "pcam-ddpm"


@dataclass(frozen=True)
class Defence:
    """A purifier with what enters the recipe: its parameters and the model's fingerprint."""

    purifier: "Purifier"
    parameters: dict[str, Any]
    model: str | None

    def compile_unet(self, chip: "Chip") -> None:
        """Let torch compile the U-Net where gradients are taken.

        Raises:
            AdvdiffError: there is no U-Net, or torch cannot compile.
        """
        from advdiff_cli.purification.purifier import DiffusionPurifier

        if not isinstance(self.purifier, DiffusionPurifier):
            raise AdvdiffError("--compile: NoiseDefense has no U-Net to compile")
        self.purifier.ddpm.to(chip).compile_unet()

    def before(self, classifier: "nn.Module", chip: "Chip", precision: str) -> "DefendedClassifier":
        """Return the defended classifier on the device, purifying at a precision, its parameters frozen."""
        from advdiff_cli.purification.defended_classifier import DefendedClassifier

        return DefendedClassifier(self.purifier, classifier, precision).to(chip).requires_grad_(False).eval()


def asked_defence(
    defense: str | None, ddpm: str | None, t_star: float | None, sampler: str | None, sampler_steps: int | None,
    *, allow_pickle: bool = False,
) -> Defence | None:  # fmt: skip
    """Build the defence that stands before a classifier: by default a DDPM where one is named, and none otherwise.

    Raises:
        AdvdiffError: as build_defence, or settings of a defence are given without one.
    """
    kind = defense or ("ddpm" if ddpm else "none")
    if kind != "none":
        return build_defence(kind, ddpm, t_star, sampler, sampler_steps, allow_pickle=allow_pickle)
    if (ddpm, t_star, sampler, sampler_steps) != (None,) * 4:
        raise AdvdiffError("--t-star, --sampler, --sampler-steps and -m are a defence's: give -m, or --defense noise")
    return None


def load_model(name: str, allow_pickle: bool) -> "tuple[Ddpm, str]":
    """Return the diffusion model called `name` and its fingerprint."""
    from advdiff_cli.models import registry
    from advdiff_cli.models.ddpm import load_ddpm

    folder = registry.find_ddpm(name, allow_pickle=allow_pickle)
    return load_ddpm(folder, allow_pickle=allow_pickle), registry.fingerprint(folder)


def build_defence(
    defense: str, ddpm: str | None, t_star: float | None, sampler: str | None, sampler_steps: int | None,
    *, allow_pickle: bool = False, load: "Callable[[str, bool], tuple[Ddpm, str]]" = load_model,
) -> Defence:  # fmt: skip
    """Build the purifier; what is not asked for is the model's recommendation, said on stderr.

    `load` is how a diffusion model is loaded, for commands that build many defences of one.

    Raises:
        AdvdiffError: the model is not there, or the settings do not fit it.
    """
    from advdiff_cli.models.ddpm import PAPER
    from advdiff_cli.purification.equations import noise_levels
    from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, linear_alpha_bar

    if defense == "none":
        raise AdvdiffError("--defense none: there is nothing to purify with")
    if defense == "noise":
        if ddpm or sampler or sampler_steps:
            raise AdvdiffError(
                "--defense noise is the forward process alone; -m, --sampler and --sampler-steps do not apply"
            )
        level = PAPER.t_star if t_star is None else t_star
        return Defence(NoisePurifier(linear_alpha_bar(), level), {"defense": "noise", "t_star": level}, None)
    model, fingerprint = load(ddpm or DEFAULT_DDPM, allow_pickle)
    settings = asdict(model.card.recommended)
    if t_star is not None and sampler_steps is None and settings["sampler_steps"] is not None:
        settings["sampler_steps"] = min(settings["sampler_steps"], noise_levels(t_star, model.timesteps))
    asked = {"t_star": t_star, "sampler": sampler, "sampler_steps": sampler_steps}
    settings |= {k: v for k, v in asked.items() if v is not None}
    if None in asked.values():
        steps = settings["sampler_steps"] or "every noise level"
        console.log(f"{ddpm or DEFAULT_DDPM}: t* {settings['t_star']:g}, sampler {settings['sampler']}, steps {steps}")
    return Defence(DiffusionPurifier(model, **settings).eval(), {"defense": "ddpm", **settings}, fingerprint)


def attack_precision(asked: str, begun: Mapping[str, Any], chip: "Chip") -> str:
    """Return the precision at which a purifier is attacked and judged; `auto` is that of the attack begun, if any.

    Raises:
        AdvdiffError: gradients underflow in it.
    """
    from advdiff_cli.jobs.attack import goes_through
    from advdiff_cli.models.device import resolve_precision

    if asked == "auto" and goes_through(begun):
        asked = begun["precision"]

    if asked == "fp16":
        raise AdvdiffError("--precision fp16: gradients underflow in it; attack in bf16 or fp32")
    return resolve_precision(asked, chip)
