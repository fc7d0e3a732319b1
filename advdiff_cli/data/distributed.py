"""The processes that torchrun or accelerate started together."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from advdiff_cli.errors import AdvdiffError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

NO_SHARD_UNDER_TORCHRUN = "--shard: under torchrun the shard is the process's rank; leave the option out"

_TIMEOUT = timedelta(days=7)  # one process may finish hours before another


@dataclass(frozen=True)
class ProcessGroup:
    """Process `rank` of `size` processes; the main process writes and prints for all of them."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        self.sum([0])

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Return the sum of each number over the processes."""
        if self.size == 1:
            return list(numbers)
        import torch
        from accelerate import PartialState

        total = torch.tensor(numbers, device=PartialState().device)
        torch.distributed.all_reduce(total)
        return [int(n) for n in total]

    def gather(self, rows: "NDArray[Any]") -> "list[NDArray[Any]]":
        """Return the rows of every process, by rank."""
        if self.size == 1:
            return [rows]
        from accelerate.utils import gather_object

        found: list[NDArray[Any]] = gather_object([rows])
        return found


def world_size() -> int:
    """Return the number of processes that were started together, from the environment alone."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_main_process() -> bool:
    """Return whether this process prints for all, from the environment alone."""
    return world_size() == 1 or os.environ["RANK"] == "0"


def _share_gpus(device: "torch.device") -> bool:
    """Return whether this machine has fewer GPUs than processes; false unless `device` is a GPU."""
    import torch

    return device.type == "cuda" and local_processes() > torch.cuda.device_count()


def local_processes() -> int:
    """Return the number of processes that were started together on this machine, from the environment alone.

    Launchers that do not set LOCAL_WORLD_SIZE are taken to start all processes on one machine.
    """
    count = world_size()
    return 1 if count == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", count))


def check_gpus(device: "torch.device") -> None:
    """Check that each process has a GPU of its own, as training needs.

    Raises:
        AdvdiffError: There are fewer GPUs than processes.
    """
    import torch

    if _share_gpus(device):
        gpus = torch.cuda.device_count()
        raise AdvdiffError(
            f"training needs a GPU for each process: {local_processes()} processes, {gpus} GPUs; start at most {gpus} "
            "on this machine"
        )


@contextmanager
def process_group(device: "torch.device") -> Iterator[ProcessGroup]:
    """Join the other processes, which compute on `device`, and leave them at the end."""
    if world_size() == 1:
        yield ProcessGroup()
        return
    from accelerate import PartialState

    backend = None
    if _share_gpus(device):
        backend = "gloo"  # NCCL refuses processes that share a GPU
    state = PartialState(cpu=device.type == "cpu", timeout=_TIMEOUT, backend=backend)
    try:
        yield ProcessGroup(state.process_index, state.num_processes)
    finally:  # an open process group would abort the process at exit
        state.destroy_process_group()
        PartialState._reset_state()
