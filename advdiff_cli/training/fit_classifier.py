"""Fit a classifier: cross-entropy, AdamW, one cosine cycle; the best epoch on valid is kept, then calibrated there."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.streams import stream
from advdiff_cli.models.classifiers import Classifier
from advdiff_cli.training.augment import turn, vary_stain
from advdiff_cli.training.calibration import platt
from advdiff_cli.training.checkpoints import WorkFolder, load_optimizer, optimizer_tensors, prefixed
from advdiff_cli.training.descent import cosine, descend
from advdiff_cli.training.rows import TrainingRows

Channels = tuple[float, float, float]

BEST = "best.safetensors"


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
    device: torch.device, *, checkpoint_seconds: float = 120,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Fit `model` in place, yielding a record after each step; it holds the best epoch's weights at the end.

    Args:
        model: Classifier; trained on `device`, back in eval mode at the end.
        train: Rows to learn from.
        valid: Labelled rows that choose the epoch; without them the last epoch's weights are kept.
        plan: Recipe of the fit.
        work: Where checkpoints are written and found again.
        device: Where to compute; processes of torch.distributed share each batch.
        checkpoint_seconds: Seconds between checkpoints within an epoch.

    Yields:
        {"step", "of", "loss"} after each step; an epoch's record has "epoch" and the valid figures too.
    """
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=plan.precision.replace("fp32", "no"))
    optimizer = torch.optim.AdamW(model.parameters(), plan.learning_rate, weight_decay=plan.weight_decay)
    per_epoch = train.steps(plan.batch_size)
    total, step, best = plan.epochs * per_epoch, 0, -1.0
    model.to(memory_format=torch.channels_last)
    if (saved := work.load()) is not None:
        tensors, state = saved
        model.load_state_dict(prefixed(tensors, "model"))
        load_optimizer(optimizer, tensors)
        step, best = state["step"], state["best"]
        work.cut_log(step)
    network, optimizer = accelerator.prepare(model, optimizer)
    part = (accelerator.process_index, accelerator.num_processes)

    def save() -> None:
        if accelerator.is_main_process:
            tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | optimizer_tensors(optimizer)
            work.save(tensors, {"step": step, "best": best})

    last = time.monotonic()
    losses: list[float] = []
    for images, labels in train.batches(step, total, plan.batch_size, plan.seed, part):
        network.train()
        rng = stream(plan.seed, "augment", step, part[0])
        images = turn(images.to(accelerator.device, non_blocking=True), rng)
        if plan.stain:
            images = vary_stain(images, plan.stain, rng)
        loss = cross_entropy(network(_channels_last(images)), labels.to(accelerator.device))
        losses.append(descend(accelerator, optimizer, loss, cosine(step, total, plan.learning_rate)))
        step += 1
        record: dict[str, Any] = {"step": step, "of": total, "loss": losses[-1]}
        if step % per_epoch == 0 and accelerator.is_main_process:
            record |= {"epoch": step // per_epoch, "loss": float(np.mean(losses[-per_epoch:]))}
            if valid is not None:
                record |= _figures(*_judge(accelerator, model, valid, plan.batch_size))
                best = _keep_best(model, record, best, work)
            work.log(record)
        if step % per_epoch == 0 or time.monotonic() - last > checkpoint_seconds:
            save()
            last = time.monotonic()
        yield record
    if (kept := work.load(BEST)) is not None:
        model.load_state_dict(kept[0])
    if valid is not None:
        model.config = replace(model.config, slope=1.0, bias=0.0)
        slope, bias = platt(*_judge(accelerator, model, valid, plan.batch_size))
        model.config = replace(model.config, slope=slope, bias=bias)
    model.eval()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # mixed precision was the training's alone


def _keep_best(model: Classifier, record: dict[str, Any], best: float, work: WorkFolder) -> float:
    """Keep the weights of an epoch that does better on valid than all before; return the best accuracy."""
    if record["valid_accuracy"] > best:
        work.save(model.state_dict(), {"epoch": record["epoch"]}, BEST)
    return max(best, float(record["valid_accuracy"]))


@torch.inference_mode()
def _judge(accelerator: Accelerator, model: nn.Module, valid: PatchSet, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return logits (N, 2) and labels (N,) of the valid rows."""
    model.eval()
    rows = np.arange(len(valid))
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    with accelerator.autocast():
        logits = torch.cat([model(_channels_last(valid.read(b).to(accelerator.device))).float().cpu() for b in batches])
    return logits, torch.from_numpy(valid.require_labels())


def _figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return {"valid_loss": cross_entropy(logits, labels).item(), "valid_accuracy": accuracy}


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
