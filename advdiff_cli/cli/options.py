"""The shared command-line options: each spelled once, the same flag meaning the same everywhere."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from advdiff_cli.errors import AdvdiffError

_MOST_AT_ONCE = 65_536


def fraction(text: str | float) -> float:
    """Read a number or a fraction such as 2/255; Typer passes a default through as it is."""
    top, _, bottom = str(text).partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{text!r} is neither a number nor a fraction such as 2/255") from None


def row_range(text: str) -> tuple[int, int | None]:
    """Read A:B, either end of which may be left out."""
    start, colon, stop = text.partition(":")
    try:
        bounds = (int(start or 0), int(stop) if stop else None)
    except ValueError:
        bounds = (-1, None)
    if not colon or bounds[0] < 0 or (bounds[1] is not None and bounds[1] < 0):
        raise typer.BadParameter(f"{text!r} is no range of rows such as 0:1000")
    return bounds


def batch_of(text: str) -> int | str:
    """Read a number of patches, or auto."""
    if text != "auto" and not (text.isdigit() and 1 <= int(text) <= _MOST_AT_ONCE):
        raise typer.BadParameter(f"{text!r} is neither a number of patches from 1 to {_MOST_AT_ONCE} nor auto")
    return text if text == "auto" else int(text)


def shard_of(text: str) -> tuple[int, int]:
    """Read i/n with 0 <= i < n."""
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise typer.BadParameter(f"{text!r} is no shard i/n with i from 0 to n-1")
    return int(i), int(n)


ROWS = "Rows"
MACHINE = "Machine"
OUTPUT = "Output"
DEFENCE = "Defence"

Data = Annotated[str, typer.Argument(help="Patch set: .safetensors, .h5, PCam's folder (with --split), or images.")]
DataSets = Annotated[list[str], typer.Argument(help="Patch sets; one named twice counts twice.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where the result goes.")]
ClassifierName = Annotated[
    str,
    typer.Option(
        "-c", "--classifier", help="Classifier: folder, bundled name, Hub id, TIAToolbox's .pth, or module:callable."
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights, of a source you trust.", rich_help_panel="Models")
]
_DDPM = "Diffusion model: folder, bundled name or Hub id."
DdpmName = Annotated[str | None, typer.Option("-m", "--ddpm", help=_DDPM)]
PurifierName = Annotated[str | None, typer.Option("-m", "--ddpm", help=_DDPM, show_default="pcam-ddpm")]
Split = Annotated[
    str | None, typer.Option(help="train, valid or test, in a folder of PCam's files.", rich_help_panel=ROWS)
]
Labels = Annotated[Path | None, typer.Option(help="CSV of file,label for a folder of images.", rich_help_panel=ROWS)]
Limit = Annotated[int | None, typer.Option(min=1, help="At most N patches.", rich_help_panel=ROWS)]
Range = Annotated[
    object | None,
    typer.Option(
        "--range",
        parser=row_range,
        metavar="A:B",
        help="Rows A to B-1 only; either may be left out.",
        rich_help_panel=ROWS,
    ),
]
ShuffleSeed = Annotated[
    int | None, typer.Option(min=0, help="Shuffle the rows before the others select.", rich_help_panel=ROWS)
]
Shard = Annotated[
    object | None,
    typer.Option(parser=shard_of, metavar="I/N", help="Only part I of N, I from 0; see merge.", rich_help_panel=ROWS),
]
Seed = Annotated[int, typer.Option(help="Seed of every random stream.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"], typer.Option(rich_help_panel=MACHINE, help="Where to compute.")
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(rich_help_panel=MACHINE, help="Of U-Nets and of training; auto: bf16 where the device has it."),
]
FixedBatch = Annotated[
    int | None, typer.Option(min=1, max=_MOST_AT_ONCE, rich_help_panel=MACHINE, help="Patches computed at once.")
]
BatchSize = Annotated[
    object | None,
    typer.Option(
        parser=batch_of, metavar="N|auto", rich_help_panel=MACHINE,
        help="Patches computed at once, 32 or for purify 16 unless told; auto: by cores and free memory.",
    ),
]  # fmt: skip
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", rich_help_panel=MACHINE, help="Compile the U-Net: gradients are faster, the first a minute late."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another result at --out.", rich_help_panel=OUTPUT)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print the output path alone.", rich_help_panel=OUTPUT)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.", rich_help_panel=OUTPUT)]
Eps = Annotated[
    float | None,
    typer.Option(
        parser=fraction, metavar="EPS", help="Attack budget, pixels being in [0, 1]; for l2 of a whole patch, say 0.5.",
        show_default="2/255; none for l2",
    ),
]  # fmt: skip
Defense = Annotated[
    Literal["none", "noise", "ddpm"] | None,
    typer.Option(
        help="What stands before the classifier.", show_default="ddpm with -m, else none", rich_help_panel=DEFENCE
    ),
]
TStar = Annotated[
    float | None,
    typer.Option(
        help="Noise level, a fraction of T in (0, 1].",
        show_default="the model's own; for noise 0.04",
        rich_help_panel=DEFENCE,
    ),
]
Sampler = Annotated[
    Literal["ddpm", "ddim"] | None,
    typer.Option(help="Reverse process.", show_default="the model's own", rich_help_panel=DEFENCE),
]
SamplerSteps = Annotated[
    int | None,
    typer.Option(min=1, help="U-Net evaluations a patch.", show_default="the model's own", rich_help_panel=DEFENCE),
]


def budget(norm: str, eps: float | None) -> float:
    """Return the attack budget asked for, or the usual one of the norm.

    Raises:
        AdvdiffError: there is none, or it is no budget of pixels in [0, 1].
    """
    if eps is None and norm == "l2":
        raise AdvdiffError("--norm l2 needs --eps, the length of the whole patch's perturbation, such as 0.5")
    found = 2 / 255 if eps is None else eps
    need_positive(eps=found)
    if norm == "linf" and found > 1:
        raise AdvdiffError(f"--eps {found:g} is more than pixels in [0, 1] can change; of 255 it is {found:g}/255")
    return found


def need_positive(**values: float) -> None:
    """Check that each named value is above zero."""
    for name, value in values.items():
        if not value > 0:
            raise AdvdiffError(f"--{name.replace('_', '-')} must be above 0, not {value}")
