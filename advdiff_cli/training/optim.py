"""One step down the gradient, at a learning rate that is a pure function of the step: resume needs no other state."""

import math

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor


def accelerator_at(precision: str, device: torch.device) -> Accelerator:
    """Return the accelerator of a fit at fp32, bf16 or fp16; another fit of this process may have had another."""
    AcceleratorState._reset_state()  # it keeps the first precision of a process, and refuses any other
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision.replace("fp32", "no"))


def scaler_state(accelerator: Accelerator) -> dict[str, float]:
    """Return the state of the loss scale that fp16 takes; empty at other precisions."""
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else {}


def restore_scaler(accelerator: Accelerator, state: dict[str, float]) -> None:
    """Put back what `scaler_state` took."""
    if state and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state)


def cosine(step: int, total: int, peak: float, warmup: float = 0.05) -> float:
    """Return the learning rate at `step` of `total`: linear warm-up over a share of them, then half a cosine to 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def descend(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float | None = None
) -> float:
    """Take a step at learning rate `rate`, gradients clipped to the norm `clip`; return the loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    accelerator.backward(loss)
    if clip is not None:
        accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
