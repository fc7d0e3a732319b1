"""`advdiff train-classifier`."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from advdiff_cli import console
from advdiff_cli.cli import options
from advdiff_cli.cli.classifier_options import ClassifierOptions, InputOptions
from advdiff_cli.cli.compute_options import SeededComputeOptions
from advdiff_cli.cli.groups import with_option_groups
from advdiff_cli.cli.output_options import OutputOptions
from advdiff_cli.cli.training import (
    TrainingDataOptions,
    finished_precision,
    follow_training,
    process_parameters,
    train,
    training_compute,
)
from advdiff_cli.cli.training_input import InputRequest
from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from advdiff_cli.cli.training import TrainingSets
    from advdiff_cli.data.provenance import JsonObject, Provenance
    from advdiff_cli.data.rng import NoiseKind
    from advdiff_cli.models.precision import Precision
    from advdiff_cli.training.checkpoints import WorkFolder
    from advdiff_cli.training.recipes import ClassifierRecipe
    from advdiff_cli.training.validation import Validation


@with_option_groups
def train_classifier(
    data: options.DataSets,
    sets: TrainingDataOptions,
    settings: ClassifierOptions,
    inputs: InputOptions,
    compute: SeededComputeOptions,
    output: OutputOptions,
) -> None:
    """Train a classifier on labeled patches, with flips, rotations by 90 degrees and stain variation.

    The weights of the epoch with the best accuracy on --valid are kept, and their log-odds are calibrated there
    (Platt scaling). --augment trains a classifier to stand behind a defense; --adversarial trains it against an
    attack on it and on the defense. Validation patches are then purified in the same way, and accuracy on attacked
    patches chooses the epoch, or with --consistency the share of patches that are right under each of several draws.
    A stopped training resumes to the same weights when the command is run again.

    Example: advdiff train-classifier train.h5 --valid valid.h5 -o classifier
    """
    from advdiff_cli.data.provenance import same_recipe
    from advdiff_cli.models import registry
    from advdiff_cli.training.checkpoints import remove_finished_work

    out = output.out
    options.require_positive(learning_rate=settings.learning_rate)
    options.require_decay(ema=settings.ema)
    recorded = registry.recorded_recipe(out)
    opened = sets.open(data)
    if opened.valid is not None:
        opened.valid.require_labels()
    plan = _Plan(settings, sets, opened, inputs.request(allow_pickle=compute.allow_pickle), compute.seed)
    known = finished_precision(compute, output, recorded)
    if known and recorded and same_recipe(recorded, plan.recipe(known, compute.noise_kind(recorded["parameters"]))):
        console.log(f"{out} is up to date")
        remove_finished_work(out, recorded)
        _print(plan, registry.training_log(out), output)
        return

    device = compute.resolve_device()
    precision, noise = training_compute(compute, output, recorded, device)
    if inputs.adversarial and precision == "fp16":
        raise AdvdiffError("--precision fp16: gradients of the attack underflow; train in bf16 or fp32")
    if not plan.request.draws_noise:
        noise = "numpy"
    fit = plan.fit(precision, noise, device, quiet=output.quiet)
    if train(output, plan.recipe(precision, noise), recorded, device, fit):
        _print(plan, registry.training_log(out), output)


@dataclass(frozen=True)
class _Plan:
    """A training that is asked for; what is left open is the precision and what draws noise and starts of attacks."""

    settings: ClassifierOptions
    sets: TrainingDataOptions
    opened: "TrainingSets"
    request: InputRequest
    seed: int

    @property
    def arch(self) -> str:
        from advdiff_cli.models.classifier_config import read_classifier_config
        from advdiff_cli.models.registry import find_classifier

        s = self.settings
        if s.arch is None and s.init is not None:
            return read_classifier_config(find_classifier(s.init))[0].arch
        return s.arch or "resnet18"

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size or 64

    def fit_settings(self, precision: "Precision", noise: "NoiseKind") -> "ClassifierRecipe":
        from advdiff_cli.training.recipes import ClassifierRecipe

        s, size = self.settings, self.batch_size
        return ClassifierRecipe(
            s.epochs, size, s.learning_rate, s.weight_decay, s.stain, self.seed, precision, noise, s.ema
        )

    def recipe(self, precision: "Precision", noise: "NoiseKind") -> "Provenance":
        from advdiff_cli.data.provenance import recipe
        from advdiff_cli.models.fingerprint import folder_fingerprint
        from advdiff_cli.models.registry import find_classifier

        s = self.settings
        return recipe(
            "train-classifier",
            self.fit_settings(precision, noise).parameters()
            | {"arch": self.arch}
            | self.sets.view.parameters()
            | self.request.parameters()
            | process_parameters(self.batch_size),
            **self.opened.recipe_inputs(),
            init=s.init and folder_fingerprint(find_classifier(s.init)),
        )

    def fit(
        self, precision: "Precision", noise: "NoiseKind", device: "torch.device", *, quiet: bool
    ) -> "Callable[[WorkFolder, bool], None]":
        """Return what trains in a work folder and, in the main process, publishes the model."""
        from advdiff_cli.data.provenance import provenance
        from advdiff_cli.models.classifier_config import ClassifierConfig
        from advdiff_cli.models.classifiers import save_classifier
        from advdiff_cli.training.fit_classifier import ClassifierFit, channel_statistics
        from advdiff_cli.training.initialization import initial_classifier
        from advdiff_cli.training.loader import TrainingRows, in_memory_for_gpu
        from advdiff_cli.training.validation import Validation

        s, opened = self.settings, self.opened
        training_input = self.request.build(precision, self.seed, device, self.sets.view, noise)

        def fit(work: "WorkFolder", is_main: bool) -> None:
            judged = [opened.valid] if is_main and opened.valid is not None else []
            sets = in_memory_for_gpu([*opened.train, *judged], device)
            rows = TrainingRows(sets[: len(opened.train)], labeled=True)
            valid = sets[-1] if judged else opened.valid
            mean, std = channel_statistics(rows, self.seed)
            model = initial_classifier(s.init, ClassifierConfig(self.arch, mean, std), self.seed, rows.shape)
            steps = rows.steps(self.batch_size) * s.epochs
            fit_settings = self.fit_settings(precision, noise)
            records = ClassifierFit(model, rows, valid, fit_settings, work, device, training_input).run()
            follow_training(records, steps, "train-classifier", quiet=quiet)
            if not is_main:
                return
            if valid is not None:
                validation = Validation(model, valid, self.batch_size, training_input, device)
                work.log({"step": steps, "published": _published(validation, work)})
            size = opened.train[0].source.shape
            model.config = replace(model.config, crop=self.sets.crop, pool=self.sets.pool, size=size)
            made = provenance(self.recipe(precision, noise), inputs=opened.provenances, device=device.type)
            save_classifier(model, work.final, made)
            work.publish()

        return fit


def _print(plan: _Plan, log: "list[JsonObject]", output: OutputOptions) -> None:
    from advdiff_cli.cli.tables import cell

    published = log[-1].get("published") if log else None
    text = f"{output.out}: {plan.arch}, {plan.settings.epochs} epochs"
    if published is not None:
        text += f"; published epoch {published['epoch']}, valid accuracy {cell(published['valid_accuracy'])} %, "
        text += f"n = {published['n']}"
        if "valid_robust_accuracy" in published:
            text += f", attacked as in training {cell(published['valid_robust_accuracy'])} %"
        if "valid_consistent_accuracy" in published:
            text += f", right under each of several draws {cell(published['valid_consistent_accuracy'])} %"
    output.emit({"out": str(output.out), "published": published, "log": log}, text, output.out)


def _published(validation: "Validation", work: "WorkFolder") -> "JsonObject":
    """Return which epoch is published, and its accuracy on validation rows.

    The classifier is calibrated and in fp32; purifiers and attacks have the precision of training.
    """
    from advdiff_cli.evaluation.statistics import wilson
    from advdiff_cli.training.fit_classifier import BEST

    kept, n = work.load(BEST), len(validation.rows)
    accuracies = {name: wilson(int(right.sum()), n).as_dict() for name, right in validation.judge()[1].items()}
    return {"epoch": kept and kept[1]["epoch"], "n": n, **accuracies}
