"""Fit a classifier: AdamW, one cosine cycle; the best epoch on valid is kept, then calibrated there.

What it is shown, as it is, behind a defence or attacked, is its regime's.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from advdiff_cli.data.patch_source import Rows
from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.rng import drawing, stream
from advdiff_cli.models.classifiers import Classifier
from advdiff_cli.training.adversarial import Regime
from advdiff_cli.training.augmentation import turn, vary_stain
from advdiff_cli.training.checkpoints import WorkFolder, load_optimizer, optimizer_tensors, prefixed
from advdiff_cli.training.loader import TrainingRows
from advdiff_cli.training.optim import accelerator_at, cosine, descend, restore_scaler, scaler_state
from advdiff_cli.training.platt import platt

Channels = tuple[float, float, float]

BEST = "best.safetensors"
PLAIN = Regime()


@dataclass(frozen=True)
class ClassifierPlan:
    """How to fit: what enters the recipe."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    stain: float  # strength of stain variation; 0 for none
    seed: int
    precision: str

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that enter a recipe."""
        return asdict(self)


def channel_statistics(rows: TrainingRows, seed: int, n: int = 2048) -> tuple[Channels, Channels]:
    """Return mean and deviation of each channel over n random rows."""
    chosen = stream(seed, "statistics").permutation(len(rows))[:n]
    images, _ = rows.read(np.sort(chosen))
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))

    def rounded(v: Tensor) -> Channels:
        return round(v[0].item(), 4), round(v[1].item(), 4), round(v[2].item(), 4)

    return rounded(mean), rounded(std)


def fit_classifier(
    model: Classifier, train: TrainingRows, valid: PatchSet | None, plan: ClassifierPlan, work: WorkFolder,
    device: torch.device, regime: Regime = PLAIN, *, checkpoint_seconds: float = 120,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Fit `model` in place, yielding a record after each step; it holds the best epoch's weights at the end,
    in the first of several processes.

    Args:
        model: Classifier; trained on `device`, back in eval mode at the end.
        train: Rows to learn from.
        valid: Labelled rows that choose the epoch; without them the last epoch's weights are kept.
        plan: Recipe of the fit.
        work: Where checkpoints are written and found again.
        device: Where to compute; processes of torch.distributed share each batch.
        regime: What the classifier is shown of a batch, and its loss.
        checkpoint_seconds: Seconds between checkpoints within an epoch.

    Yields:
        {"step", "of", "loss"} after each step; an epoch's record has "epoch" and the valid figures too, the accuracy
        on attacked patches among them where the regime has an adversary. That accuracy then chooses the epoch.
    """
    accelerator = accelerator_at(plan.precision, device)
    optimizer = torch.optim.AdamW(model.parameters(), plan.learning_rate, weight_decay=plan.weight_decay)
    for purifier in filter(None, regime.purifiers):
        purifier.to(accelerator.device)
    per_epoch = train.steps(plan.batch_size)
    model.to(memory_format=torch.channels_last)
    step, best, before = _resume(model, optimizer, work, accelerator)
    total, losses = plan.epochs * per_epoch, deque(before, per_epoch)
    network, optimizer = accelerator.prepare(model, optimizer)
    part = (accelerator.process_index, accelerator.num_processes)

    def save() -> None:
        if accelerator.is_main_process:
            tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | optimizer_tensors(optimizer)
            state = {"step": step, "best": best, "losses": list(losses), "scaler": scaler_state(accelerator)}
            work.save(tensors, state)

    last = time.monotonic()
    for images, labels in train.batches(step, total, plan.batch_size, plan.seed, part):
        network.train()
        rng = stream(plan.seed, "augment", step, part[0])
        images = _varied(images.to(accelerator.device, non_blocking=True), plan.stain, rng)
        first = step * plan.batch_size + part[0] * len(images)
        truth, names = labels.to(accelerator.device), range(first, first + len(images))
        with drawing(accelerator.device, plan.seed, "dropout", step, part[0]):
            loss = regime.loss(network, model, _channels_last(images), truth, names)
        losses.append(descend(accelerator, optimizer, loss, cosine(step, total, plan.learning_rate)))
        step += 1
        record: dict[str, Any] = {"step": step, "of": total, "loss": losses[-1]}
        if step % per_epoch == 0 and accelerator.is_main_process:
            record |= {"epoch": step // per_epoch, "loss": float(np.mean(losses))}
            if valid is not None:
                record |= _figures(OnValid(model, valid, plan.batch_size, regime, accelerator.device))
                best = _keep_best(model, record, best, work)
            work.log(record)
        if step % per_epoch == 0 or time.monotonic() - last > checkpoint_seconds:
            save()
            last = time.monotonic()
        yield record
    if accelerator.is_main_process:
        judge = None if valid is None else OnValid(model, valid, plan.batch_size, regime, accelerator.device)
        _finish(model, work, judge)
    model.eval()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # mixed precision was the training's alone


def _resume(
    model: Classifier, optimizer: torch.optim.Optimizer, work: WorkFolder, accelerator: Accelerator
) -> tuple[int, float, list[float]]:  # fmt: skip
    """Put back the last checkpoint; return its step (0: there is none), the best accuracy and the losses."""
    tensors, state = work.load() or ({}, {"step": 0, "best": -1.0})
    if tensors:
        model.load_state_dict(prefixed(tensors, "model"))
        load_optimizer(optimizer, tensors)
        restore_scaler(accelerator, state.get("scaler", {}))
    work.cut_log(state["step"])
    return state["step"], state["best"], state.get("losses", [])


def _varied(images: Tensor, stain: float, rng: np.random.Generator) -> Tensor:
    turned = turn(images, rng)
    return vary_stain(turned, stain, rng) if stain else turned


def _finish(model: Classifier, work: WorkFolder, on_valid: "OnValid | None") -> None:
    """Put back the weights of the best epoch and calibrate their log-odds on valid."""
    if (kept := work.load(BEST)) is not None:
        model.load_state_dict(kept[0])
    if on_valid is not None:
        model.config = replace(model.config, slope=1.0, bias=0.0)
        slope, bias = platt(*on_valid.logits())
        model.config = replace(model.config, slope=slope, bias=bias)


def _keep_best(model: Classifier, record: dict[str, Any], best: float, work: WorkFolder) -> float:
    """Keep the weights of an epoch that does better on valid than all before; return the best accuracy."""
    accuracy = float(record.get("valid_robust_accuracy", record["valid_accuracy"]))
    if accuracy > best:
        work.save(model.state_dict(), {"epoch": record["epoch"]}, BEST)
    return max(best, accuracy)


@dataclass(frozen=True)
class OnValid:
    """A classifier on the valid rows, which it is shown as in training."""

    model: Classifier
    valid: PatchSet
    batch_size: int
    regime: Regime
    device: torch.device

    def logits(self, *, attacked: bool = False) -> tuple[Tensor, Tensor]:
        """Return logits (N, 2) and labels (N,)."""
        self.model.eval()
        labels = torch.from_numpy(self.valid.require_labels())
        starts = range(0, len(self.valid), self.batch_size)
        batches = [np.arange(i, min(i + self.batch_size, len(self.valid))) for i in starts]
        return torch.cat([self._batch(rows, labels[rows], attacked) for rows in batches]), labels

    def _batch(self, rows: Rows, labels: Tensor, attacked: bool) -> Tensor:
        names = [f"valid {i}" for i in rows]
        images = _channels_last(self.valid.read(rows).to(self.device))
        if attacked:
            images = self.regime.attacked(self.model, images, labels.to(self.device), names)
        with torch.inference_mode():
            logits: Tensor = self.model(_channels_last(self.regime.shown(images, names)))
        return logits.float().cpu()


def _figures(judge: OnValid) -> dict[str, float]:
    logits, labels = judge.logits()
    found = {"valid_loss": cross_entropy(logits, labels).item(), "valid_accuracy": _accuracy(logits, labels)}
    if judge.regime.adversary is not None:
        found["valid_robust_accuracy"] = _accuracy(*judge.logits(attacked=True))
    return found


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
