"""Options that several commands have: each is defined once, so that a flag means the same everywhere."""

from math import inf
from typing import Annotated, Literal

import typer

from advdiff_cli.cli.parsers import MAX_BATCH, fraction
from advdiff_cli.errors import AdvdiffError

ROWS = "Rows"
COMPUTE = "Compute"
OUTPUT = "Output"
DEFENSE = "Defense"
DRAWS = 11  # of a defense's noise, that judge a patch; odd, since there are two classes
_MAX_LENGTH = 1e5  # of a change of a patch; one of 512 x 512 pixels changes by at most 887

Data = Annotated[str, typer.Argument(help="Patch set: .safetensors, .h5, PCam's folder (with --split), or images.")]
DataSets = Annotated[list[str], typer.Argument(help="Patch sets; a set named twice counts twice.")]
ClassifierName = Annotated[
    str,
    typer.Option(
        "-c", "--classifier", help="Classifier: folder, bundled name, Hub id, TIAToolbox's .pth, or module:callable."
    ),
]
DdpmName = Annotated[str | None, typer.Option("-m", "--ddpm", help="Diffusion model: folder, bundled name or Hub id.")]
Seed = Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Seed of every random stream.")]
Split = Annotated[
    str | None, typer.Option(help="train, valid or test, for a folder of PCam's files.", rich_help_panel=ROWS)
]
FixedBatch = Annotated[
    int | None, typer.Option(min=1, max=MAX_BATCH, rich_help_panel=COMPUTE, help="Patches computed together.")
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        rich_help_panel=COMPUTE,
        help="Compile the U-Net: gradients are faster, but the first one takes a minute.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another result of that name.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.", rich_help_panel=OUTPUT)]
Draws = Annotated[
    int | None,
    typer.Option(
        min=1, help="Draws of the defense's noise for each patch.", show_default=str(DRAWS), rich_help_panel=DEFENSE
    ),
]
Norm = Annotated[Literal["linf", "l2"], typer.Option(help="Norm of the ball.")]
Eps = Annotated[
    float | None,
    typer.Option(
        parser=fraction,
        metavar="EPS",
        help="Radius of the ball in [0, 1] pixels; for l2, of the whole patch.",
        show_default="2/255; l2: required",
    ),
]


def resolve_draws(draws: int | None, *, defended: bool) -> int:
    """Return the number of draws that judge a patch.

    Raises:
        AdvdiffError: There is no defense to draw for.
    """
    if draws is not None and not defended:
        raise AdvdiffError("--draws is about a defense's noise: give -m, or --defense noise")
    return (draws or DRAWS) if defended else 1


def attack_radius(norm: str, eps: float | None, option: str = "eps") -> float:
    """Return the radius asked for by an option, or the default of the norm.

    Raises:
        AdvdiffError: There is no default, or the radius does not fit pixels in [0, 1].
    """
    if eps is None and norm == "l2":
        raise AdvdiffError("--norm l2 needs --eps, the length of the perturbation of a whole patch, such as 0.5")
    radius = 2 / 255 if eps is None else eps
    require_positive(**{option: radius})
    if norm == "linf" and radius > 1:
        raise AdvdiffError(f"--{option} {radius:g} exceeds the range of pixels, [0, 1]; did you mean {radius:g}/255?")
    if norm == "l2" and radius > _MAX_LENGTH:
        raise AdvdiffError(f"--{option} {radius:g} is longer than any change of a patch; give an l2 radius such as 0.5")
    return radius


def require_decay(**values: float | None) -> None:
    """Check that each named value is at least zero and below one, or None.

    Raises:
        AdvdiffError: One is not.
    """
    for name, value in values.items():
        if value is not None and not 0 <= value < 1:
            raise AdvdiffError(f"--{name} must be at least 0 and below 1, not {value:g}")


def require_positive(**values: float | None) -> None:
    """Check that each named value is above zero and finite, or None.

    Raises:
        AdvdiffError: One is not.
    """
    for name, value in values.items():
        if value is not None and not 0 < value < inf:
            raise AdvdiffError(f"--{name.replace('_', '-')} must be above 0 and finite, not {value}")
