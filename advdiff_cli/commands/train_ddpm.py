"""`advdiff train-ddpm`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from advdiff_cli import console
from advdiff_cli.cli import options
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

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from advdiff_cli.cli.training import TrainingSets
    from advdiff_cli.data.provenance import JsonObject, Provenance
    from advdiff_cli.data.rng import NoiseKind
    from advdiff_cli.models.card import DdpmCard
    from advdiff_cli.models.precision import Precision
    from advdiff_cli.training.checkpoints import WorkFolder
    from advdiff_cli.training.recipes import DdpmRecipe

_T_STAR, _T_STAR_CERTIFIED = 0.2, 0.3  # the recommended noise levels, as those of pcam-ddpm


@dataclass(frozen=True, kw_only=True)
class DdpmOptions:
    """The diffusion model, and how it is trained."""

    preset: Annotated[
        Literal["paper", "s2d2", "s2d4", "tiny"],
        typer.Option(
            help="The paper's U-Net; a small one on images unshuffled by 2 or 4; or that of pcam-ddpm (tiny)."
        ),
    ] = "tiny"
    max_t: Annotated[
        float, typer.Option(min=1e-3, max=1.0, help="Highest noise level that is trained, as a fraction of T.")
    ] = 0.3
    data_range: Annotated[
        Literal["-1,1", "0,1"], typer.Option(help="Range that pixels are scaled to; the paper's code uses 0,1.")
    ] = "-1,1"
    init: Annotated[str | None, typer.Option(help="Start from the weights of this model.")] = None
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 12_000
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the cosine cycle.", show_default="1e-3 for tiny, else 3e-4")
    ] = None
    ema: Annotated[float, typer.Option(help="Decay of the moving average of the weights.")] = 0.999
    batch_size: options.FixedBatch = 32
    compiled: options.Compile = False

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The data range as numbers."""
        low, high = map(float, self.data_range.split(","))
        return low, high

    @property
    def peak_rate(self) -> float:
        """The learning rate, or the default of the preset."""
        default = 1e-3 if self.preset == "tiny" else 3e-4
        return default if self.learning_rate is None else self.learning_rate

    def parameters(self) -> "JsonObject":
        """Return the parameters of the recipe that are not those of the fit."""
        found: JsonObject = {"preset": self.preset, **process_parameters(self.batch_size or 32)}
        if self.data_range != "-1,1":
            found["data_range"] = self.data_range
        return found | ({"compiled": True} if self.compiled else {})


@with_option_groups
def train_ddpm(
    data: options.DataSets,
    sets: TrainingDataOptions,
    settings: DdpmOptions,
    compute: SeededComputeOptions,
    output: OutputOptions,
) -> None:
    """Train a diffusion model on patches with or without labels; diffusers can load the resulting folder.

    The defaults are those of the bundled pcam-ddpm, a purifier for t* up to 0.3 and not a generator. Like it, the model
    purifies in one step at t* 0.2 and certifies at 0.3 (or at --max-t, if that is less) unless other settings are
    given. The folder also holds the validation loss of each noise level (training.jsonl) and a picture of clean, noised
    and denoised patches (samples.png). A stopped training resumes to the same weights when the command is run again.

    Example: advdiff train-ddpm train.h5 --valid valid.h5 -o ddpm
    """
    from advdiff_cli.data.provenance import same_recipe
    from advdiff_cli.models import registry
    from advdiff_cli.training.checkpoints import remove_finished_work

    out = output.out
    options.require_positive(learning_rate=settings.peak_rate)
    options.require_decay(ema=settings.ema)
    recorded = registry.recorded_recipe(out)
    plan = _Plan(settings, sets, sets.open(data), compute.seed, compute.allow_pickle)
    known = finished_precision(compute, output, recorded)
    if known and recorded and same_recipe(recorded, plan.recipe(known, compute.noise_kind(recorded["parameters"]))):
        console.log(f"{out} is up to date")
        remove_finished_work(out, recorded)
        _print(settings, output)
        return

    device = compute.resolve_device()
    precision, noise = training_compute(compute, output, recorded, device)
    fit = plan.fit(precision, noise, device, quiet=output.quiet)
    if train(output, plan.recipe(precision, noise), recorded, device, fit):
        _print(settings, output)


