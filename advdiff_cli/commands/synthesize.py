"""`advdiff synthesize`."""

from typing import Annotated

import typer

from advdiff_cli import console, options

_BATCH = 32


def synthesize(
    out: options.Out,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="Number of patches.")],
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw synthetic H&E-like patches with labels: the same patches for the same seed, another seed for another set.

    Example: advdiff synthesize -n 256 -o tissue.safetensors
    """
    from advdiff_cli.data.patch_writer import Part, PatchWriter
    from advdiff_cli.data.patches import PatchSet
    from advdiff_cli.data.provenance import recipe
    from advdiff_cli.datasets.synthetic import SyntheticSource

    source = PatchSet(SyntheticSource(number, seed))
    made_by = recipe("synthesize", {"seed": seed, "n": number})
    whole, shape = Part(0, number, number), source.require_shape()
    sink = PatchWriter(out, made_by, source, whole, shape=shape, dtype="uint8", overwrite=overwrite, inputs=[])
    if sink.up_to_date:
        console.log(f"{out} is up to date")
    else:
        with sink, console.progress(number, "synthesize", done=int(sink.finished.sum()), quiet=quiet) as advance:
            for batch in sink.batches(_BATCH):
                sink.write(batch, source.source.read(batch.rows[: batch.count]))
                advance(batch.count)
    positive = int(source.require_labels().sum())
    result = {"out": str(out), "status": "up to date" if sink.up_to_date else "done", "n": number, "positive": positive}
    console.emit(result, f"{out}: {number} patches, {positive} positive", out, as_json=as_json, quiet=quiet)
