"""How many patches a module computes at once: as many as keep the cores busy and the memory holds."""

import psutil
import torch
from torch import Tensor, nn

A_THREAD = 8  # patches of 96 x 96 a thread is kept busy by; more at once only leave the caches
A_GPU = 512
_SHARE = 0.5  # of the memory that is free: what the layers put out is not all they need


@torch.no_grad()
def batch_that_fits(module: nn.Module, height: int, width: int, device: torch.device, *, graph: bool = False) -> int:
    """Return a power of two of images (3, height, width) for `module` to compute at once.

    Args:
        module: From images (B, 3, H, W) in [0, 1]; called once, with one image.
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        device: Where the module is.
        graph: Whether gradients are taken, so that what every layer puts out is kept, and its gradient beside it.
    """
    put_out: dict[nn.Module, int] = {}

    def note(layer: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            put_out[layer] = output.nbytes

    hooks = [m.register_forward_hook(note) for m in module.modules() if not list(m.children())]
    try:
        module(torch.zeros(1, 3, height, width, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    each = sum(put_out.values()) * (2 if graph else 1) + 3 * height * width * 4
    busy = A_GPU if device.type != "cpu" else max(16, A_THREAD * torch.get_num_threads())
    most = min(busy, int(_SHARE * free_memory(device) / each))
    return 1 << max(most.bit_length() - 1, 0)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return int(psutil.virtual_memory().available)
