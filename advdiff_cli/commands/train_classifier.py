"""`advdiff train-classifier`."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.compute_options import SeededComputeOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import OutputOptions
from advdiff_cli.cli.parsers import fraction
from advdiff_cli.cli.training import (
    TrainingDataOptions,
    finished_precision,
    follow_training,
    process_parameters,
    train,
    training_noise,
    training_precision,
)
from advdiff_cli.cli.training_input import InputRequest, parse_augmentation
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from advdiff_cli.data.provenance import JsonObject, Provenance
    from advdiff_cli.data.rng import NoiseKind
    from advdiff_cli.models.precision import Precision
    from advdiff_cli.training.checkpoints import WorkFolder
    from advdiff_cli.training.recipes import Adversary
    from advdiff_cli.training.validation import Validation

_INPUT = "Purified and attacked patches"
_ATTACK_STEPS = 7
_BETA = 6.0


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """The classifier, and how it is trained."""

    arch: Annotated[str, typer.Option(help="Any torchvision classification architecture.")] = "resnet18"
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


@with_option_groups
def train_classifier(
    data: options.DataSets,
    sets: TrainingDataOptions,
    settings: ClassifierOptions,
    inputs: InputOptions,
    compute: SeededComputeOptions,
    output: OutputOptions,
) -> None:
    """Train a classifier on labelled patches, with flips, rotations by 90 degrees and stain variation.

    The weights of the epoch with the best accuracy on --valid are kept, and their log-odds are calibrated there
    (Platt scaling). --augment trains a classifier to stand behind a defense; --adversarial trains it against an
    attack on it and on the defense. Validation patches are then purified in the same way, and accuracy on attacked
    patches chooses the epoch, or with --consistency the share of patches that are right under each of several draws.
    A stopped training resumes to the same weights when the command is run again.

    Example: advdiff train-classifier train.h5 --valid valid.h5 -o classifier
    """
    from advdiff_cli.data.provenance import provenance, recipe, same_recipe
    from advdiff_cli.models import registry
    from advdiff_cli.models.classifier_config import ClassifierConfig
    from advdiff_cli.models.fingerprint import folder_fingerprint
    from advdiff_cli.training.recipes import ClassifierRecipe

    s, out = settings, output.out
    options.require_positive(learning_rate=s.learning_rate)
    options.require_decay(ema=s.ema)
    recorded = registry.recorded_recipe(out)
    opened = sets.open(data)
    if opened.valid is not None:
        opened.valid.require_labels()
    request, batch_size = inputs.request(allow_pickle=compute.allow_pickle), s.batch_size or 64

    def planned(precision: "Precision", noise: "NoiseKind") -> "tuple[ClassifierRecipe, Provenance]":
        fit_settings = ClassifierRecipe(
            s.epochs, batch_size, s.learning_rate, s.weight_decay, s.stain, compute.seed, precision, noise, s.ema
        )
        return fit_settings, recipe(
            "train-classifier",
            fit_settings.parameters()
            | {"arch": s.arch}
            | sets.view.parameters()
            | request.parameters()
            | process_parameters(batch_size),
            **opened.recipe_inputs(),
            init=s.init and folder_fingerprint(registry.find_classifier(s.init)),
        )

    known = finished_precision(compute, output, recorded)
    if known and recorded and same_recipe(recorded, planned(known, compute.noise_kind(recorded["parameters"]))[1]):
        console.log(f"{out} is up to date")
        _print(settings, registry.training_log(out), output)
        return

    from advdiff_cli.models.classifiers import save_classifier
    from advdiff_cli.training.fit_classifier import ClassifierFit, channel_statistics
    from advdiff_cli.training.initialization import initial_classifier
    from advdiff_cli.training.loader import TrainingRows
    from advdiff_cli.training.validation import Validation

    device = compute.resolve_device()
    precision = training_precision(compute, out, recorded, device)
    if inputs.adversarial and precision == "fp16":
        raise AdvdiffError("--precision fp16: gradients of the attack underflow; train in bf16 or fp32")
    noise = training_noise(compute, out, recorded) if request.draws_noise else "numpy"
    fit_settings, made_by = planned(precision, noise)
    training_input = request.build(precision, compute.seed, device, sets.view, noise)

    def fit(work: "WorkFolder", is_main: bool) -> None:
        rows = TrainingRows(opened.train, labelled=True)
        mean, std = channel_statistics(rows, compute.seed)
        model = initial_classifier(s.init, ClassifierConfig(s.arch, mean, std), compute.seed, rows.shape)
        steps = rows.steps(batch_size) * s.epochs
        records = ClassifierFit(model, rows, opened.valid, fit_settings, work, device, training_input).run()
        follow_training(records, steps, "train-classifier", quiet=output.quiet)
        if not is_main:
            return
        if opened.valid is not None:
            validation = Validation(model, opened.valid, batch_size, training_input, device)
            work.log({"step": steps, "published": _published(validation, work)})
        model.config = replace(model.config, crop=sets.crop, pool=sets.pool)
        save_classifier(model, work.final, provenance(made_by, inputs=opened.provenances, device=device.type))
        work.publish()

    if train(output, made_by, recorded, device, fit):
        _print(settings, registry.training_log(out), output)


def _print(settings: ClassifierOptions, log: "list[JsonObject]", output: OutputOptions) -> None:
    from advdiff_cli.cli.tables import cell

    published = log[-1].get("published") if log else None
    text = f"{output.out}: {settings.arch}, {settings.epochs} epochs"
    if published is not None:
        text += f"; published epoch {published['epoch']}, valid accuracy {cell(published['valid_accuracy'])} %, "
        text += f"n = {published['n']}"
        if "valid_robust_accuracy" in published:
            text += f", attacked as in training {cell(published['valid_robust_accuracy'])} %"
        if "valid_consistent_accuracy" in published:
            text += f", right under each of several draws {cell(published['valid_consistent_accuracy'])} %"
    output.emit({"out": str(output.out), "published": published, "log": log}, text, output.out)


def _published(validation: "Validation", work: "WorkFolder") -> "JsonObject":
    """Return which epoch is published, and its accuracy on validation rows, calibrated and in fp32."""
    from advdiff_cli.evaluation.statistics import wilson
    from advdiff_cli.training.fit_classifier import BEST

    kept, n = work.load(BEST), len(validation.rows)
    accuracies = {name: wilson(int(right.sum()), n).as_dict() for name, right in validation.judge()[1].items()}
    return {"epoch": kept and kept[1]["epoch"], "n": n, **accuracies}
