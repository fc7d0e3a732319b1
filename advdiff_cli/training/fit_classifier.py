"""Train a classifier: AdamW with one cosine cycle; the best epoch on validation rows is kept and calibrated.

`TrainingInput` decides whether batches are clean, purified or attacked.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.provenance import JsonObject
from advdiff_cli.data.rng import stream, torch_seeded
from advdiff_cli.models.classifiers import Classifier
from advdiff_cli.models.device import to_device
from advdiff_cli.training import checkpoints
from advdiff_cli.training.adversarial import TrainingInput
from advdiff_cli.training.augmentation import random_symmetry, vary_stain
from advdiff_cli.training.checkpoint_file import load_optimizer, optimizer_tensors, with_prefix
from advdiff_cli.training.checkpoints import WorkFolder
from advdiff_cli.training.loader import TrainingRows
from advdiff_cli.training.optim import (
    build_accelerator,
    check_weights,
    cosine,
    optimizer_step,
    restore_scaler,
    scaler_state,
)
from advdiff_cli.training.platt import fit_platt
from advdiff_cli.training.recipes import ClassifierRecipe
from advdiff_cli.training.validation import Validation, channels_last

Channels = tuple[float, float, float]

_log = logging.getLogger(__name__)

BEST = "best.safetensors"
_STATISTICS_BATCH = 64  # patches
CLEAN = TrainingInput()


def channel_statistics(rows: TrainingRows, seed: int, n: int = 2048) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of each channel over n random rows; that of a constant one is 1e-4."""
    chosen = np.sort(stream(seed, "statistics").permutation(len(rows))[:n])
    sums = torch.zeros(2, 3, dtype=torch.float64)  # of the values and of their squares
    for start in range(0, len(chosen), _STATISTICS_BATCH):
        images = rows.read(chosen[start : start + _STATISTICS_BATCH])[0].double()
        sums += torch.stack([images.sum((0, 2, 3)), images.square().sum((0, 2, 3))])
    count = len(chosen) * math.prod(rows.shape)
    mean = sums[0] / count
    std = ((sums[1] - count * mean.square()) / (count - 1)).clamp(min=1e-8).sqrt()

    def rounded(v: Tensor) -> Channels:
        return round(v[0].item(), 4), round(v[1].item(), 4), round(v[2].item(), 4)

    return rounded(mean), rounded(std)


