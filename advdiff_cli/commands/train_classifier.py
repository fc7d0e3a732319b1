"""`advdiff train-classifier`."""

from typing import Annotated

import typer

from advdiff_cli import console, options

_BATCH = 64


def train_classifier(
    data: options.DataSets,
    out: options.Out,
    valid: Annotated[str | None, typer.Option(help="Patch set that chooses the best epoch.")] = None,
    arch: Annotated[str, typer.Option(help="Any torchvision classification architecture.")] = "resnet18",
    init: Annotated[str | None, typer.Option(help="Start from this classifier's weights.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 12,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine cycle.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="AdamW's weight decay.")] = 0.05,
    stain: Annotated[float, typer.Option(min=0.0, help="Strength of stain variation; 0 for none.")] = 0.2,
    split: options.Split = None,
    batch_size: options.BatchSize = _BATCH,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a classifier on labelled patches, with flips, quarter turns and stain variation.

    The weights of the epoch that does best on --valid are kept, and its log-odds calibrated there (Platt).

    Run again after an interruption, it ends in the same weights as an uninterrupted run.

    Example: advdiff train-classifier train.h5 --valid valid.h5 -o classifier
    """
    from advdiff_cli.commands.following import follow
    from advdiff_cli.data.patches import open_patches
    from advdiff_cli.data.provenance import provenance, recipe
    from advdiff_cli.models import zoo
    from advdiff_cli.models.classifiers import ClassifierConfig, save_classifier
    from advdiff_cli.models.device import resolve_device, resolve_precision
    from advdiff_cli.training.checkpoints import WorkFolder
    from advdiff_cli.training.fit_classifier import BEST, ClassifierPlan, channel_statistics, fit_classifier
    from advdiff_cli.training.rows import TrainingRows

    options.need_positive(learning_rate=learning_rate)
    chip = resolve_device(device)
    sets = [open_patches(path, split=split) for path in data]
    valid_set = None if valid is None else open_patches(valid, split=None if split is None else "valid")
    plan = ClassifierPlan(
        epochs, batch_size or _BATCH, learning_rate, weight_decay, stain, seed, resolve_precision(precision, chip)
    )
    made_by = recipe(
        "train-classifier",
        plan.parameters() | {"arch": arch},
        data=[s.recipe_input() for s in sets],
        valid=valid_set and valid_set.recipe_input(),
        init=init and zoo.fingerprint(zoo.find_classifier(init)),
    )
    work = WorkFolder(out, made_by, zoo.recorded_recipe(out), overwrite=overwrite)
    if work.up_to_date:
        console.log(f"{out} is up to date")
    else:
        rows = TrainingRows(sets, labelled=True)
        mean, std = channel_statistics(rows, seed)
        model = zoo.initial_classifier(init, ClassifierConfig(arch, mean, std), seed)
        records = fit_classifier(model, rows, valid_set, plan, work, chip)
        follow(records, rows.steps(plan.batch_size) * epochs, "train-classifier", quiet=quiet)
        made = provenance(made_by, inputs=[s.provenance for s in sets if s.provenance], device=chip.type)
        save_classifier(model, work.part, made)
        work.publish(BEST)
    last = zoo.training_log(out)[-1]
    accuracy = last.get("valid_accuracy")
    text = f"{out}: {arch}, {last['epoch']} epochs" + (f", last valid accuracy {accuracy:.3f}" if accuracy else "")
    console.emit({"out": str(out), "log": zoo.training_log(out)}, text, out, as_json=as_json, quiet=quiet)
