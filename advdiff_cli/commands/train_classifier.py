"""`advdiff train-classifier`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from advdiff_cli import console, options
from advdiff_cli.cli.training import asked_regime, fit_precision, follow, open_sets, shared
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.training.adversarial import Adversary
    from advdiff_cli.training.checkpoints import WorkFolder
    from advdiff_cli.training.fit_classifier import OnValid

_BATCH = 64
_ATTACK_STEPS = 7
_BETA = 6.0
_REGIME = "Regime"


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
    augment: Annotated[
        list[str] | None,
        typer.Option(
            help="none, noise:T or purify:MODEL[:T[:STEPS]]: patches pass one of those named, at random.",
            show_default="none",
            rich_help_panel=_REGIME,
        ),
    ] = None,
    adversarial: Annotated[
        bool,
        typer.Option(
            "--adversarial", help="Learn from patches attacked by PGD, through --augment.", rich_help_panel=_REGIME
        ),
    ] = False,
    eps: Annotated[
        float | None,
        typer.Option(
            parser=options.fraction,
            metavar="EPS",
            help="Its l-inf budget in [0, 1] pixels.",
            show_default="2/255",
            rich_help_panel=_REGIME,
        ),
    ] = None,
    attack_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Its steps.", show_default=str(_ATTACK_STEPS), rich_help_panel=_REGIME),
    ] = None,
    loss: Annotated[
        Literal["madry", "trades"] | None,
        typer.Option(
            help="Cross-entropy on attacked patches; trades: on clean ones, and the divergence of the two.",
            show_default="madry",
            rich_help_panel=_REGIME,
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Weight of that divergence.", show_default=str(_BETA), rich_help_panel=_REGIME),
    ] = None,
    split: options.Split = None,
    batch_size: options.FixedBatch = _BATCH,
    seed: options.Seed = 0,
    allow_pickle: options.AllowPickle = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a classifier on labelled patches, with flips, quarter turns and stain variation.

    The weights of the epoch that does best on --valid are kept, and its log-odds calibrated there (Platt). --augment
    trains the classifier for use behind a defence, --adversarial against an attack on it and on the defence; --valid is
    then seen the same way, and attacked patches choose the epoch.

    Run again after an interruption, it ends in the same weights as an uninterrupted run.

    Example: advdiff train-classifier train.h5 --valid valid.h5 -o classifier
    """
    from advdiff_cli.data.distributed import together
    from advdiff_cli.data.provenance import provenance, recipe
    from advdiff_cli.models import registry
    from advdiff_cli.models.classifiers import ClassifierConfig, save_classifier
    from advdiff_cli.models.device import resolve_device
    from advdiff_cli.training.checkpoints import WorkFolder
    from advdiff_cli.training.fit_classifier import ClassifierPlan, OnValid, channel_statistics, fit_classifier
    from advdiff_cli.training.loader import TrainingRows

    options.need_positive(learning_rate=learning_rate)
    chip = resolve_device(device)
    recorded = registry.recorded_recipe(out)
    sets, valid_set = open_sets(data, valid, split)
    if valid_set is not None:
        valid_set.require_labels()
    exact = fit_precision(precision, out, recorded, chip)
    adversary = _adversary(adversarial, eps, attack_steps, loss, beta)
    if adversary is not None and exact == "fp16":
        raise AdvdiffError("--precision fp16: gradients of the attack underflow in it; train in bf16 or fp32")
    asked = asked_regime(augment, adversary, allow_pickle=allow_pickle)
    plan = ClassifierPlan(epochs, batch_size or _BATCH, learning_rate, weight_decay, stain, seed, exact)
    made_by = recipe(
        "train-classifier",
        plan.parameters() | {"arch": arch} | asked.parameters() | shared(plan.batch_size),
        data=[s.recipe_input() for s in sets],
        valid=valid_set and valid_set.recipe_input(),
        init=init and registry.fingerprint(registry.find_classifier(init)),
    )
    with together() as processes, WorkFolder(
        out, made_by, recorded, overwrite=overwrite, first=processes.first
    ) as work:  # fmt: skip
        processes.wait()  # for the first to lay it down
        if work.up_to_date:
            console.log(f"{out} is up to date")
        else:
            rows = TrainingRows(sets, labelled=True)
            mean, std = channel_statistics(rows, seed)
            model = registry.initial_classifier(init, ClassifierConfig(arch, mean, std), seed, rows.shape)
            regime, steps = asked.build(exact, seed, chip), rows.steps(plan.batch_size) * epochs
            records = fit_classifier(model, rows, valid_set, plan, work, chip, regime)
            follow(records, steps, "train-classifier", quiet=quiet)
            if processes.first:
                if valid_set is not None:
                    found = OnValid(model, valid_set, plan.batch_size, regime, chip)
                    work.log({"step": steps, "published": _judge(found, work)})
                made = provenance(made_by, inputs=[s.provenance for s in sets if s.provenance], device=chip.type)
                save_classifier(model, work.final, made)
                work.publish()
    if processes.first:
        _report(out, arch, epochs, registry.training_log(out), as_json, quiet)


def _adversary(
    adversarial: bool, eps: float | None, steps: int | None, loss: Literal["madry", "trades"] | None, beta: float | None
) -> "Adversary | None":  # fmt: skip
    from advdiff_cli.training.adversarial import Adversary

    if not adversarial:
        if (eps, steps, loss, beta) != (None,) * 4:
            raise AdvdiffError("--eps, --attack-steps, --loss and --beta are of --adversarial")
        return None
    if beta is not None and loss != "trades":
        raise AdvdiffError("--beta is of --loss trades")
    asked = {"eps": 2 / 255 if eps is None else eps, "beta": _BETA if beta is None else beta}
    options.need_positive(**asked)
    return Adversary(asked["eps"], steps or _ATTACK_STEPS, loss or "madry", asked["beta"])


def _report(out: Path, arch: str, epochs: int, log: list[dict[str, Any]], as_json: bool, quiet: bool) -> None:
    from advdiff_cli.evaluation.statistics import Estimate

    published = log[-1].get("published")
    text = f"{out}: {arch}, {epochs} epochs"
    if published is not None:
        accuracy = Estimate(**published["valid_accuracy"])
        text += f"; epoch {published['epoch']} published, valid accuracy {accuracy} %, n = {published['n']}"
        if "valid_robust_accuracy" in published:
            text += f", attacked as in training {Estimate(**published['valid_robust_accuracy'])} %"
    console.emit({"out": str(out), "published": published, "log": log}, text, out, as_json=as_json, quiet=quiet)


def _judge(found: "OnValid", work: "WorkFolder") -> dict[str, Any]:
    """Return which epoch is published and what it makes of the valid rows, calibrated, in fp32."""
    from advdiff_cli.evaluation.statistics import wilson
    from advdiff_cli.training.fit_classifier import BEST

    kept, n = work.load(BEST), len(found.valid)

    def accuracy(*, attacked: bool) -> dict[str, float]:
        logits, labels = found.logits(attacked=attacked)
        return wilson(int((logits.argmax(1) == labels).sum()), n).as_dict()

    robust = {} if found.regime.adversary is None else {"valid_robust_accuracy": accuracy(attacked=True)}
    return {"epoch": kept and kept[1]["epoch"], "n": n, "valid_accuracy": accuracy(attacked=False), **robust}
