"""Fit a DDPM: noise prediction on [-1, 1] data, AdamW, one cosine cycle, the EMA published.

Source: Ho et al. 2020, algorithm 1 and eq. 14; timesteps are drawn below max_t only, those that purification uses.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchvision.utils import make_grid

from advdiff_cli.data.patches import PatchSet
from advdiff_cli.data.rng import RowStreams, stream
from advdiff_cli.models.ddpm import Ddpm
from advdiff_cli.purification.equations import add_noise, estimate_x_0, noise_levels
from advdiff_cli.training.augmentation import turn
from advdiff_cli.training.checkpoints import WorkFolder, load_optimizer, optimizer_tensors, prefixed
from advdiff_cli.training.loader import TrainingRows
from advdiff_cli.training.optim import accelerator_at, cosine, descend, restore_scaler, scaler_state

GRID = "samples.png"
_LEVELS = (0.02, 0.04, 0.085, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)  # fractions of T at which the validation loss is taken
_VALID_ROWS = 96


@dataclass(frozen=True)
class DdpmPlan:
    """How to fit: what enters the recipe."""

    steps: int
    batch_size: int
    learning_rate: float
    ema: float
    max_t: float
    seed: int
    precision: str

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that enter a recipe."""
        return asdict(self)


def fit_ddpm(
    model: Ddpm, train: TrainingRows, valid: PatchSet | None, plan: DdpmPlan, work: WorkFolder, device: torch.device,
    *, checkpoint_seconds: float = 120, every: int = 500,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Fit `model` in place, yielding a record after each step; it holds the EMA's weights at the end.

    Args:
        model: Diffusion model; trained on `device`.
        train: Rows to learn from.
        valid: Rows for the validation loss and the picture, or None.
        plan: Recipe of the fit.
        work: Where checkpoints, the log and the picture are written.
        device: Where to compute; processes of torch.distributed share each batch.
        checkpoint_seconds: Seconds between checkpoints.
        every: Steps between validations.

    Yields:
        {"step", "of", "loss"}; a validation adds "valid_loss", by noise level.
    """
    accelerator = accelerator_at(plan.precision, device)
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.unet.parameters(), plan.learning_rate, fused=True)
    ema = EMAModel(model.unet.parameters(), decay=plan.ema, use_ema_warmup=True, power=3 / 4)
    first, before = _resume(model, optimizer, ema, work, accelerator)
    losses = deque(before, every)
    network, optimizer = accelerator.prepare(model, optimizer)
    part = (accelerator.process_index, accelerator.num_processes)
    last = time.monotonic()
    for step, (images, _) in enumerate(train.batches(first, plan.steps, plan.batch_size, plan.seed, part), first + 1):
        rng = stream(plan.seed, "augment", step - 1, part[0])
        loss = _loss(network, model, turn(images, rng).to(accelerator.device), plan.max_t, rng)
        rate = cosine(step - 1, plan.steps, plan.learning_rate)
        losses.append(descend(accelerator, optimizer, loss, rate, clip=1.0))
        ema.step(model.unet.parameters())
        record: dict[str, Any] = {"step": step, "of": plan.steps, "loss": losses[-1]}
        if accelerator.is_main_process:
            if step % every == 0 or step == plan.steps:
                record |= {"loss": float(np.mean(losses)), **_look(model, ema, valid, plan, work, accelerator)}
                work.log(record)
            if time.monotonic() - last > checkpoint_seconds and step < plan.steps:
                state = {"step": step, "losses": list(losses), "scaler": scaler_state(accelerator)}
                _save(model, optimizer, ema, state, work)
                last = time.monotonic()
        yield record
    ema.copy_to(model.unet.parameters())
    model.eval()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # mixed precision was the training's alone


def _loss(network: nn.Module, model: Ddpm, images: Tensor, max_t: float, rng: np.random.Generator) -> Tensor:
    """Return the mean squared error of the predicted noise, at timesteps drawn below max_t (Ho et al., eq. 14)."""
    t = torch.from_numpy(rng.integers(0, noise_levels(max_t, model.timesteps), len(images))).to(images.device)
    noise = torch.from_numpy(rng.standard_normal(images.shape, np.float32)).to(images.device)
    x_t = add_noise(model.card.to_range(images), noise, model.alpha_bar[t].view(-1, 1, 1, 1))
    return mse_loss(network(x_t, t), noise)


def _save(
    model: Ddpm, optimizer: torch.optim.Optimizer, ema: EMAModel, state: dict[str, Any], work: WorkFolder
) -> None:  # fmt: skip
    shadow = {f"ema.{i:05}": p for i, p in enumerate(ema.shadow_params)}
    weights = {f"unet.{k}": v for k, v in model.unet.state_dict().items()}
    work.save(weights | shadow | optimizer_tensors(optimizer), state)


def _resume(
    model: Ddpm, optimizer: torch.optim.Optimizer, ema: EMAModel, work: WorkFolder, accelerator: Accelerator
) -> tuple[int, list[float]]:  # fmt: skip
    """Put back the last checkpoint; return its step, 0 where there is none, and the losses before it."""
    saved = work.load()
    if saved is None:
        work.cut_log(0)
        return 0, []
    tensors, state = saved
    model.unet.load_state_dict(prefixed(tensors, "unet"))
    load_optimizer(optimizer, tensors)
    shadow = prefixed(tensors, "ema")
    ema.shadow_params = [shadow[k].to(p.device) for k, p in zip(sorted(shadow), ema.shadow_params, strict=True)]
    ema.optimization_step = int(state["step"])
    restore_scaler(accelerator, state.get("scaler", {}))
    work.cut_log(state["step"])
    return int(state["step"]), list(state.get("losses", []))


@torch.inference_mode()
def _look(
    model: Ddpm,
    ema: EMAModel,
    valid: PatchSet | None,
    plan: DdpmPlan,
    work: WorkFolder,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return the EMA's validation loss by noise level, and draw clean, noised and denoised patches."""
    if valid is None:
        return {}
    ema.store(model.unet.parameters())
    ema.copy_to(model.unet.parameters())
    order = stream(0, "validation").permutation(len(valid))[:_VALID_ROWS]
    levels = [f for f in _LEVELS if f <= plan.max_t] or [plan.max_t]
    sums = dict.fromkeys(levels, 0.0)
    rows: list[Tensor] = []
    for start in range(0, len(order), plan.batch_size):
        chosen = order[start : start + plan.batch_size]
        x_0 = model.card.to_range(valid.read(chosen)).to(accelerator.device)
        noise = RowStreams(0, "validation", [valid.keys[i] for i in chosen]).normal(*x_0.shape[1:]).to(x_0.device)
        shown = [x_0]
        for level in levels:
            t = noise_levels(level, model.timesteps) - 1
            x_t = add_noise(x_0, noise, model.alpha_bar[t])
            with accelerator.autocast():
                predicted = model(x_t, torch.full((len(x_0),), t, device=x_0.device))
            sums[level] += mse_loss(predicted, noise, reduction="sum").item() / (noise[0].numel() * len(order))
            shown += [x_t, estimate_x_0(x_t, predicted, model.alpha_bar[t])]
        if start == 0:
            rows = [torch.stack([column[i] for column in shown]) for i in range(min(8, len(x_0)))]
    ema.restore(model.unet.parameters())
    _draw(model.card.to_pixels(torch.cat(rows)), len(rows[0]), work)
    return {"valid_loss": {f"{k:g}": round(v, 6) for k, v in sums.items()}}


def _draw(images: Tensor, columns: int, work: WorkFolder) -> None:
    """Write the grid: a row a patch; clean, then noised and denoised at each level."""
    grid = make_grid(images.clamp(0, 1).float().cpu(), nrow=columns)
    Image.fromarray((grid * 255).byte().permute(1, 2, 0).numpy()).save(work.part / GRID)
