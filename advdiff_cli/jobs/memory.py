"""How many patches, and how many batches of them, are computed at once: what keeps the cores busy and memory holds."""

import math
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.purifier import DiffusionPurifier

A_BATCH = 16  # patches of 96 x 96 on a CPU: more at once only leave the caches
A_THREAD = 8  # patches that keep a thread busy where threads share a batch, as they do for gradients
A_GPU = 512
_SHARE = 0.5  # of the memory that is free: what the layers put out is not all they need
_CGROUP = Path("/sys/fs/cgroup")


def batch_that_fits(
    module: nn.Module, height: int, width: int, device: torch.device, *, n: int | None = None, graph: bool = False
) -> int:  # fmt: skip
    """Return a power of two of images (3, height, width) for `module` to compute at once.

    Args:
        module: A purifier, a classifier or a defended one; called once, with two images and one step.
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        device: Where the module is.
        n: How many images there are: a batch much larger would be filled up.
        graph: Whether gradients are taken, so that what every layer puts out is kept, and its gradient beside it.
    """
    each = _bytes_each(module, height, width, device) * (2 if graph else 1) + _held(module, height, width)
    shared = A_THREAD * torch.get_num_threads() if graph else 0
    busy = A_GPU if device.type != "cpu" else max(A_BATCH, shared)
    most = min(busy, int(_SHARE * free_memory(device) / each))
    fits = 1 << max(most.bit_length() - 1, 0)
    return fits if n is None else min(fits, 1 << (n - 1).bit_length())


def batches_that_fit(module: nn.Module, height: int, width: int, batch_size: int, device: torch.device) -> int:
    """Return how many batches are computed side by side, each by a thread, without gradients; 0 where not on a CPU.

    Args:
        module: As for `batch_that_fits`.
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        batch_size: Images in a batch.
        device: Where the module is.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return int(device.type == "cpu")
    each = _bytes_each(module, height, width, device) + _held(module, height, width)
    return max(1, min(threads, int(_SHARE * free_memory(device) / (each * batch_size))))


@torch.no_grad()
def _bytes_each(module: nn.Module, height: int, width: int, device: torch.device) -> int:
    """Return the bytes that the layers put out for one image."""
    put_out: dict[nn.Module, int] = {}

    def note(layer: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            put_out[layer] = output.nbytes

    brief = _in_one_step(module)
    hooks = [m.register_forward_hook(note) for m in brief.modules() if not list(m.children())]
    try:
        brief(torch.zeros(2, 3, height, width, device=device))  # modules of others may squeeze a batch of one
    finally:
        for hook in hooks:
            hook.remove()
    return sum(put_out.values()) // 2


def _in_one_step(module: nn.Module) -> nn.Module:
    """Return the module with a purifier of one step, which needs as much memory as many: each step is alone."""
    if isinstance(module, DefendedClassifier):
        purifier = module.purifier
        if isinstance(purifier, DiffusionPurifier):
            purifier = purifier.with_steps(1)
        return DefendedClassifier(purifier, module.classifier, module.precision).eval()
    return module.with_steps(1).eval() if isinstance(module, DiffusionPurifier) else module


def _held(module: nn.Module, height: int, width: int) -> int:
    """Return the bytes of an image and its noise, twice: a batch is computed, and the next is there."""
    purifier = module.purifier if isinstance(module, DefendedClassifier) else module
    shape = getattr(purifier, "noise_shape", lambda *_: (0,))(height, width)
    return 2 * 4 * (3 * height * width + math.prod(shape))


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on `device`, within what the process's control group may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    free = int(psutil.virtual_memory().available)
    try:
        most, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if most == "max" else min(free, int(most) - int(used))
    except (OSError, ValueError):
        return free