@dataclass(frozen=True)
class _Plan:
    """A training that is asked for; what is left open is the precision and what draws the noise."""

    settings: DdpmOptions
    sets: TrainingDataOptions
    opened: "TrainingSets"
    seed: int
    allow_pickle: bool

    def fit_settings(self, precision: "Precision", noise: "NoiseKind") -> "DdpmRecipe":
        from advdiff_cli.training.recipes import DdpmRecipe

        s, size = self.settings, self.settings.batch_size or 32
        return DdpmRecipe(s.steps, size, s.peak_rate, s.ema, s.max_t, self.seed, precision, noise)

    def recipe(self, precision: "Precision", noise: "NoiseKind") -> "Provenance":
        from advdiff_cli.data.provenance import recipe
        from advdiff_cli.models.fingerprint import folder_fingerprint
        from advdiff_cli.models.registry import find_ddpm

        s = self.settings
        parameters = self.fit_settings(precision, noise).parameters() | self.sets.view.parameters() | s.parameters()
        init = s.init and folder_fingerprint(find_ddpm(s.init, allow_pickle=self.allow_pickle))
        return recipe("train-ddpm", parameters, **self.opened.recipe_inputs(), init=init)

    def card(self, space_to_depth: int, made: "Provenance") -> "DdpmCard":
        """Return the card of the trained model, which recommends noise levels that it was trained on."""
        from advdiff_cli.models.card import DdpmCard, PurificationSettings

        s, view = self.settings, self.sets.view
        purify, certify = (PurificationSettings(min(t, s.max_t), "ddpm", 1) for t in (_T_STAR, _T_STAR_CERTIFIED))
        return DdpmCard(
            space_to_depth,
            s.max_t,
            s.pixel_range,
            crop=view.crop,
            pool=view.pool,
            recommended=purify,
            certification=certify,
            provenance=made,
        )

    def fit(
        self, precision: "Precision", noise: "NoiseKind", device: "torch.device", *, quiet: bool
    ) -> "Callable[[WorkFolder, bool], None]":
        """Return what trains in a work folder and, in the main process, publishes the model."""
        from advdiff_cli.data.provenance import provenance
        from advdiff_cli.models.ddpm import Ddpm, build_ddpm, save_ddpm
        from advdiff_cli.training.fit_ddpm import SAMPLES, DdpmFit
        from advdiff_cli.training.initialization import initial_ddpm
        from advdiff_cli.training.loader import TrainingRows, in_memory_for_gpu

        s, opened = self.settings, self.opened

        def fit(work: "WorkFolder", is_main: bool) -> None:
            rows = TrainingRows(in_memory_for_gpu(opened.train, device), labeled=False)
            shapes = [rows.shape, *([opened.valid.require_shape()] if opened.valid else [])]
            fresh = build_ddpm(s.preset, rows.shape[0], s.max_t, self.seed, s.pixel_range)
            model: Ddpm = initial_ddpm(s.init, fresh, s.preset, shapes, allow_pickle=self.allow_pickle)
            if s.compiled:
                model.to(device).compile_unet()
            records = DdpmFit(model, rows, opened.valid, self.fit_settings(precision, noise), work, device).run()
            follow_training(records, s.steps, "train-ddpm", quiet=quiet)
            made = provenance(self.recipe(precision, noise), inputs=opened.provenances, device=device.type)
            model.card = self.card(model.card.space_to_depth, made)
            if is_main:
                save_ddpm(model.cpu(), work.final)
                work.publish(SAMPLES)

        return fit


def _print(settings: DdpmOptions, output: OutputOptions) -> None:
    from advdiff_cli.models.registry import training_log

    log = training_log(output.out)
    text = f"{output.out}: {settings.preset}, {settings.steps} steps"
    if log and "loss" in log[-1]:
        text += f", loss {log[-1]['loss']:.4f}"
    output.emit({"out": str(output.out), "log": log}, text, output.out)
