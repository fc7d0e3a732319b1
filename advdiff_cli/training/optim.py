"""Optimizer steps through accelerate, with a learning rate that depends on the step only, so that a resume is exact."""

import math

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from advdiff_cli.data.distributed import world_size
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.precision import Precision

DIVERGED = "training diverged; give a lower --learning-rate, or --precision fp32"


def build_accelerator(precision: Precision, device: torch.device) -> Accelerator:
    """Return an accelerator; an earlier one in this process may have had another precision."""
    alone = world_size() == 1
    AcceleratorState._reset_state(reset_partial_state=alone)  # it would refuse a second precision, or keep a device
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision.replace("fp32", "no"))


def scaler_state(accelerator: Accelerator) -> dict[str, float]:
    """Return the state of fp16's loss scaler; empty at other precisions."""
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else {}


def restore_scaler(accelerator: Accelerator, state: dict[str, float]) -> None:
    """Restore a state of `scaler_state`."""
    if state and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state)


def cosine(step: int, total: int, peak: float, warmup: float = 0.05) -> float:
    """Return the learning rate at `step` of `total`: linear warm-up over a share of the steps, then a cosine to 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float | None = None
) -> float:
    """Take a step with learning rate `rate`, with gradients clipped to the norm `clip`; return the loss.

    Raises:
        AdvdiffError: The loss is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    accelerator.backward(loss)
    if clip is not None:
        accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value = loss.item()  # last, since a GPU is waited for
    if not math.isfinite(value):
        raise AdvdiffError(f"the loss of a training step is {value}: {DIVERGED}")
    return value


def check_weights(model: nn.Module) -> None:
    """Check that all weights of a trained model are finite.

    Raises:
        AdvdiffError: They are not.
    """
    if not all(bool(p.isfinite().all()) for p in model.state_dict().values()):
        raise AdvdiffError(f"the trained weights are not finite: {DIVERGED}")
