"""`advdiff train-ddpm`."""

from typing import Annotated, Literal

import typer

from advdiff_cli import console, options
from advdiff_cli.cli.training import fit_precision, follow, open_sets, shared

_BATCH = 32


def train_ddpm(
    data: options.DataSets,
    out: options.Out,
    valid: Annotated[str | None, typer.Option(help="Patch set for the validation loss and the picture.")] = None,
    preset: Annotated[
        Literal["paper", "s2d2", "s2d4", "tiny"],
        typer.Option(help="The paper's U-Net, a small one on space-to-depth by 2 or 4, or pcam-ddpm's (tiny)."),
    ] = "tiny",
    max_t: Annotated[float, typer.Option(min=1e-3, max=1.0, help="Train noise levels up to this fraction of T.")] = 1.0,
    data_range: Annotated[
        Literal["-1,1", "0,1"], typer.Option(help="What pixels are scaled to; 0,1 is what the paper's model saw.")
    ] = "-1,1",
    init: Annotated[str | None, typer.Option(help="Start from this model's weights.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 12_000,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the cosine cycle.", show_default="1e-3 for tiny, else 3e-4")
    ] = None,
    ema: Annotated[float, typer.Option(min=0.0, max=1.0, help="Decay of the weights' moving average.")] = 0.999,
    split: options.Split = None,
    batch_size: options.FixedBatch = _BATCH,
    seed: options.Seed = 0,
    allow_pickle: options.AllowPickle = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    compiled: options.Compile = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a diffusion model on patches, labelled or not; diffusers loads the folder it writes.

    The defaults but --max-t are those of the bundled pcam-ddpm, which has 0.3 and is a purifier and no generator.

    Along the way it writes the validation loss of each noise level (training.jsonl) and a picture of clean, noised and
    denoised patches (samples.png). Run again after an interruption, it ends in the same weights as an uninterrupted
    run.

    Example: advdiff train-ddpm train.h5 --valid valid.h5 --max-t 0.3 -o ddpm
    """
    from advdiff_cli.data.distributed import together
    from advdiff_cli.data.provenance import provenance, recipe
    from advdiff_cli.models import registry
    from advdiff_cli.models.ddpm import DdpmCard, Purification, save_ddpm
    from advdiff_cli.models.device import resolve_device
    from advdiff_cli.training.checkpoints import WorkFolder
    from advdiff_cli.training.fit_ddpm import GRID, DdpmPlan, fit_ddpm
    from advdiff_cli.training.loader import TrainingRows

    rate = _peak_rate(learning_rate, preset)
    chip = resolve_device(device)
    recorded = registry.recorded_recipe(out)
    sets, valid_set = open_sets(data, valid, split)
    exact = fit_precision(precision, out, recorded, chip)
    plan = DdpmPlan(steps, batch_size or _BATCH, rate, ema, max_t, seed, exact)
    made_by = recipe(
        "train-ddpm",
        plan.parameters()
        | {"preset": preset, **shared(plan.batch_size)}
        | ({} if data_range == "-1,1" else {"data_range": data_range})
        | ({"compiled": True} if compiled else {}),
        data=[s.recipe_input() for s in sets],
        valid=valid_set and valid_set.recipe_input(),
        init=init and registry.fingerprint(registry.find_ddpm(init, allow_pickle=allow_pickle)),
    )
    with together() as processes, WorkFolder(
        out, made_by, recorded, overwrite=overwrite, first=processes.first
    ) as work:  # fmt: skip
        processes.wait()  # for the first to lay it down
        if work.up_to_date:
            console.log(f"{out} is up to date")
        else:
            rows = TrainingRows(sets, labelled=False)
            shapes = [rows.shape, *([valid_set.require_shape()] if valid_set else [])]
            low, high = map(float, data_range.split(","))
            model = registry.initial_ddpm(init, preset, shapes, max_t, seed, (low, high), allow_pickle=allow_pickle)
            if compiled:
                model.to(chip).compile_unet()
            follow(fit_ddpm(model, rows, valid_set, plan, work, chip), steps, "train-ddpm", quiet=quiet)
            made = provenance(made_by, inputs=[s.provenance for s in sets if s.provenance], device=chip.type)
            paper = Purification(t_star=min(Purification.t_star, max_t))
            model.card = DdpmCard(model.card.space_to_depth, max_t, (low, high), recommended=paper, provenance=made)
            if processes.first:
                save_ddpm(model.cpu(), work.final)
                work.publish(GRID)
    if not processes.first:
        return
    log = registry.training_log(out)
    text = f"{out}: {preset}, {log[-1]['step']} steps, loss {log[-1]['loss']:.4f}"
    console.emit({"out": str(out), "log": log}, text, out, as_json=as_json, quiet=quiet)


def _peak_rate(given: float | None, preset: str) -> float:
    """Return the learning rate that is given, or the preset's; AdvdiffError where it is not above 0."""
    rate = given if given is not None else 1e-3 if preset == "tiny" else 3e-4
    options.need_positive(learning_rate=rate)
    return rate
