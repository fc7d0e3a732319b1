"""`advdiff train-classifier`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from advdiff_cli import console, options
from advdiff_cli.commands.training import fit_precision, follow, open_sets

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
    from advdiff_cli.data.provenance import provenance, recipe
    from advdiff_cli.models import zoo
    from advdiff_cli.models.classifiers import ClassifierConfig, save_classifier
    from advdiff_cli.models.device import resolve_device
    from advdiff_cli.training.checkpoints import WorkFolder
    from advdiff_cli.training.fit_classifier import BEST, ClassifierPlan, channel_statistics, fit_classifier
    from advdiff_cli.training.rows import TrainingRows

    options.need_positive(learning_rate=learning_rate)
    chip = resolve_device(device)
    recorded = zoo.recorded_recipe(out)
    sets, valid_set = open_sets(data, valid, split)
    if valid_set is not None:
        valid_set.require_labels()
    exact = fit_precision(precision, out, recorded, chip)
    plan = ClassifierPlan(epochs, batch_size or _BATCH, learning_rate, weight_decay, stain, seed, exact)
    made_by = recipe(
        "train-classifier",
        plan.parameters() | {"arch": arch},
        data=[s.recipe_input() for s in sets],
        valid=valid_set and valid_set.recipe_input(),
        init=init and zoo.fingerprint(zoo.find_classifier(init)),
    )
    work = WorkFolder(out, made_by, recorded, overwrite=overwrite)
    if work.up_to_date:
        console.log(f"{out} is up to date")
    else:
        rows = TrainingRows(sets, labelled=True)
        mean, std = channel_statistics(rows, seed)
        model = zoo.initial_classifier(init, ClassifierConfig(arch, mean, std), seed, rows.shape)
        records = fit_classifier(model, rows, valid_set, plan, work, chip)
        follow(records, rows.steps(plan.batch_size) * epochs, "train-classifier", quiet=quiet)
        if valid_set is not None:
            work.log({"step": rows.steps(plan.batch_size) * epochs, "published": _judge(model, valid_set, work, chip)})
        made = provenance(made_by, inputs=[s.provenance for s in sets if s.provenance], device=chip.type)
        save_classifier(model, work.part, made)
        work.publish(BEST)
    _report(out, arch, epochs, zoo.training_log(out), as_json, quiet)


def _report(out: Path, arch: str, epochs: int, log: list[dict[str, Any]], as_json: bool, quiet: bool) -> None:
    from advdiff_cli.evaluation.intervals import Estimate

    published = log[-1].get("published")
    text = f"{out}: {arch}, {epochs} epochs"
    if published is not None:
        accuracy = Estimate(**published["valid_accuracy"])
        text += f"; epoch {published['epoch']} published, valid accuracy {accuracy} %, n = {published['n']}"
    console.emit({"out": str(out), "published": published, "log": log}, text, out, as_json=as_json, quiet=quiet)


def _judge(model: Any, valid: Any, work: Any, chip: Any) -> dict[str, Any]:
    """Return which epoch is published and what it makes of the valid rows, calibrated, in fp32."""
    import numpy as np

    from advdiff_cli.evaluation.intervals import wilson
    from advdiff_cli.evaluation.metrics import Predictions, predict
    from advdiff_cli.training.fit_classifier import BEST

    judged = Predictions(valid.require_labels(), np.concatenate(list(predict(model, valid, chip))))
    right = int(judged.correct.sum())
    return {
        "epoch": work.load(BEST)[1]["epoch"],
        "n": len(valid),
        "valid_accuracy": wilson(right, len(valid)).as_dict(),
    }
