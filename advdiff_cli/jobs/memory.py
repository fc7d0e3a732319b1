"""How many patches, and how many batches, are computed together: enough to use all cores, and no more than fit."""

import math

import torch
from torch import Tensor, nn

from advdiff_cli.models.device import free_memory
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.purifier import DiffusionPurifier

CPU_BATCH = 16  # patches of 96 x 96; larger batches leave the caches
PATCHES_PER_THREAD = 8  # that keep a thread busy where threads share a batch, as for gradients
GPU_BATCH = 512
_USABLE_SHARE = 0.5  # of free memory; layers need more than their outputs


def auto_batch_size(
    module: nn.Module, shape: tuple[int, int], device: torch.device, *, n: int | None = None, graph: bool = False
) -> int:
    """Return a power of two: the number of images for `module` to compute together.

    Args:
        module: A purifier, a classifier or a defended classifier; called once, with two images and one step.
        shape: (H, W) of the images.
        device: Where the module is.
        n: The number of images, if known; a much larger batch would mostly be padding.
        graph: Whether gradients are computed, which keep the output of every layer and its gradient.
    """
    image_bytes = _layer_bytes(module, shape, device) * (2 if graph else 1) + _input_bytes(module, shape)
    shared = PATCHES_PER_THREAD * torch.get_num_threads() if graph else 0
    useful = GPU_BATCH if device.type != "cpu" else max(CPU_BATCH, shared)
    limit = min(useful, int(_USABLE_SHARE * free_memory(device) / image_bytes))
    size = 1 << max(limit.bit_length() - 1, 0)
    return size if n is None else min(size, 1 << (n - 1).bit_length())


def parallel_batches(module: nn.Module, shape: tuple[int, int], batch_size: int, device: torch.device) -> int:
    """Return how many batches are computed in parallel without gradients, one thread each; 0 if not on a CPU.

    Args:
        module: As for `auto_batch_size`.
        shape: (H, W) of the images.
        batch_size: Images in a batch.
        device: Where the module is.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return int(device.type == "cpu")
    batch_bytes = batch_size * (_layer_bytes(module, shape, device) + _input_bytes(module, shape))
    return max(1, min(threads, int(_USABLE_SHARE * free_memory(device) / batch_bytes)))


@torch.no_grad()
def _layer_bytes(module: nn.Module, shape: tuple[int, int], device: torch.device) -> int:
    """Return the bytes of all layer outputs for one image."""
    outputs: dict[nn.Module, int] = {}

    def record(layer: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs[layer] = output.nbytes

    brief = _with_one_step(module)
    hooks = [m.register_forward_hook(record) for m in brief.modules() if not list(m.children())]
    try:
        brief(torch.zeros(2, 3, *shape, device=device))  # two, since external modules may squeeze a batch of one
    finally:
        for hook in hooks:
            hook.remove()
    return sum(outputs.values()) // 2


def _with_one_step(module: nn.Module) -> nn.Module:
    """Return the module with a one-step purifier, which needs as much memory as one of many steps."""
    if isinstance(module, DefendedClassifier):
        purifier = module.purifier
        if isinstance(purifier, DiffusionPurifier):
            purifier = purifier.with_steps(1)
        return DefendedClassifier(purifier, module.classifier, module.precision)
    return module.with_steps(1).eval() if isinstance(module, DiffusionPurifier) else module


def _input_bytes(module: nn.Module, shape: tuple[int, int]) -> int:
    """Return the bytes of two images with their noise: one is computed while the next one is read."""
    purifier = module.purifier if isinstance(module, DefendedClassifier) else module
    noise_shape = getattr(purifier, "noise_shape", lambda *_: (0,))(*shape)
    return 2 * 4 * (3 * math.prod(shape) + math.prod(noise_shape))
