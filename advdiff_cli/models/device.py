"""Devices and precisions, resolved once and named explicitly."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from threading import Event, get_ident
from typing import Literal, TypeVar

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from advdiff_cli.data.prefetch import ahead
from advdiff_cli.errors import AdvdiffError

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device of that name, `auto` being the best there is; AdvdiffError when it is missing.

    Processes that torchrun starts on one machine share its GPUs, each taking that of its LOCAL_RANK. On CUDA,
    convolutions are deterministic from then on, and fp32 is not rounded to TF32.
    """
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(k for k, there in have.items() if there)
    if not have[name]:
        raise AdvdiffError(f"--device {name}: torch sees no such device here; use --device auto or cpu")
    if name == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device(name, int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; `auto` is bf16 where the device multiplies it natively, else fp32."""
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise AdvdiffError("--precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and native else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which forwards run at `precision`."""
    return torch.autocast(device.type, _DTYPES[precision]) if precision in _DTYPES else nullcontext()


def layout(device: torch.device) -> torch.memory_format:
    """Return the layout in which a U-Net is fastest where it is called; its parameters, contiguous, fit either.

    On a CPU at reduced precision GroupNorm is several times slower in channels_last, and convolutions are no faster;
    everywhere else they are.
    """
    reduced_cpu = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return torch.contiguous_format if reduced_cpu else torch.channels_last


def onto(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on `device`; CUDA copies it from pinned memory while it computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def spread(
    prepare: Callable[[S], R], compute: Callable[[R], T], batches: Iterable[S], at_once: int
) -> Iterator[T]:  # fmt: skip
    """Yield compute(prepare(batch)) for each of `batches`, in their order.

    On a CPU, threads take a batch each through all layers: cores that compute one layer together wait for each other at
    its end, and for whatever else is done meanwhile. A batch has one core even where others are idle, since what layers
    compute in fp32 depends on the number that share them.

    Args:
        prepare: What a thread does ahead of the computation.
        compute: What is computed; it sets its own grad mode and precision, which belong to a thread.
        batches: Taken by the caller's thread.
        at_once: How many are computed side by side, at most; 0 leaves the computation to the caller's thread and to
            what it computes on, all cores or a GPU.
    """
    threads, stopped, workers = torch.get_num_threads(), Event(), set()
    if at_once < 2:
        torch.set_num_threads(at_once or threads)
        try:
            yield from map(compute, ahead(prepare, batches))
        finally:
            torch.set_num_threads(threads)
        return

    def task(batch: S) -> T:
        workers.add(get_ident())
        torch.set_num_threads(1)  # of this thread, and of those that are born later
        return compute(prepare(batch))

    def stop(*_: object) -> None:
        if stopped.is_set() and get_ident() in workers:  # the caller was interrupted, and waits for them
            raise InterruptedError

    hook = register_module_forward_pre_hook(stop)
    try:
        yield from ahead(task, batches, threads=at_once, depth=at_once + 1, leaving=stopped.set)
    finally:
        hook.remove()
        torch.set_num_threads(threads)
