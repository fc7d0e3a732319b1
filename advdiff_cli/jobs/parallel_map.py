"""Compute batches in parallel on a CPU, one core each; elsewhere one after another, reading the next one meanwhile."""

from collections.abc import Callable, Iterable, Iterator
from threading import Event, get_ident
from typing import TypeVar

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from advdiff_cli.data.prefetch import prefetch

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")


def parallel_map(
    prepare: Callable[[S], R], compute: Callable[[R], T], batches: Iterable[S], workers: int, *, depth: int = 1
) -> Iterator[T]:
    """Yield compute(prepare(batch)) for each batch, in order.

    Threads take one batch each through all layers, because cores that share a layer wait for each other at its end. A
    batch uses one core even where others are idle, because the results of some layers in fp32 depend on the number of
    cores that share them.

    Args:
        prepare: Reads a batch in a thread.
        compute: Computes it. It must set its own grad mode and precision, which belong to a thread.
        batches: Consumed in the caller's thread.
        workers: Number of batches computed at the same time; 0 computes them in the caller's thread, on all cores or
            on a GPU.
        depth: Number of batches begun for each worker's one, if some take much longer than others.
    """
    threads, stopped, worker_threads = torch.get_num_threads(), Event(), set()
    if workers < 2:
        torch.set_num_threads(workers or threads)
        try:
            yield from map(compute, prefetch(prepare, batches))
        finally:
            torch.set_num_threads(threads)
        return

    def task(batch: S) -> T:
        worker_threads.add(get_ident())
        torch.set_num_threads(1)  # of this thread and of threads created later
        return compute(prepare(batch))

    def stop(*_: object) -> None:
        if stopped.is_set() and get_ident() in worker_threads:  # the caller was interrupted and joins them
            raise InterruptedError

    hook = register_module_forward_pre_hook(stop)
    try:
        yield from prefetch(task, batches, threads=workers, depth=workers * depth + 1, on_exit=stopped.set)
    finally:
        hook.remove()
        torch.set_num_threads(threads)