@dataclass
class ClassifierFit:
    """A fit of a classifier, resumed from the last checkpoint of its work folder.

    Args:
        model: Trained in place on `device`.
        train: Rows to train on.
        valid: Labelled rows that choose the epoch; without them, the last epoch is kept.
        settings: What enters the recipe.
        work: Where checkpoints are written and found.
        device: Where to compute; processes of torch.distributed share each batch.
        inputs: How batches are purified and attacked.
        checkpoint_seconds: Seconds between checkpoints within an epoch.
    """

    model: Classifier
    train: TrainingRows
    valid: PatchSet | None
    settings: ClassifierRecipe
    work: WorkFolder
    device: torch.device
    inputs: TrainingInput = CLEAN
    checkpoint_seconds: float = field(default_factory=lambda: checkpoints.CHECKPOINT_SECONDS)
    _best: float = field(default=-1.0, init=False)
    _average: AveragedModel | None = field(default=None, init=False)

    def run(self) -> Iterator[JsonObject]:
        """Train, yielding a record after each step.

        At the end the model of the main process has the weights of the best epoch, is calibrated, and is in eval mode.

        Yields:
            {"step", "of", "loss"} after each step. The record of an epoch adds "epoch" and the validation metrics, of
            which the last chooses the epoch.
        """
        s, model = self.settings, self.model
        accelerator = build_accelerator(s.precision, self.device)
        fused = accelerator.device.type == "cuda"  # otherwise steps wait for the GPU after a resume
        optimizer = torch.optim.AdamW(model.parameters(), s.learning_rate, weight_decay=s.weight_decay, fused=fused)
        for purifier in filter(None, self.inputs.purifiers):
            purifier.to(accelerator.device)
        per_epoch = self.train.steps(s.batch_size)
        model.to(memory_format=torch.channels_last)
        if s.ema is not None:
            average = get_ema_multi_avg_fn(s.ema)  # type: ignore[no-untyped-call]  # torch's own, without types
            self._average = AveragedModel(model.to(accelerator.device), multi_avg_fn=average, use_buffers=True)
        step, earlier = self._resume(optimizer, accelerator)
        total, losses = s.epochs * per_epoch, deque(earlier, per_epoch)
        network, optimizer = accelerator.prepare(model, optimizer)
        part = (accelerator.process_index, accelerator.num_processes)
        saved = time.monotonic()
        for images, labels in self.train.batches(step, total, s.batch_size, s.seed, part):
            network.train()
            rng = stream(s.seed, "augment", step, part[0])
            turned = random_symmetry(to_device(images, accelerator.device), rng)
            augmented = vary_stain(turned, s.stain, rng) if s.stain else turned
            first = step * s.batch_size + part[0] * len(images)
            names = range(first, first + len(images))
            with torch_seeded(accelerator.device, s.seed, "dropout", step, part[0]):
                truth = to_device(labels, accelerator.device)
                loss = self.inputs.loss(network, model, channels_last(augmented), truth, names)
            losses.append(optimizer_step(accelerator, optimizer, loss, cosine(step, total, s.learning_rate)))
            if self._average is not None:
                self._average.update_parameters(model)
            step += 1
            record: JsonObject = {"step": step, "of": total, "loss": losses[-1]}
            if step % per_epoch == 0 and accelerator.is_main_process:
                record |= {"epoch": step // per_epoch, "loss": float(np.mean(losses))}
                self._end_epoch(record, accelerator)
            if step % per_epoch == 0 or time.monotonic() - saved > self.checkpoint_seconds:
                self._save(optimizer, step, list(losses), accelerator)
                saved = time.monotonic()
            yield record
        if accelerator.is_main_process:
            self._keep_and_calibrate_best(accelerator)
        check_weights(model)
        model.eval()
        accelerator.wait_for_everyone()
        accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # removes mixed precision

    @property
    def _trained(self) -> Classifier:
        """The model that is validated and kept."""
        found = self.model if self._average is None else self._average.module
        assert isinstance(found, Classifier)
        return found

    def _validation(self, accelerator: Accelerator) -> Validation | None:
        if self.valid is None:
            return None
        return Validation(self._trained, self.valid, self.settings.batch_size, self.inputs, accelerator.device)

    def _end_epoch(self, record: JsonObject, accelerator: Accelerator) -> None:
        """Validate, store the weights if they are the best so far, and log the record."""
        validation = self._validation(accelerator)
        if validation is not None:
            loss, right = validation.judge()
            accuracies = {name: rows.float().mean().item() for name, rows in right.items()}
            record |= {"valid_loss": loss, **accuracies}
            accuracy = list(accuracies.values())[-1]
            if accuracy > self._best:
                self.work.save(self._trained.state_dict(), {"epoch": record["epoch"]}, BEST)
            self._best = max(self._best, accuracy)
        self.work.log(record)

    def _save(self, optimizer: torch.optim.Optimizer, step: int, losses: list[float], accelerator: Accelerator) -> None:
        if accelerator.is_main_process:
            weights = {f"model.{k}": v for k, v in self.model.state_dict().items()}
            if self._average is not None:
                weights |= {f"average.{k}": v for k, v in self._average.state_dict().items()}
            state = {"step": step, "best": self._best, "losses": losses, "scaler": scaler_state(accelerator)}
            self.work.save(weights | optimizer_tensors(optimizer), state)

    def _resume(self, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[int, list[float]]:
        """Restore the last checkpoint; return its step (0 without one) and the losses before it."""
        begun = self.work.load()
        if begun is not None and begun[1]["best"] >= 0 and self.work.load(BEST) is None:
            _log.warning("%s lacks the weights of the best epoch; training begins again", self.work.part)
            begun = None
        tensors, state = begun or ({}, {"step": 0, "best": -1.0})
        if tensors:
            self.model.load_state_dict(with_prefix(tensors, "model"))
            if self._average is not None:
                self._average.load_state_dict(with_prefix(tensors, "average"))
            load_optimizer(optimizer, tensors)
            restore_scaler(accelerator, state.get("scaler", {}))
        self.work.truncate_log(state["step"])
        self._best = state["best"]
        return state["step"], state.get("losses", [])

    def _keep_and_calibrate_best(self, accelerator: Accelerator) -> None:
        """Restore the weights of the best epoch, or else of the average; calibrate the log-odds on validation rows."""
        kept = self.work.load(BEST)
        self.model.load_state_dict(self._trained.state_dict() if kept is None else kept[0])
        self._average = None
        validation = self._validation(accelerator)
        if validation is not None:
            slope, bias = fit_platt(*validation.logits())
            was = self.model.config  # calibrated already, if training started from a calibrated classifier
            self.model.config = replace(was, slope=round(slope * was.slope, 6), bias=round(slope * was.bias + bias, 6))
