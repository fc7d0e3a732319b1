"""Time workloads in turns, so that other load on the machine affects all of them alike."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from advdiff_cli.data.provenance import JsonObject


@dataclass(frozen=True)
class Workload:
    """A task on a number of patches.

    Args:
        name: Of the workload.
        run: The task.
        patches: Patches that one run computes.
        flops: Floating-point operations for each patch; 0 if not counted.
        unet_evaluations: U-Net evaluations for each patch.
    """

    name: str
    run: Callable[[], object]
    patches: int = 1
    flops: int = 0
    unet_evaluations: int = 0


@dataclass
class Timing:
    """Measurements of a workload.

    Args:
        workload: What was measured.
        seconds: Of each round.
        processor_seconds: Of each round, summed over threads; waiting for a disk does not count.
        memory: The most bytes that the workload added to the process.
        warm_up: Seconds of the first, uncounted round, including compilation.
    """

    workload: Workload
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    memory: int = 0
    warm_up: float = 0.0

    @property
    def patch_seconds(self) -> float:
        """The median seconds for each patch."""
        return median(self.seconds) / self.workload.patches

    @property
    def patch_processor_seconds(self) -> float:
        """The median processor seconds for each patch."""
        return median(self.processor_seconds) / self.workload.patches

    @property
    def flops_per_second(self) -> float:
        """The floating-point operations per second."""
        return self.workload.flops / self.patch_seconds

    def as_dict(self) -> JsonObject:
        """Return the measurements: seconds for each patch, processor seconds, rate, FLOP/s, memory."""
        w, each = self.workload, sorted(s / self.workload.patches for s in self.seconds)
        return {
            "name": w.name,
            "patches": w.patches,
            "rounds": len(each),
            "unet_evaluations": w.unet_evaluations,
            "seconds": {"median": self.patch_seconds, "least": each[0], "most": each[-1]},
            "processor_seconds": self.patch_processor_seconds,
            "warm_up_seconds": self.warm_up,
            "patches_per_second": 1 / self.patch_seconds,
            "flop_per_patch": w.flops,
            "flops_per_second": self.flops_per_second,
            "peak_memory": self.memory,
        }


def count_flops(task: Callable[[], object]) -> int:
    """Return the floating-point operations of a call; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        task()
    return int(counter.get_total_flops())


def measure(
    workloads: Sequence[Workload], rounds: int, device: torch.device, advance: Callable[[], None]
) -> dict[str, Timing]:
    """Run every workload once in each round, after one round to warm up; `advance` is called after each round."""
    timings = {w.name: Timing(w) for w in workloads}
    for turn in range(rounds + 1):
        for timing in timings.values():
            before = _reset_peak_memory(device)
            started, busy = time.perf_counter(), time.process_time()
            timing.workload.run()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if turn:
                timing.seconds.append(time.perf_counter() - started)
                timing.processor_seconds.append(time.process_time() - busy)
            else:
                timing.warm_up = time.perf_counter() - started
            timing.memory = max(timing.memory, _peak_memory(device) - before)
        advance()
    return timings


def ratios(found: Mapping[str, Timing], pairs: Mapping[str, tuple[str, str]]) -> dict[str, float]:
    """Return how many times faster the first workload of each pair is than the second, where both were measured."""
    return {
        label: found[slow].patch_seconds / found[fast].patch_seconds
        for label, (fast, slow) in pairs.items()
        if fast in found and slow in found
    }


def _reset_peak_memory(device: torch.device) -> int:
    """Reset the peak that `_peak_memory` returns, if the system can, and return the current one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0
