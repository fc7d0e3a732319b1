"""Devices, precisions, memory layouts and free memory."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import psutil
import torch

from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.precision import Precision, PrecisionName

DeviceName = Literal["auto", "cpu", "cuda", "mps"]

_CGROUP = Path("/sys/fs/cgroup")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: DeviceName) -> torch.device:
    """Return the device called `name`; `auto` is the best available one.

    Processes that torchrun starts on one machine use one GPU each, chosen by LOCAL_RANK, or share them if there are
    fewer. On CUDA this makes convolutions and attention deterministic and turns TF32 off.

    Raises:
        AdvdiffError: The device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k, usable in available.items() if usable) if name == "auto" else name
    if not available[kind]:
        raise AdvdiffError(f"--device {kind}: torch finds no such device; use --device auto or cpu")
    if kind == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
        for enable in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
            getattr(torch.backends.cuda, enable)(False)  # their gradients depend on the order of additions
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device(kind, int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device(kind)


def resolve_precision(name: PrecisionName, device: torch.device) -> Precision:
    """Return fp32, bf16 or fp16; `auto` is bf16 where the device computes it natively, and fp32 elsewhere.

    Raises:
        AdvdiffError: The device does not support the precision.
    """
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise AdvdiffError("--precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and native else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which modules compute at `precision`."""
    return torch.autocast(device.type, _DTYPES[precision]) if precision in _DTYPES else nullcontext()


def memory_layout(device: torch.device) -> torch.memory_format:
    """Return the memory format in which a U-Net is fastest in the current autocast context.

    On a CPU at reduced precision GroupNorm is several times slower in channels_last, and convolutions are no faster.
    Everywhere else channels_last is faster. The parameters stay contiguous, which suits both.
    """
    reduced_cpu = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return torch.contiguous_format if reduced_cpu else torch.channels_last


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on `device`; for CUDA it is copied from pinned memory, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def free_memory(device: torch.device) -> int:
    """Return the free bytes on `device`, within the limits of the process's control group.

    Files that the group's kernel keeps in memory and can drop count as free, as in the machine's own figure.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit == "max":
            return free
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return min(free, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return free
