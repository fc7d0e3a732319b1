"""`advdiff synthesize`."""

from typing import Annotated

import typer

from advdiff_cli import console
from advdiff_cli.cli import options, up_to_date
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import OutputOptions


@with_option_groups
def synthesize(
    number: Annotated[int, typer.Option("-n", "--number", min=1, max=1_000_000, help="Number of patches.")],
    output: OutputOptions,
    seed: options.Seed = 0,
) -> None:
    """Draw synthetic H&E-like patches with labels; the same seed always gives the same patches.

    Example: advdiff synthesize -n 256 -o tissue.safetensors
    """
    from advdiff_cli.datasets.synthetic import write_synthetic

    with console.progress(number, "synthesize", quiet=output.quiet) as advance:
        writer, positive = write_synthetic(output.out, number, seed, overwrite=output.overwrite, advance=advance)
    if writer.up_to_date:
        up_to_date.keep(output.out)
    status = "up to date" if writer.up_to_date else "done"
    result = {"out": str(output.out), "status": status, "n": number, "positive": positive}
    output.emit(result, f"{output.out}: {number} patches, {positive} positive", output.out)
